"""Where a class's vector comes from: a file of vectors, and an encoder for the texts that it lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np

from zept_nnunet.errors import ZePTError
from zept_nnunet.knowledge.encoders import INSTALL, EnglishEncoder, TextEncoder
from zept_nnunet.knowledge.texts import Description
from zept_nnunet.knowledge.vectors import VectorFile, read_vectors


class KnowledgeSource:
    """Vectors by text from a file; texts that it lacks go to the encoder, if it is the one that made the file."""

    def __init__(self, file: VectorFile | None = None, encoder: Callable[[], TextEncoder] | None = None):
        """One of both is enough. `encoder` is called when a text is missing; it may raise ZePTError."""
        assert file is not None or encoder is not None
        self.file, self._make_encoder = file, encoder
        made_by = file if file is not None else encoder() if encoder is not None else None
        assert made_by is not None
        self.name = made_by.encoder if isinstance(made_by, VectorFile) else made_by.name
        self.revision, self.width = made_by.revision, made_by.width

    def vectors(self, descriptions: Mapping[str, Description]) -> dict[str, np.ndarray]:
        """Per class name, its vector of unit length.

        Raises:
            ZePTError: a class has no vector and its text cannot be encoded; the message says what to do.
        """
        found: dict[str, np.ndarray] = {}
        for name, d in descriptions.items():
            vector = self.file.find(name, d.text, d.is_own) if self.file is not None else None
            if vector is not None:
                found[name] = vector
        missing = [name for name in descriptions if name not in found]
        if missing:
            encoder = self._encoder(missing, descriptions)
            for name in missing:
                try:
                    found[name] = encoder.encode([descriptions[name].text])[0]
                except ZePTError as error:
                    raise ZePTError(f"the description of {name!r}: {error}") from error
        return {name: found[name] for name in descriptions}

    def _encoder(self, missing: list[str], descriptions: Mapping[str, Description]) -> TextEncoder:
        own = [name for name in missing if descriptions[name].is_own]
        what = f"no vector for the text of {missing}" + (f" (described by you: {own})" if own else "")
        if self._make_encoder is None:
            raise ZePTError(
                f"{self.file.path if self.file else ''}: {what}. Encode it with the encoder that made this file: "
                f"zept knowledge encode --encoder {self.name} -d DATASET_ID -o FILE"
            )
        try:
            encoder = self._make_encoder()
        except ZePTError as error:
            raise ZePTError(
                f"{what}: it is no built-in description, and {error}. Or bring vectors of your own: "
                "zept knowledge encode --help"
            ) from error
        if (encoder.name, encoder.revision, encoder.width) != (self.name, self.revision, self.width):
            raise ZePTError(
                f"{what}, and the installed encoder is another one: {encoder.name} (revision {encoder.revision}, width "
                f"{encoder.width}); wanted {self.name} (revision {self.revision}, width {self.width}). {INSTALL}"
            )
        return encoder


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
