"""Raw datasets derived from another one for the baselines: labels of their own, the images by reference.

nnU-Net v2 reads the training cases from `"dataset": {case: {"images": [...], "label": ...}}` where a dataset.json has
that entry, so no image is copied. Three kinds:

`any_tumor`: organs unchanged, all tumors in one class.
`organs`: no tumor class; an organ holds the tumors in it, as the organ labels of practitioners do.
`declared`: the labels of the source, and the tumors of `zept.unseen` as classes that no case annotates. For
    ZePTTrainerPaper, which learns one query per class: as in the authors' training, an unseen tumor's query exists and
    is aligned with its description, and no voxel supervises it.

`zept_derived` in the new dataset.json says from what it was made; a change of the source is noticed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm  # type: ignore[import-untyped]

from zept_nnunet.datasets.raw_folder import (
    nearest_hosts,
    new_dataset,
    read_dataset_json,
    relabeled,
    training_cases,
    write_dataset_json,
)
from zept_nnunet.errors import ZePTError
from zept_nnunet.names import normalize_name
from zept_nnunet.taxonomy import Taxonomy, annotated_for, annotated_patterns, declared_unseen

ANY_TUMOR = "any tumor"
KINDS = {"any_tumor": "AnyTumor", "organs": "Organs", "declared": "Declared"}
"""Kind → what follows the source's name in the name of the new dataset."""
KEY = "zept_derived"
"""Where the dataset.json of a derived dataset says what it is."""


@dataclass(frozen=True)
class Source:
    """A raw dataset with plain labels, every class labeled in every case."""

    folder: Path
    dataset_json: dict[str, Any]
    taxonomy: Taxonomy

    @property
    def name(self) -> str:
        """DatasetXXX_Name."""
        return self.folder.name

    @property
    def file_ending(self) -> str:
        """Of images and labels."""
        return str(self.dataset_json["file_ending"])

    @classmethod
    def read(cls, folder: Path) -> Source:
        """Read and check.

        Raises:
            ZePTError: dataset.json is missing, its labels are regions, or some cases do not label every class.
        """
        path = folder / "dataset.json"
        dataset_json = read_dataset_json(folder)
        taxonomy = Taxonomy.from_dataset_json(dataset_json, str(path))
        if taxonomy.has_regions:
            raise ZePTError(
                f"{path}: the labels are regions, and the baselines are made for plain labels. Write each label value "
                'as a class of its own ("liver": 1, "liver tumor": 2), without regions_class_order'
            )
        source = cls(folder, dataset_json, taxonomy)
        patterns = annotated_patterns(dataset_json, str(path))
        classes = {normalize_name(c.name) for c in taxonomy.classes}
        for case in source.cases() if patterns else ():
            labeled = annotated_for(case, patterns, str(path))
            missing = [] if labeled is None else sorted(classes - {normalize_name(n) for n in labeled})
            if missing:
                raise ZePTError(
                    f"{path}, zept.annotated: case {case!r} does not label {missing}. nnU-Net's own trainers would "
                    "take its voxels for background there, so such a baseline compares nothing: make a dataset of the "
                    "cases that label every class, and use that"
                )
        return source

    def cases(self) -> dict[str, dict[str, Any]]:
        """Case identifier → its training `images` (list of paths) and `label` (path), as nnU-Net finds them."""
        return training_cases(self.folder, self.dataset_json)

    def reader(self, example: str) -> Any:
        """An instance of nnU-Net's reader and writer for this dataset."""
        from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

        return determine_reader_writer_from_dataset_json(self.dataset_json, example, verbose=False)()

    def output_labels(self) -> dict[str, int]:
        """Every label of a baseline's predictions: the source's, and the unseen tumors'; without `ignore`.

        An unseen tumor without a declared label gets the next free one, as in `zept add-tumor --declared`.

        Raises:
            ZePTError: the labels of the unseen tumors leave a gap.
        """
        labels = {c.name: c.label for c in self.taxonomy.classes}
        unseen = declared_unseen(self.dataset_json)
        taken = {*labels.values(), *(u.label for u in unseen)}
        free = (value for value in itertools.count(1) if value not in taken)
        labels |= {u.name: u.label if u.label is not None else next(free) for u in unseen}
        ascending = dict(sorted(labels.items(), key=lambda item: item[1]))
        if list(ascending.values()) != list(range(1, len(ascending) + 1)):
            raise ZePTError(
                f"{self.folder / 'dataset.json'}: with the unseen tumors the labels leave a gap: {ascending}. "
                "nnU-Net's plain labels are consecutive: correct zept.unseen"
            )
        return {"background": 0, **ascending}

    def tumor_hosts(self) -> dict[str, tuple[str, ...]]:
        """Every tumor of the predictions, in the order of their labels → its hosts; () is the whole body."""
        hosts = {t.name: t.hosts for t in self.taxonomy.tumors}
        hosts |= {u.name: u.hosts for u in declared_unseen(self.dataset_json)}
        return {name: hosts[name] for name in self.output_labels() if name in hosts}

    def unlabeled_hosts(self) -> list[str]:
        """Organs whose tumors nobody labeled: they host no tumor of the training labels.

        All of them, not only the hosts of the declared unseen tumors: training must not know what will be asked.
        """
        hosts = [t.hosts for t in self.taxonomy.tumors]
        seen = {h for names in hosts for h in names}
        return [o.name for o in self.taxonomy.organs if o.name not in seen] if all(hosts) else []


def derived_labels(source: Source, kind: str) -> dict[str, int]:
    """`labels` of the derived dataset, plain and without gaps, `ignore` last where the source has it."""
    names = [o.name for o in source.taxonomy.organs]
    if kind == "declared":
        labels = source.output_labels()
    else:
        if kind == "any_tumor":
            if not source.taxonomy.tumors:
                raise ZePTError(f"{source.folder / 'dataset.json'} labels no tumor: there is nothing to merge")
            names.append(ANY_TUMOR)
        if not source.taxonomy.organs:
            raise ZePTError(
                f"{source.folder / 'dataset.json'} labels no organ, and this baseline needs organs to tell where a "
                "tumor lies. Add labels of the organs"
            )
        labels = {"background": 0, **{name: value for value, name in enumerate(names, start=1)}}
    if source.taxonomy.ignore_label is not None:
        labels["ignore"] = len(labels)
    return labels


def relabel(seg: np.ndarray, source: Source, kind: str, spacing: tuple[float, ...]) -> np.ndarray:
    """A label map (*,) of the source → one of the derived dataset, of the same shape, uint8 or uint16.

    Args:
        seg: label values of the source, integers of any type.
        source: whose labels they are.
        kind: one of `KINDS`.
        spacing: voxel size along each axis of `seg`, to tell which of several hosts a tumor voxel is nearest to.

    Raises:
        ZePTError: a value is no label of the source.
    """
    taxonomy, labels = source.taxonomy, derived_labels(source, kind)
    values = np.rint(seg).astype(np.int64)
    table = {0: 0, **{o.label: labels[o.name] for o in taxonomy.organs}}
    if taxonomy.ignore_label is not None:
        table[taxonomy.ignore_label] = labels["ignore"]
    given = {}  # tumors that become a host: label → labels of the hosts
    for tumor in taxonomy.tumors:
        if kind == "any_tumor":
            table[tumor.label] = labels[ANY_TUMOR]
        elif kind == "declared":
            table[tumor.label] = labels[tumor.name]
        else:
            table[tumor.label] = 0
            if tumor.hosts:
                by_name = {o.name: o.label for o in taxonomy.organs}
                given[tumor.label] = [by_name[host] for host in tumor.hosts]
    return relabeled(nearest_hosts(values, given, spacing), table, source.folder / "dataset.json")


def derive_dataset(source: Source, kind: str, raw: Path) -> Path:
    """The derived dataset's folder in `raw`, written where it is not there yet, under the highest free ID.

    Safe to call in several processes at once.

    Raises:
        ZePTError: the source cannot be derived from, or has changed since the derived dataset was made.
    """
    labels = derived_labels(source, kind)
    with alone(raw / ".zept_derived"):
        cases = source.cases()
        digest = _digest(source, cases)
        for folder in sorted(raw.glob("Dataset*")):
            if (found := read_derived(folder)) and (found["source"], found["kind"]) == (source.name, kind):
                if found["digest"] != digest:
                    raise ZePTError(
                        f"{folder} was derived from {source.name}, whose dataset.json or training labels have changed "
                        "since. Remove that folder, and those of the same name in nnUNet_preprocessed and "
                        "nnUNet_results; they are made again"
                    )
                return folder
        target = raw / f"Dataset{_free_id():03d}_{source.name.partition('_')[2]}{KINDS[kind]}"
        with new_dataset(target) as scratch:
            mapping = _write_labels(source, kind, cases, scratch, target)
            description = _dataset_json(source, kind, labels, digest) | {"numTraining": len(cases), "dataset": mapping}
            write_dataset_json(scratch, description)
    return target


def read_derived(folder: Path) -> dict[str, Any] | None:
    """What a raw dataset's dataset.json says under `zept_derived`; None where it is no derived dataset."""
    try:
        entry = json.loads((folder / "dataset.json").read_text(encoding="utf-8")).get(KEY)
    except (OSError, json.JSONDecodeError):
        return None
    return entry if isinstance(entry, dict) else None


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold a lock file beside `path`, so that processes side by side do not make the same thing twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        yield


def _write_labels(
    source: Source, kind: str, cases: Mapping[str, Mapping[str, Any]], scratch: Path, target: Path
) -> dict[str, Any]:
    """Write labelsTr where the labels change; returns the `dataset` entry, its paths relative to `target`."""
    keeps_labels = kind == "declared" and source.taxonomy.ignore_label is None
    mapping = {}
    if not keeps_labels:
        (scratch / "labelsTr").mkdir()
    for case, files in tqdm(cases.items(), desc=f"labels of {target.name}", unit="case", disable=keeps_labels):
        label = os.path.relpath(files["label"], target)
        if not keeps_labels:
            label = f"labelsTr/{case}{source.file_ending}"
            reader = source.reader(files["images"][0])
            seg, properties = reader.read_seg(files["label"])
            try:
                derived = relabel(seg[0], source, kind, tuple(properties["spacing"]))
            except ZePTError as error:
                raise ZePTError(f"{files['label']}: {error}") from error
            reader.write_seg(derived, str(scratch / label), properties)
        mapping[case] = {"images": [os.path.relpath(i, target) for i in files["images"]], "label": label}
    return mapping


def _dataset_json(source: Source, kind: str, labels: Mapping[str, int], digest: str) -> dict[str, Any]:
    taken_over = {k: v for k, v in source.dataset_json.items() if k not in ("labels", "zept", "dataset")}
    organs = [o.name for o in source.taxonomy.organs]
    zept: dict[str, Any] = {"organs": organs}
    if kind == "any_tumor":
        hosts = [t.hosts for t in source.taxonomy.tumors]
        names = list(dict.fromkeys(h for some in hosts for h in some)) if all(hosts) else []
        zept["tumors"] = {ANY_TUMOR: {"hosts": names}}
    elif kind == "declared":
        zept["tumors"] = {name: {"hosts": list(hosts)} for name, hosts in source.tumor_hosts().items()}
        zept["annotated"] = {"*": [c.name for c in source.taxonomy.classes]}
        if texts := (source.dataset_json.get("zept") or {}).get("knowledge"):
            zept["knowledge"] = texts
    derived = {
        "source": source.name,
        "kind": kind,
        "digest": digest,
        "unlabeled_hosts": source.unlabeled_hosts(),
    }
    return {**taken_over, "labels": dict(labels), "zept": zept, KEY: derived}


def _digest(source: Source, cases: Mapping[str, Mapping[str, Any]]) -> str:
    """Of the dataset.json and of every training label."""
    digest = hashlib.sha256(json.dumps(source.dataset_json, sort_keys=True).encode())
    for case, files in cases.items():
        digest.update(case.encode())
        try:
            digest.update(Path(files["label"]).read_bytes())
        except OSError as error:
            raise ZePTError(f"case {case!r} of {source.name}: its label cannot be read: {error}") from error
    return digest.hexdigest()


def _free_id() -> int:
    from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

    free = next((i for i in range(999, 0, -1) if not len(find_candidate_datasets(i))), None)
    if free is None:
        raise ZePTError("every dataset ID from 1 to 999 is taken; remove a dataset that is no longer needed")
    return free
