"""Stages, resuming, validation flags, cascades, regions, ignore label, ResEnc plans, pretrained weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.commands import Workspace
from tests.conftest import make_dataset, read_json
from tests.small_ct import write_demo_dataset

pytestmark = pytest.mark.slow


def _log(folder: Path) -> str:
    return "\n".join(
        p.read_text() for p in sorted(folder.glob("training_log_*.txt"), key=lambda p: p.stat().st_mtime_ns)
    )


@pytest.mark.parametrize(("stop", "stage"), [("1", 1), ("3", 2)])
def test_resume_lands_in_the_right_epoch_and_stage(workspace: Workspace, planned: Path, stop: str, stage: int) -> None:
    fold = workspace.model(planned.name, "3d_fullres", "ZePTTrainerStops") / f"fold_{stage}"
    workspace.train(901, "3d_fullres", str(stage), "ZePTTrainerStops", fails=True, ZEPT_TEST_STOP=stop)
    checkpoint = torch.load(fold / "checkpoint_latest.pth", weights_only=False)
    assert checkpoint["current_epoch"] == int(stop)
    assert set(checkpoint["logging"]["stage"]) == ({1} if stage == 1 else {1, 2})
    buffers = [s["exp_avg"].norm().item() for s in checkpoint["optimizer_state"]["state"].values()]
    workspace.train(901, "3d_fullres", str(stage), "ZePTTrainerStops", "--c")
    resumed = _log(fold).split("TEST moments")
    found = float(re.search(r"sum ([\d.]+)", resumed[int(stop)]).group(1))  # type: ignore[union-attr]
    assert found == pytest.approx(sum(buffers), rel=1e-4)
    final = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert final["logging"]["stage"] == [1, 2, 2, 2]
    assert len(final["logging"]["loss_tumor"]) == 4
    for key in ("mean_fg_dice", "ema_fg_dice"):
        assert all(value == value for value in final["logging"][key]), f"{key} holds a NaN"


def test_validation_flags(workspace: Workspace, planned: Path) -> None:
    fold = workspace.model(planned.name, "2d", "ZePTTrainerPaperTest") / "fold_0"
    workspace.train(901, "2d", "0", "ZePTTrainerPaperTest", "--disable_checkpointing")
    assert not list(fold.glob("*.pth")) and (fold / "validation" / "summary.json").is_file()
    workspace.train(901, "2d", "0", "ZePTTrainerPaperTest")
    for flags in (("--val", "--npz"), ("--val", "--val_best")):
        (fold / "validation" / "summary.json").unlink()
        workspace.train(901, "2d", "0", "ZePTTrainerPaperTest", *flags)
        assert (fold / "validation" / "summary.json").is_file()
    assert list((fold / "validation").glob("*.npz"))


def test_cascade(workspace: Workspace) -> None:
    folder = make_dataset(workspace, 902)
    workspace.plan(902, "-c", "3d_fullres")
    plans_file = workspace.preprocessed / folder.name / "nnUNetPlans.json"
    plans = read_json(plans_file)
    full = plans["configurations"]["3d_fullres"]
    plans["configurations"]["3d_lowres"] = full | {
        "spacing": [1.5 * s for s in full["spacing"]],
        "data_identifier": "nnUNetPlans_3d_lowres",
        "next_stage": "3d_cascade_fullres",
    }
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    plans_file.write_text(json.dumps(plans))
    workspace.run("nnUNetv2_preprocess", "-d", "902", "-c", "3d_lowres", "-np", "1", "--no_pbar")
    workspace.train(902, "3d_lowres", "all")
    workspace.train(902, "3d_cascade_fullres", "all")
    for stage in ("3d_lowres", "3d_cascade_fullres"):
        summary = workspace.model(folder.name, stage) / "fold_all" / "validation" / "summary.json"
        assert read_json(summary)["metric_per_case"]


def test_regions_with_the_tumor_inside_its_organ(workspace: Workspace) -> None:
    folder = make_dataset(workspace, 903, labels="regions")
    workspace.plan(903, "-c", "3d_fullres")
    workspace.train(903, "3d_fullres")
    model = workspace.model(folder.name, "3d_fullres")
    assert read_json(model / "fold_0" / "validation" / "summary.json")["metric_per_case"]
    workspace.run("zept", "add-tumor", model, "--declared", "-o", workspace.root / "regions_plus")
    out = workspace.root / "regions_pred"
    workspace.run(
        "nnUNetv2_predict_from_modelfolder", "-i", folder / "imagesTs", "-o", out,
        "-m", workspace.root / "regions_plus",
        "-f", "0", "--disable_tta", "-device", "cpu", "-npp", "1", "-nps", "1",
    )  # fmt: skip
    assert list(out.glob("*.nii.gz"))


def test_ignore_label_and_residual_encoder_plans(workspace: Workspace) -> None:
    folder = make_dataset(workspace, 904, labels="ignore")
    workspace.plan(904, "-c", "3d_fullres", "-pl", "nnUNetPlannerResEncM")
    workspace.train(904, "3d_fullres", "0", "ZePTTrainerTest", "-p", "nnUNetResEncUNetMPlans")
    model = workspace.model(folder.name, "3d_fullres", plans="nnUNetResEncUNetMPlans")
    assert read_json(model / "fold_0" / "validation" / "summary.json")["metric_per_case"]


def test_pretrained_weights_carry_over_to_other_labels_and_to_stage_two(workspace: Workspace, planned: Path) -> None:
    workspace.train(901, "3d_fullres", "0", "ZePTTrainerStageITest")
    stage_one = workspace.model(planned.name, "3d_fullres", "ZePTTrainerStageITest") / "fold_0" / "checkpoint_final.pth"
    assert set(torch.load(stage_one, weights_only=False)["logging"]["stage"]) == {1}

    refused = workspace.train(901, "3d_fullres", "0", "ZePTTrainerStageIITest", fails=True)
    assert "-pretrained_weights" in refused
    assert not workspace.model(planned.name, "3d_fullres", "ZePTTrainerStageIITest").exists()
    workspace.train(901, "3d_fullres", "0", "ZePTTrainerStageIITest", "-pretrained_weights", stage_one)

    other = make_dataset(workspace, 905, labels="regions")
    workspace.run("nnUNetv2_extract_fingerprint", "-d", "905", "-np", "1")
    workspace.run(
        "nnUNetv2_move_plans_between_datasets", "-s", "901", "-t", "905", "-sp", "nnUNetPlans", "-tp", "nnUNetPlans"
    )
    (workspace.preprocessed / other.name / "dataset.json").write_text((other / "dataset.json").read_text())
    workspace.run("nnUNetv2_preprocess", "-d", "905", "-c", "3d_fullres", "-np", "1", "--no_pbar")
    workspace.train(905, "3d_fullres", "0", "ZePTTrainerTest", "-pretrained_weights", stage_one)


def test_two_mr_channels_thick_slices_and_zepts_own_plans(workspace: Workspace) -> None:
    folder = write_demo_dataset(workspace.raw, 906, cases_train=5, cases_test=0, shape=(12, 48, 64))
    for image in sorted((folder / "imagesTr").glob("*_0000.nii.gz")):
        shutil.copy(image, str(image).replace("_0000", "_0001"))
    dataset_json = read_json(folder / "dataset.json") | {"channel_names": {"0": "T1", "1": "T2"}}
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    printed = workspace.run("zept", "plan", "-d", "906", "-c", "3d_fullres", "-np", "1", "-npfp", "1", "--no_pbar")
    assert "liver tumor" in printed
    plans = read_json(workspace.preprocessed / folder.name / "ZePTPlans.json")
    spacing = plans["configurations"]["3d_fullres"]["spacing"]
    assert max(spacing) / min(spacing) > 3 and plans["zept"]["taxonomy"]["tumors"]
    workspace.train(906, "3d_fullres", "0", "ZePTTrainerTest", "-p", "ZePTPlans")
    model = workspace.model(folder.name, "3d_fullres", plans="ZePTPlans")
    assert read_json(model / "fold_0" / "validation" / "summary.json")["metric_per_case"]
    assert "no CT channel" in _log(model / "fold_0")


def test_a_bad_dataset_stops_the_stock_command_before_it_writes(
    workspace: Workspace, planned: Path, tmp_path: Path
) -> None:
    other = Workspace(tmp_path)
    source, target = workspace.preprocessed / planned.name, other.preprocessed / planned.name
    target.mkdir()
    shutil.copy(source / "nnUNetPlans.json", target)
    dataset_json = read_json(source / "dataset.json")
    dataset_json["zept"]["tumors"] = {"liver tumor": {"hosts": ["colon"]}}
    (target / "dataset.json").write_text(json.dumps(dataset_json))
    printed = other.train(901, "3d_fullres", "0", "ZePTTrainerTest", fails=True)
    assert "ZePTError" in printed and "colon" in printed and "dataset.json" in printed
    assert not list(other.results.iterdir())
