"""Files that are never half-written, and whether one has changed. No torch."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write under another name, then rename: nothing half-written stands under the file's name. Makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # two commands may write it at once
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def nearest_existing(path: Path) -> Path:
    """The path, or the nearest of its parents that is there; where that is no folder, nothing can be written below."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def stamp(path: Path) -> tuple[int, int]:
    """What changes with a file's content, though nothing is read: its size in bytes and the time in ns of its change.

    Raises:
        OSError: there is none.
    """
    found = path.stat()
    return found.st_size, found.st_mtime_ns
