"""Files of knowledge vectors: safetensors, one tensor a description or class, with the encoder's name and a checksum.

A tensor's key is `text:` and the SHA-256 of the text that it encodes, so that an edited description is never matched to
the vector of the old one; or, in files that users bring, simply the name of a class.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from zept_nnunet.errors import ZePTError
from zept_nnunet.names import name_key

_BY_TEXT = "text:"


def text_key(text: str) -> str:
    """The key of a text's vector. White space at the ends and its amount between words do not count."""
    return _BY_TEXT + hashlib.sha256(" ".join(text.split()).encode(errors="surrogatepass")).hexdigest()


@dataclass(frozen=True)
class VectorFile:
    """What a file holds: unit vectors of one width by text and by class name, and who made them."""

    path: str
    encoder: str
    revision: str
    width: int
    by_text: Mapping[str, np.ndarray]
    by_name: Mapping[tuple[str, ...], np.ndarray]

    @property
    def is_own(self) -> bool:
        """Whether the user made it, with a tensor per class."""
        return bool(self.by_name) and not self.by_text

    def find(self, name: str, text: str, is_own_text: bool) -> np.ndarray | None:
        """The vector of a class; None where the file has none of this text.

        Args:
            is_own_text: the user described the class. Then a vector by name is none of that text.
        """
        if self.holds_name(name, text, is_own_text):
            return self.by_name[name_key(name)]
        return self.by_text.get(text_key(text))

    def holds_name(self, name: str, text: str, is_own_text: bool) -> bool:
        """Whether `find` gives a vector that the user brought by the class's name, whatever its text."""
        return text_key(text) not in self.by_text and not is_own_text and name_key(name) in self.by_name


def write_vectors(path: Path, encoder: str, revision: str, texts: list[str], vectors: np.ndarray) -> None:
    """Write the vectors of `texts`, shape (len(texts), width); the file appears whole or not at all."""
    tensors = {text_key(t): np.ascontiguousarray(v, dtype=np.float32) for t, v in zip(texts, vectors, strict=True)}
    metadata = {"encoder": encoder, "revision": revision}
    metadata["sha256"] = _checksum(tensors, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        try:
            save_file(tensors, scratch, metadata)
        except SafetensorError as error:
            raise ZePTError(f"cannot write {path}: {error}; free some space or give another folder") from error
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def read_vectors(path: Path) -> VectorFile:
    """Read a file that `zept knowledge encode` or a user made.

    Raises:
        ZePTError: it is missing or no safetensors file, its checksum does not fit, two vectors differ in width, or one
            is not finite or all zeros.
    """
    remedy = "make it again with `zept knowledge encode`"
    if not path.is_file():
        raise ZePTError(f"no file of knowledge vectors at {path}; give one that `zept knowledge encode` wrote")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            given = {key: np.asarray(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
        with np.errstate(over="ignore"):  # for the checksum only: what is used is of unit length
            tensors = {key: v.astype(np.float32) for key, v in given.items()}
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ZePTError(f"{path} is no readable safetensors file ({error}); {remedy}") from error
    if "sha256" in metadata and metadata["sha256"] != _checksum(tensors, metadata):
        raise ZePTError(
            f"{path} is damaged, or an earlier version wrote it: its vectors, encoder and revision do not have the "
            f"checksum in its header; {remedy}"
        )
    shapes = {v.shape for v in tensors.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise ZePTError(f"{path}: wanted one vector of the same width a class, found shapes {sorted(shapes)}; {remedy}")
    unit = {key: _unit(v) for key, v in given.items()}
    wrong = [key for key, v in unit.items() if not v.size or not np.isfinite(v).all()]
    if wrong:
        raise ZePTError(f"{path}: the vectors of {wrong[:5]} are not finite or all zeros; {remedy}")
    named = [key for key in tensors if not key.startswith(_BY_TEXT)]
    keys = [name_key(key) for key in named]
    twice = sorted(name for name, key in zip(named, keys, strict=True) if keys.count(key) > 1)
    if twice:
        raise ZePTError(f"{path}: {twice} are spellings of one class; keep one of them")
    return VectorFile(
        str(path),
        metadata.get("encoder", path.stem),
        metadata.get("revision", _checksum(tensors, {})[:16]),
        next(iter(shapes))[0],
        {key: v for key, v in unit.items() if key.startswith(_BY_TEXT)},
        {name_key(key): v for key, v in unit.items() if not key.startswith(_BY_TEXT)},
    )


def _unit(vector: np.ndarray) -> np.ndarray:
    """The vector (E) at unit length, float32; NaN where it has no direction: all zeros, or something is not finite."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        single, double = vector.astype(np.float32), vector.astype(np.float64)
        norm = np.linalg.norm(single)
        if 1e-15 < norm < 1e15:  # the squares fit, and plans keep the decimals that they have always had
            return np.asarray(single / norm)
        scaled = double / np.abs(double).max(initial=0.0)
        return np.asarray(scaled / np.linalg.norm(scaled), dtype=np.float32)


def _checksum(tensors: Mapping[str, np.ndarray], header: Mapping[str, str]) -> str:
    """SHA-256 of the tensors, and of the encoder's name and revision where the header has them."""
    digest = hashlib.sha256()
    for key in ("encoder", "revision"):
        if key in header:
            digest.update(f"{key}={header[key]}\0".encode())
    for key in sorted(tensors):
        digest.update(key.encode() + tensors[key].tobytes())
    return digest.hexdigest()
