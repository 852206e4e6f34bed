"""A published table: what is asked of whom, which commands follow, and what stands beside the published figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from tests.datasets.conftest import raw  # noqa: F401 - a fixture
from tests.datasets.test_merge import make
from zept_nnunet.cli import main
from zept_nnunet.datasets.prepare import labels_of, recipes
from zept_nnunet.errors import ZePTError
from zept_nnunet.evaluation.suite import Suite, SuiteRun, Training, find_datasets
from zept_nnunet.names import infer_hosts, infer_is_tumor

HOW = Training(("ZePTTrainer",), "3d_fullres", ("0", "1"), "ZePTPlanner", "cpu")
ORGANS = {"background": 0, "liver": 1, "spleen": 2, "left kidney": 3, "right kidney": 4}


def content(**changes: Any) -> dict[str, Any]:
    """A small suite: organs and liver tumors train; spleen tumors are unseen."""
    tests = [
        {"name": "A", "dataset": "Test", "class": "spleen tumor", "scope": "volume", "metric": "auroc",
         "published": 0.9},
        {"name": "B", "dataset": "Test", "class": "liver tumor", "scope": "volume", "metric": "auroc"},
        {"name": "C", "dataset": "Organs", "split": "validation", "class": "(organs)", "scope": "volume",
         "metric": "dsc", "published": 0.8},
    ]  # fmt: skip
    return {
        "title": "T", "training": {"stage_one": ["Organs"], "stage_two": ["Livers"]}, "tests": tests, **changes,
    }  # fmt: skip


def suite_file(folder: Path, **changes: Any) -> str:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(content(**changes)))
    return str(path)


def three(raw: Path) -> dict[str, Path]:  # noqa: F811
    zept = {"unseen": {"spleen tumor": {"hosts": ["spleen"], "label": 6}}}
    return {
        "Organs": make(raw, "Dataset201_Organs", ORGANS),
        "Livers": make(raw, "Dataset202_Livers", {"background": 0, "liver": 1, "cancer": 2}),
        "Test": make(raw, "Dataset203_Test", {**ORGANS, "liver tumor": 5}, zept=zept),
    }


def test_a_type_that_no_training_dataset_labels_is_unseen_and_gets_hosts(raw: Path, tmp_path: Path) -> None:  # noqa: F811
    run = SuiteRun(Suite.read(suite_file(tmp_path)), three(raw), raw / "Dataset210_All", HOW, tmp_path / "results")
    assert run.unseen() == {"spleen tumor": ("spleen",)}
    seen = run.known(run.suite.tests[1])
    assert seen is not None and seen.name == "liver tumor"
    jobs = {job.name: job for job in run.training_jobs(tmp_path / "out")}
    assert list(jobs) == ["merge", "plan", "train_ZePTTrainer_0", "train_ZePTTrainer_1", "add_tumors_ZePTTrainer"]
    assert jobs["train_ZePTTrainer_1"].needs == ("plan",) and "--c" in jobs["train_ZePTTrainer_1"].command
    assert jobs["add_tumors_ZePTTrainer"].command[-4:] == ("--name", "spleen tumor", "--host", "spleen")
    assert jobs["add_tumors_ZePTTrainer"].needs == ("train_ZePTTrainer_0", "train_ZePTTrainer_1")
    assert jobs["merge"].command[-2:] == ("--test", "Dataset203_Test")
    allowing = replace(run, allowed=("Test",)).training_jobs(tmp_path / "out")[0]
    assert allowing.command[-2:] == ("--allow-overlap", "Dataset203_Test")


def test_validation_cases_come_from_the_folds_that_held_them_out(raw: Path, tmp_path: Path) -> None:  # noqa: F811
    datasets = three(raw)
    run = SuiteRun(Suite.read(suite_file(tmp_path)), datasets, raw / "Dataset210_All", HOW, tmp_path / "results")
    assert main(["merge", "-d", "201", "202", "-o", "Dataset210_All", "--no-content-check"]) == 0
    with pytest.raises(ZePTError, match="no trained fold has validated a case of Dataset201_Organs"):
        run.cases_of(run.suite.tests[2])
    model = run.model_folder("ZePTTrainer", grown=False)
    for fold, cases in (("0", ["d201_case0", "d202_case1"]), ("1", ["d201_case3"]), ("2", ["d201_case4"])):
        for case in cases:
            path = model / f"fold_{fold}" / "validation" / f"{case}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(case)
    for name in ("dataset.json", "plans.json"):
        (model / name).write_text("{}")
    found = run.cases_of(run.suite.tests[2])
    assert list(found.cases) == ["d201_case0", "d201_case3"] and found.name == "Dataset201_Organs_validation"
    run.link_validation("ZePTTrainer", found, tmp_path / "predictions")
    assert {p.name for p in (tmp_path / "predictions").iterdir()} == {
        "d201_case0.nii.gz", "d201_case3.nii.gz", "dataset.json", "plans.json",
    }  # fmt: skip


def test_two_splits_of_one_dataset_are_two_sets_of_cases(raw: Path, tmp_path: Path) -> None:  # noqa: F811
    tests = content()["tests"]
    tests = [tests[1] | {"name": "train", "split": "training"}, tests[1] | {"name": "test", "split": "test"}, tests[1]]
    datasets = three(raw)
    for kind, name in (("imagesTs", "t_0000.nii.gz"), ("labelsTs", "t.nii.gz")):
        (datasets["Test"] / kind).mkdir()
        (datasets["Test"] / kind / name).symlink_to(next((datasets["Test"] / kind.replace("Ts", "Tr")).iterdir()))
    run = SuiteRun(
        Suite.read(suite_file(tmp_path, tests=tests)), datasets, raw / "Dataset210_All", HOW, tmp_path / "results"
    )
    assert {run.cases_of(t).name: len(run.cases_of(t).cases) for t in run.suite.tests} == {
        "Dataset203_Test_training": 5, "Dataset203_Test_test": 1, "Dataset203_Test": 1,
    }  # fmt: skip
    announced = [job.name for job in run.announced(tmp_path / "out", [], [])]
    assert len(set(announced)) == len(announced) == 6


def test_the_table_puts_published_figures_beside_ours(raw: Path, tmp_path: Path) -> None:  # noqa: F811
    run = SuiteRun(Suite.read(suite_file(tmp_path)), three(raw), raw / "Dataset210_All", HOW, tmp_path / "results")
    rows = [
        ("mean", "spleen tumor", "auroc", 0.95, 0.9, 0.99), ("mean", "liver tumor", "auroc", 0.5, float("nan"), 0),
        ("case1", "spleen tumor", "auroc", 0.9, float("nan"), float("nan")),
        ("mean", "(organs)", "dsc", 0.7, 0.6, 0.8),
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["case", "class", "metric", "value", "ci_low", "ci_high"])
    frame = frame.assign(scope="volume", cases=[3, 0, float("nan"), 5])
    for name in ("Dataset203_Test", "Dataset201_Organs_validation"):
        (tmp_path / "reports" / "ZePTTrainer" / name).mkdir(parents=True)
        frame.to_csv(tmp_path / "reports" / "ZePTTrainer" / name / "metrics.csv")
    names = {"A": "Dataset203_Test", "B": "Dataset203_Test", "C": "Dataset201_Organs_validation"}
    table = replace(run, allowed=("Organs",)).table(names, tmp_path)
    assert [bool(n) for n in table["note"]] == [False, False, True]
    assert list(table["ZePTTrainer"]) == ["0.9500 (0.9000–0.9900)", "0.5000", "0.7000 (0.6000–0.8000)"]
    assert list(table["published"]) == ["0.9000", "–", "0.8000"]
    assert list(table["in training"]) == ["no (unseen)", "yes", "yes"] and list(table["cases"]) == ["3", "0", "5"]
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "evaluate_ZePTTrainer_Dataset203_Test").touch()
    partly = run.table(names, tmp_path, partly=True)
    assert list(partly["ZePTTrainer"]) == ["0.9500 (0.9000–0.9900)", "0.5000", "–"]
    assert list(partly["cases"]) == ["3", "0", "–"]


def test_a_test_that_would_have_no_figure_is_refused_before_the_training(raw: Path, tmp_path: Path) -> None:  # noqa: F811
    datasets = three(raw)
    vessels = make(raw, "Dataset204_V", {"background": 0, "hepatic vessels": 1, "liver": 2})

    def run(**test: str) -> SuiteRun:
        suite = Suite.read(suite_file(tmp_path, tests=[content()["tests"][1] | test]))
        return SuiteRun(suite, datasets, raw / "Dataset210_All", HOW, tmp_path / "results")

    run().check_tests()
    with pytest.raises(ZePTError, match=r"A: no training dataset labels 'hepatic vessels'.*--without Test"):
        run(name="A", **{"class": "hepatic vessels"}).check_tests()
    organs = run(**{"class": "(organs)"})
    organs.check_tests()
    assert organs.in_training(organs.suite.tests[0]) == "yes"
    theirs = replace(organs, datasets=datasets | {"Test": vessels})
    assert theirs.in_training(theirs.suite.tests[0]) == "1 of 2 organs"
    with pytest.raises(ZePTError, match=r"B asks for 'liver tumor', and .*Dataset204_V.* only \['liver'\]"):
        replace(run(), datasets=datasets | {"Test": vessels}).check_tests()
    for path in (vessels / "labelsTr").iterdir():
        path.unlink()
    with pytest.raises(ZePTError, match="Dataset204_V"):
        replace(run(), datasets=datasets | {"Test": vessels}).check_tests()


def test_trainers_of_which_a_fold_failed_are_told_from_those_that_are_done(raw: Path, tmp_path: Path) -> None:  # noqa: F811
    how = replace(HOW, trainers=("ZePTTrainer", "ZePTTrainerPaper"))
    run = SuiteRun(Suite.read(suite_file(tmp_path)), three(raw), raw / "Dataset210_All", how, tmp_path / "results")
    jobs = run.training_jobs(tmp_path / "out")
    (tmp_path / "out" / "done").mkdir(parents=True)
    for job in jobs:
        if job.name != "train_ZePTTrainerPaper_1":
            job.done.write_text(job.digest())
    assert run.trained(jobs) == ["ZePTTrainer"]


@pytest.mark.parametrize("found", ["{", "[]", '{"zept_recipe": null}', '{"zept_recipe": {"recipe": "Organs"}}'])
def test_other_datasets_do_not_matter(raw: Path, tmp_path: Path, found: str) -> None:  # noqa: F811
    datasets = three(raw)
    other = raw / "Dataset299_Other" / "dataset.json"
    other.parent.mkdir()
    other.write_text(found)
    ids = {name: folder for name, folder in datasets.items() if '"recipe"' not in found or name != "Organs"}
    wanted = datasets if len(ids) == 3 else datasets | {"Organs": other.parent}
    assert find_datasets(Suite.read(suite_file(tmp_path)), raw, ids) == wanted


def test_the_published_suite_merges_what_the_recipes_make_of_its_datasets(
    raw: Path,  # noqa: F811
    tmp_path: Path,
    capsys: Any,
) -> None:
    """Labels conflict nowhere, each test's class is known or has a host, and the figures are those of the paper."""
    suite = Suite.read("zept-cvpr24")
    datasets = {}
    for number, name in enumerate(suite.datasets, start=301):
        recipe = recipes()[name]
        names = labels_of(recipe) if name != "one-tumor" else {"colon tumor": 1}
        folder = raw / f"Dataset{number}_{name.replace('-', '')}"
        organs = [n for n in names if not infer_is_tumor(n)]
        given = recipe.get("hosts", {})
        hosts = {n: list(given.get(n) or infer_hosts(n, organs)) for n in names if n not in organs}
        zept = {"organs": organs, "tumors": {n: {"hosts": h} for n, h in hosts.items()}}
        labels = {"background": 0, **{label: i for i, label in enumerate(names, start=1)}}
        for file in ("imagesTr/c_0000.nii.gz", "labelsTr/c.nii.gz"):
            (folder / file).parent.mkdir(parents=True)
            (folder / file).touch()
        record = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}
        (folder / "dataset.json").write_text(json.dumps(record | {"zept_recipe": {"recipe": name}, "zept": zept}))
    datasets = find_datasets(suite, raw, {})
    assert list(datasets) == suite.datasets
    run = SuiteRun(suite, datasets, raw / "Dataset399_All", HOW, tmp_path)
    assert set(run.unseen()) == {"pancreas tumor", "lung tumor", "colon tumor"}
    known = {t.name: run.known(t) for t in suite.tests}
    assert {n for n, c in known.items() if c is not None} == {"MSD Hepatic Vessel", "MSD Spleen", "MSD Liver", "KiTS23"}
    published = {t.name: t.published for t in suite.tests}
    assert published == {
        "MSD Pancreas": 0.8681, "MSD Lung": 0.7784, "MSD Hepatic Vessel": 0.9157, "MSD Colon": 0.8236,
        "real-world colon": 0.8435, "MSD Spleen": 0.9403, "MSD Liver": 0.9722, "WORD": 0.8426, "AbdomenCT-1K": 0.9134,
        "KiTS23": 0.4875,
    }  # fmt: skip
    pages = (Path(__file__).parents[2] / "docs" / "benchmarking.md").read_text().splitlines()
    documented = [line.split("#")[0].split() for line in pages if line.startswith("zept benchmark --suite")]
    assert len(documented) == 3
    for command in documented:
        command[command.index("-o") + 1] = str(tmp_path / "out")
        assert main([*command[1:], *([] if "--dry-run" in command else ["--dry-run"])]) == 0, capsys.readouterr().err


def test_what_is_missing_is_named_with_the_command_that_makes_it(raw: Path, tmp_path: Path, capsys: Any) -> None:  # noqa: F811
    three(raw)
    file, out = suite_file(tmp_path), ["-o", str(tmp_path / "out"), "--dry-run"]
    ids = ["--ids", "Organs=201", "Livers=202", "Test=203"]
    for arguments, words in (
        (["--suite", "nothing"], "no such suite (zept-cvpr24)"),
        (["--suite", file], "zept prepare Organs DOWNLOAD_FOLDER -d ID"),
        (["--suite", file, *ids[:3]], "--without Test"),
        (["--suite", file, *ids], "--merged ID"),
        (["--suite", file, "--ids", "X=201"], "the suite has"),
        (["--suite", file, "--ids", "201"], "wants NAME=ID"),
        (["--suite", file, "--without", "X"], "the suite has"),
        (["--suite", file, *ids, "--merged", "210", "--allow-overlap", "X"], "--allow-overlap X: the suite has"),
        (["--suite", file, "--without", "Organs", "Livers"], "no training dataset is left"),
    ):
        assert main(["benchmark", *arguments, *out]) == 1
        assert words in capsys.readouterr().err, words
    assert main(["benchmark", "--suite", file, *ids, "--merged", "210", *out, "-f", "0"]) == 0
    said = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert said == [
        ["zept", "merge"], ["zept", "plan"], ["nnUNetv2_train", "210"], ["zept", "add-tumor"], ["zept", "predict"],
        ["zept", "evaluate"], ["zept", "evaluate"],
    ]  # fmt: skip
    assert not (tmp_path / "out").exists() and not list(raw.glob("Dataset210_*"))


def test_files_that_are_no_suite_are_refused(tmp_path: Path) -> None:
    for changes, words in (
        ({"training": {}}, "names no dataset"),
        ({"tests": []}, "tests"),
        ({"tests": [{"name": "A"}]}, "tests/0: 'dataset' is a required property"),
        ({"labels": {"Organs": {"liver": 3}}}, "labels/Organs/liver: 3 is not of type"),
        ({"tests": [content()["tests"][0] | {"metric": "dcs"}]}, "tests/0/metric: 'dcs' is not one of"),
        ({"extra": 1}, "the file: Additional properties"),
        ({"tests": [content()["tests"][2] | {"dataset": "Test"}]}, "no fold validates it"),
        ({"tests": [content()["tests"][0]] * 2}, "one name"),
    ):
        with pytest.raises(ZePTError, match=words):
            Suite.read(suite_file(tmp_path, **changes))
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ZePTError, match="no YAML"):
        Suite.read(str(tmp_path / "broken.yaml"))
