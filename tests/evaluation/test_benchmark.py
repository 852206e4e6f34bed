"""A test dataset's labels in a model's values: which classes are judged, what the others become, what is refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from tests.datasets.conftest import raw  # noqa: F401 - a fixture
from tests.datasets.test_merge import make
from zept_nnunet.cli import main
from zept_nnunet.errors import ZePTError
from zept_nnunet.evaluation.benchmark import (
    LabeledCases,
    Model,
    jobs_of,
    matched,
    table_of,
    write_references,
    write_table,
)
from zept_nnunet.evaluation.classes import read_class_table
from zept_nnunet.jobs import only_one, run_command

LABELS = {"background": 0, "spleen": 1, "liver": 2, "right kidney": 3, "liver tumor": 4, "kidney tumor": 5}


def model_folder(root: Path, labels: dict[str, int] | None = None, **zept: Any) -> Path:
    folder = root / "ZePTTrainer__nnUNetPlans__3d_fullres"
    folder.mkdir()
    content = {"channel_names": {"0": "CT"}, "labels": labels or LABELS, "numTraining": 1, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content | ({"zept": zept} if zept else {})))
    (folder / "plans.json").write_text(json.dumps({"image_reader_writer": "SimpleITKIO"}))
    return folder


def lits(raw: Path) -> LabeledCases:  # noqa: F811
    labels = {"background": 0, "Liver": 1, "tumor": 2, "gallbladder": 3}
    zept = {"tumors": {"tumor": {"hosts": ["Liver"]}}}
    return LabeledCases.read(make(raw, "Dataset201_LiTS", labels, 2, zept))


def test_references_get_the_models_values_and_say_what_they_label(raw: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = model_folder(tmp_path, unseen={"spleen tumor": {"hosts": ["spleen"], "label": 6}})
    model, test, out = Model.read(str(folder)), lits(raw), tmp_path / "out"
    table, names = matched(model, test)
    assert table == {0: 0, 1: 2, 2: 4, 3: 0} and names == {"Liver": "liver", "tumor": "liver tumor"}
    write_references(model, test, out)
    written = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "labels" / "case0.nii.gz")))
    own = sitk.GetArrayFromImage(sitk.ReadImage(str(test.cases["case0"][1])))
    assert np.array_equal(written, np.vectorize(table.get)(own))
    assert (out / "images" / "case1_0000.nii.gz").resolve() == test.cases["case1"][0][0].resolve()
    classes = read_class_table(model.folder, out / "dataset.json")
    assert classes.annotated_in("case0") == {"liver", "liver tumor"}
    assert [c.name for c in classes.classes] == list(LABELS)[1:]


def test_references_of_another_model_or_of_changed_labels_are_written_anew(raw: Path, tmp_path: Path) -> None:  # noqa: F811
    test, out = lits(raw), tmp_path / "out"
    written = out / "labels" / "case0.nii.gz"

    def values(labels: dict[str, int], cases: LabeledCases = test) -> set[int]:
        content = json.loads((folder / "dataset.json").read_text()) | {"labels": labels}
        (folder / "dataset.json").write_text(json.dumps(content))
        write_references(Model.read(str(folder)), cases, out)
        return set(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(written)))).tolist())

    folder = model_folder(tmp_path)
    assert values({"background": 0, "liver": 1, "liver tumor": 2}) == {0, 1, 2}
    before = written.stat().st_mtime_ns
    assert values({"background": 0, "liver": 1, "liver tumor": 2}) == {0, 1, 2}
    assert written.stat().st_mtime_ns == before
    assert values({"background": 0, "spleen": 1, "liver": 2, "liver tumor": 3}) == {0, 2, 3}
    source = test.cases["case0"][1]
    empty = sitk.ReadImage(str(source)) * 0
    sitk.WriteImage(sitk.Cast(empty, sitk.sitkUInt8), str(source))
    assert values({"background": 0, "spleen": 1, "liver": 2, "liver tumor": 3}) == {0}
    values({"background": 0, "liver": 1}, replace(test, cases={"case0": test.cases["case0"]}))
    assert [p.name for p in (out / "labels").iterdir()] == ["case0.nii.gz"]
    assert [p.name for p in (out / "images").iterdir()] == ["case0_0000.nii.gz"]


def test_a_tumor_that_the_model_lacks_belongs_to_its_host(raw: Path, tmp_path: Path) -> None:  # noqa: F811
    model = Model.read(str(model_folder(tmp_path, {"background": 0, "liver": 1})))
    assert matched(model, lits(raw))[0] == {0: 0, 1: 1, 2: 1, 3: 0}


def test_declared_values_of_unseen_tumors_are_matched_too(raw: Path, tmp_path: Path) -> None:  # noqa: F811
    zept = {"unseen": {"liver tumour": {"hosts": ["liver"], "label": 2}}}
    folder = make(raw, "Dataset202_Unseen", {"background": 0, "liver": 1}, 1, zept=zept)
    table, names = matched(Model.read(str(model_folder(tmp_path))), LabeledCases.read(folder))
    assert table == {0: 0, 1: 2, 2: 4} and names["liver tumour"] == "liver tumor"


def test_cases_that_label_less_are_judged_on_less(raw: Path, tmp_path: Path) -> None:  # noqa: F811
    zept = {"annotated": {"case0": ["liver"]}}
    test = LabeledCases.read(make(raw, "Dataset203_P", {"background": 0, "liver": 1, "liver tumor": 2}, 2, zept=zept))
    out = tmp_path / "out"
    write_references(Model.read(str(model_folder(tmp_path))), test, out)
    classes = read_class_table(tmp_path / "ZePTTrainer__nnUNetPlans__3d_fullres", out / "dataset.json")
    assert classes.annotated_in("case0") == {"liver"} and classes.annotated_in("case1") == {"liver", "liver tumor"}


def test_where_the_host_is_not_labeled_nothing_is_said_within_it(raw: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = make(raw, "Dataset204_T", {"background": 0, "tumor": 1}, 1, zept={"tumors": {"tumor": {"hosts": []}}})
    content = json.loads((folder / "dataset.json").read_text())
    content["labels"], content["zept"] = {"background": 0, "liver tumor": 1}, {"tumors": {"liver tumor": {"hosts": []}}}
    (folder / "dataset.json").write_text(json.dumps(content))
    out = tmp_path / "out"
    write_references(Model.read(str(model_folder(tmp_path))), LabeledCases.read(folder), out)
    classes = read_class_table(tmp_path / "ZePTTrainer__nnUNetPlans__3d_fullres", out / "dataset.json")
    tumor = classes.find("liver tumor")
    assert tumor is not None and not classes.labels_hosts("case0", tumor)
    assert classes.annotated_in("case0") == {"liver tumor"}


def test_test_cases_come_before_training_cases_unless_asked_for(raw: Path) -> None:  # noqa: F811
    folder = make(raw, "Dataset201_LiTS", {"background": 0, "liver": 1}, 2)
    assert list(LabeledCases.read(folder).cases) == ["case0", "case1"]
    for kind, name in (("imagesTs", "t_0000.nii.gz"), ("labelsTs", "t.nii.gz")):
        (folder / kind).mkdir()
        source = next((folder / kind.replace("Ts", "Tr")).iterdir())
        (folder / kind / name).symlink_to(source)
    assert list(LabeledCases.read(folder).cases) == ["t"]
    assert list(LabeledCases.read(folder, "training").cases) == ["case0", "case1"]


def test_one_row_a_dataset_and_class_and_a_column_a_model(tmp_path: Path) -> None:
    models = [Model(name, tmp_path, {}, None) for name in ("ours", "theirs")]  # type: ignore[arg-type]
    tests = [LabeledCases(tmp_path / "Dataset201_A", {}, {})]
    for model, value in zip(models, (0.9, float("nan")), strict=True):
        folder = tmp_path / "reports" / model.name / "Dataset201_A"
        folder.mkdir(parents=True)
        row = {"case": "mean", "class": "liver tumor", "seen": False, "scope": "volume", "metric": "dsc"}
        pd.DataFrame([row | {"value": value, "ci_low": 0.8, "ci_high": 0.95}]).to_csv(folder / "metrics.csv")
    table = table_of(models, tests, tmp_path)
    assert table.iloc[0].to_dict() == {
        "dataset": "Dataset201_A", "class": "liver tumor", "scope": "volume", "metric": "dsc",
        "ours": "0.900 (0.800–0.950) [unseen]", "theirs": "–",
    }  # fmt: skip
    assert [p.name for p in write_table(table, tmp_path)] == ["benchmark.csv", "benchmark.md", "benchmark.html"]
    assert "| Dataset201_A | liver tumor |" in (tmp_path / "benchmark.md").read_text()
    page = (tmp_path / "benchmark.html").read_text()
    assert '<td data-label="ours">0.900 (0.800–0.950) [unseen]</td>' in page and "http" not in page.split("<body>")[1]


def test_every_model_is_predicted_before_it_is_evaluated(raw: Path, tmp_path: Path) -> None:  # noqa: F811
    model, test = Model.read(f"ours={model_folder(tmp_path)}"), lits(raw)
    jobs = jobs_of({model.name: model.folder}, [test], tmp_path / "out", ["-f", "0"], [])
    assert [j.name for j in jobs] == ["predict_ours_Dataset201_LiTS", "evaluate_ours_Dataset201_LiTS"]
    assert jobs[1].needs == (jobs[0].name,) and "--save_scores" in jobs[0].command


def test_another_model_of_one_name_and_one_trained_again_are_predicted_again(raw: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "b").mkdir()
    folders, test, out = [model_folder(tmp_path), model_folder(tmp_path / "b")], lits(raw), tmp_path / "out"
    first, other = (jobs_of({"ours": folder}, [test], out, ["-f", "0"], []) for folder in folders)
    for job in first:
        run_command((Path(sys.executable).name, "-c", "pass"), {}, job.done, None, job.digest(), job.folder)
    assert all(job.is_done() for job in first) and not other[0].is_done()
    assert not jobs_of({"ours": folders[0]}, [test], out, ["-f", "0", "--disable_tta"], [])[0].is_done()
    (folders[0] / "fold_0").mkdir()
    (folders[0] / "fold_0" / "checkpoint_final.pth").write_text("weights")
    assert not jobs_of({"ours": folders[0]}, [test], out, ["-f", "0"], [])[0].is_done()
    assert first[0].folder == out / "predictions" / "ours" / test.name


def test_figures_that_are_not_there_are_named_or_left_out(tmp_path: Path) -> None:
    models = [Model("ours", tmp_path, {}, None)]  # type: ignore[arg-type]
    tests = [LabeledCases(tmp_path / "Dataset201_A", {}, {})]
    with pytest.raises(ZePTError, match=r"reports/ours/Dataset201_A/metrics\.csv cannot be read"):
        table_of(models, tests, tmp_path)
    assert table_of(models, tests, tmp_path, partly=True).empty


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_dataset_json_of_a_model_is_named(tmp_path: Path, content: str) -> None:
    folder = model_folder(tmp_path)
    (folder / "dataset.json").write_text(content)
    with pytest.raises(ZePTError, match=r"dataset\.json"):
        Model.read(str(folder))


def test_status_says_that_nobody_goes_on(tmp_path: Path, capsys: Any) -> None:
    entry = {"state": "running", "attempts": 1, "purpose": "p"}
    (tmp_path / "status.json").write_text(json.dumps({"a": entry}))
    assert main(["benchmark", "-o", str(tmp_path), "--status"]) == 0
    assert "no zept benchmark runs" in capsys.readouterr().out
    with only_one(tmp_path):
        assert main(["benchmark", "-o", str(tmp_path), "--status"]) == 0
    assert "no zept benchmark runs" not in capsys.readouterr().out


def test_bad_arguments_are_refused(raw: Path, tmp_path: Path, capsys: Any) -> None:  # noqa: F811
    folder = str(model_folder(tmp_path))
    make(raw, "Dataset201_Brain", {"background": 0, "brain": 1}, 1)
    make(raw, "Dataset202_Twins", {"background": 0, "kidney right": 1, "spleen": 2}, 1)
    out = ["benchmark", "-o", str(tmp_path / "out")]
    for arguments, words in (
        ([], "wanted models"),
        (["--suite", "zept-cvpr24", "-m", folder], "or --suite NAME without both"),
        (["-m", str(tmp_path), "-d", "201"], "dataset.json is missing"),
        (["-m", folder, folder, "-d", "202"], "two models have one name"),
        (["-m", folder, "-d", "201"], "no class in common"),
        (["-m", folder, "-d", "299"], "names 0 datasets"),
        (["-m", folder, "-d", "202", "--parameter", "x"], "wants KEY=VALUE"),
        (["--status"], "cannot be read"),
        (["-m", folder, "-d", "202", "--jobs", "0"], "--jobs wants 1 or more; got 0"),
        (["-m", folder, "-d", "202", "--retries", "-1"], "--retries wants 0 or more; got -1"),
        (["--suite", "zept-cvpr24", "--split", "test"], "--split test is for -m and -d"),
    ):
        assert main([*out, *arguments]) == 1
        assert words in capsys.readouterr().err
    assert main([*out, "-m", folder, "-d", "202", "--dry-run"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and said[0].startswith("zept predict -m") and said[1].startswith("zept evaluate -r")
    assert not (tmp_path / "out").exists()
