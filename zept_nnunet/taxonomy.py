"""dataset.json → which labels are organs, which are tumors, each tumor's hosts, and which output channel reports what.

The only place that knows which channel is which class. No torch. Names decide (`names.py`) where the dataset says
nothing; its optional `zept` block (`declarations.py`) decides where it does.

Roles and hosts belong to *atomic* classes, one per label value. In a dataset of regions, a label value is called after
the smallest region that holds it: of "liver": [1, 2] and "liver tumor": [2], class "liver" is value 1, healthy tissue.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from zept_nnunet.declarations import (
    Unseen,
    annotated_for,
    annotated_patterns,
    check_knowledge,
    declared_hosts,
    declared_roles,
    read_unseen,
    undetermined_host,
)
from zept_nnunet.errors import ZePTError
from zept_nnunet.labels import RESERVED, LabelSet, read_labels
from zept_nnunet.names import infer_hosts, infer_is_tumor, is_lateral, normalize_name
from zept_nnunet.public_datasets import label_readings, read_as

__all__ = [
    "Organ",
    "Taxonomy",
    "Tumor",
    "Unseen",
    "annotated_for",
    "annotated_patterns",
    "declared_unseen",
    "normalize_name",
]

_WHOLE_BODY = "(whole body)"


@dataclass(frozen=True)
class Organ:
    """A class of healthy tissue. `label` is its value in the segmentations."""

    name: str
    label: int


@dataclass(frozen=True)
class Tumor:
    """A class of abnormal tissue, and the organs that it sits in."""

    name: str
    label: int
    hosts: tuple[str, ...]  # () : the whole body is the host
    added: bool = False  # by `zept add-tumor`, after training


@dataclass(frozen=True)
class Taxonomy:
    """The classes of a dataset or model."""

    organs: tuple[Organ, ...]  # ascending by label
    tumors: tuple[Tumor, ...]  # ascending by label, added ones last
    channels: tuple[tuple[str, ...], ...]  # per output channel, the classes whose union it reports; () is background
    has_regions: bool
    ignore_label: int | None
    declared: frozenset[str] = field(default=frozenset(), compare=False, repr=False)  # named by the zept block
    # of a public dataset: label names, normalized, and what they mean there
    readings: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_dataset_json(cls, dataset_json: dict[str, Any], source: str = "dataset.json") -> Taxonomy:
        """Read the taxonomy, and check the whole `zept` block.

        A tumor in a dataset without any organ has the whole body as its host, and so has one of a public dataset that
        labels others than the tumor's hosts; a Python warning says so.

        Raises:
            ZePTError: the labels are not as nnU-Net wants them; a host cannot be determined or is no organ; the `zept`
                block holds an unknown key or class; an unseen tumor is a label.
        """
        labels = read_labels(dataset_json, source)
        taxonomy = _read(dataset_json, labels, source)
        unseen = read_unseen(dataset_json, labels, taxonomy._organ_labels(), source)
        check_knowledge(dataset_json, [*labels.atoms.values(), *(u.name for u in unseen)], source)
        annotated_patterns(dataset_json, source)
        homeless = [t.name for t in taxonomy.tumors if not t.hosts and t.name not in taxonomy.declared]
        if homeless:
            what = "no organ that hosts them" if taxonomy.organs else "no organ"
            warnings.warn(
                f"{source} labels {what}: the whole body is taken as the host of {homeless}. Label the organ, or say "
                "that this is meant: 'zept': {'tumors': {NAME: {'hosts': []}}}",
                stacklevel=2,
            )
        return taxonomy

    @property
    def classes(self) -> tuple[Organ | Tumor, ...]:
        """Organs, then tumors."""
        return (*self.organs, *self.tumors)

    @property
    def trained_tumors(self) -> tuple[Tumor, ...]:
        """The tumors that stood in the training labels."""
        return tuple(t for t in self.tumors if not t.added)

    @property
    def is_lateral(self) -> bool:
        """Whether a class name holds a side, so that mirroring left and right would swap classes."""
        return any(is_lateral(c.name) for c in self.classes)

    def reading(self, name: str) -> str:
        """What a class name means: of "cancer" in MSD Lung "lung tumor"; most names mean themselves."""
        return read_as(name, self.readings)

    @property
    def next_label(self) -> int:
        """The value that an added tumor gets where none is asked for."""
        return max((c.label for c in self.classes), default=0) + 1

    def host_indices(self) -> tuple[tuple[int, ...], ...]:
        """Per tumor: indices of its hosts in `organs`."""
        index = {o.name: i for i, o in enumerate(self.organs)}
        return tuple(tuple(index[host] for host in t.hosts) for t in self.tumors)

    def channel_indices(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """Per channel: indices in `organs` and in `tumors` of the classes that it reports."""
        organ = {o.name: i for i, o in enumerate(self.organs)}
        tumor = {t.name: k for k, t in enumerate(self.tumors)}
        return tuple(
            (tuple(organ[n] for n in names if n in organ), tuple(tumor[n] for n in names if n in tumor))
            for names in self.channels
        )

    def with_tumor(self, name: str, label: int, hosts: Iterable[str]) -> Taxonomy:
        """A copy with one more tumor, marked as added, and one more channel, the last, that reports it alone.

        nnU-Net wants the ignore label to be the highest plus one, so it moves up where needed. The caller extends
        dataset.json to match (labels; of regions, also regions_class_order).

        Raises:
            ZePTError: the name or the label is taken, the label leaves a gap in plain labels, or a host is no organ.
        """
        taken = {normalize_name(c.name): c.label for c in self.classes}
        if normalize_name(name) in taken or normalize_name(name) in (*RESERVED, ""):
            raise ZePTError(
                f"cannot add {name!r}: the model has a class of that name; choose one besides {sorted(taken)}"
            )
        owner = next((c.name for c in self.classes if c.label == label), None)
        if owner is not None or label < 1:
            raise ZePTError(
                f"cannot add {name!r} as label {label}: that is {owner or 'background'!r}; {self.next_label} is free"
            )
        if not self.has_regions and label != self.next_label:
            raise ZePTError(
                f"cannot add {name!r} as label {label}: nnU-Net's plain labels leave no gaps, so the next one is "
                f"{self.next_label}; use it, or add the tumors in the order of their labels"
            )
        by_name = {normalize_name(o.name): o.name for o in self.organs}
        unknown = [h for h in hosts if normalize_name(h) not in by_name]
        if unknown:
            raise ZePTError(f"cannot add {name!r} with host {unknown}: the model's organs are {list(by_name.values())}")
        tumor = Tumor(name, label, tuple(dict.fromkeys(by_name[normalize_name(h)] for h in hosts)), added=True)
        highest = max(label, self.next_label - 1)
        return replace(
            self,
            tumors=(*self.tumors, tumor),
            channels=(*self.channels, (name,)),
            ignore_label=None if self.ignore_label is None else highest + 1,
        )

    def _organ_labels(self) -> dict[int, str]:
        return {o.label: o.name for o in self.organs}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "organs": [{"name": o.name, "label": o.label} for o in self.organs],
            "tumors": [
                {"name": t.name, "label": t.label, "hosts": list(t.hosts), "added": t.added} for t in self.tumors
            ],
            "channels": [list(names) for names in self.channels],
            "has_regions": self.has_regions,
            "ignore_label": self.ignore_label,
        }

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Taxonomy:
        """Inverse of `to_dict`.

        Raises:
            ZePTError: an entry is missing, or a host or channel names a class that is not there.
        """
        try:
            taxonomy = cls(
                tuple(Organ(o["name"], o["label"]) for o in d["organs"]),
                tuple(Tumor(t["name"], t["label"], tuple(t["hosts"]), t["added"]) for t in d["tumors"]),
                tuple(tuple(names) for names in d["channels"]),
                d["has_regions"],
                d["ignore_label"],
            )
            taxonomy.host_indices()
        except (KeyError, TypeError) as e:
            raise ZePTError(
                f"the taxonomy in the plans is damaged ({e!r}); plan and train again, or restore the file"
            ) from e
        known = {c.name for c in taxonomy.classes}
        unknown = {n for names in taxonomy.channels for n in names} - known
        if unknown:
            raise ZePTError(f"the taxonomy in the plans reports classes that it does not hold: {sorted(unknown)}")
        return taxonomy

    def table(self) -> str:
        """The classes as a table to read: label, name, role, hosts, channels, and who decided the role and hosts."""
        rows = [("label", "name", "role", "hosts", "channel", "from")]
        for c in sorted(self.classes, key=lambda c: c.label):
            is_tumor = isinstance(c, Tumor)
            channels = ", ".join(str(i) for i, names in enumerate(self.channels) if c.name in names)
            hosts = (", ".join(c.hosts) or _WHOLE_BODY) if isinstance(c, Tumor) else ""
            origin = (
                "added" if isinstance(c, Tumor) and c.added else "declared" if c.name in self.declared else "inferred"
            )
            rows.append((str(c.label), c.name, "tumor" if is_tumor else "organ", hosts, channels, origin))
        if self.ignore_label is not None:
            rows.append((str(self.ignore_label), "ignore", "", "", "", ""))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def declared_unseen(dataset_json: dict[str, Any], source: str = "dataset.json") -> tuple[Unseen, ...]:
    """The tumors of `zept.unseen`, those with a label first and ascending: the order in which they can be added.

    Raises:
        ZePTError: as `Taxonomy.from_dataset_json`.
    """
    labels = read_labels(dataset_json, source)
    return read_unseen(dataset_json, labels, _read(dataset_json, labels, source)._organ_labels(), source)


def _read(dataset_json: Mapping[str, Any], labels: LabelSet, source: str) -> Taxonomy:
    """Organs, tumors, hosts and channels."""
    tumors, organs = declared_roles(dataset_json, labels, source)
    readings = label_readings(dataset_json, source)

    def read(name: str) -> str:
        return read_as(name, readings)

    def declaration(value: int) -> tuple[bool, dict[str, Any]] | None:
        """(is tumor, settings) where the block names the class, or a region that makes it a tumor."""
        regions = labels.regions_of(value)
        for depth, name in enumerate([labels.atoms[value], *regions]):
            if normalize_name(name) in tumors:
                return True, tumors[normalize_name(name)]
            if normalize_name(name) in organs and depth < 2:  # itself, or the region it is called after
                return False, {}
        return None

    declarations = {v: declaration(v) for v in labels.atoms}
    is_tumor = {
        v: d[0] if d is not None else infer_is_tumor(read(labels.regions_of(v)[0])) for v, d in declarations.items()
    }
    organ_names = {v: name for v, name in labels.atoms.items() if not is_tumor[v]}
    read_organs = {read(name): name for name in organ_names.values()}
    found_tumors = []
    for value in (v for v in labels.atoms if is_tumor[v]):
        settings = (declarations[value] or (True, {}))[1]
        name = labels.atoms[value]
        if "hosts" in settings:
            hosts = declared_hosts(settings["hosts"], labels, organ_names, f"{source}, zept.tumors[{name!r}].hosts")
        else:
            hosts = tuple(read_organs[o] for o in infer_hosts(read(name), read_organs))
            hosts = hosts or _enclosing_organs(value, labels, organ_names, organs, set(tumors))
            if not hosts and organ_names and normalize_name(name) not in readings:
                raise undetermined_host(name, "tumors", organ_names.values(), source)
        found_tumors.append(Tumor(name, value, hosts))
    return Taxonomy(
        tuple(Organ(name, v) for v, name in organ_names.items()),
        tuple(found_tumors),
        (() if labels.has_regions else ((),)) + _channels(labels),
        labels.has_regions,
        labels.ignore_label,
        frozenset(labels.atoms[v] for v, d in declarations.items() if d is not None),
        readings,
    )


def _channels(labels: LabelSet) -> tuple[tuple[str, ...], ...]:
    """Regions in dataset.json's order, plain labels ascending: the order of nnU-Net's output channels."""
    if labels.has_regions:
        return tuple(tuple(labels.atoms[v] for v in values) for values in labels.regions.values())
    return tuple((name,) for name in labels.atoms.values())


def _enclosing_organs(
    value: int, labels: LabelSet, organ_names: Mapping[int, str], forced_organs: set[str], forced_tumors: set[str]
) -> tuple[str, ...]:
    """The organs of the smallest organ regions that hold a tumor's label."""
    best: dict[str, None] = {}
    size = None
    for region in labels.regions_of(value):  # smallest first
        key = normalize_name(region)
        if key in forced_tumors or (infer_is_tumor(region) and key not in forced_organs):
            continue
        members = [organ_names[v] for v in labels.regions[region] if v in organ_names]
        if members and size in (None, len(labels.regions[region])):
            size = len(labels.regions[region])
            best.update(dict.fromkeys(members))
    return tuple(best)
