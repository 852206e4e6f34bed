"""A trained model folder as nnU-Net leaves it, made in a second: a small network with random weights."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from tests.small_plans import DATASET_JSON, make_network, make_plans
from zept_nnunet.plans_block import build_block

IDENTIFIER = "ZePTTrainer__nnUNetPlans__3d_fullres"
IDENTIFIER_2D = "ZePTTrainer__nnUNetPlans__2d"


def make_model_folder(
    root: Path,
    dataset_json: dict[str, Any] | None = None,
    folds: tuple[int, ...] = (0, 1),
    variant: str = "zept",
    dimensions: int = 3,
    **plans_changes: Any,
) -> Path:
    """`root`/Dataset999_Small/IDENTIFIER with all files that training and cross-validation write. Returns it."""
    dataset_json = deepcopy(dataset_json or DATASET_JSON)
    folder = root / "Dataset999_Small" / (IDENTIFIER if dimensions == 3 else IDENTIFIER_2D)
    folder.mkdir(parents=True)
    plans = {**make_plans(dimensions), "zept": build_block(dataset_json, variant), **plans_changes}
    next(iter(plans["configurations"].values())).update(
        {
            "resampling_fn_data": "resample_data_or_seg_to_shape",
            "resampling_fn_seg": "resample_data_or_seg_to_shape",
            "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
            "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
            "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
            "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None},
        }
    )
    plans["foreground_intensity_properties_per_channel"] = {
        "0": {"mean": 0.0, "std": 1.0, "percentile_00_5": -3.0, "percentile_99_5": 3.0}
    }
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    (folder / "dataset_fingerprint.json").write_text("{}")
    for fold in folds:
        write_checkpoint(folder, fold, plans, dataset_json)
        (folder / f"fold_{fold}" / "debug.json").write_text("{}")
        (folder / f"fold_{fold}" / "progress.png").write_bytes(b"png")
        (folder / f"fold_{fold}" / "validation").mkdir()
        (folder / f"fold_{fold}" / "validation" / "summary.json").write_text("{}")
        (folder / f"fold_{fold}" / "validation" / "case.nii.gz").write_bytes(b"")
    crossval = folder / "crossval_results_folds_0_1"
    crossval.mkdir()
    for name in ("summary.json", "postprocessing.json"):
        (crossval / name).write_text("{}")
    for name in ("plans.json", "dataset.json"):
        shutil.copyfile(folder / name, crossval / name)
    (crossval / "postprocessing.pkl").write_bytes(b"pkl")
    return folder


def write_checkpoint(
    folder: Path, fold: int, plans: dict[str, Any], dataset_json: dict[str, Any], **changes: Any
) -> Path:
    """checkpoint_final.pth and checkpoint_best.pth of a fold, with the keys that nnU-Net's predictor reads."""
    configuration = next(iter(plans["configurations"]))
    network = make_network(2 if configuration == "2d" else 3, block=plans["zept"], seed=fold)
    torch.manual_seed(100 + fold)
    for name, parameter in network.named_parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # the initial maps are nearly constant: make them differ
        if "heads.2.bias" in name:  # and no class win everywhere
            parameter.data.fill_(0.5 if name.endswith("bias.bias") else 0.0)
        if name.endswith("heads.2.norm.weight"):
            parameter.data.fill_(4.0)
    checkpoint = {
        "network_weights": network.state_dict(),
        "trainer_name": "ZePTTrainer",
        "inference_allowed_mirroring_axes": (2,),
        "init_args": {"plans": plans, "configuration": configuration, "fold": fold, "dataset_json": dataset_json},
        **changes,
    }
    (folder / f"fold_{fold}").mkdir(exist_ok=True)
    path = folder / f"fold_{fold}" / "checkpoint_final.pth"
    torch.save(checkpoint, path)
    torch.save(checkpoint, path.with_name("checkpoint_best.pth"))
    return path


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
