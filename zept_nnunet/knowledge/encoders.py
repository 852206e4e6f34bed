"""Text encoders: a description in, a vector of fixed width out.

The only encoder here is a *placeholder*. It is deterministic and needs no weights, but it knows no medicine: two
descriptions are close when they share words, and only then.
"""

from __future__ import annotations

import hashlib
import re
from typing import Protocol

import numpy as np


class TextEncoder(Protocol):
    """Anything that turns texts into vectors. `name` and `revision` are written into the plans."""

    name: str
    revision: str
    width: int

    def encode(self, texts: list[str]) -> np.ndarray:
        """Return float32 vectors of unit length, shape (len(texts), width)."""
        ...


class PlaceholderEncoder:
    """Bag of hashed words: each word is a fixed pseudo-random direction, a text the normalized sum of its words."""

    name = "placeholder-hashed-words"
    revision = "1"
    width = 384

    def encode(self, texts: list[str]) -> np.ndarray:
        """Return float32 vectors of unit length, shape (len(texts), 384).

        Raises:
            ValueError: a text holds no word.
        """
        return np.stack([self._encode_one(text) for text in texts]).astype(np.float32)

    def _encode_one(self, text: str) -> np.ndarray:
        words = re.findall(r"[a-z0-9]+", text.lower())
        if not words:
            raise ValueError(f"a description needs at least one word, got {text!r}")
        total = np.sum([self._direction(word) for word in words], axis=0)
        return total / np.linalg.norm(total)

    def _direction(self, word: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
        return np.random.default_rng(seed).standard_normal(self.width)


def describe(name: str, hosts: tuple[str, ...] = ()) -> str:
    """The text that stands for a class which brings no description of its own: its name and, for a tumor, its hosts."""
    words = name.replace("_", " ").replace("-", " ")
    return f"{words} in {' and '.join(h.replace('_', ' ') for h in hosts)}" if hosts else words
