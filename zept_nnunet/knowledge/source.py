"""Where a class's vector comes from: a file of vectors, and an encoder for the texts that it lacks."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from importlib import resources
from pathlib import Path

import numpy as np

from zept_nnunet.errors import ZePTError
from zept_nnunet.knowledge.encoders import INSTALL, EnglishEncoder, TextEncoder, check_text
from zept_nnunet.knowledge.texts import Description, refuse_twin
from zept_nnunet.knowledge.vectors import VectorFile, read_vectors
from zept_nnunet.names import name_key

_SAME = 1e-4  # plans hold vectors with six decimals
_SHOWN = 200  # characters of a text in a message


class KnowledgeSource:
    """Vectors by text from a file; texts that it lacks go to the encoder, if it is the one that made the file.

    An encoder is known by `revision`, a checksum of what it computes with, and `width`; its name is for reading.
    """

    def __init__(self, file: VectorFile | None = None, encoder: Callable[[], TextEncoder] | None = None):
        """One of both is enough. `encoder` is called once, when it is needed; it may raise ZePTError."""
        assert file is not None or encoder is not None
        self.file, self._make_encoder = file, encoder
        made_by = file if file is not None else self._encoder
        self.name = made_by.encoder if isinstance(made_by, VectorFile) else made_by.name
        self.revision, self.width = made_by.revision, made_by.width

    @cached_property
    def _encoder(self) -> TextEncoder:
        assert self._make_encoder is not None
        return self._make_encoder()

    def is_that_of(self, revision: str, width: int, vectors: Mapping[str, Sequence[float]]) -> bool:
        """Whether a model's vectors (by class name) are by this encoder.

        A file that a user made names no encoder; it is the model's where the vectors of the model's classes in it are.
        """
        if self.file is None or not self.file.is_own:
            return (self.revision, self.width) == (revision, width)
        found = {n: self.file.by_name.get(name_key(n)) for n in vectors}
        shared = [(v, vectors[n]) for n, v in found.items() if v is not None and len(vectors[n]) == len(v)]
        return bool(shared) and all(np.abs(a - np.asarray(b)).max() < _SAME for a, b in shared)

    def reads_text(self, name: str, description: Description) -> bool:
        """Whether a class's vector is that of its text, and not one that the user brought by the class's name."""
        file = self.file
        return file is None or not file.holds_name(name, description.text, description.is_own)

    def refuse_twins(
        self,
        vectors: Mapping[str, Sequence[float] | np.ndarray],
        hosts: Mapping[str, Collection[str] | None],
        descriptions: Mapping[str, Description],
    ) -> None:
        """Raise where a class of this source has the vector of a class of the same place that stands before it.

        Args:
            vectors: by class name.
            hosts: of each class, in order; None of an organ, which no other class may be like.
            descriptions: of the classes to look at.

        Raises:
            ZePTError: names the first two that nothing would tell apart.
        """
        found = {name: np.asarray(vectors[name], dtype=np.float64) for name in hosts}
        for name, description in descriptions.items():
            here = hosts[name]
            file = None if self.file is None or self.reads_text(name, description) else self.file.path
            for other, place in hosts.items():
                if other == name:
                    break
                is_same_place = here is None or place is None or set(here) == set(place)
                if is_same_place and np.abs(found[other] - found[name]).max() < _SAME:
                    refuse_twin(name, other, description, file)

    def vectors(self, descriptions: Mapping[str, Description]) -> dict[str, np.ndarray]:
        """Per class name, its vector of unit length.

        Raises:
            ZePTError: a class has no vector and its text cannot be encoded; the message says what to do. A text of the
                user's that no encoder would take is refused for that, whether or not there is an encoder.
        """
        found: dict[str, np.ndarray] = {}
        for name, d in descriptions.items():
            vector = self.file.find(name, d.text, d.is_own) if self.file is not None else None
            if vector is not None:
                found[name] = vector
        missing = {name: d for name, d in descriptions.items() if name not in found}
        if missing:
            is_english = self.revision == built_in().revision
            for name, description in missing.items():
                if description.is_own:
                    with said_of(f"the description of {name!r}"):
                        check_text(description.text, is_english, by_word=True)
            encoder = self._checked_encoder(missing)
            for name, description in missing.items():
                with said_of(f"the description of {name!r}"):
                    found[name] = encode(encoder, description)
        return {name: found[name] for name in descriptions}

    def _checked_encoder(self, missing: Mapping[str, Description]) -> TextEncoder:
        own = [name for name, d in missing.items() if d.is_own]
        edited = [f"{name!r} ({d.entry!r})" for name, d in missing.items() if d.entry is not None]
        what = f"no vector for the text of {[*missing]}" + (f" (described by you: {own})" if own else "")
        texts = " ".join(f"--text {shlex.quote(_shortened(d.text))}" for d in missing.values())
        if self._make_encoder is None:
            assert self.file is not None
            if self.file.is_own:
                remedy = f"add a tensor of each of these names to it, of {self.width} numbers" + (
                    ", and take its description out of zept.knowledge" if own else ""
                )
            else:
                remedy = (
                    f"encode them by {self.name} (its name on the Hugging Face hub or its folder): zept knowledge "
                    f"encode --encoder ENCODER {texts} -o FILE, and name that FILE; or zept add-tumor --encoder ENCODER"
                )
            raise ZePTError(f"{self.file.path}: {what}; {remedy}")
        try:
            encoder = self._encoder
        except ZePTError as error:
            if edited:
                raise ZePTError(
                    f"{what}: the package's description of {', '.join(edited)} was edited after its vector was made, "
                    f"and {error}. Then encode again: zept knowledge encode -o {shlex.quote(str(built_in_path()))}. Or "
                    "restore the descriptions"
                ) from error
            raise ZePTError(
                f"{what}: it is no built-in description, and {error}. Or bring vectors of your own (docs/knowledge.md)"
            ) from error
        if (encoder.revision, encoder.width) != (self.revision, self.width):
            raise ZePTError(
                f"{what}, and the installed encoder is another one: {encoder.name} (revision {encoder.revision}, width "
                f"{encoder.width}); wanted {self.name} (revision {self.revision}, width {self.width}). {INSTALL}"
            )
        return encoder


def encode(encoder: TextEncoder, description: Description) -> np.ndarray:
    """The vector of one description. What was made from a class's name may hold words of no language.

    Raises:
        ZePTError: the encoder cannot read the text.
    """
    if isinstance(encoder, EnglishEncoder) and not description.is_own:
        return encoder.encode_names([description.text])[0]
    return encoder.encode([description.text])[0]


@contextmanager
def said_of(what: str) -> Iterator[None]:
    """An error says what it is about."""
    try:
        yield
    except ZePTError as error:
        raise ZePTError(f"{what}: {error}") from error


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def built_in_path() -> Path:
    """The vectors that come with the package."""
    return Path(str(resources.files("zept_nnunet.knowledge") / "vectors.safetensors"))


@cache
def built_in() -> KnowledgeSource:
    """The package's vectors, and its sentence encoder where that is installed."""
    return KnowledgeSource(read_vectors(built_in_path()), english_encoder)


@cache
def english_encoder() -> TextEncoder:
    """The sentence encoder, loaded once.

    Raises:
        ZePTError: it is not installed.
    """
    return EnglishEncoder()
