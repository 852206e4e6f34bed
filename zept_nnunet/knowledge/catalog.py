"""The descriptions that come with the package: `descriptions/*.yaml`, to be read and edited by radiologists. No torch.

A class is found by its name: the words of an entry's name or of one of its synonyms, in any order and case, singular or
plural, "l" and "r" for the sides. A tumor that a dataset calls "cancer" or "tumor" is found by its host organ.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

from zept_nnunet.errors import ZePTError
from zept_nnunet.names import (
    host_words,
    infer_is_tumor,
    is_generic_tumor,
    key_without_number,
    kind_of_tumor,
    name_key,
    part_before_and,
)

SECTIONS = ("location", "shape", "structure", "ct", "healthy", "mimics")


@dataclass(frozen=True)
class Entry:
    """One described structure or tumor. `hosts` of a tumor are names of organs; of an organ there are none."""

    name: str
    kind: str  # "organ" or "tumor"
    sections: Mapping[str, str]
    hosts: tuple[str, ...] = ()
    synonyms: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()  # whole citations
    file: str = ""

    @property
    def text(self) -> str:
        """What is encoded: the name, then each section."""
        return " ".join([f"{self.name}.", *(self.sections[s] for s in SECTIONS if s in self.sections)])


class Catalog:
    """Entries by name and synonym."""

    def __init__(self, entries: Iterable[Entry]):
        """Index the entries.

        Raises:
            ZePTError: two entries share a name or a synonym; the message lists all that do.
        """
        self.entries: dict[str, Entry] = {}
        self._by_key: dict[tuple[str, ...], Entry] = {}
        collisions = []
        for entry in entries:
            self.entries.setdefault(entry.name, entry)
            for name in (entry.name, *entry.synonyms):
                if not name_key(name):
                    raise ZePTError(f"{entry.file}, {entry.name!r}: the name or synonym {name!r} holds no word")
                other = self._by_key.setdefault(name_key(name), entry)
                if other is not entry:
                    collisions.append(f"{name!r} ({other.name!r} and {entry.name!r})")
        if collisions:
            raise ZePTError(f"names that stand for more than one description: {', '.join(collisions)}; remove one each")

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    def __len__(self) -> int:
        return len(self.entries)

    def find(self, name: str, hosts: Sequence[str] = (), kind: str | None = None) -> Entry | None:
        """The entry that a class name stands for; None where nothing fits.

        Args:
            name: as a dataset writes it: "kidney_tumour", "Lung_Upper_Lobe_L", "cancer".
            hosts: of a tumor. They tell what "cancer" means: of ["liver"], the liver tumor.
            kind: "organ" or "tumor", where only such an entry will do. As an organ "kidney and tumor" is the kidney.
        """
        name = part_before_and(name) if kind == "organ" else name
        found = self._by_key.get(name_key(name))
        if found is None and infer_is_tumor(name) and kind != "organ":  # "right kidney tumor" → "kidney tumor"
            found = self._by_key.get(tuple(w for w in name_key(name) if w not in ("left", "right")))
        if found is None:  # "livertumor01"
            found = self._by_key.get(key_without_number(name))
        if found is not None:
            return found if kind in (None, found.kind) else None
        if kind == "organ" or not is_generic_tumor(name):
            return None
        candidates = {id(e): e for e in (self._of_host(name, host) for host in hosts) if e is not None}
        return next(iter(candidates.values())) if len(candidates) == 1 else None

    def _of_host(self, name: str, host: str) -> Entry | None:
        """ "cyst" in "right kidney" → "right kidney cyst", else "kidney cyst"; "nodule" → "… nodule", or "… tumor"."""
        organ = self.find(host, kind="organ")
        names = [host] + ([organ.name] if organ else [])
        names += [host_words(n) for n in names]
        kinds = [kind_of_tumor(name)] + ([] if kind_of_tumor(name) == "cyst" else ["tumor"])
        found = (self._by_key.get(name_key(f"{n} {kind}")) for kind in kinds for n in names)
        return next((e for e in found if e is not None and e.kind == "tumor"), None)

    def require(self, name: str, hosts: Sequence[str] = ()) -> Entry:
        """As `find`.

        Raises:
            ZePTError: nothing fits; the message names what looks like it.
        """
        entry = self.find(name, hosts)
        if entry is None:
            near = self.nearest(name)
            raise ZePTError(
                f"no built-in description of {name!r}"
                + (f"; did you mean {', '.join(map(repr, near))}?" if near else "")
                + " `zept knowledge list` shows all"
            )
        return entry

    def nearest(self, name: str, number: int = 3) -> list[str]:
        """Names that look like `name`, for an error message."""
        from difflib import get_close_matches

        known = {n: e.name for e in self for n in (e.name, *e.synonyms)}
        return list(dict.fromkeys(known[n] for n in get_close_matches(name.lower(), known, number, 0.5)))


def read_entries(path: Path) -> list[Entry]:
    """The entries of one file.

    Raises:
        ZePTError: it is no YAML, or not as `schema.json` wants it; the message names the entry.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except OSError as error:
        raise ZePTError(f"cannot read {path} ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ZePTError(f"{path} is no valid YAML: {error}") from error
    named = content.get("entries") if isinstance(content, dict) else None
    odd = [name for name in named if not isinstance(name, str)] if isinstance(named, dict) else []
    if odd:
        raise ZePTError(f"{path}: YAML reads the names {odd} as something else than text; put them in quotes")
    problems = sorted(Draft202012Validator(_schema()).iter_errors(content), key=lambda e: list(map(str, e.path)))
    if problems:
        where = [f"{' > '.join(map(str, e.path)) or 'the file'}: {e.message}" for e in problems[:10]]
        raise ZePTError(f"{path} is not as schema.json wants it:\n  " + "\n  ".join(where))
    sources = content.get("sources", {})
    entries = []
    for name, entry in content["entries"].items():
        missing = [key for key in entry.get("sources", ()) if key not in sources]
        if missing:
            raise ZePTError(f"{path}, {name!r}: cites {missing}, which 'sources' at the top of the file does not hold")
        entries.append(
            Entry(
                name,
                entry["kind"],
                {s: " ".join(entry[s].split()) for s in SECTIONS if s in entry},
                tuple(entry.get("hosts", ())),
                tuple(entry.get("synonyms", ())),
                tuple(sources[key] for key in entry.get("sources", ())),
                path.name,
            )
        )
    return entries


@cache
def catalog() -> Catalog:
    """Every description that comes with the package."""
    return read_catalog(sorted(descriptions_folder().glob("*.yaml")))


def read_catalog(paths: Iterable[Path]) -> Catalog:
    """The entries of several files, checked together.

    Raises:
        ZePTError: a file cannot be read, names collide, or a tumor's host is not described.
    """
    found = Catalog(entry for path in paths for entry in read_entries(path))
    for entry in found:
        unknown = [h for h in entry.hosts if (e := found.find(h)) is None or e.kind != "organ"]
        if unknown:
            raise ZePTError(f"{entry.file}, {entry.name!r}: its hosts {unknown} are no described organs")
    return found


def descriptions_folder() -> Path:
    """Where the package's YAML files stand."""
    return Path(str(resources.files("zept_nnunet.knowledge") / "descriptions"))


@cache
def _schema() -> dict[str, Any]:
    schema: dict[str, Any] = json.loads((resources.files("zept_nnunet.knowledge") / "schema.json").read_text("utf-8"))
    return schema


class _UniqueKeys(yaml.SafeLoader):
    """YAML where a key that stands twice is an error, not a silent loss."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(k) for k in keys if keys.count(k) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"stands there twice: {twice}", node.start_mark)
        return super().construct_mapping(node, deep)
