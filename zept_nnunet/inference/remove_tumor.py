"""The inverse of adding a tumor: a model folder without it. Where none is left, its files are those of training."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zept_nnunet import plans_block
from zept_nnunet.errors import ZePTError
from zept_nnunet.inference.add_tumor import (
    CHANGED_KEYS,
    AddedTumors,
    TumorRequest,
    assign_labels,
    extend_dataset_json,
    write_checked,
)
from zept_nnunet.inference.model_folder import check_checkpoints, folds, output, read_json
from zept_nnunet.knowledge import KnowledgeBank
from zept_nnunet.names import normalize_name
from zept_nnunet.taxonomy import Taxonomy


def remove_tumors(
    model_folder: str | os.PathLike[str],
    names: Sequence[str],
    output_folder: str | os.PathLike[str] | None = None,
    copy_checkpoints: bool = False,
) -> AddedTumors:
    """Write a model folder without the named tumors, which `add_tumors` had added. The old folder stays as it is.

    Args:
        model_folder: one that `add_tumors` has written.
        names: of added tumors, in any spelling.
        output_folder: any new folder; None: the sibling `TRAINER__PLANS_minus__CONFIGURATION`, or, where no added tumor
            is left, the one with the plans' name from before any addition.
        copy_checkpoints: copy the checkpoints even where they could be hard links.

    Returns:
        The new folder, and the added tumors that are left in it, with their labels: nnU-Net's plain labels leave no
        gaps, so those behind a removed one move up.

    Raises:
        ZePTError: a name is no added tumor, or the folder is no model; nothing has been written then.
    """
    source = Path(model_folder)
    plans, dataset_json = read_json(source / "plans.json"), read_json(source / "dataset.json")
    block = plans_block.read_block(plans, str(source / "plans.json"))
    taxonomy = Taxonomy.from_dict(block["taxonomy"])
    added = {normalize_name(t.name): t for t in taxonomy.tumors if t.added}
    if not names:
        raise ZePTError("no tumor to remove: give --name NAME")
    for name in names:
        if normalize_name(name) not in added:
            trained = normalize_name(name) in {normalize_name(c.name) for c in taxonomy.classes}
            why = "was trained, and only added tumors can be removed" if trained else "is no class of the model"
            raise ZePTError(f"{name!r} {why}; added are: {[t.name for t in added.values()] or 'none'}")
    plans_block.check_own_texts(block, dataset_json, str(source), names)
    before = block.get("before")
    if before is None:
        raise ZePTError(
            f"{source / 'plans.json'} does not say what the model was before; it was written by another version. The "
            "folder that the tumor was added to still stands where it was"
        )
    gone = {normalize_name(name) for name in names}
    kept = [t for key, t in added.items() if key not in gone]
    if kept:
        target, plans_name = output(source, output_folder, plans, lambda name: f"{name}_minus")
    else:
        stands = "the model as it was trained; give -o FOLDER for another copy of it"
        plans_name = before["plans_name"] or "nnUNetPlans"  # before any addition, however many there were
        target, _ = output(source, output_folder, plans, lambda _: plans_name, stands)
    trained_folds = folds(source)
    configuration = check_checkpoints(source, trained_folds, block)

    texts = (dataset_json.get("zept") or {}).get("knowledge") or {}
    texts = {normalize_name(n): text for n, text in texts.items()}
    new_dataset_json = _restored(dataset_json, copy.deepcopy(before["dataset_json"]))
    new_taxonomy = Taxonomy.from_dict(before["taxonomy"])
    requests = [
        TumorRequest(t.name, t.hosts, texts.get(normalize_name(t.name)), t.label if taxonomy.has_regions else None)
        for t in kept
    ]
    for request in assign_labels(requests, new_dataset_json, source) if requests else []:
        assert request.hosts is not None and request.label is not None
        new_taxonomy = new_taxonomy.with_tumor(request.name, request.label, request.hosts)
        extend_dataset_json(new_dataset_json, request)
    bank = KnowledgeBank.from_dict(block["knowledge"]).without([t.name for k, t in added.items() if k in gone])
    new_block = {
        **block,
        "taxonomy": new_taxonomy.to_dict(),
        "knowledge": bank.to_dict(),
        "added": {t.name: block["added"][t.name] for t in kept},
    }
    thresholds = {n: t for n, t in block.get("thresholds", {}).items() if normalize_name(n) not in gone}
    if not thresholds:
        new_block.pop("thresholds", None)
    else:
        new_block["thresholds"] = thresholds
    if not kept:
        del new_block["added"], new_block["before"]
    new_plans = {**plans, "plans_name": plans_name, "zept": new_block}
    old_labels = {t.name: t.label for t in kept}
    left = tuple((t.name, t.label, t.hosts) for t in new_taxonomy.tumors if t.added)
    notes = [f"{n!r} moved from label {old_labels[n]} to {v}" for n, v, _ in left if old_labels[n] != v]
    old_ignore, ignore = (d["labels"].get("ignore") for d in (dataset_json, new_dataset_json))
    if ignore != old_ignore:
        notes.append(f"the ignore label moved from {old_ignore} to {ignore}")
    notes += write_checked(source, target, trained_folds, new_plans, new_dataset_json, copy_checkpoints, configuration)
    return AddedTumors(target, plans_name, left, tuple(notes))


def _restored(dataset_json: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """dataset.json as it was; entries that adding did not change stand where they stood."""
    return {
        key: before.get(key, value) for key, value in dataset_json.items() if key not in CHANGED_KEYS or key in before
    }
