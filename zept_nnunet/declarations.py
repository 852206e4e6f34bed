"""The `zept` block of a dataset.json: what a dataset says about its classes, checked. No torch.

    "zept": {"tumors": {name: {"hosts": [...]}}, "organs": [names], "unseen": {name: {"hosts": [...], "label": int}},
             "knowledge": {name: text or {"like": name}}, "vectors": file, "annotated": {pattern: [names]},
             "dataset": name of a public dataset, whose label names are then read as it means them}

Every entry is optional. `hosts` may be empty: the whole body. Names are found whatever their case, `_` and `-`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from zept_nnunet.errors import ZePTError
from zept_nnunet.labels import RESERVED, LabelSet, read_labels
from zept_nnunet.names import infer_hosts, normalize_name

_BLOCK_KEYS = ("tumors", "organs", "unseen", "knowledge", "vectors", "annotated", "dataset")


@dataclass(frozen=True)
class Unseen:
    """A tumor of `zept.unseen`: no training label, added after training. Without `label`, the next free one."""

    name: str
    hosts: tuple[str, ...]
    label: int | None


def annotated_patterns(dataset_json: dict[str, Any], source: str = "dataset.json") -> dict[str, tuple[str, ...]]:
    """`zept.annotated`: pattern of case identifiers → names of the classes that such cases label.

    A region's name stands for the classes called after it, or else for every class in it. A tumor of `zept.unseen` may
    stand there too: test cases label it.

    Raises:
        ZePTError: a name is no class, or the entry is not of that form.
    """
    labels = read_labels(dataset_json, source)
    unseen = {normalize_name(name): name for name in _block(dataset_json, "unseen", source)}
    found: dict[str, tuple[str, ...]] = {}
    for pattern, names in _block(dataset_json, "annotated", source).items():
        where = f"{source}, zept.annotated[{pattern!r}]"
        classes: list[str] = []
        for name in _names(where, names):
            if normalize_name(name) in unseen:
                classes.append(unseen[normalize_name(name)])
                continue
            values = _require(name, labels, where)
            own = [v for v in values if normalize_name(labels.regions_of(v)[0]) == normalize_name(name)]
            classes += [labels.atoms[v] for v in own or values]
        found[pattern] = tuple(dict.fromkeys(classes))
    return found


def annotated_for(
    case_id: str, patterns: Mapping[str, Iterable[str]], source: str = "dataset.json"
) -> tuple[str, ...] | None:
    """The classes that a case labels; None means every class (no pattern matches).

    Raises:
        ZePTError: two patterns match the case and disagree.
    """
    matching = {p: tuple(names) for p, names in patterns.items() if fnmatchcase(case_id, p)}
    if len({frozenset(map(normalize_name, names)) for names in matching.values()}) > 1:
        raise ZePTError(
            f"{source}, zept.annotated: the patterns {sorted(matching)} all match case {case_id!r} and disagree; "
            "make them exclusive"
        )
    return next(iter(matching.values()), None)


def declared_vectors(dataset_json: Mapping[str, Any], source: str = "dataset.json") -> Path | None:
    """`zept.vectors`: the file of knowledge vectors to use instead of the package's.

    Raises:
        ZePTError: it is no absolute path (nnU-Net copies dataset.json about).
    """
    path = (dataset_json.get("zept") or {}).get("vectors")
    if path is not None and not (isinstance(path, str) and Path(path).is_absolute()):
        raise ZePTError(f"{source}: zept.vectors must be the absolute path of a file, found {path!r}")
    return None if path is None else Path(path)


def _block(dataset_json: Mapping[str, Any], key: str, source: str) -> dict[str, Any]:
    """One entry of the `zept` block, which must be a dictionary; empty where it is not given."""
    block = dataset_json.get("zept") or {}
    unknown = [k for k in block if k not in _BLOCK_KEYS] if isinstance(block, Mapping) else ["zept"]
    if unknown:
        raise ZePTError(
            f"{source}: the 'zept' block may hold {list(_BLOCK_KEYS)}; found {unknown}. Correct or remove it"
        )
    entry = block.get(key) or {}
    if not isinstance(entry, Mapping):
        raise ZePTError(f"{source}: zept.{key} must be a dictionary, found {entry!r}")
    return dict(entry)


def _settings(where: str, entry: Any, allowed: tuple[str, ...]) -> dict[str, Any]:
    """The settings of one declared tumor: known keys only, hosts a list of names."""
    if not isinstance(entry, Mapping) or any(k not in allowed for k in entry):
        raise ZePTError(f"{where} must be a dictionary with {list(allowed)}; found {entry!r}")
    _names(f"{where}.hosts", entry.get("hosts", []))
    return dict(entry)


def _names(where: str, entry: Any) -> list[str]:
    if not isinstance(entry, (list, tuple)) or not all(isinstance(n, str) for n in entry):
        raise ZePTError(f'{where} must be a list of names such as ["liver"]; found {entry!r}')
    return list(entry)


def _require(name: str, labels: LabelSet, where: str) -> tuple[int, ...]:
    """The label values that a name stands for."""
    values = labels.find(name)
    if not values:
        raise ZePTError(
            f"{where}: {name!r} is no label; labels: {labels.names()}. Correct the name or remove the entry"
        )
    return values


def declared_roles(
    dataset_json: Mapping[str, Any], labels: LabelSet, source: str
) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """`zept.tumors` (normalized name → settings) and `zept.organs` (normalized names), of labels or regions.

    Raises:
        ZePTError: a name is no label or stands in both, or an entry is not of that form.
    """
    tumors = {}
    for name, entry in _block(dataset_json, "tumors", source).items():
        _require(name, labels, f"{source}, zept.tumors (a tumor without training label belongs to zept.unseen)")
        tumors[normalize_name(name)] = _settings(f"{source}, zept.tumors[{name!r}]", entry, ("hosts",))
    organs = _names(f"{source}, zept.organs", (dataset_json.get("zept") or {}).get("organs") or [])
    for name in organs:
        _require(name, labels, f"{source}, zept.organs")
        if normalize_name(name) in tumors:
            raise ZePTError(f"{source}: {name!r} stands in zept.organs and in zept.tumors; remove it from one of them")
    return tumors, {normalize_name(name) for name in organs}


def declared_hosts(names: list[str], labels: LabelSet, organs: Mapping[int, str], where: str) -> tuple[str, ...]:
    """Names of organs, or of regions, → organs. `organs`: label value → class name. No names: the whole body.

    Raises:
        ZePTError: a name is no label, or holds no organ.
    """
    hosts: list[str] = []
    for name in names:
        members = [organs[v] for v in _require(name, labels, where) if v in organs]
        if not members:
            raise ZePTError(f"{where}: {name!r} is a tumor; name one of the organs {list(organs.values())}")
        hosts += members
    return tuple(dict.fromkeys(hosts))


def undetermined_host(name: str, key: str, organs: Iterable[str], source: str) -> ZePTError:
    """The error to raise where a tumor's name does not tell its host. `key`: where in the block to say it."""
    return ZePTError(
        f"{source}: which organ hosts {name!r} cannot be told from its name; organs: {list(organs)}. "
        f'Say it in {source}: "zept": {{"{key}": {{"{name}": {{"hosts": ["ORGAN"]}}}}}} '
        "(an empty list means the whole body)"
    )


def read_unseen(
    dataset_json: Mapping[str, Any], labels: LabelSet, organs: Mapping[int, str], source: str
) -> tuple[Unseen, ...]:
    """`zept.unseen`, those with a label first and ascending. `organs`: label value → class name.

    Raises:
        ZePTError: a name or label is taken, or a host is unknown or cannot be determined.
    """
    taken = dict(labels.atoms)
    found: list[Unseen] = []
    for name, entry in _block(dataset_json, "unseen", source).items():
        where = f"{source}, zept.unseen[{name!r}]"
        settings = _settings(where, entry, ("hosts", "label"))
        if labels.find(name) or normalize_name(name) in (*RESERVED, ""):
            raise ZePTError(
                f"{where}: that name is a label, so training shows it; remove it from labels or from unseen"
            )
        if any(normalize_name(name) == normalize_name(u.name) for u in found):
            raise ZePTError(f"{where}: the same name stands there twice; remove one")
        label = settings.get("label")
        if label is not None and (not isinstance(label, int) or isinstance(label, bool) or label < 1):
            raise ZePTError(f"{where}.label must be an integer above 0, found {label!r}")
        if label is not None and label in taken:  # the ignore label is not: adding a class moves it up
            raise ZePTError(f"{where}.label: {label} is the value of {taken[label]!r}; choose a free one")
        if "hosts" in settings:
            hosts = declared_hosts(settings["hosts"], labels, organs, f"{where}.hosts")
        else:
            hosts = infer_hosts(name, organs.values())
            if not hosts and organs:
                raise undetermined_host(name, "unseen", organs.values(), source)
        if label is not None:
            taken[label] = name
        found.append(Unseen(name, hosts, label))
    return tuple(sorted(found, key=lambda u: (u.label is None, u.label or 0)))


def check_knowledge(dataset_json: Mapping[str, Any], known: list[str], source: str) -> None:
    """Refuse descriptions of anything but the `known` class names, and empty ones."""
    normalized = {normalize_name(n) for n in known}
    for name, text in _block(dataset_json, "knowledge", source).items():
        if normalize_name(name) not in normalized:
            raise ZePTError(f"{source}, zept.knowledge: {name!r} is no class; classes: {known}. Correct or remove it")
        is_like = isinstance(text, Mapping) and set(text) == {"like"} and isinstance(text["like"], str)
        if not is_like and (not isinstance(text, str) or not text.strip()):
            raise ZePTError(
                f'{source}, zept.knowledge[{name!r}] must be a description or {{"like": NAME}}, found {text!r}'
            )
