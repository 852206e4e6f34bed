"""A tumor for a trained model folder: a new model folder that also reports it.

No weight changes. A class lives in plans.json and dataset.json, so these two are rewritten and the checkpoints are
linked. Everything is checked before the first byte is written, and the folder appears under its name only when it is
complete.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from zept_nnunet import plans_block
from zept_nnunet.declarations import declared_hosts
from zept_nnunet.errors import ZePTError
from zept_nnunet.labels import read_labels
from zept_nnunet.names import infer_hosts, normalize_name
from zept_nnunet.taxonomy import Taxonomy, declared_unseen

CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth")
_FOLD_FILES = ("debug.json", "progress.png", "network_architecture.pdf", "validation/summary.json")
_CROSSVAL_FILES = ("summary.json", "postprocessing.pkl", "postprocessing.json")
_FINGERPRINT_KEY = ".seg_layers.fingerprint"


@dataclass(frozen=True)
class TumorRequest:
    """One tumor to add. What is None is taken from the model's `zept.unseen`, else inferred or chosen."""

    name: str
    hosts: tuple[str, ...] | None = None
    description: str | None = None
    label: int | None = None


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
    dataset_json = _read_json(folder / "dataset.json")
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
) -> AddedTumors:
    """Write a model folder that also reports the requested tumors. The old folder stays as it is.

    Args:
        model_folder: `…/TRAINER__PLANS__CONFIGURATION` of a model trained by a ZePT trainer.
        requests: the tumors, each with a name of its own.
        output_folder: any new folder; None: the sibling `TRAINER__PLANS_plus__CONFIGURATION`.
        copy_checkpoints: copy the checkpoints even where they could be hard links.

    Raises:
        ZePTError: something in the folder or in a request does not fit; nothing has been written then.
    """
    source = Path(model_folder)
    plans, dataset_json = _read_json(source / "plans.json"), _read_json(source / "dataset.json")
    block = plans_block.read_block(plans, str(source / "plans.json"))
    target, plans_name = _output(source, output_folder, plans)
    folds = _folds(source)
    configuration = _check_checkpoints(source, folds, block)
    _refuse_cascade(source, plans, configuration)

    if not requests:
        raise ZePTError("no tumor to add: give --name NAME --host ORGAN, or --declared")
    taxonomy = Taxonomy.from_dict(block["taxonomy"])
    resolved = _assign_labels([_complete(r, taxonomy, dataset_json, source) for r in requests], dataset_json, source)
    notes: list[str] = []
    new_dataset_json = copy.deepcopy(dataset_json)
    for request in resolved:
        assert request.hosts is not None and request.label is not None
        block = plans_block.add_tumor_to_block(block, request.name, request.hosts, request.label, request.description)
        _extend_dataset_json(new_dataset_json, request)
    old_ignore, ignore = (d["labels"].get("ignore") for d in (dataset_json, new_dataset_json))
    if ignore is not None:
        notes.append(
            f"the ignore label moved from {old_ignore} to {ignore}, as nnU-Net wants it above all others: references "
            f"that hold {old_ignore} as ignore cannot be evaluated with this model's dataset.json"
        )
    _check_agreement(block, new_dataset_json, source)
    new_plans = {**plans, "plans_name": plans_name, "zept": block}

    linked = _write(source, target, folds, new_plans, new_dataset_json, copy_checkpoints)
    if linked:
        notes.append(
            f"the checkpoints are hard links to those in {source}: training there again changes this model too "
            "(--copy makes copies)"
        )
    skipped = sorted({p.name for p in source.glob("fold_*") if p.is_dir()} - set(folds))
    if skipped:
        notes.append(f"left out, as they hold no checkpoint yet: {', '.join(skipped)}")
    tumors = tuple((r.name, int(r.label or 0), tuple(r.hosts or ())) for r in resolved)
    return AddedTumors(target, plans_name, tumors, tuple(notes))


# ---------------------------------------------------------------------------------------------------- the old folder
def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ZePTError(
            f"{path.parent} is not a model folder: it holds no {path.name}. Wanted: the folder "
            "TRAINER__PLANS__CONFIGURATION under nnUNet_results that nnUNetv2_train has written"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ZePTError(f"{path} is no valid JSON ({error}); restore the file") from error


def _output(source: Path, output_folder: str | os.PathLike[str] | None, plans: Mapping[str, Any]) -> tuple[Path, str]:
    """The new folder's path and the name that its plans get."""
    plans_name = f"{plans.get('plans_name', 'nnUNetPlans')}_plus"
    here = source.resolve()
    if output_folder is None:
        parts = here.name.split("__")
        if len(parts) != 3:
            raise ZePTError(
                f"{source} is not named TRAINER__PLANS__CONFIGURATION, so the new folder's name cannot be derived from "
                "it; give one with -o"
            )
        plans_name = f"{parts[1]}_plus"
        target = here.parent / "__".join((parts[0], plans_name, parts[2]))
    else:
        target = Path(output_folder).absolute()
        parts = target.name.split("__")
        if len(parts) == 3:  # a folder that -p is to find
            plans_name = parts[1]
    resolved = target.resolve()
    if resolved == here:
        raise ZePTError(f"add-tumor never changes a model in place, and {target} is the model itself; give another -o")
    if here in resolved.parents or resolved in here.parents:
        raise ZePTError(
            f"the output {target} and the model {source} lie inside each other; give another folder with -o"
        )
    if os.path.lexists(target):
        raise ZePTError(f"the output {target} exists already; remove it, or give another folder with -o")
    return target, plans_name


def _folds(source: Path) -> list[str]:
    folds = [p.name for p in sorted(source.glob("fold_*")) if any((p / c).is_file() for c in CHECKPOINTS)]
    if not folds:
        raise ZePTError(
            f"{source} holds no trained fold: wanted fold_*/{CHECKPOINTS[0]} or fold_*/{CHECKPOINTS[1]}. "
            "Train the model first"
        )
    return folds


def _check_checkpoints(source: Path, folds: Iterable[str], block: Mapping[str, Any]) -> str:
    """Every checkpoint belongs to the folder's plans. Returns the configuration."""
    wanted = list(plans_block.fingerprint(block))
    configuration = ""
    for path in (source / f / c for f in folds for c in CHECKPOINTS):
        if not path.is_file():
            continue
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
            weights, init_args = checkpoint["network_weights"], checkpoint["init_args"]
        except Exception as error:  # whatever an unreadable file raises
            raise ZePTError(f"{path} is no readable checkpoint of nnU-Net ({error}); train this fold again") from error
        found = [value for key, value in weights.items() if f".{key}".endswith(_FINGERPRINT_KEY)]
        if not found:
            trainer = checkpoint.get("trainer_name", "another trainer")
            raise ZePTError(
                f"{path} was trained by {trainer}, not by a ZePT trainer: its network has no queries to add to. "
                "Train with -tr ZePTTrainer"
            )
        if found[0].tolist() != wanted:
            raise ZePTError(
                f"{path} was trained with other classes, knowledge or decoder settings than {source / 'plans.json'} "
                f"describes{_which(init_args, block)}. All folds of a model must share them: train this fold again, or "
                "restore the plans.json that belongs to it"
            )
        configuration = init_args["configuration"]
    return configuration


def _which(init_args: Mapping[str, Any], block: Mapping[str, Any]) -> str:
    """What differs, where the checkpoint says it."""
    theirs = (init_args.get("plans") or {}).get("zept") if isinstance(init_args.get("plans"), Mapping) else None
    return f" (differs in: {', '.join(plans_block.differences(theirs, block))})" if theirs else ""


def _refuse_cascade(source: Path, plans: Mapping[str, Any], configuration: str) -> None:
    if PlansManager(dict(plans)).get_configuration(configuration).previous_stage_name is None:
        return
    raise ZePTError(
        f"{source} is the second stage of a cascade ({configuration}): its first convolution has one input channel per "
        "label, so a new label does not fit its weights. Add the tumor to a 3d_fullres, 3d_lowres or 2d model instead, "
        "and keep feeding this cascade with the predictions of the 3d_lowres model as it was trained"
    )


# ---------------------------------------------------------------------------------------------------- the requests
def _complete(request: TumorRequest, taxonomy: Taxonomy, dataset_json: Mapping[str, Any], source: Path) -> TumorRequest:
    """Fill in hosts, label and description; hosts in the taxonomy's spelling."""
    name = request.name.strip()
    key = normalize_name(name)
    if not key:
        raise ZePTError("a tumor needs a name: --name NAME")
    if key in ("background", "ignore"):
        raise ZePTError(f"{request.name!r} is a name that nnU-Net keeps for itself; choose another")
    taken = {normalize_name(n): n for n in dataset_json["labels"]}
    taken |= {normalize_name(c.name): c.name for c in taxonomy.classes}
    if key in taken:
        raise ZePTError(
            f"{request.name!r}: the model in {source} has a class {taken[key]!r} already; choose another name"
        )

    declared = next((t for t in declared_unseen(dict(dataset_json)) if normalize_name(t.name) == key), None)
    texts = (dataset_json.get("zept") or {}).get("knowledge") or {}
    described = next((text for n, text in texts.items() if normalize_name(n) == key), None)
    hosts = request.hosts or (declared.hosts if declared else None)
    organs = [o.name for o in taxonomy.organs]
    if hosts is None and organs:
        hosts = infer_hosts(name, organs)
        if not hosts:
            raise ZePTError(f"the host of {name!r} cannot be determined from its name; give --host, one of {organs}")
    labels = read_labels(dict(dataset_json), str(source / "dataset.json"))
    by_label = {o.label: o.name for o in taxonomy.organs}
    hosts = declared_hosts(list(hosts or ()), labels, by_label, f"{source / 'dataset.json'}, host of {name!r}")
    description = request.description if request.description is not None else described
    if description is not None and not description.strip():
        raise ZePTError(f"{name!r}: the description is empty; write a sentence or leave --description out")
    return TumorRequest(
        name,
        hosts,
        description,
        request.label if request.label is not None else (declared.label if declared else None),
    )


def _label_values(dataset_json: Mapping[str, Any]) -> set[int]:
    """Every label value but that of `ignore`."""
    values: set[int] = set()
    for name, value in dataset_json["labels"].items():
        if name != "ignore":
            values |= {int(v) for v in (value if isinstance(value, list | tuple) else [value])}
    return values


def _has_regions(dataset_json: Mapping[str, Any]) -> bool:
    return any(isinstance(v, list | tuple) and len(v) > 1 for v in dataset_json["labels"].values())


def _assign_labels(
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
def _extend_dataset_json(dataset_json: dict[str, Any], request: TumorRequest) -> None:
    """Add the label (or region), in place; what was declared unseen becomes a tumor."""
    labels = dataset_json["labels"]
    label, key = int(request.label or 0), normalize_name(request.name)
    labels[request.name] = label
    if "ignore" in labels:
        labels["ignore"] = max(_label_values(dataset_json)) + 1
    if _has_regions(dataset_json):
        # painted last, over its host
        dataset_json["regions_class_order"] = [*dataset_json["regions_class_order"], label]

    zept = dataset_json.setdefault("zept", {})
    if "unseen" in zept:
        zept["unseen"] = {n: v for n, v in zept["unseen"].items() if normalize_name(n) != key}
        if not zept["unseen"]:
            del zept["unseen"]
    zept["tumors"] = {**zept.get("tumors", {}), request.name: {"hosts": list(request.hosts or ())}}
    texts = {n: t for n, t in (zept.get("knowledge") or {}).items() if normalize_name(n) != key}
    if request.description is not None:
        texts[request.name] = request.description
    if texts:
        zept["knowledge"] = texts


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


def _write(
    source: Path,
    target: Path,
    folds: Iterable[str],
    plans: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
    copy_checkpoints: bool,
) -> bool:
    """Build the folder under a name of its own beside `target`, then rename. True: something is a hard link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    building = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
    linked = False
    try:
        building.mkdir()
        for name, content in (("plans.json", plans), ("dataset.json", dataset_json)):
            (building / name).write_text(json.dumps(content, indent=4), encoding="utf-8")
        _copy(source, building, "dataset_fingerprint.json")
        for fold in folds:
            for name in _FOLD_FILES:
                _copy(source / fold, building / fold, name)
            for name in CHECKPOINTS:
                if (source / fold / name).is_file():
                    linked |= _link(source / fold / name, building / fold / name, copy_checkpoints)
        for crossval in sorted(source.glob("crossval_results_folds_*")):
            # determined on the trained labels: it goes on to hold for them, and leaves the added one alone
            for name in _CROSSVAL_FILES:
                _copy(crossval, building / crossval.name, name)
            for name in ("plans.json", "dataset.json"):
                if (crossval / name).is_file():
                    _copy(building, building / crossval.name, name)
        if os.path.lexists(target):
            raise ZePTError(f"the output {target} appeared while it was being built; remove it, or give another -o")
        building.rename(target)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return linked


def _copy(source: Path, target: Path, name: str) -> None:
    if (source / name).is_file():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _link(source: Path, target: Path, copy_instead: bool) -> bool:
    """True: hard link. Where the file system has none, a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not copy_instead:
        try:
            os.link(source, target)
            return True
        except OSError:
            pass
    shutil.copyfile(source, target)
    return False
