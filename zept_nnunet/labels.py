"""The `labels` of a dataset.json, read once: label values, regions, the ignore label. No roles yet, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zept_nnunet.errors import ZePTError
from zept_nnunet.names import normalize_name

RESERVED = ("background", "ignore")


@dataclass(frozen=True)
class LabelSet:
    """Atomic classes (one per label value) and the regions that nnU-Net reports."""

    atoms: dict[int, str]  # label value → class name, ascending
    regions: dict[str, tuple[int, ...]]  # dataset.json's order; of plain labels, each its own region
    has_regions: bool
    ignore_label: int | None

    def regions_of(self, value: int) -> list[str]:
        """Names of the regions that hold a label value, smallest first, ties in dataset.json's order."""
        return sorted((n for n, values in self.regions.items() if value in values), key=lambda n: len(self.regions[n]))

    def find(self, name: str) -> tuple[int, ...]:
        """Label values of a class, or else of a region; empty where the name is neither."""
        wanted = normalize_name(name)
        for value, atom in self.atoms.items():
            if normalize_name(atom) == wanted:
                return (value,)
        return next((values for region, values in self.regions.items() if normalize_name(region) == wanted), ())

    def names(self) -> list[str]:
        """Every name that `find` knows, spelled as in dataset.json."""
        return list(dict.fromkeys([*self.regions, *self.atoms.values()]))


def read_labels(dataset_json: Mapping[str, Any], source: str) -> LabelSet:
    """Read and check `labels`.

    Raises:
        ZePTError: what nnU-Net would refuse too, in words that name the file and the remedy; and names that are equal
            but for case, `_` or `-`.
    """
    labels = dataset_json.get("labels")
    if not isinstance(labels, Mapping) or "background" not in labels:
        raise ZePTError(
            f'{source}: "labels" must be a dictionary of name: value with "background": 0, as nnU-Net v2 wants; '
            f"found {labels!r}"
        )
    values = {name: _values(name, value, source) for name, value in labels.items()}
    if values["background"] != (0,):
        raise ZePTError(f'{source}: "background" must be 0, found {labels["background"]!r}')
    ignore = values.pop("ignore", None)
    if ignore is not None and not _is_int(labels["ignore"]):
        raise ZePTError(f'{source}: "ignore" must be one integer, found {labels["ignore"]!r}')
    has_regions = any(isinstance(v, (list, tuple)) and len(v) > 1 for v in labels.values())
    if has_regions:
        regions = {name: v for name, v in values.items() if v != (0,)}
        _check_regions(regions, dataset_json.get("regions_class_order"), source)
    else:
        regions = {name: v for name, v in values.items() if name != "background"}
        _check_plain(regions, source)
    if not regions:
        raise ZePTError(f"{source}: there is no label besides background; add the organs and tumors to segment")
    _check_names(list(regions), source)
    highest = max(v for region in regions.values() for v in region)
    if ignore is not None and ignore != (highest + 1,):
        raise ZePTError(f'{source}: "ignore" must be the highest label plus one, {highest + 1}; found {ignore[0]}')
    atoms = _name_atoms(regions)
    _check_names(list(atoms.values()), source)
    return LabelSet(atoms, regions, has_regions, None if ignore is None else ignore[0])


def _name_atoms(regions: Mapping[str, tuple[int, ...]]) -> dict[int, str]:
    """Each label value takes the name of the smallest region that holds it."""
    values = sorted({v for region in regions.values() for v in region})
    base = {v: min((n for n in regions if v in regions[n]), key=lambda n: len(regions[n])) for v in values}
    shared = list(base.values())
    return {v: name if shared.count(name) == 1 else f"{name} {v}" for v, name in base.items()}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _values(name: str, value: Any, source: str) -> tuple[int, ...]:
    members = list(value) if isinstance(value, (list, tuple)) else [value]
    if not members or not all(_is_int(v) and v >= 0 for v in members):
        raise ZePTError(
            f"{source}: label {name!r} must be an integer of at least 0, or a list of such; found {value!r}. "
            'nnU-Net v2 wants "name": value, not "value": name'
        )
    return tuple(sorted(set(members)))


def _check_regions(regions: Mapping[str, tuple[int, ...]], order: Any, source: str) -> None:
    with_background = [name for name, v in regions.items() if 0 in v]
    if with_background:
        raise ZePTError(f"{source}: the regions {with_background} hold background (0) among others; remove the 0")
    if not isinstance(order, (list, tuple)) or len(order) != len(regions):
        raise ZePTError(
            f'{source}: labels are regions, so "regions_class_order" must be a list with one value for each of '
            f"{list(regions)}; found {order!r}"
        )


def _check_plain(labels: Mapping[str, tuple[int, ...]], source: str) -> None:
    values = sorted(v for (v,) in labels.values())
    if values != list(range(1, len(values) + 1)):
        raise ZePTError(
            f"{source}: label values must be 0, 1, 2 … without gaps or repeats; found {dict(labels)}. "
            "Renumber the labels, in the segmentations too"
        )


def _check_names(names: list[str], source: str) -> None:
    seen: dict[str, str] = {}
    for name in names:
        key = normalize_name(name)
        if not key or key in RESERVED:
            raise ZePTError(f"{source}: {name!r} is not a name for a class; rename that label")
        if key in seen:
            raise ZePTError(f"{source}: the labels {seen[key]!r} and {name!r} mean the same name; rename one of them")
        seen[key] = name
