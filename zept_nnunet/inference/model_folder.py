"""Trained model folders as nnU-Net leaves them: reading one, and writing another that shares its checkpoints.

A class lives in plans.json and dataset.json, so these two are rewritten and the checkpoints are linked. The new folder
appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from zept_nnunet import plans_block
from zept_nnunet.errors import ZePTError
from zept_nnunet.files import nearest_existing, new_parents, written_as

CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth")
_FOLD_FILES = ("debug.json", "progress.png", "network_architecture.pdf", "validation/summary.json")
_CROSSVAL_FILES = ("summary.json", "postprocessing.pkl", "postprocessing.json")
_ORGANS_ALONE = "ZePTTrainerStageI"
_FINGERPRINT_KEY = ".seg_layers.fingerprint"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a model folder.

    Raises:
        ZePTError: it is missing or no JSON object.
    """
    if not path.is_file():
        raise ZePTError(
            f"{path.parent} is not a model folder: it holds no {path.name}. Wanted: the folder "
            "TRAINER__PLANS__CONFIGURATION under nnUNet_results that nnUNetv2_train has written"
        )
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ZePTError(f"{path} is no valid JSON in UTF-8 ({error}); restore the file") from error
    if not isinstance(content, dict):
        raise ZePTError(f"{path} holds {type(content).__name__} where nnU-Net writes an object; restore the file")
    return content


def dump_like(path: Path, content: Mapping[str, Any]) -> str:
    """`content` as JSON in the layout of the file at `path`, so that what did not change keeps its bytes."""
    text = path.read_text(encoding="utf-8")
    end = "\n" if text.endswith("\n") else ""
    parsed = json.loads(text)
    layouts: list[dict[str, Any]] = [{"indent": n, "ensure_ascii": a} for n in (4, 2, None, 1) for a in (True, False)]
    same = (layout for layout in layouts if json.dumps(parsed, **layout) + end == text)
    return json.dumps(content, **next(same, layouts[0])) + end


def output(
    source: Path,
    output_folder: str | os.PathLike[str] | None,
    plans: Mapping[str, Any],
    rename: Callable[[str], str],
    if_there: str = "remove it, or give another folder with -o",
) -> tuple[Path, str]:
    """The new folder's path and the name that its plans get.

    Args:
        output_folder: any new folder; None: a sibling named after the new plans.
        rename: the old plans' name → the new plans'.
        if_there: what to do where the folder exists.

    Raises:
        ZePTError: the folder exists or lies below a file, or it and the model lie inside each other, or no name can be
            derived.
    """
    plans_name = str(plans.get("plans_name", "nnUNetPlans"))
    here = source.resolve()
    if output_folder is None:
        parts = here.name.split("__")
        if len(parts) != 3:
            raise ZePTError(
                f"{source} is not named TRAINER__PLANS__CONFIGURATION, so the new folder's name cannot be derived from "
                "it; give one with -o"
            )
        plans_name = rename(parts[1])
        target = here.parent / "__".join((parts[0], plans_name, parts[2]))
    else:
        target = Path(output_folder).absolute()
        parts = target.name.split("__")
        plans_name = parts[1] if len(parts) == 3 else rename(plans_name)  # as -p is to find it
    resolved = target.resolve()
    if resolved == here:
        raise ZePTError(f"no model is changed in place, and {target} is the model itself; give another folder with -o")
    if here in resolved.parents or resolved in here.parents:
        raise ZePTError(
            f"the output {target} and the model {source} lie inside each other; give another folder with -o"
        )
    if os.path.lexists(target):
        raise ZePTError(f"the output {target} exists already; {if_there}")
    if not (there := nearest_existing(target.parent)).is_dir():
        raise ZePTError(f"the output {target} cannot be written: {there} is no folder; give another with -o")
    return target, plans_name


def folds(source: Path) -> list[str]:
    """Names of the folds that hold a checkpoint.

    Raises:
        ZePTError: there is none.
    """
    found = [p.name for p in sorted(source.glob("fold_*")) if any((p / c).is_file() for c in CHECKPOINTS)]
    if not found:
        raise ZePTError(
            f"{source} holds no trained fold: wanted fold_*/{CHECKPOINTS[0]} or fold_*/{CHECKPOINTS[1]}. "
            "Train the model first"
        )
    return found


def check_checkpoints(source: Path, folds: Iterable[str], block: Mapping[str, Any]) -> str:
    """Every checkpoint belongs to the folder's plans. Returns the configuration.

    Raises:
        ZePTError: one cannot be read, is no ZePT model's, or was trained with other plans.
    """
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
        if checkpoint.get("trainer_name") == _ORGANS_ALONE:
            raise ZePTError(
                f"{path} is a stage I model ({_ORGANS_ALONE}): it reports no tumor at all. Train stage II first, with "
                "-tr ZePTTrainerStageII, or both stages with -tr ZePTTrainer"
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


def refuse_cascade(source: Path, plans: Mapping[str, Any], configuration: str) -> None:
    """A cascade's second stage has an input channel per label: no class can be added.

    Raises:
        ZePTError: the configuration is one.
    """
    if PlansManager(dict(plans)).get_configuration(configuration).previous_stage_name is None:
        return
    raise ZePTError(
        f"{source} is the second stage of a cascade ({configuration}): its first convolution has one input channel per "
        "label, so a new label does not fit its weights. Add the tumor to a 3d_fullres, 3d_lowres or 2d model instead, "
        "and keep feeding this cascade with the predictions of the 3d_lowres model as it was trained"
    )


def write_model(
    source: Path,
    target: Path,
    folds: Iterable[str],
    plans: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
    copy_checkpoints: bool,
    check: Callable[[Path], None],
) -> bool:
    """Build the folder under a name of its own beside `target`, check it, rename it. True: something is a hard link."""
    building = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
    linked = False
    with new_parents(target.parent):
        try:
            with written_as(target, building):
                building.mkdir(parents=True)
                for name, content in (("plans.json", plans), ("dataset.json", dataset_json)):
                    _write(building / name, dump_like(source / name, content))
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
                    update_copies(crossval, building / crossval.name, plans, dataset_json)
            check(building)
            if os.path.lexists(target):
                raise ZePTError(f"the output {target} appeared while it was being built; remove it, or give another -o")
            building.rename(target)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
    return linked


def update_copies(source: Path, target: Path, plans: Mapping[str, Any], dataset_json: Mapping[str, Any]) -> None:
    """What becomes of copies that nnU-Net made of a model's plans.json and dataset.json, in the folder `source`.

    Thresholds stay those of the copy, which may be older than they are: removing what was added gives it back.
    """
    for name, content in (("plans.json", plans), ("dataset.json", dataset_json)):
        if not (source / name).is_file():
            continue
        if name == "plans.json":
            own = (read_json(source / name).get("zept") or {}).get("thresholds", {})
            kept = {t["name"] for t in content["zept"]["taxonomy"]["tumors"]}
            own = {tumor: entry for tumor, entry in own.items() if tumor in kept}
            block = {key: value for key, value in content["zept"].items() if key != "thresholds"}
            content = {**content, "zept": block | ({"thresholds": own} if own else {})}
        target.mkdir(parents=True, exist_ok=True)
        _write(target / name, dump_like(source / name, content))


def _write(path: Path, text: str) -> None:
    """Path.write_text, whose errors do not name the file."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _copy(source: Path, target: Path, name: str) -> None:
    if (source / name).is_file():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _link(source: Path, target: Path, copy_instead: bool) -> bool:
    """True: hard link. Where the file system has none, a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not copy_instead:
        try:
            os.link(source.resolve(), target)  # a relative symbolic link would dangle
            return True
        except OSError:
            pass
    shutil.copyfile(source, target)
    return False
