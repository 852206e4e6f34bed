"""`zept baseline`: bad input, and what is decided before anything runs."""

from __future__ import annotations

import argparse
import json
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import TINY
from tests.small_ct import write_demo_dataset
from tests.small_plans import DATASET_JSON
from zept_nnunet.commands import baseline
from zept_nnunet.commands.baseline import RECIPES, RECORD
from zept_nnunet.errors import ZePTError
from zept_nnunet.plans_block import build_block
from zept_nnunet.taxonomy import Taxonomy

FULLRES = {"architecture": {}}
CONFIGURATIONS = {"3d_fullres": FULLRES, "next": {**FULLRES, "previous_stage": "3d_fullres"}}
PLANS = {"plans_name": "nnUNetPlans", "configurations": CONFIGURATIONS}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnU-Net's folders with a planned dataset 1."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setenv("nnUNet_extTrainer", "")
    source = write_demo_dataset(tmp_path / "raw", 1, cases_train=1, cases_test=1, shape=TINY)
    planned = tmp_path / "preprocessed" / source.name
    planned.mkdir()
    (planned / "nnUNetPlans.json").write_text(json.dumps(PLANS))
    (planned / "dataset_fingerprint.json").write_text("{}")
    return tmp_path


def parse(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    baseline.register(parser.add_subparsers())
    return parser.parse_args(["baseline", *map(str, words)])


def test_the_names_are_those_of_the_contract() -> None:
    assert sorted(RECIPES) == sorted(
        "any_tumor any_tumor_plus any_tumor_rel max_logit entropy zept_paper supervised host_deviation".split()
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("magic", "-d", 1), "'magic' is no baseline; wanted one of any_tumor"),
        (("supervised", "-d", 1), "supervised wants --supervised-dataset"),
        (("entropy", "-d", 1, "--supervised-dataset", 2), "no other baseline takes it"),
        (("entropy", "-d", 77), "-d 77: Could not find a dataset with the ID 77"),
        (("entropy", "-d", "liver"), "-d liver"),
        (("entropy", "-d", 1, "-f", "x"), "-f wants a fold"),
        (("entropy", "-d", 1, "-c", "2d"), "no configuration '2d'"),
        (("entropy", "-d", 1, "-c", "next"), "second stage of a cascade"),
        (("entropy", "-d", 1, "-p", "Other"), "plan first"),
        (("entropy", "-d", 1, "-i", "nowhere"), "is no folder"),
        (("entropy", "-d", 1, "--epochs", 1, "--minutes", 1), "both set"),
        (("entropy", "-d", 1, "--minutes", -1), "ZEPT_MINUTES must be a positive number"),
        (("host_deviation", "-d", 1, "--sigma-mm", -1), "--sigma-mm wants 0 or more"),
        (("zept_paper", "-d", 1, "--optimizer", "sgd"), "keeps its AdamW"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(
    folders: Path, words: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folders.rglob("*"))
    with pytest.raises(ZePTError, match=message):
        baseline.run(parse(*words, "-o", folders / "out", "-device", "cpu"))
    assert sorted(folders.rglob("*")) == before


def test_an_unset_folder_is_named(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_results")
    with pytest.raises(ZePTError, match="nnUNet_results is not set"):
        baseline.run(parse("entropy", "-d", 1, "-o", folders / "out", "-device", "cpu"))


def test_a_supervised_dataset_without_the_unseen_tumors_is_refused(folders: Path) -> None:
    write_demo_dataset(folders / "raw", 2, cases_train=1, cases_test=0, shape=TINY)
    with pytest.raises(ZePTError, match=r"Dataset002_ZePTDemo/dataset.json: .* lack \['pancreas tumor'\]"):
        baseline.run(parse("supervised", "-d", 1, "--supervised-dataset", 2, "-o", folders / "out", "-device", "cpu"))


def test_a_foreign_output_folder_and_another_run_s_are_refused(folders: Path) -> None:
    output = folders / "out"
    output.mkdir()
    (output / "mine.txt").write_text("kept")
    command = ("entropy", "-d", 1, "-o", output, "-device", "cpu")
    with pytest.raises(ZePTError, match="no baseline made it"):
        baseline.run(parse(*command))
    (output / RECORD).write_text(json.dumps({"baseline": "max_logit"}))
    with pytest.raises(ZePTError, match=r"another run: \{'baseline': 'max_logit'"):
        baseline.run(parse(*command))
    assert (output / "mine.txt").read_text() == "kept"


def test_plans_are_compared_without_their_names() -> None:
    ours = {"dataset_name": "A", "plans_name": "P", "configurations": {"c": {"data_identifier": "P_c", "batch": 2}}}
    theirs = json.loads(json.dumps(ours).replace('"P_c"', '"P_from1_c"').replace('"P"', '"P_from1"'))
    assert baseline._comparable(ours, "P") == baseline._comparable(theirs, "P_from1")
    theirs["configurations"]["c"]["batch"] = 3
    assert baseline._comparable(ours, "P") != baseline._comparable(theirs, "P_from1")


def test_the_published_method_gets_the_size_and_the_optimizer_of_the_plans_and_a_block_of_its_own(
    tmp_path: Path,
) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps({**DATASET_JSON, "labels": {"background": 0, "liver": 1}}))
    block = build_block(deepcopy(DATASET_JSON), settings={"width": 32, "learning_rate": 4e-3, "prompts": "organs"})
    plans = {"plans_name": "P", "zept": block}
    for name, gets_one in (("zept_paper", True), ("any_tumor", False)):
        runner = SimpleNamespace(recipe=baseline.RECIPES[name])
        got = baseline.Runner._with_own_block(runner, dict(plans), tmp_path)  # type: ignore[arg-type]
        assert got["plans_name"] == "P" and ("zept" in got) == gets_one
        if gets_one:
            own = got["zept"]
            assert (own["decoder"]["width"], own["training"]["learning_rate"]) == (32, 4e-3)
            assert own["decoder"]["prompts"] != "organs"  # a part of the method, not of the plans
            assert [c.name for c in Taxonomy.from_dict(own["taxonomy"]).classes] == ["liver"]
