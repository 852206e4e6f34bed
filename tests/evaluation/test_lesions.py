"""Matching equals panoptica's, whose results on the same volumes are kept beside this file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

from tests.evaluation.panoptica_reference import VERSION, volumes
from zept_nnunet.evaluation.lesions import LesionCounts, bounding_box, components, match_lesions

KEPT = Path(__file__).with_name("panoptica_reference.json")


@pytest.mark.parametrize("row", json.loads(KEPT.read_text())["results"], ids=lambda r: f"{r['iou']}-{r['seed']}")
def test_equal_to_panoptica(row: dict) -> None:
    counts = match_lesions(*volumes(row["seed"]), row["iou"])
    assert [counts.reference, counts.predicted, counts.matched] == row["counts"]
    assert counts.matched / counts.reference == pytest.approx(row["recall"], abs=1e-6)
    assert counts.matched / counts.predicted == pytest.approx(row["precision"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(
    "ZEPT_TEST_PANOPTICA" not in os.environ, reason="installs panoptica from PyPI: ZEPT_TEST_PANOPTICA=1"
)
def test_what_is_kept_is_what_panoptica_finds(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"panoptica=={VERSION}"], check=True)
    script = Path(sys.modules[volumes.__module__].__file__ or "")
    subprocess.run([python, script, tmp_path / "now.json"], check=True)
    assert json.loads((tmp_path / "now.json").read_text()) == json.loads(KEPT.read_text())


def test_each_lesion_is_taken_once() -> None:
    reference, prediction = np.zeros((2, 5, 5, 20), dtype=bool)
    reference[2, 2, 2:8] = True
    prediction[2, 2, 2:5] = True
    prediction[2, 2, 6:8] = True  # the second half of the same lesion: a false positive, not a second hit
    reference[2, 2, 14] = True
    counts = match_lesions(reference, prediction, 0.1)
    assert counts == LesionCounts(reference=2, predicted=2, matched=1)
    assert counts.false_positives == 1
    assert match_lesions(reference, prediction, 0.6) == LesionCounts(2, 2, 0)  # 3 of 6 voxels


def test_corners_connect() -> None:
    mask = np.zeros((3, 3, 3), dtype=bool)
    mask[0, 0, 0] = mask[1, 1, 1] = True
    assert components(mask)[1] == 1


def test_nothing() -> None:
    empty = np.zeros((3, 3, 3), dtype=bool)
    assert match_lesions(empty, empty) == LesionCounts(0, 0, 0)
    assert bounding_box(empty) is None
    some = empty.copy()
    some[1, 2, 0] = True
    assert bounding_box(empty, some) == (slice(1, 2), slice(2, 3), slice(0, 1))
    assert match_lesions(empty, some) == LesionCounts(0, 1, 0)
    assert match_lesions(some, empty) == LesionCounts(1, 0, 0)
