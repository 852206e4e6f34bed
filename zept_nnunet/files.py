"""Files that are never half-written, and whether one has changed. No torch."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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


@contextmanager
def new_files(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A scratch folder, whose files take their places in `folder` at the end; after an error that is as it was.

    Args:
        names: of all files that may be written; where one is not, an old one of that name is removed. Others stay.
    """
    folder = folder.absolute()
    with new_parents(folder):
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".zept_partial_", dir=folder))
        try:
            with written_as(folder, scratch):
                yield scratch
                for name in names:
                    if (scratch / name).is_file():
                        (scratch / name).replace(folder / name)
                    else:
                        (folder / name).unlink(missing_ok=True)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def new_parents(folder: Path) -> Iterator[None]:
    """After an error the folder and its parents are removed again, those that were not there before and are empty."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for made in missing:
                if made.exists():
                    made.rmdir()
        raise


@contextmanager
def written_as(target: Path, scratch: Path) -> Iterator[None]:
    """An error of the system names the file below `target` that could not be written, not a scratch or source file."""
    try:
        yield
    except OSError as error:
        name = str(error.filename2 or error.filename or target)
        error.filename, error.filename2 = name.replace(str(scratch), str(target)), None
        raise


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
