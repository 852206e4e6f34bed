"""A published table run again on phantoms: merge, plan, train, add the unseen tumor, predict, evaluate, as jobs."""

from __future__ import annotations

import threading
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.commands import Workspace
from tests.conftest import read_json
from tests.test_jobs import kill_first

pytestmark = pytest.mark.slow
TRAINER = "ZePTTrainerTest"
SUITE = {
    "title": "Two phantoms",
    "training": {"stage_one": ["organs"], "stage_two": ["tumors"]},
    "labels": {"organs": {"liver tumor": None, "kidney tumor": None}},
    "tests": [
        {"name": "unseen", "dataset": "test", "class": "spleen tumor", "scope": "volume", "metric": "auroc",
         "published": 0.9},
        {"name": "seen", "dataset": "test", "class": "liver tumor", "scope": "host", "metric": "auroc"},
        {"name": "held out", "dataset": "organs", "split": "validation", "class": "(organs)", "scope": "volume",
         "metric": "dsc", "published": 0.8},
    ],
}  # fmt: skip


def test_a_suite_through_jobs_of_which_one_is_killed(tmp_path: Path) -> None:
    workspace, out = Workspace(tmp_path), tmp_path / "benchmark"
    for number in (921, 922):
        workspace.run("zept", "phantom", "-d", str(number), "--size", "tiny", "--seed", str(number))
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(SUITE))
    command = (
        "zept", "benchmark", "--suite", tmp_path / "suite.yaml", "--ids", "organs=921", "tumors=922", "test=922",
        "--merged", "930", "-tr", TRAINER, "-pl", "ZePTSmallPlanner", "-f", "0", "-device", "cpu", "--disable_tta",
        "--bootstrap", "20", "-o", out,
    )  # fmt: skip
    announced = workspace.run(*command, "--dry-run").splitlines()
    assert not out.exists()
    killer = threading.Thread(target=kill_first, args=(out, f"train_{TRAINER}_0"))
    killer.start()
    said = workspace.run(*command, "--cluster", "local")
    killer.join()
    assert "once more" in said
    ran = [line.removeprefix("  $ ") for line in said.splitlines() if line.startswith("  $ ")]
    assert set(ran) == set(announced) and len(ran) == len(announced) + 1  # the killed one twice
    status = read_json(out / "status.json")
    assert {e["state"] for e in status.values()} == {"done"} and len(status) == len(announced)
    assert status[f"train_{TRAINER}_0"]["attempts"] == 2

    table = pd.read_csv(out / "benchmark.csv", dtype=str, keep_default_na=False).set_index("test")
    assert list(table["in training"]) == ["no (unseen)", "yes", "yes"]
    assert list(table["published"]) == ["0.9000", "–", "0.8000"]
    for name in ("unseen", "seen", "held out"):
        value = float(table.loc[name, TRAINER].split()[0])
        assert 0 <= value <= 1
    tested = len(list((workspace.raw / "Dataset922_ZePTPhantom/labelsTs").iterdir()))
    assert 0 < int(table.loc["unseen", "cases"]) <= tested  # those that hold the tumor and more
    assert "Two phantoms" in (out / "benchmark.html").read_text() and (out / "benchmark.md").is_file()
    again = workspace.run(*command)  # nothing is left to do
    assert "===" not in again and f"{len(announced)} done" in workspace.run("zept", "benchmark", "-o", out, "--status")
