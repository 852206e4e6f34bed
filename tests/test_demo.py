"""``zept demo``: its commands, its folder, its table, and (slow) the whole way with a tiny budget."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest

from zept_nnunet.commands import demo
from zept_nnunet.errors import ZePTError


def parse(*words: str) -> Namespace:
    parser = ArgumentParser()
    demo.register(parser.add_subparsers())
    return parser.parse_args(["demo", *words])


def test_the_steps_are_the_stock_commands_in_order(tmp_path: Path) -> None:
    paths = demo.demo_paths(tmp_path, demo.ZEPT_TRAINER)
    steps = demo.demo_steps(paths, demo.ZEPT_TRAINER, "cpu")
    names = ["plan_and_preprocess", "train", "zept", "predict", "evaluate_folder"]
    assert [step.command[0].removeprefix("nnUNetv2_") for step in steps] == names
    predict = steps[3].command
    assert predict[predict.index("-p") + 1] == "nnUNetPlans_plus"
    assert steps[2].command[2:] == (str(paths.trained_model), "--declared")
    assert str(paths.model / "dataset.json") in steps[4].command


def test_the_stock_trainer_gets_no_unseen_tumor(tmp_path: Path) -> None:
    paths = demo.demo_paths(tmp_path, demo.STOCK_TRAINER)
    steps = demo.demo_steps(paths, demo.STOCK_TRAINER, "cpu")
    assert paths.model == paths.trained_model
    assert [step.command[0] for step in steps if step.command[0] == "zept"] == []


def test_all_paths_stay_in_the_folder_and_the_trainers_are_found(tmp_path: Path) -> None:
    variables = demo.demo_environment(tmp_path, epochs=3)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        assert Path(variables[name]).parent == tmp_path
    for folder in variables["nnUNet_extTrainer"].split(os.pathsep):
        assert (Path(folder) / "zept_demo_trainers.py").is_file()
    assert variables["ZEPT_DEMO_EPOCHS"] == "3" and "ZEPT_DEMO_ITERATIONS" not in variables


def test_the_table_marks_unseen_classes_and_missing_figures() -> None:
    summary = {"mean": {"1": {"Dice": 0.912345}, "2": {"Dice": float("nan")}, "3": {"Dice": 0.5}}}
    table = demo.dice_table(summary, {"liver": 1, "liver tumor": 2, "pancreas tumor": 3}, {"pancreas tumor"})
    rows = [line.split() for line in table.splitlines()[2:]]
    assert rows == [
        ["liver", "seen", "0.912"],
        ["liver", "tumor", "seen", "-"],
        ["pancreas", "tumor", "UNSEEN", "0.500"],
    ]


def test_a_foreign_folder_is_refused_and_an_own_one_replaced_on_request(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ZePTError, match="no demo made it"):
        demo.run(parse("-o", str(tmp_path), "--overwrite"))
    own = tmp_path / "own"
    demo._prepare_folder(own, overwrite=False)
    (own / "nnUNet_raw" / "old").mkdir()
    (own / "notes.txt").write_text("kept")
    with pytest.raises(ZePTError, match="earlier demo"):
        demo._prepare_folder(own, overwrite=False)
    demo._prepare_folder(own, overwrite=True)
    assert not (own / "nnUNet_raw" / "old").exists() and (own / "notes.txt").is_file()


def test_a_failing_step_is_named_with_its_command() -> None:
    step = demo.Step("fail", (sys.executable, "-c", "raise SystemExit(3)"))
    with pytest.raises(ZePTError, match=r"\[1/1\] \(fail\) ended with exit code 3"):
        demo.run_step(step, "[1/1]", dict(os.environ), 0.0)


@pytest.mark.slow
def test_the_whole_demo_with_a_tiny_budget(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    command = [sys.executable, "-m", "zept_nnunet.cli", "demo", "-o", str(folder), "--epochs", "2", "--iterations", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "[5/5]" in done.stdout and "UNSEEN" in done.stdout
    assert (folder / "demo.png").stat().st_size > 20_000
