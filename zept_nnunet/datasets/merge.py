"""Several raw datasets, each of which labels only some classes, in one: images by reference, labels rewritten.

A class is found in two datasets by what its name means (knowledge/catalog.py knows synonyms), or by the user's map.
What each case labels stands in `zept.annotated`; a class that a dataset does not label is not background there, but
unknown.
`zept_merge` in the new dataset.json says where everything came from. nnU-Net reads the training cases from its
`"dataset"` entry.
"""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from zept_nnunet.datasets.merge_map import MergeMap
from zept_nnunet.datasets.model_organs import ModelOrgans
from zept_nnunet.datasets.raw_folder import (
    file_ending_of,
    read_dataset_json,
    training_cases,
)
from zept_nnunet.declarations import Unseen, declared_vectors
from zept_nnunet.errors import ZePTError
from zept_nnunet.knowledge.catalog import catalog
from zept_nnunet.labels import RESERVED
from zept_nnunet.names import (
    infer_hosts,
    is_generic_tumor,
    may_overlap,
    name_key,
    normalize_name,
    numbers_in,
    organs_named,
)
from zept_nnunet.taxonomy import Taxonomy, Tumor, annotated_for, annotated_patterns, declared_unseen

KEY = "zept_merge"
"""Where the dataset.json of a merged dataset says what it is."""
NUM_FOLDS = 5


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
        file_ending_of(dataset_json, folder)
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

    @cached_property
    def reader(self) -> Any:
        """An instance of nnU-Net's reader and writer for this dataset; chosen once, as that may read an image."""
        from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

        example = next(iter(self.cases.values()))["images"][0]
        return determine_reader_writer_from_dataset_json(self.dataset_json, example, verbose=False)()

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
    """What two datasets' names of one class have in common. `hosts`: of a tumor; None: an organ.

    A number that a description leaves out, as that of ribs, tells classes apart.
    """
    entry = catalog().find(name, hosts or (), "organ" if hosts is None else "tumor")
    if entry is None:
        return name_key(name)
    return (*name_key(entry.name), *sorted(numbers_in(name) - numbers_in(entry.name)))


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
            labeled = {normalize_name(c.name) for c in source.taxonomy.classes}
            for name, label, hosts in source.classes():
                # of a label and a model's mask of one name, the map speaks of the label
                named = by_name if label is not None or normalize_name(name) not in labeled else {}
                if named.get(normalize_name(name), "") is None:
                    continue  # left out
                chosen = named.get(normalize_name(name))
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
                    organs_there = {keys[h] for h in hosts if h in keys}
                    if organs_there:
                        host_keys.setdefault(keys[name], {})[source.folder.name] = organs_there
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

    def masks_of(self, source: MergeSource) -> dict[str, int]:
        """Masks of a model that a source takes its organs from → label values in the merged dataset."""
        return {n: self.labels[c.name] for c in self.classes for n, v in c.members.get(source.id, []) if v is None}

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
        self._check_patterns()
        unseen = self._unseen()
        zept |= {"unseen": unseen} if unseen else {}
        knowledge = self._knowledge()
        zept |= {"knowledge": knowledge} if knowledge else {}
        vectors = self._vectors()
        zept |= {"vectors": vectors} if vectors else {}
        annotated = self.annotated()
        zept |= {"annotated": annotated} if annotated else {}
        content = {
            **kept,
            "labels": self.labels,
            "numTraining": len(cases),
            "dataset": cases,
            "zept": zept,
            KEY: {
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

    def _check_patterns(self) -> None:
        """Refuse a pattern of `zept.annotated` that fits no case: those meant by it would count as labeled wholly.

        Raises:
            ZePTError: it fits neither a training case nor a test scan of its dataset.
        """
        for source in self.sources:
            ending = file_ending_of(source.dataset_json, source.folder)
            images = (source.folder / "imagesTs").glob(f"*_0000{ending}")
            labels = (source.folder / "labelsTs").glob(f"*{ending}")
            tests = [p.name.removesuffix(ending).removesuffix("_0000") for p in itertools.chain(images, labels)]
            cases = [*source.cases, *tests]
            unused = [p for p in source.patterns if not any(fnmatchcase(case, p) for case in cases)]
            if unused:
                raise ZePTError(
                    f"{source.folder / 'dataset.json'}, zept.annotated: no case has a name like {unused}. A case that "
                    f"no pattern fits counts as labeled wholly: correct or remove them; cases: {cases[:3]} …"
                )

    def _unseen(self) -> dict[str, Any]:
        """Tumors that some dataset declares unseen and none labels; label values are given anew."""
        labeled = {class_key(c.name, c.hosts) for c in self.classes if c.is_tumor}
        found: dict[str, Any] = {}
        for source in self.sources:
            for unseen in declared_unseen(source.dataset_json, str(source.folder / "dataset.json")):
                names = {n: c.name for c in self.classes for n, _ in c.members.get(source.id, [])}
                known = normalize_name(unseen.name) in map(normalize_name, found)
                if class_key(unseen.name, unseen.hosts) not in labeled and not known:
                    found[unseen.name] = {"hosts": [names[h] for h in unseen.hosts if h in names]}
        return found

    def _knowledge(self) -> dict[str, Any]:
        """The datasets' own descriptions under the merged names.

        Raises:
            ZePTError: two describe one class differently.
        """
        found: dict[str, Any] = {}
        for source in self.sources:
            block = source.dataset_json.get("zept") or {}
            own = {normalize_name(k): v for k, v in (block.get("knowledge") or {}).items()}
            names = [(n, c.name) for c in self.classes for n, _ in c.members.get(source.id, [])]
            unseen = declared_unseen(source.dataset_json, str(source.folder / "dataset.json"))
            names += [(u.name, merged) for u in unseen if (merged := self._merged_unseen(u)) is not None]
            for name, merged in names:
                text = own.get(normalize_name(name))
                if text is not None and found.setdefault(merged, text) != text:
                    raise ZePTError(f"two datasets describe {merged!r} differently (zept.knowledge); keep one")
        return found

    def _merged_unseen(self, unseen: Unseen) -> str | None:
        """The merged name of a tumor that some dataset declares unseen; None where it is left out."""
        labeled = {class_key(c.name, c.hosts): c.name for c in self.classes if c.is_tumor}
        declared = {normalize_name(name): name for name in self._unseen()}
        return labeled.get(class_key(unseen.name, unseen.hosts)) or declared.get(normalize_name(unseen.name))

    def _vectors(self) -> str | None:
        """The file of vectors that the datasets name.

        Raises:
            ZePTError: they name several.
        """
        found = {}
        for source in self.sources:
            path = declared_vectors(source.dataset_json, str(source.folder / "dataset.json"))
            if path is not None:
                found[source.folder.name] = str(path)
        if len(set(found.values())) > 1:
            raise ZePTError(
                f"the datasets name different files of vectors (zept.vectors): {found}. One model has one: write the "
                "vectors of all classes into one file and name it in each dataset.json"
            )
        return next(iter(found.values()), None)

    def cases(self) -> Iterator[tuple[MergeSource, str, dict[str, Any]]]:
        """Every source's cases: the source, the case's name there, its `images` and `label`."""
        for source in self.sources:
            for case, files in source.cases.items():
                yield source, case, files
