"""The knowledge vectors of a model, as they stand in its plans."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from zept_nnunet.errors import ZePTError
from zept_nnunet.knowledge.source import KnowledgeSource
from zept_nnunet.knowledge.texts import Description
from zept_nnunet.knowledge.vectors import text_key

_DECIMALS = 6  # plain JSON, the same number on every machine


class QuietVector(list):
    """A list of floats that prints as its length: nnU-Net writes the plans into console, log and debug.json."""

    def __repr__(self) -> str:
        return f"<vector of {len(self)}>"

    __str__ = __repr__


@dataclass(frozen=True)
class PlannedText:
    """What a vector was made from: the origin of a description, and its text's key."""

    origin: str
    key: str


@dataclass(frozen=True)
class KnowledgeBank:
    """Encoder's identity, one vector per class name, and which text each vector was made from.

    `texts`: class name → origin and key of its text. Classes of plans by an earlier version may be missing there, and
    so are those whose vector the user brought by the class's name.
    """

    encoder: str
    revision: str
    width: int
    vectors: Mapping[str, list[float]]
    texts: Mapping[str, PlannedText] = field(default_factory=dict)

    @classmethod
    def build(cls, descriptions: Mapping[str, Description], source: KnowledgeSource) -> KnowledgeBank:
        """The vectors of some classes, by class name.

        Raises:
            ZePTError: a class has no vector and its text cannot be encoded.
        """
        empty = cls(source.name, source.revision, source.width, {})
        return empty.with_classes(descriptions, source)

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

    def with_classes(self, descriptions: Mapping[str, Description], source: KnowledgeSource) -> KnowledgeBank:
        """A bank that also holds these classes, their vectors from the encoder that made the others.

        Raises:
            ZePTError: the source's encoder is not the one of this bank, or a text cannot be encoded.
        """
        if self.vectors and not source.is_that_of(self.revision, self.width, self.vectors):
            raise ZePTError(
                f"the model's vectors were made by {self.encoder} (revision {self.revision}, width {self.width}); "
                f"got {source.name} (revision {source.revision}, width {source.width}). Use the model's encoder, or "
                "a file that holds the vectors of the model's classes too"
            )
        found = {name: _quiet(vector) for name, vector in source.vectors(descriptions).items()}
        texts = {
            name: PlannedText(d.origin, text_key(d.text))
            for name, d in descriptions.items()
            if source.reads_text(name, d)
        }
        return replace(self, vectors={**self.vectors, **found}, texts={**self.texts, **texts})

    def without(self, names: Collection[str]) -> KnowledgeBank:
        """A bank that lacks these classes."""
        vectors = {name: v for name, v in self.vectors.items() if name not in names}
        return replace(self, vectors=vectors, texts={n: t for n, t in self.texts.items() if n not in names})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON (the vectors print as their length)."""
        return {
            "encoder": self.encoder,
            "revision": self.revision,
            "width": self.width,
            "texts": {name: {"origin": text.origin, "key": text.key} for name, text in self.texts.items()},
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
            planned_texts(d),
        )


def planned_texts(knowledge: Mapping[str, Any]) -> dict[str, PlannedText]:
    """`texts` of a bank as the plans hold it; of plans by an earlier version, the texts that the user chose."""
    old = {name: PlannedText("own", key) for name, key in knowledge.get("own_texts", {}).items()}
    return old | {name: PlannedText(t["origin"], t["key"]) for name, t in knowledge.get("texts", {}).items()}


def _quiet(vector: np.ndarray) -> QuietVector:
    return QuietVector(round(float(x), _DECIMALS) for x in vector)
