"""``zept demo``: its commands, its folder, and (slow) the whole way with a tiny budget."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pandas as pd
import pytest

from zept_nnunet.cli import build_parser
from zept_nnunet.commands import demo
from zept_nnunet.errors import ZePTError


def parse(*words: str) -> Namespace:
    parser = ArgumentParser()
    demo.register(parser.add_subparsers())
    return parser.parse_args(["demo", *words])


def test_the_steps_are_commands_that_exist_in_the_order_in_which_each_finds_its_input(tmp_path: Path) -> None:
    steps = demo.demo_steps(tmp_path, "demo", 0, "cpu", ["a.csv"])
    names = [step.command[1] if step.command[0] == "zept" else step.command[0] for step in steps]
    assert names == "phantom plan nnUNetv2_train add-tumor calibrate predict baseline evaluate evaluate report".split()
    parser = build_parser()
    parsed = {n: parser.parse_args(s.command[1:]) for n, s in zip(names, steps, strict=True) if s.command[0] == "zept"}
    model = demo.model_folder(tmp_path, added=True)
    assert model.name == "ZePTTrainerBudget__ZePTSmallPlans_plus__3d_fullres"
    assert parsed["calibrate"].model_folder == model and parsed["predict"].m == str(model)
    assert parsed["report"].results == [Path("a.csv")] and parsed["report"].o == tmp_path / "report.html"
    assert not {"pancreas tumor", "stomach tumor"} & set(parsed["report"].classes)  # closed until the method is final


def test_all_paths_stay_in_the_folder_and_the_trainers_are_found(tmp_path: Path) -> None:
    variables = demo.demo_environment(tmp_path, 3, 5, 1)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        assert Path(variables[name]).parent == tmp_path
    assert (Path(variables["nnUNet_extTrainer"]) / "zept_trainers.py").is_file()
    assert [variables[f"ZEPT_{n}"] for n in ("EPOCHS", "ITERATIONS", "SEED")] == ["3", "5", "1"]


def test_a_foreign_folder_is_refused_and_an_own_one_replaced_on_request(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ZePTError, match="no demo made it"):
        demo.run(parse("-o", str(tmp_path), "--overwrite"))
    with pytest.raises(ZePTError, match=r"nowhere.csv is no file"):
        demo.run(parse("-o", str(tmp_path / "new"), "--results", "nowhere.csv"))
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
    flags = ["--size", "tiny", "--epochs", "2", "--iterations", "1"]
    command = [sys.executable, "-m", "zept_nnunet.cli", "demo", "-o", str(folder), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "[10/10]" in done.stdout
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "spleen tumor" in page and "any_tumor_plus" in page and "pancreas tumor" not in page.split("<table")[1]
    table = pd.read_csv(folder / "evaluation" / "zept" / "metrics.csv")
    assert {"liver tumor", "spleen tumor"} <= set(table["class"])
