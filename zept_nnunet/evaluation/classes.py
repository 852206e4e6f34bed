"""Which classes are evaluated, under which values references and predictions hold them, and which were unseen.

Classes come from the dataset.json that nnU-Net leaves beside its predictions. The dataset.json of the raw dataset,
where it is given, says what the *references* hold; the two are joined by name.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zept_nnunet.declarations import Unseen, annotated_for, annotated_patterns
from zept_nnunet.errors import ZePTError
from zept_nnunet.labels import LabelSet, read_labels
from zept_nnunet.names import normalize_name
from zept_nnunet.taxonomy import Taxonomy, declared_unseen

_READERS = {"SimpleITKIO": False, "NibabelIO": False, "NibabelIOWithReorient": True}
FILE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")


@dataclass(frozen=True)
class EvaluatedClass:
    """One class of the report; of regions, one region."""

    name: str
    is_tumor: bool
    seen: bool
    reference_values: tuple[int, ...]
    prediction_values: tuple[int, ...] | None
    """None: the model does not report this class."""
    host_values: tuple[int, ...] | None
    """Of a tumor: reference values of its hosts and of all tumors in them (whole body: every value). Else None."""
    host_names: frozenset[str] = frozenset()
    """Of a tumor: the organs that host it, where the references name them."""


@dataclass(frozen=True)
class ClassTable:
    """All evaluated classes, and how the files are read."""

    classes: tuple[EvaluatedClass, ...]
    reference_values: frozenset[int]
    prediction_values: frozenset[int]
    ignore_value: int | None
    """In the references."""
    file_ending: str
    reorients: bool
    """The reader brings images to RAS, so scores stand on that grid."""
    annotated: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    source: str = "dataset.json"

    @property
    def tumors(self) -> tuple[EvaluatedClass, ...]:
        return tuple(c for c in self.classes if c.is_tumor)

    def find(self, name: str) -> EvaluatedClass | None:
        """The class of that name, whatever its case, `_` and `-`."""
        return next((c for c in self.classes if normalize_name(c.name) == normalize_name(name)), None)

    def annotated_in(self, case: str) -> frozenset[str]:
        """Names of the classes that a case's reference annotates."""
        names = annotated_for(case, self.annotated, self.source)
        if names is None:
            return frozenset(c.name for c in self.classes)
        known = {normalize_name(n) for n in names}
        return frozenset(c.name for c in self.classes if normalize_name(c.name) in known)

    def labels_hosts(self, case: str, c: EvaluatedClass) -> bool:
        """Whether a case's reference shows where a tumor's hosts are."""
        names = annotated_for(case, self.annotated, self.source)
        return names is None or {normalize_name(n) for n in names} >= {normalize_name(n) for n in c.host_names}


def read_class_table(
    predictions: Path, reference_dataset_json: Path | None = None, unseen: Collection[str] = ()
) -> ClassTable:
    """Read the classes of a folder of predictions.

    A tumor is unseen where plans.json says that it was added after training, where `zept.unseen` of either
    dataset.json names it, or where the caller does.

    Args:
        predictions: holds dataset.json, and plans.json where nnU-Net wrote it.
        reference_dataset_json: of the raw dataset; None: the references hold the values of the predictions.
        unseen: further names of unseen tumors.

    Raises:
        ZePTError: a file is missing or damaged, the two do not fit together, or a name is unknown.
    """
    path = predictions / "dataset.json"
    ours = _read_json(path, "nnU-Net writes it beside its predictions: copy it from the model folder")
    plans = _read_json(predictions / "plans.json") if (predictions / "plans.json").is_file() else {}
    labels, taxonomy = read_labels(ours, str(path)), Taxonomy.from_dataset_json(ours, str(path))
    source = reference_dataset_json or path
    theirs = _read_json(source) if reference_dataset_json is not None else ours
    their_labels, their_taxonomy = read_labels(theirs, str(source)), Taxonomy.from_dataset_json(theirs, str(source))
    declared = declared_unseen(theirs, str(source))
    regions, added_hosts, ignore = _reference_regions(labels, taxonomy, their_labels, declared, path, source)

    unseen_names = {normalize_name(u.name) for u in (*declared, *declared_unseen(ours, str(path)))}
    unseen_names |= {normalize_name(n) for n in _added_tumors(plans)} | {normalize_name(n) for n in unseen}
    tumor_hosts = {  # reference value of a tumor → its hosts
        **{t.label: frozenset(t.hosts) for t in their_taxonomy.tumors},
        **{regions[name][0]: hosts for name, hosts in added_hosts.items()},
    }
    organ_value = {o.name: o.label for o in their_taxonomy.organs}
    every_value = (0, *sorted({v for values in regions.values() for v in values}))
    predicted = {normalize_name(n): values for n, values in labels.regions.items()}

    def hosts_of(values: tuple[int, ...]) -> frozenset[str]:
        return frozenset().union(*(tumor_hosts[v] for v in values))

    def host_values(values: tuple[int, ...]) -> tuple[int, ...]:
        hosts = hosts_of(values)
        if any(not tumor_hosts[v] for v in values):
            return every_value
        inside = {organ_value[h] for h in hosts} | {v for v, theirs in tumor_hosts.items() if theirs & hosts}
        return tuple(sorted(inside | set(values)))

    classes = []
    for name, values in regions.items():
        is_tumor = all(v in tumor_hosts for v in values)
        key = normalize_name(name)
        classes.append(
            EvaluatedClass(
                name,
                is_tumor,
                key not in unseen_names,
                values,
                predicted.get(key),
                host_values(values) if is_tumor else None,
                hosts_of(values) if is_tumor else frozenset(),
            )
        )
    known = {normalize_name(c.name) for c in classes if c.is_tumor}
    wrong = [n for n in unseen if normalize_name(n) not in known]
    if wrong:
        raise ZePTError(f"{wrong[0]!r} is said to be unseen and is no tumor of {source}: {sorted(known)}")
    return ClassTable(
        tuple(classes),
        frozenset(every_value) | ({ignore} if ignore is not None else frozenset()),
        frozenset({0, *(v for values in labels.regions.values() for v in values)}),
        ignore,
        _file_ending(ours, path),
        _reorients(ours, plans, path),
        annotated_patterns(theirs, str(source)),
        str(source),
    )


def _reference_regions(
    labels: LabelSet,
    taxonomy: Taxonomy,
    their_labels: LabelSet,
    declared: Collection[Unseen],
    path: Path,
    source: Path,
) -> tuple[dict[str, tuple[int, ...]], dict[str, frozenset[str]], int | None]:
    """Class → values in the references; the hosts of those that are no label there; the ignore value there."""
    regions, ignore = dict(their_labels.regions), their_labels.ignore_label
    hosts: dict[str, frozenset[str]] = {}
    for tumor in declared:
        reported = labels.find(tumor.name)
        if tumor.label is None and not reported:
            continue  # nobody says under which value the references hold it
        regions[tumor.name] = reported if tumor.label is None else (tumor.label,)
        hosts[tumor.name] = frozenset(tumor.hosts)
    known = {normalize_name(n) for n in regions}
    extra = [n for n in labels.regions if normalize_name(n) not in known]
    if extra:
        raise ZePTError(
            f"{path} reports {extra}, which {source} does not name, so the references' value for it is unknown. "
            'Declare it there: "zept": {"unseen": {NAME: {"hosts": [ORGAN], "label": VALUE}}}, or give -r instead of -d'
        )
    if ignore is not None and any(ignore in values for values in regions.values()):
        ignore = labels.ignore_label  # an added tumor took the value, and moved ignore up
    return regions, hosts, ignore


def _added_tumors(plans: Mapping[str, Any]) -> list[str]:
    """Names of the tumors that `zept add-tumor` has added."""
    block = plans.get("zept") or {}
    return [t["name"] for t in (block.get("taxonomy") or {}).get("tumors", []) if t.get("added")]


def _file_ending(dataset_json: Mapping[str, Any], path: Path) -> str:
    ending = str(dataset_json.get("file_ending", ""))
    if ending not in FILE_ENDINGS:
        raise ZePTError(
            f"{path}: zept evaluate reads 3D images with file_ending {list(FILE_ENDINGS)}; found {ending!r}"
        )
    return ending


def _reorients(dataset_json: Mapping[str, Any], plans: Mapping[str, Any], path: Path) -> bool:
    name = dataset_json.get("overwrite_image_reader_writer", "None")
    name = plans.get("image_reader_writer", "SimpleITKIO") if name in ("None", None) else name
    if name not in _READERS:
        raise ZePTError(f"{path}: zept evaluate knows the readers {list(_READERS)}; found {name!r}")
    return _READERS[name]


def _read_json(path: Path, hint: str = "restore it") -> dict[str, Any]:
    if not path.is_file():
        raise ZePTError(f"{path} is missing; {hint}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ZePTError(f"{path} is no valid JSON ({error}); restore the file") from error
