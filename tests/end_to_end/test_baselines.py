"""`zept baseline` end to end: every baseline writes the same form; what is finished is skipped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from tests.commands import Workspace
from tests.conftest import make_dataset, read_json
from tests.small_ct import LABELS, demo_dataset_json
from zept_nnunet.commands.baseline import RECIPES, RECORD

pytestmark = pytest.mark.slow

CLASSES = ["liver tumor", "kidney tumor", "pancreas tumor"]
FLAGS = ("-device", "cpu", "-np", "1", "--epochs", "1", "--iterations", "2", "--disable_tta")


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Dataset 1, planned; dataset 2, the same cases with the pancreas tumor among the labels."""
    space = Workspace(tmp_path_factory.mktemp("baselines"))
    source = make_dataset(space, 1)
    space.plan(1, "-c", "3d_fullres")
    names = [f"demo_{i:03d}" for i in range(5)]
    split = [{"train": names[1:], "val": names[:1]}, {"train": names[:4], "val": names[4:]}]
    (space.preprocessed / source.name / "splits_final.json").write_text(json.dumps(split))
    supervised = space.raw / "Dataset002_Supervised"
    (supervised / "labelsTr").mkdir(parents=True)
    cases = {}
    for file in sorted((source / "labelsTr").glob("*.nii.gz")):
        image = sitk.ReadImage(str(file))
        labels = sitk.GetArrayFromImage(image)
        places = np.argwhere(labels == LABELS["pancreas"])
        labels[tuple(places[: len(places) // 3].T)] = 8
        changed = sitk.GetImageFromArray(labels)
        changed.CopyInformation(image)
        sitk.WriteImage(changed, str(supervised / "labelsTr" / file.name))
        case = file.name.removesuffix(".nii.gz")
        images = [f"../{source.name}/imagesTr/{case}_0000.nii.gz"]
        cases[case] = {"images": images, "label": f"labelsTr/{file.name}"}
    content = demo_dataset_json(len(cases)) | {"dataset": cases, "labels": {**LABELS, "pancreas tumor": 8}}
    content["zept"] = {"tumors": {"pancreas tumor": {"hosts": ["pancreas"]}}}
    (supervised / "dataset.json").write_text(json.dumps(content))
    return space


def baseline(space: Workspace, name: str, fails: bool = False) -> tuple[str, Path]:
    output = space.root / "predictions" / name
    more = ("--supervised-dataset", "2") if name == "supervised" else ()
    return space.run("zept", "baseline", name, "-d", "1", "-o", output, *FLAGS, *more, fails=fails), output


@pytest.mark.parametrize("name", RECIPES)
def test_every_baseline_writes_the_same_form(space: Workspace, name: str) -> None:
    _, output = baseline(space, name)
    image = sitk.ReadImage(str(space.raw / "Dataset001_ZePTDemo" / "imagesTs" / "test_000_0000.nii.gz"))
    segmentation = sitk.ReadImage(str(output / "test_000.nii.gz"))
    assert (segmentation.GetSize(), segmentation.GetOrigin()) == (image.GetSize(), image.GetOrigin())
    assert set(np.unique(sitk.GetArrayFromImage(segmentation))) <= set(range(9))
    with np.load(output / "test_000_scores.npz") as saved:
        assert saved["classes"].tolist() == CLASSES
        assert saved["logits"].dtype == np.float16
        assert saved["logits"].shape == (3, *image.GetSize()[::-1])
        assert np.isfinite(saved["logits"]).all() and np.abs(saved["logits"]).max() <= 1000
        assert len(np.unique(saved["logits"])) > 10
    described = read_json(output / "dataset.json")
    assert described["labels"] == {**LABELS, "pancreas tumor": 8}
    assert described["zept"]["tumors"]["pancreas tumor"] == {"hosts": ["pancreas"]}
    added = [t["name"] for t in read_json(output / "plans.json")["zept"]["taxonomy"]["tumors"] if t["added"]]
    assert added == ["pancreas tumor"]
    record = read_json(output / RECORD)
    assert record["baseline"] == name and record["budget"]["iterations"] == 2
    assert ("threshold" in record) == (name in ("max_logit", "entropy", "host_deviation"))
    files = {"test_000.nii.gz", "test_000_scores.npz", "dataset.json", "plans.json", RECORD}
    assert {p.name for p in output.iterdir()} - {"predict_from_raw_data_args.json"} == files


def test_plans_and_split_are_those_of_the_source(space: Workspace) -> None:
    planned = space.preprocessed / "Dataset001_ZePTDemo"
    derived = [p for p in space.preprocessed.glob("Dataset99*") if p.is_dir()]
    assert derived
    for folder in derived:
        ours, theirs = (read_json(f / "nnUNetPlans.json") for f in (folder, planned))
        assert ours.pop("dataset_name") == folder.name and theirs.pop("dataset_name") == planned.name
        assert ours == theirs
        assert read_json(folder / "splits_final.json") == read_json(planned / "splits_final.json")


def test_what_is_finished_is_skipped_and_another_budget_is_refused(space: Workspace) -> None:
    baseline(space, "any_tumor")
    shown, output = baseline(space, "any_tumor")
    assert "$ nnUNetv2" not in shown and "next: zept evaluate" in shown
    command = ("zept", "baseline", "any_tumor", "-d", "1", *FLAGS, "--epochs", "2")
    assert "another run" in space.run(*command, "-o", output, fails=True)
    assert "another budget" in space.run(*command, "-o", space.root / "elsewhere", fails=True)
