"""Several raw datasets, each of which labels only some classes, in one: images by reference, labels rewritten.

A class is found in two datasets by what its name means (knowledge/catalog.py knows synonyms), or by the user's map.
What each case labels stands in `zept.annotated`; a class that a dataset does not label is not background there, but
unknown.
`zept_merge` in the new dataset.json says where everything came from. nnU-Net reads the training cases from its
`"dataset"` entry.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm  # type: ignore[import-untyped]

from zept_nnunet.datasets.model_organs import ModelOrgans
from zept_nnunet.datasets.raw_folder import (
    nearest_hosts,
    read_dataset_json,
    relabeled,
    training_cases,
    write_dataset_json,
)
from zept_nnunet.datasets.same_scan import Ties
from zept_nnunet.errors import ZePTError
from zept_nnunet.knowledge.catalog import catalog
from zept_nnunet.labels import RESERVED
from zept_nnunet.names import infer_hosts, is_generic_tumor, may_overlap, name_key, normalize_name, organs_named
from zept_nnunet.taxonomy import Taxonomy, Tumor, annotated_for, annotated_patterns, declared_unseen

KEY = "zept_merge"
"""Where the dataset.json of a merged dataset says what it is."""
NUM_FOLDS = 5


@dataclass(frozen=True)
class MergeMap:
    """What the user says of some labels and patients. `labels`: dataset → label → name in the merged dataset, or None
    where it is left out; `patients`: dataset → regular expression whose first group is the patient's name.
    """

    labels: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    patients: Mapping[str, re.Pattern[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> MergeMap:
        """A YAML file: `labels: {101: {kidney_l: left kidney, spleen: null}}` and `patients: {101: "^(p[0-9]+)_"}`.

        Raises:
            ZePTError: it cannot be read or is not of that form.
        """
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise ZePTError(f"{path} cannot be read as YAML: {error}") from error
        if not isinstance(content, dict) or set(content) - {"labels", "patients"}:
            raise ZePTError(f"{path}: wanted the entries 'labels' and 'patients', found {content!r}")
        labels, patients = content.get("labels") or {}, content.get("patients") or {}
        ok = isinstance(labels, dict) and all(
            isinstance(names, dict) and all(n is None or (isinstance(n, str) and n.strip()) for n in names.values())
            for names in labels.values()
        )
        if not ok or not isinstance(patients, dict):
            raise ZePTError(
                f"{path}: 'labels' wants DATASET: {{LABEL: NAME or null}}, 'patients' DATASET: REGULAR EXPRESSION"
            )
        compiled = {}
        for dataset, expression in patients.items():
            try:
                compiled[_id_of(dataset, path)] = re.compile(str(expression))
            except re.error as error:
                raise ZePTError(
                    f"{path}, patients, {dataset}: {expression!r} is no regular expression: {error}"
                ) from error
            if compiled[_id_of(dataset, path)].groups < 1:
                raise ZePTError(f"{path}, patients, {dataset}: {expression!r} has no group (…) that holds the patient")
        return cls({_id_of(d, path): {str(k): v for k, v in names.items()} for d, names in labels.items()}, compiled)


def _id_of(dataset: Any, path: Path) -> str:
    """The three digits of a dataset's ID, from the ID or the whole name."""
    found = re.fullmatch(r"(?:Dataset)?(\d{1,3})(?:_.*)?", str(dataset))
    if found is None:
        raise ZePTError(f"{path}: {dataset!r} is no dataset ID and no name of a dataset")
    return f"{int(found[1]):03d}"


@dataclass(frozen=True)
class MergeSource:
    """A raw dataset that goes into the merged one."""

    folder: Path
    dataset_json: dict[str, Any]
    taxonomy: Taxonomy
    patterns: Mapping[str, tuple[str, ...]]
    organs_from: ModelOrgans | None = None

    @property
    def id(self) -> str:
        """Three digits."""
        return self.folder.name[7:10]

    @classmethod
    def read(cls, folder: Path, organs_from: ModelOrgans | None = None) -> MergeSource:
        """Read and check dataset.json.

        Raises:
            ZePTError: it is missing or cannot be understood.
        """
        path = folder / "dataset.json"
        dataset_json = read_dataset_json(folder)
        taxonomy = Taxonomy.from_dataset_json(dataset_json, str(path))
        return cls(folder, dataset_json, taxonomy, annotated_patterns(dataset_json, str(path)), organs_from)

    @cached_property
    def cases(self) -> dict[str, dict[str, Any]]:
        """Case → its training `images` and `label`, as nnU-Net finds them."""
        return training_cases(self.folder, self.dataset_json)

    @property
    def channels(self) -> dict[str, str]:
        """Channel number → name."""
        names = self.dataset_json.get("channel_names") or self.dataset_json.get("modality") or {}
        return {str(k): str(v) for k, v in names.items()}

    def merged_case(self, case: str) -> str:
        """The case's name in the merged dataset."""
        return f"d{self.id}_{case}"

    def classes(self) -> list[tuple[str, int | None, tuple[str, ...] | None]]:
        """Name, label value (None: a mask of `organs_from`), and hosts (None: an organ).

        A tumor without hosts sits in those of the masks that its name points at.
        """
        given = self.organs_from.names if self.organs_from else ()
        own: list[tuple[str, int | None, tuple[str, ...] | None]] = [
            (c.name, c.label, self._hosts_of(c) if isinstance(c, Tumor) else None)
            for c in sorted(self.taxonomy.classes, key=lambda c: c.label)
        ]
        return [*((name, None, None) for name in given), *own]

    def _hosts_of(self, tumor: Tumor) -> tuple[str, ...]:
        masks = self.organs_from.names if self.organs_from else ()
        return tumor.hosts or infer_hosts(self.taxonomy.reading(tumor.name), masks)


def class_key(name: str, hosts: tuple[str, ...] | None) -> tuple[str, ...]:
    """What two datasets' names of one class have in common. `hosts`: of a tumor; None: an organ."""
    entry = catalog().find(name, hosts or (), "organ" if hosts is None else "tumor")
    return name_key(entry.name if entry is not None else name)


def _unusable_names(classes: Iterable[MergedClass]) -> list[str]:
    """Names that stand for two classes, or that no class may have."""
    problems, seen = [], dict[str, str]()
    for entry in classes:
        key = normalize_name(entry.name)
        if not key or key in RESERVED:
            problems.append(f"{entry.name!r} is not a name for a class ({', '.join(entry.members)})")
        elif key in seen:
            problems.append(
                f"two classes would be called {entry.name!r}"
                + (f" and {seen[key]!r}, which are one name" if seen[key] != entry.name else "")
            )
        seen.setdefault(key, entry.name)
    return problems


@dataclass
class MergedClass:
    """One class of the merged dataset. `members`: dataset ID → (label there, or None: its organ mask)."""

    name: str
    is_tumor: bool
    hosts: tuple[str, ...] = ()
    members: dict[str, list[tuple[str, int | None]]] = field(default_factory=dict)
    mapped: set[str] = field(default_factory=set)  # datasets in which the user named it so


class Merge:
    """What a merge will do, checked before it does anything."""

    def __init__(self, sources: Sequence[MergeSource], mapping: MergeMap | None = None):
        """Match the labels.

        Raises:
            ZePTError: labels conflict (all conflicts at once), or the datasets cannot be read by one reader.
        """
        self.sources, self.mapping = list(sources), mapping or MergeMap()
        ids = [s.id for s in self.sources]
        if len(set(ids)) != len(ids):
            raise ZePTError(f"each dataset once, got {ids}")
        unknown = sorted((set(self.mapping.labels) | set(self.mapping.patients)) - set(ids))
        if unknown:
            raise ZePTError(f"the map speaks of the datasets {unknown}, which are not merged; merged are {ids}")
        self._check_images()
        self.classes = self._match()
        self.labels = {"background": 0, **{c.name: i for i, c in enumerate(self.classes, start=1)}}
        self.ignores = any(s.taxonomy.ignore_label is not None for s in self.sources)
        if self.ignores:
            self.labels["ignore"] = len(self.labels)

    def _check_images(self) -> None:
        for what, of in (
            ("channels", lambda s: sorted(s.channels.items())),
            ("file_ending", lambda s: s.dataset_json.get("file_ending")),
            ("overwrite_image_reader_writer", lambda s: self._reader_of(s)),
        ):
            found = {s.folder.name: of(s) for s in self.sources if of(s) is not None}
            if len({str(v).lower() for v in found.values()}) > 1:
                raise ZePTError(f"the datasets differ in their {what}: {found}. Convert them to one first")

    @staticmethod
    def _reader_of(source: MergeSource) -> str | None:
        """None where nnU-Net goes by the file ending."""
        name = source.dataset_json.get("overwrite_image_reader_writer")
        return None if name in (None, "None") else str(name)

    # ------------------------------------------------------------------------------------------------ classes
    def _match(self) -> list[MergedClass]:
        merged: dict[tuple[str, ...], MergedClass] = {}
        host_keys: dict[tuple[str, ...], dict[str, set[tuple[str, ...]]]] = {}
        problems: list[str] = []
        roles: dict[tuple[str, ...], bool] = {}  # name → is a tumor
        for source in self.sources:
            mapped = self.mapping.labels.get(source.id, {})
            known = {normalize_name(name) for name, *_ in source.classes()}
            problems += [
                f"the map names {name!r} of {source.folder.name}, which is no class there: {sorted(known)}"
                for name in mapped
                if normalize_name(name) not in known
            ]
            keys = {}
            by_name = {normalize_name(k): v for k, v in mapped.items()}
            for name, label, hosts in source.classes():
                if by_name.get(normalize_name(name), "") is None:
                    continue  # left out
                chosen = by_name.get(normalize_name(name))
                read = source.taxonomy.reading(name)  # of a public dataset: "cancer" → "lung tumor"
                shown = chosen or self._name_of(read, hosts)
                key = keys[name] = class_key(chosen or read, hosts)
                nowhere = chosen is None and hosts == () and is_generic_tumor(shown)
                if nowhere and (name not in source.taxonomy.declared or key in merged):
                    problems.append(
                        f"{name!r} of {source.folder.name} says neither by its name nor by an organ of its dataset "
                        "where it lies, so it cannot be told what it is in another dataset"
                    )
                entry = merged.setdefault(key, MergedClass(shown, hosts is not None))
                if roles.setdefault(name_key(shown), hosts is not None) != (hosts is not None):
                    problems.append(
                        f"{name!r} of {source.folder.name} is {'a tumor' if hosts is not None else 'an organ'}, and "
                        "that of another dataset is not (zept.organs, zept.tumors in dataset.json say which)"
                    )
                if chosen is not None:
                    entry.mapped.add(source.id)
                there = entry.members.setdefault(source.id, [])
                there.append((name, label))
                if len(there) > 1 and chosen is None:
                    problems.append(
                        f"{source.folder.name} has {[n for n, _ in there]}, which would all become {entry.name!r}"
                    )
            for name, _, hosts in source.classes():
                if hosts and name in keys:
                    named = {keys[h] for h in hosts if h in keys}
                    if named:
                        host_keys.setdefault(keys[name], {})[source.folder.name] = named
        problems += self._overlaps(merged) + _unusable_names(merged.values())
        for key, by_source in host_keys.items():
            if len({frozenset(h) for h in by_source.values()}) > 1:
                named_by = {s: sorted(merged[h].name for h in keys_of) for s, keys_of in by_source.items()}
                problems.append(f"the hosts of {merged[key].name!r} differ: {named_by}")
        if problems:
            raise ZePTError(
                "the labels conflict:\n  " + "\n  ".join(dict.fromkeys(problems)) + "\nSay in a file which is which, "
                "and give it with --map: labels: {ID: {LABEL: NAME}}, or null as the name to leave a label out"
            )
        organs = [c for c in merged.values() if not c.is_tumor]
        tumors = [c for c in merged.values() if c.is_tumor]
        for key, entry in merged.items():
            if entry.is_tumor:
                told = [merged[h].name for by in host_keys.get(key, {}).values() for h in sorted(by)]
                entry.hosts = tuple(dict.fromkeys(told)) or self._described_hosts(entry, organs)
        return organs + tumors

    def _name_of(self, name: str, hosts: tuple[str, ...] | None) -> str:
        """As the dataset spells it, or the description's name where it says nothing by itself ("cancer")."""
        if hosts is not None and is_generic_tumor(name):
            entry = catalog().find(name, hosts, "tumor")
            return entry.name if entry is not None else name
        return name

    def _overlaps(self, merged: Mapping[tuple[str, ...], MergedClass]) -> list[str]:
        """Organs of two datasets of which one may hold the other."""
        organs = [c for c in merged.values() if not c.is_tumor]
        return [
            f"{a.name!r} ({', '.join(a.members)}) and {b.name!r} ({', '.join(b.members)}) may overlap"
            for a, b in itertools.combinations(organs, 2)
            if may_overlap(a.name, b.name)
            and set(a.members) != set(b.members)
            and not (a.mapped >= set(a.members) or b.mapped >= set(b.members))
        ]

    def _described_hosts(self, tumor: MergedClass, organs: Sequence[MergedClass]) -> tuple[str, ...]:
        """Of a tumor whose own dataset labels no organ: the merged organs that its description or its name names.

        One that names none has the whole body as its host, as in its own dataset, even where a single organ is merged.
        """
        entry = catalog().find(tumor.name, (), "tumor")
        described = {name_key(h) for h in entry.hosts} if entry is not None else set()
        keys = {c.name: class_key(c.name, None) for c in organs}
        found = tuple(name for name, key in keys.items() if key in described)
        if found:
            return found
        return organs_named(tumor.name, keys)

    # ------------------------------------------------------------------------------------------------ label values
    def table_of(self, source: MergeSource) -> dict[int, int]:
        """Label value in a source → in the merged dataset; what is left out is background (but see `hosts_of`)."""
        table = {0: 0}
        if source.taxonomy.ignore_label is not None:
            table[source.taxonomy.ignore_label] = self.labels["ignore"]
        for entry in self.classes:
            for _, label in entry.members.get(source.id, []):
                if label is not None:
                    table[label] = self.labels[entry.name]
        for entry_there in source.taxonomy.classes:
            table.setdefault(entry_there.label, 0)
        return table

    def hosts_of(self, source: MergeSource) -> dict[int, list[int]]:
        """Label values in a source: each tumor that is left out → its hosts, the nearest of which it belongs to."""
        kept = {label for c in self.classes for _, label in c.members.get(source.id, [])}
        organs = {o.name: o.label for o in source.taxonomy.organs}
        return {
            t.label: [organs[host] for host in t.hosts]
            for t in source.taxonomy.tumors
            if t.hosts and t.label not in kept
        }

    def annotated_in(self, source: MergeSource, names: Sequence[str] | None) -> list[str]:
        """Names in the merged dataset of what a case labels; `names`: of the source, None: all of it."""
        wanted = None if names is None else {normalize_name(n) for n in names}
        found = []
        for entry in self.classes:
            members = entry.members.get(source.id, [])
            if members and all(label is None or wanted is None or normalize_name(n) in wanted for n, label in members):
                found.append(entry.name)
        return found

    def annotated(self) -> dict[str, list[str]]:
        """`zept.annotated`: a pattern per dataset, or per case where a dataset has patterns of its own."""
        patterns: dict[str, list[str]] = {}
        everything = [c.name for c in self.classes]
        for source in self.sources:
            if not source.patterns:
                patterns[f"d{source.id}_*"] = self.annotated_in(source, None)
                continue
            for case in source.cases:
                names = annotated_for(case, source.patterns, str(source.folder / "dataset.json"))
                patterns[glob.escape(source.merged_case(case))] = self.annotated_in(source, names)
        return {p: names for p, names in patterns.items() if names != everything}

    # ------------------------------------------------------------------------------------------------ dataset.json
    def dataset_json(self, target: Path, same: Mapping[str, str]) -> dict[str, Any]:
        """The merged dataset's, checked. `same`: case → a case that stands for all that are the same scan.

        Raises:
            ZePTError: two datasets say different things of one class, or the result is no description of a dataset.
        """
        first = self.sources[0].dataset_json
        readers = [r for r in map(self._reader_of, self.sources) if r is not None]
        kept: dict[str, Any] = {k: first[k] for k in ("channel_names", "file_ending") if k in first}
        kept |= {"overwrite_image_reader_writer": readers[0]} if readers else {}
        cases = {
            source.merged_case(case): {
                "images": [os.path.relpath(i, target) for i in files["images"]],
                "label": f"labelsTr/{source.merged_case(case)}{first['file_ending']}",
            }
            for source in self.sources
            for case, files in source.cases.items()
        }
        zept: dict[str, Any] = {
            "organs": [c.name for c in self.classes if not c.is_tumor],
            "tumors": {c.name: {"hosts": list(c.hosts)} for c in self.classes if c.is_tumor},
        }
        unseen = self._unseen()
        zept |= {"unseen": unseen} if unseen else {}
        knowledge = self._knowledge()
        zept |= {"knowledge": knowledge} if knowledge else {}
        annotated = self.annotated()
        zept |= {"annotated": annotated} if annotated else {}
        content = {
            **kept,
            "labels": self.labels,
            "numTraining": len(cases),
            "dataset": cases,
            "zept": zept,
            KEY: {
                "digest": self.digest(),
                "sources": {
                    source.folder.name: {
                        "cases": len(source.cases),
                        "labels": {n: c.name for c in self.classes for n, _ in c.members.get(source.id, [])},
                        **({"organs_from": source.organs_from.record()} if source.organs_from else {}),
                    }
                    for source in self.sources
                },
                "same_scans": {name: leader for name, leader in same.items() if name != leader},
            },
        }
        Taxonomy.from_dataset_json(content, f"the merged {target.name}/dataset.json")
        return content

    def _unseen(self) -> dict[str, Any]:
        """Tumors that some dataset declares unseen and none labels; label values are given anew."""
        labeled = {class_key(c.name, c.hosts) for c in self.classes if c.is_tumor}
        found: dict[str, Any] = {}
        for source in self.sources:
            for unseen in declared_unseen(source.dataset_json, str(source.folder / "dataset.json")):
                names = {n: c.name for c in self.classes for n, _ in c.members.get(source.id, [])}
                if class_key(unseen.name, unseen.hosts) not in labeled and unseen.name not in found:
                    found[unseen.name] = {"hosts": [names[h] for h in unseen.hosts if h in names]}
        return found

    def _knowledge(self) -> dict[str, Any]:
        """The datasets' own descriptions under the merged names.

        Raises:
            ZePTError: two describe one class differently.
        """
        found: dict[str, Any] = {}
        for source in self.sources:
            own = {
                normalize_name(k): v for k, v in (source.dataset_json.get("zept") or {}).get("knowledge", {}).items()
            }
            for entry in self.classes:
                for name, _ in entry.members.get(source.id, []):
                    text = own.get(normalize_name(name))
                    if text is not None and found.setdefault(entry.name, text) != text:
                        raise ZePTError(f"two datasets describe {entry.name!r} differently (zept.knowledge); keep one")
        return found

    def digest(self) -> str:
        """Of all that the labels depend on: an interrupted merge goes on only where it is the same."""
        content = [
            [s.folder.name, sorted(self.table_of(s).items()), sorted(s.cases), s.organs_from and s.organs_from.record()]
            for s in self.sources
        ]
        return hashlib.sha256(json.dumps([content, self.labels], sort_keys=True, default=str).encode()).hexdigest()

    # ------------------------------------------------------------------------------------------------ writing
    def write(self, target: Path, same: Mapping[str, str]) -> int:
        """Write the merged dataset; returns how many label files were there from an interrupted run.

        Label files come first, each whole or not at all, in a folder beside `target`; dataset.json last; then the
        folder takes its place.

        Raises:
            ZePTError: `target` holds another dataset, or a label file cannot be read or holds an unknown value.
        """
        if target.exists():
            found = _record_of(target)
            if found is None or found.get("digest") != self.digest():
                raise ZePTError(
                    f"{target} exists and is not what this merge would make; choose another ID (-o) or remove it, and "
                    "the folders of the same name in nnUNet_preprocessed and nnUNet_results"
                )
            return len(list(self._cases()))
        scratch = target.parent / f".zept_merge_{target.name}"
        record = scratch / "merge.json"
        if scratch.exists() and (not record.is_file() or record.read_text(encoding="utf-8") != self.digest()):
            shutil.rmtree(scratch)  # of another merge
        (scratch / "labelsTr").mkdir(parents=True, exist_ok=True)
        record.write_text(self.digest(), encoding="utf-8")
        ending = str(self.sources[0].dataset_json["file_ending"])
        for leftover in (scratch / "labelsTr").glob(f".partial_*{ending}"):
            leftover.unlink()
        done = 0
        progress = tqdm(list(self._cases()), desc=f"labels of {target.name}", unit="case")
        for source, case, files in progress:
            label = scratch / "labelsTr" / f"{source.merged_case(case)}{ending}"
            if label.is_file():
                done += 1
                continue
            partial = label.with_name(f".partial_{label.name}")
            self._write_label(source, case, files, partial)
            partial.rename(label)
        write_dataset_json(scratch, self.dataset_json(target, same))
        record.unlink()
        scratch.rename(target)
        return done

    def _cases(self) -> Iterator[tuple[MergeSource, str, dict[str, Any]]]:
        for source in self.sources:
            for case, files in source.cases.items():
                yield source, case, files

    def _write_label(self, source: MergeSource, case: str, files: Mapping[str, Any], path: Path) -> None:
        from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

        reader = determine_reader_writer_from_dataset_json(source.dataset_json, files["images"][0], verbose=False)()
        seg, properties = reader.read_seg(files["label"])
        try:
            values = nearest_hosts(np.rint(seg[0]).astype(np.int64), self.hosts_of(source), properties["spacing"])
            merged = relabeled(values, self.table_of(source), source.folder / "dataset.json")
        except ZePTError as error:
            raise ZePTError(f"{files['label']}: {error}") from error
        if source.organs_from is not None:
            organs = {
                n: self.labels[c.name] for c in self.classes for n, v in c.members.get(source.id, []) if v is None
            }
            merged = source.organs_from.under(merged, case, organs, reader)
        reader.write_seg(merged, str(path), properties)

    # ------------------------------------------------------------------------------------------------ splits
    def splits(self, same: Mapping[str, str], seed: int = 12345) -> list[dict[str, list[str]]]:
        """Five folds: each dataset is spread over all of them, and a patient's scans, and one scan of several datasets,
        stay together. Fewer patients than folds: as many folds as patients.
        """
        from sklearn.model_selection import StratifiedGroupKFold  # type: ignore[import-untyped]

        names, strata, groups = [], [], []
        for source, case, _ in self._cases():
            name = source.merged_case(case)
            names.append(name)
            strata.append(source.id)
            groups.append(self.patient_of(source, case))
        patient = dict(zip(names, groups, strict=True))
        ties = Ties()
        for name, leader in same.items():  # scans that are the same tie their patients together
            ties.tie(patient[name], patient[leader])
        roots = [ties.root(g) for g in groups]
        folds = min(NUM_FOLDS, len(set(roots)))
        if folds < 2:
            raise ZePTError("all cases are of one patient: there is nothing to validate on")
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The least populated class")  # a dataset of fewer cases than folds
            split = [
                {"train": sorted(names[i] for i in train), "val": sorted(names[i] for i in val)}
                for train, val in splitter.split(names, strata, roots)
            ]
        return split

    def patient_of(self, source: MergeSource, case: str) -> str:
        """By the map's expression, or the case itself.

        Raises:
            ZePTError: the expression does not fit the case.
        """
        expression = self.mapping.patients.get(source.id)
        if expression is None:
            return f"{source.id}/case/{case}"
        found = expression.search(case)
        if found is None:
            raise ZePTError(f"the map's patients[{source.id}] {expression.pattern!r} does not fit the case {case!r}")
        return f"{source.id}/patient/{found[1]}"


def _record_of(folder: Path) -> dict[str, Any] | None:
    try:
        entry = json.loads((folder / "dataset.json").read_text(encoding="utf-8")).get(KEY)
    except (OSError, json.JSONDecodeError):
        return None
    return entry if isinstance(entry, dict) else None
