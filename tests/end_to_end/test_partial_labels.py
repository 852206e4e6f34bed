"""Cases that label only some classes: what cross-validation, ensembling and postprocessing make of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from tests.commands import Workspace
from tests.conftest import read_json

pytestmark = pytest.mark.slow
LABELS = {"background": 0, "liver": 1, "liver tumor": 2}
FULL, WHOLE = ("full_0", "full_1"), ("whole_0", "whole_1", "whole_2")
TRAINER = "ZePTTrainerOracle"


def write_case(raw: Path, case: str) -> None:
    """A liver of intensity 1. In full_* a tumor of intensity 2 is labeled; the liver at its far side is none.

    In whole_* a tumor of intensity 3 that cuts the liver in two is labeled as liver: nobody outlined it.
    """
    image, label = np.zeros((24, 32, 32), np.float32), np.zeros((24, 32, 32), np.uint8)
    liver = np.s_[8:18, 10:22, 4:26]
    image[liver], label[liver] = 1, 1
    if case in FULL:
        tumor = np.s_[10:16, 12:18, 22:29]
        image[tumor], label[tumor] = 2, 2
        image[10:16, 12:18, 29:31] = 1
    else:
        image[8:18, 10:22, 13:18] = 3
    for folder, array in ((f"imagesTr/{case}_0000", image), (f"labelsTr/{case}", label)):
        path = raw / f"{folder}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(sitk.GetImageFromArray(array), str(path))


def steps_of(model: Path) -> list[str]:
    """The classes of which postprocessing keeps the largest component."""
    found = read_json(model / "crossval_results_folds_0" / "postprocessing.json")
    return [str(kwargs["labels_or_regions"]) for kwargs in found["postprocessing_kwargs"]]


def best(workspace: Workspace, name: str) -> dict:
    workspace.run(
        "nnUNetv2_find_best_configuration", "905", "-tr", TRAINER, "-c", "2d", "3d_fullres", "-f", "0", "-np", "1"
    )
    return read_json(workspace.results / name / "inference_information.json")


def test_what_nobody_labeled_misleads_neither_the_choice_of_a_configuration_nor_postprocessing(
    tmp_path: Path,
) -> None:
    workspace, name = Workspace(tmp_path), "Dataset905_Partial"
    raw = workspace.raw / name
    for case in (*FULL, *WHOLE):
        write_case(raw, case)
    dataset = {
        "channel_names": {"0": "noNorm"},
        "labels": LABELS,
        "numTraining": 5,
        "file_ending": ".nii.gz",
        "zept": {"annotated": {"whole_*": ["liver"]}},
    }
    (raw / "dataset.json").write_text(json.dumps(dataset))
    workspace.plan(905, "-c", "2d", "3d_fullres")
    preprocessed = workspace.preprocessed / name
    split = [{"train": list(FULL), "val": [*FULL, *WHOLE]}] * 5
    (preprocessed / "splits_final.json").write_text(json.dumps(split))
    for configuration in ("2d", "3d_fullres"):
        workspace.train(905, configuration, "0", TRAINER, "--npz")

    models = {c: workspace.model(name, c, TRAINER) for c in ("2d", "3d_fullres")}
    chosen = best(workspace, name)
    assert [m["configuration"] for m in chosen["best_model_or_ensemble"]["selected_model_or_models"]] == ["3d_fullres"]
    summary = read_json(models["3d_fullres"] / "crossval_results_folds_0" / "summary.json")
    assert summary["mean"]["2"]["Dice"] == 1.0
    for case in summary["metric_per_case"]:
        dice = {label: m["Dice"] for label, m in case["metrics"].items()}
        if "whole" in case["prediction_file"]:
            assert dice["1"] == 1.0 and np.isnan(dice["2"])
        else:
            assert dice["2"] == 1.0 and dice["1"] < 1.0  # the island
    assert steps_of(models["3d_fullres"]) == ["1"]  # that removes the island

    # the same predictions, judged as if every class were labeled everywhere
    for file in (preprocessed / "dataset.json", *(m / "dataset.json" for m in models.values())):
        content = read_json(file)
        del content["zept"]
        file.write_text(json.dumps(content))
    for configuration in models:
        workspace.train(905, configuration, "0", TRAINER, "--npz", "--val")
    misled = best(workspace, name)["best_model_or_ensemble"]["selected_model_or_models"]
    assert "2d" in [m["configuration"] for m in misled]  # alone, or the two together
    model = models["3d_fullres"]
    workspace.run(
        "nnUNetv2_determine_postprocessing", "-i", model / "crossval_results_folds_0", "-np", "1",
        "-ref", preprocessed / "gt_segmentations", "-plans_json", model / "plans.json",
        "-dataset_json", model / "dataset.json",
    )  # fmt: skip
    assert steps_of(model) == []
