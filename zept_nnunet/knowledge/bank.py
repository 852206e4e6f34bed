"""The knowledge vectors of a model, as they stand in its plans."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from zept_nnunet.errors import ZePTError
from zept_nnunet.knowledge.encoders import PlaceholderEncoder, TextEncoder, describe
from zept_nnunet.names import normalize_name
from zept_nnunet.taxonomy import Taxonomy

_DECIMALS = 6  # plain JSON, the same number on every machine


class QuietVector(list):
    """A list of floats that prints as its length: nnU-Net writes the plans into console, log and debug.json."""

    def __repr__(self) -> str:
        return f"<vector of {len(self)}>"

    __str__ = __repr__


@dataclass(frozen=True)
class KnowledgeBank:
    """Encoder's identity and one vector per class name."""

    encoder: str
    revision: str
    width: int
    vectors: Mapping[str, list[float]]

    @classmethod
    def build(
        cls,
        taxonomy: Taxonomy,
        descriptions: Mapping[str, str] | None = None,
        encoder: TextEncoder | None = None,
    ) -> KnowledgeBank:
        """Encode every class of `taxonomy`; `descriptions` (by class name) replace the generated texts.

        Raises:
            ZePTError: a description names a class that the taxonomy does not hold, or is empty.
        """
        encoder = encoder if encoder is not None else PlaceholderEncoder()
        given = {normalize_name(name): text for name, text in (descriptions or {}).items()}
        texts: dict[str, str] = {}
        for organ in taxonomy.organs:
            texts[organ.name] = given.pop(normalize_name(organ.name), describe(organ.name))
        for tumor in taxonomy.tumors:
            texts[tumor.name] = given.pop(normalize_name(tumor.name), describe(tumor.name, tumor.hosts))
        if given:
            raise ZePTError(
                f"zept.knowledge describes classes that are no labels: {sorted(given)}; labels: {list(texts)}"
            )
        empty = [name for name, text in texts.items() if not text.strip()]
        if empty:
            raise ZePTError(
                f"zept.knowledge: the description of {empty} is empty; write a sentence or remove the entry"
            )
        vectors = encoder.encode(list(texts.values()))
        return cls(
            encoder.name,
            encoder.revision,
            encoder.width,
            {name: _quiet(vector) for name, vector in zip(texts, vectors, strict=True)},
        )

    def matrix(self, names: Iterable[str]) -> np.ndarray:
        """The vectors of `names`, float32, shape (len(names), width).

        Raises:
            ZePTError: a class has no vector.
        """
        names = list(names)
        missing = [name for name in names if name not in self.vectors]
        if missing:
            raise ZePTError(f"no knowledge vector for {missing}; the plans hold vectors for {list(self.vectors)}")
        return np.array([self.vectors[name] for name in names], dtype=np.float32).reshape(len(names), self.width)

    def with_class(self, name: str, text: str, encoder: TextEncoder | None = None) -> KnowledgeBank:
        """A bank that also holds `name`, encoded by the encoder that made the others.

        Raises:
            ZePTError: the encoder is not the one of this bank.
        """
        encoder = encoder if encoder is not None else PlaceholderEncoder()
        if (encoder.name, encoder.revision, encoder.width) != (self.encoder, self.revision, self.width):
            raise ZePTError(
                f"the model's vectors were made by {self.encoder} (revision {self.revision}, width {self.width}); "
                f"got {encoder.name} (revision {encoder.revision}, width {encoder.width}). Use the model's encoder"
            )
        return KnowledgeBank(
            self.encoder, self.revision, self.width, {**self.vectors, name: _quiet(encoder.encode([text])[0])}
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON (the vectors print as their length)."""
        return {
            "encoder": self.encoder,
            "revision": self.revision,
            "width": self.width,
            "vectors": {name: QuietVector(vector) for name, vector in self.vectors.items()},
        }

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> KnowledgeBank:
        """Inverse of `to_dict`.

        Raises:
            ZePTError: a vector has another width than the bank.
        """
        width = int(d["width"])
        wrong = [name for name, vector in d["vectors"].items() if len(vector) != width]
        if wrong:
            raise ZePTError(f"knowledge vectors of {wrong} do not have width {width}; make the plans again")
        return cls(
            d["encoder"],
            str(d["revision"]),
            width,
            {name: QuietVector(vector) for name, vector in d["vectors"].items()},
        )


def _quiet(vector: np.ndarray) -> QuietVector:
    return QuietVector(round(float(x), _DECIMALS) for x in vector)
