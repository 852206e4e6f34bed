"""A tumor for a trained model: a new model folder that also reports it.

No weight changes. Everything is checked before the first byte is written, and on a small input that the classes which
the model had come out as before.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zept_nnunet import plans_block
from zept_nnunet.declarations import declared_hosts
from zept_nnunet.errors import ZePTError
from zept_nnunet.inference.model_folder import (
    check_checkpoints,
    folds,
    output,
    read_json,
    refuse_cascade,
    write_model,
)
from zept_nnunet.inference.unchanged import check_unchanged
from zept_nnunet.knowledge import KnowledgeSource
from zept_nnunet.knowledge.catalog import catalog
from zept_nnunet.knowledge.dataset import declared_source, like, own_descriptions
from zept_nnunet.knowledge.texts import describe_tumor
from zept_nnunet.labels import read_labels
from zept_nnunet.names import infer_hosts, normalize_name, organs_named
from zept_nnunet.public_datasets import label_readings, read_as
from zept_nnunet.taxonomy import Taxonomy, declared_unseen

# what dataset.json holds that an added tumor changes; the plans keep it, for `zept remove-tumor`
CHANGED_KEYS = ("labels", "regions_class_order", "zept")


@dataclass(frozen=True)
class TumorRequest:
    """One tumor to add. What is None is taken from the model's `zept.unseen`, else inferred or chosen.

    `like`: the name of a built-in description to use.
    """

    name: str
    hosts: tuple[str, ...] | None = None
    description: str | None = None
    label: int | None = None
    like: str | None = None


@dataclass(frozen=True)
class AddedTumors:
    """What was done: the new folder, each tumor's (name, label, hosts), and what the user should know."""

    folder: Path
    plans_name: str
    tumors: tuple[tuple[str, int, tuple[str, ...]], ...]
    notes: tuple[str, ...] = field(default=())


def declared_requests(model_folder: str | os.PathLike[str]) -> list[TumorRequest]:
    """Every tumor that stands in the model's dataset.json under `zept.unseen`.

    Raises:
        ZePTError: no model folder, or nothing is declared.
    """
    folder = Path(model_folder)
    dataset_json = read_json(folder / "dataset.json")
    requests = [TumorRequest(t.name) for t in declared_unseen(dataset_json)]
    if not requests:
        raise ZePTError(
            f"--declared adds what {folder / 'dataset.json'} lists under zept.unseen, and nothing is listed there. "
            "Name the tumor instead: --name NAME --host ORGAN"
        )
    return requests


def add_tumors(
    model_folder: str | os.PathLike[str],
    requests: Sequence[TumorRequest],
    output_folder: str | os.PathLike[str] | None = None,
    copy_checkpoints: bool = False,
    knowledge: KnowledgeSource | None = None,
    keep_vectors: bool = False,
) -> AddedTumors:
    """Write a model folder that also reports the requested tumors. The old folder stays as it is.

    Args:
        model_folder: `…/TRAINER__PLANS__CONFIGURATION` of a model trained by a ZePT trainer.
        requests: the tumors, each with a name of its own.
        output_folder: any new folder; None: the sibling `TRAINER__PLANS_plus__CONFIGURATION`.
        copy_checkpoints: copy the checkpoints even where they could be hard links.
        knowledge: of the tumors' vectors, by the encoder of the model's; default: what the model's dataset.json names
            under `zept.vectors`, else the package's.
        keep_vectors: add them though the package describes classes of the model otherwise than when it was trained.

    Raises:
        ZePTError: something in the folder or in a request does not fit; nothing has been written then.
    """
    source = Path(model_folder)
    plans, dataset_json = read_json(source / "plans.json"), read_json(source / "dataset.json")
    block = plans_block.read_block(plans, str(source / "plans.json"))
    plans_block.check_own_texts(block, dataset_json, str(source))
    target, plans_name = output(source, output_folder, plans, lambda name: f"{name}_plus")
    trained_folds = folds(source)
    configuration = check_checkpoints(source, trained_folds, block)
    refuse_cascade(source, plans, configuration)

    if not requests:
        raise ZePTError("no tumor to add: give --name NAME --host ORGAN, or --declared")
    if not keep_vectors and block["training"]["descriptions"] == "own":
        remedy = "zept plan -d ID, then train, or install the zept-nnunet that trained it, or add with --keep-vectors"
        plans_block.check_planned_texts(block, dataset_json, str(source / "plans.json"), remedy)
    taxonomy = Taxonomy.from_dict(block["taxonomy"])
    notes: list[str] = []
    resolved = assign_labels(
        [_complete(r, taxonomy, dataset_json, source, block["anomalies"], notes) for r in requests],
        dataset_json,
        source,
    )
    knowledge = knowledge or declared_source(dataset_json, str(source / "dataset.json"))
    readings = label_readings(dataset_json, str(source / "dataset.json"))
    before = {
        "plans_name": plans.get("plans_name"),
        "taxonomy": block["taxonomy"],
        "dataset_json": {key: dataset_json[key] for key in CHANGED_KEYS if key in dataset_json},
    }
    new_dataset_json = copy.deepcopy(dataset_json)
    for request in resolved:
        assert request.hosts is not None and request.label is not None
        read_hosts = [read_as(host, readings) for host in request.hosts]
        description = describe_tumor(request.name, read_hosts, request.description)
        block = plans_block.add_tumor_to_block(
            block, request.name, request.hosts, request.label, description, knowledge
        )
        extend_dataset_json(new_dataset_json, request)
    old_ignore, ignore = (d["labels"].get("ignore") for d in (dataset_json, new_dataset_json))
    if ignore is not None:
        notes.append(
            f"the ignore label moved from {old_ignore} to {ignore}, as nnU-Net wants it above all others: references "
            f"that hold {old_ignore} as ignore cannot be evaluated with this model's dataset.json"
        )
    block = {"before": before, **block}
    _check_agreement(block, new_dataset_json, source)
    new_plans = {**plans, "plans_name": plans_name, "zept": block}

    notes += write_checked(source, target, trained_folds, new_plans, new_dataset_json, copy_checkpoints, configuration)
    skipped = sorted({p.name for p in source.glob("fold_*") if p.is_dir()} - set(trained_folds))
    if skipped:
        notes.append(f"left out, as they hold no checkpoint yet: {', '.join(skipped)}")
    tumors = tuple((r.name, int(r.label or 0), tuple(r.hosts or ())) for r in resolved)
    return AddedTumors(target, plans_name, tumors, tuple(notes))


# ---------------------------------------------------------------------------------------------------- the requests
def _complete(
    request: TumorRequest,
    taxonomy: Taxonomy,
    dataset_json: Mapping[str, Any],
    source: Path,
    anomalies: Mapping[str, str],
    notes: list[str],
) -> TumorRequest:
    """Fill in hosts, label and description; hosts in the taxonomy's spelling. What is worth telling goes to `notes`."""
    name = request.name.strip()
    key = normalize_name(name)
    if not key:
        raise ZePTError("a tumor needs a name: --name NAME")
    if key in ("background", "ignore"):
        raise ZePTError(f"{request.name!r} is a name that nnU-Net keeps for itself; choose another")
    taken = {normalize_name(n): n for n in dataset_json["labels"]}
    taken |= {normalize_name(c.name): c.name for c in taxonomy.classes}
    taken |= {normalize_name(n): f"query for {n}" for n in anomalies}
    if key in taken:
        raise ZePTError(
            f"{request.name!r}: the model in {source} has a class {taken[key]!r} already; choose another name"
        )

    if request.like is not None and request.description is not None:
        raise ZePTError(f"{name!r}: --like takes a built-in description, --description brings one; give one of both")
    description = like(request.like, "tumor").text if request.like is not None else request.description
    declared = next((t for t in declared_unseen(dict(dataset_json)) if normalize_name(t.name) == key), None)
    texts = own_descriptions(dataset_json)
    described = next((d.text for n, d in texts.items() if normalize_name(n) == key), None)
    hosts = request.hosts or (declared.hosts if declared else None)
    organs = [o.name for o in taxonomy.organs]
    if hosts is None and organs:
        hosts = _infer_hosts(name, request.like, organs, notes)
    labels = read_labels(dict(dataset_json), str(source / "dataset.json"))
    by_label = {o.label: o.name for o in taxonomy.organs}
    hosts = declared_hosts(list(hosts or ()), labels, by_label, f"{source / 'dataset.json'}, host of {name!r}")
    description = description if description is not None else described
    if description is not None and not description.strip():
        raise ZePTError(f"{name!r}: the description is empty; write a sentence or leave --description out")
    return TumorRequest(
        name,
        hosts,
        description,
        request.label if request.label is not None else (declared.label if declared else None),
    )


def _infer_hosts(name: str, like_name: str | None, organs: Sequence[str], notes: list[str]) -> tuple[str, ...]:
    """The hosts that a tumor's name says, else those of its description, as far as they are organs of the model.

    Raises:
        ZePTError: there are none.
    """
    hosts = organs_named(name, organs)
    entry = None if hosts else catalog().find(like_name or name, kind="tumor")
    if entry is None:
        hosts = hosts or infer_hosts(name, organs)
        if not hosts:
            raise ZePTError(f"the host of {name!r} cannot be determined from its name; give --host, one of {organs}")
        return hosts
    hosts = tuple(dict.fromkeys(o for host in entry.hosts for o in _organs_of_host(host, organs)))
    where = f"the built-in description of {entry.name!r} says {', '.join(entry.hosts)}"
    if not hosts:
        raise ZePTError(
            f"the host of {name!r} cannot be determined: {where}, and that is no organ of the model; give --host, one "
            f"of {list(organs)}"
        )
    notes.append(f"host of {name!r}: {', '.join(hosts)} ({where}); --host names another")
    return hosts


def _organs_of_host(host: str, organs: Sequence[str]) -> tuple[str, ...]:
    described = catalog().find(host, kind="organ")
    same = tuple(o for o in organs if described is not None and catalog().find(o, kind="organ") is described)
    return same or organs_named(host, organs)


def _label_values(dataset_json: Mapping[str, Any]) -> set[int]:
    """Every label value but that of `ignore`."""
    values: set[int] = set()
    for name, value in dataset_json["labels"].items():
        if name != "ignore":
            values |= {int(v) for v in (value if isinstance(value, list | tuple) else [value])}
    return values


def _has_regions(dataset_json: Mapping[str, Any]) -> bool:
    return any(isinstance(v, list | tuple) and len(v) > 1 for v in dataset_json["labels"].values())


def assign_labels(
    requests: Sequence[TumorRequest], dataset_json: Mapping[str, Any], source: Path
) -> list[TumorRequest]:
    """Give each request its label and sort by it; plain labels stay consecutive, of regions a label may leave a gap."""
    keys = [normalize_name(r.name) for r in requests]
    twice = [r.name for r, k in zip(requests, keys, strict=True) if keys.count(k) > 1]
    if twice:
        raise ZePTError(f"{twice[0]!r} is to be added twice; name each tumor once")
    taken = _label_values(dataset_json)
    first = max(taken) + 1
    wanted = range(first, first + len(requests))
    has_regions = _has_regions(dataset_json)
    given: dict[int, str] = {}
    for r in requests:
        if r.label is None:
            continue
        if r.label in taken or r.label in given:
            owner = given.get(r.label, f"a class of {source / 'dataset.json'}")
            raise ZePTError(f"{r.name!r}: the label {r.label} belongs to {owner}; the next free label is {first}")
        if r.label not in wanted and not has_regions:
            raise ZePTError(
                f"{r.name!r}: label {r.label} leaves a gap or is out of order. nnU-Net needs consecutive labels: here "
                f"{list(wanted)}. Leave --label out, or add the tumors of the labels between in the same call "
                "(--declared adds all that the dataset declares)"
            )
        given[r.label] = r.name
    free = (v for v in itertools.count(first) if v not in given)
    return sorted(
        (r if r.label is not None else replace(r, label=next(free)) for r in requests), key=lambda r: r.label or 0
    )


# ---------------------------------------------------------------------------------------------------- the new folder
def extend_dataset_json(dataset_json: dict[str, Any], request: TumorRequest) -> None:
    """Add the label (or region), in place; what was declared unseen becomes a tumor.

    Labels are consecutive. One that another unseen tumor was declared with is taken from it: in this model it can only
    get the next one.
    """
    labels = dataset_json["labels"]
    label, key = int(request.label or 0), normalize_name(request.name)
    labels[request.name] = label
    if "ignore" in labels:
        labels["ignore"] = max(_label_values(dataset_json)) + 1
    if _has_regions(dataset_json):
        # painted last, over its host
        dataset_json["regions_class_order"] = [*dataset_json["regions_class_order"], label]

    zept = dataset_json["zept"] = dict(dataset_json.get("zept") or {})
    if "unseen" in zept:
        zept["unseen"] = {
            n: {k: x for k, x in v.items() if k != "label" or x != label}
            for n, v in zept["unseen"].items()
            if normalize_name(n) != key
        }
        if not zept["unseen"]:
            del zept["unseen"]
    zept["tumors"] = {**zept.get("tumors", {}), request.name: {"hosts": list(request.hosts or ())}}
    texts = {n: t for n, t in (zept.get("knowledge") or {}).items() if normalize_name(n) != key}
    if request.description is not None:
        texts[request.name] = request.description
    if texts:
        zept["knowledge"] = texts


def write_checked(
    source: Path,
    target: Path,
    trained_folds: Sequence[str],
    plans: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
    copy_checkpoints: bool,
    configuration: str,
) -> list[str]:
    """Write the new model folder once it is found to agree with the old one; returns what the user should know."""

    def check(built: Path) -> None:
        check_unchanged(source, built, configuration)

    if not write_model(source, target, trained_folds, plans, dataset_json, copy_checkpoints, check):
        return []
    return [
        f"the checkpoints are hard links to those in {source}: training there again changes this model too "
        "(--copy makes copies)"
    ]


def _check_agreement(block: Mapping[str, Any], dataset_json: dict[str, Any], source: Path) -> None:
    """The new dataset.json must say what the new plans say, or prediction would paint other labels."""
    ours = Taxonomy.from_dict(block["taxonomy"])
    theirs = Taxonomy.from_dataset_json(dataset_json, f"{source / 'dataset.json'}, extended")
    same_tumors = {(t.name, t.label, t.hosts) for t in ours.tumors} == {
        (t.name, t.label, t.hosts) for t in theirs.tumors
    }
    if ours.organs != theirs.organs or ours.channels != theirs.channels or not same_tumors:
        raise ZePTError(
            f"{source / 'dataset.json'} and {source / 'plans.json'} do not describe the same classes:\n"
            f"{theirs.table()}\nagainst\n{ours.table()}\nRestore the dataset.json that the model was trained with"
        )
