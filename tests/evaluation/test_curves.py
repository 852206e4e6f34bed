"""ROC and FROC curves: against scikit-learn on all voxels, against metrics.csv, and their intervals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from tests.evaluation.small_folders import draw_prediction
from tests.evaluation.test_evaluate import Folders
from zept_nnunet.evaluation.aggregate import Draws
from zept_nnunet.evaluation.case import CaseResult, ClassResult
from zept_nnunet.evaluation.curves import COLUMNS, Curve, froc, roc
from zept_nnunet.evaluation.froc import Candidates
from zept_nnunet.evaluation.ranking import encode


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path)


def results_of(scores: np.ndarray, truths: np.ndarray) -> list[CaseResult]:
    """One case a row (N, voxels), one class "t"."""
    cases = []
    for i, (score, truth) in enumerate(zip(scores, truths, strict=True)):
        codes = encode(score)
        used = np.unique(codes)
        counts = [np.array([int(((codes == c) & which).sum()) for c in used]) for which in (truth, ~truth)]
        entry = ClassResult(holds=bool(truth.any()), histograms={"volume": (used, *counts)})
        cases.append(CaseResult(f"c{i}", {"t": entry}))
    return cases


def test_roc_is_the_exact_curve_of_all_voxels(folders: Folders) -> None:
    assert folders.run() == 0
    table = pd.read_csv(folders.out / "curves.csv")
    assert list(table.columns) == COLUMNS
    drawn = [(r, draw_prediction(r, i)[1][1].astype(float)) for i, r in enumerate(folders.cases.values())]
    for scope, values in (("volume", range(5)), ("host", (2, 4))):
        inside = [np.isin(r, list(values)) for r, _ in drawn]
        truth = np.concatenate([r[w] == 4 for (r, _), w in zip(drawn, inside, strict=True)])
        score = np.concatenate([s[w] for (_, s), w in zip(drawn, inside, strict=True)])
        points = table[(table["class"] == "pancreas tumor") & (table["curve"] == "roc") & (table["scope"] == scope)]
        assert len(points) <= 200 and (points["seen"] == False).all()  # noqa: E712
        assert np.trapezoid(points["y"], points["x"]) == pytest.approx(roc_auc_score(truth, score), abs=2e-3)
        fpr, tpr, _ = roc_curve(truth, score, drop_intermediate=False)
        exact = {(round(x, 9), round(y, 9)) for x, y in zip(fpr, tpr, strict=True)}
        ours = {(round(x, 9), round(y, 9)) for x, y in zip(points["x"], points["y"], strict=True)}
        assert ours <= exact and {(0.0, 0.0), (1.0, 1.0)} <= ours
        assert (points["ci_low"] <= points["y"] + 1e-9).all() and (points["y"] - 1e-9 <= points["ci_high"]).all()


def test_froc_equals_the_seven_figures_of_metrics(folders: Folders) -> None:
    assert folders.run() == 0
    table = pd.read_csv(folders.out / "curves.csv")
    points = table[(table["class"] == "liver tumor") & (table["curve"] == "froc")].set_index("x")
    assert points.index.is_monotonic_increasing and points.index[0] == 0 and points["y"].is_monotonic_increasing
    m = folders.metrics()
    m = m[(m["case"] == "mean") & (m["class"] == "liver tumor")].set_index("metric")
    for rate in (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0):
        ours, theirs = points.loc[rate], m.loc[f"froc_sensitivity_at_{rate:g}"]
        assert ours["y"] == pytest.approx(theirs["value"])
        assert [ours["ci_low"], ours["ci_high"]] == pytest.approx([theirs["ci_low"], theirs["ci_high"]])


def test_a_jump_is_drawn_upright() -> None:
    """Two scores only: the curve goes (0, 0), (0, 0.5), (0.25, 0.5), (0.25, 1), (1, 1)."""
    scores = np.array([[3.0, 1.0, 2.0, 0.0, 0.0, 0.0]])
    truth = np.array([[True, True, False, False, False, False]])
    curve = roc([results_of(scores, truth)], "t", "volume", Draws.make(10, 1, 1, 0))
    assert curve is not None
    assert [*zip(curve.x, curve.y, strict=True)] == [(0, 0), (0, 0.5), (0.25, 0.5), (0.25, 1), (1, 1)]
    assert np.isnan(curve.low).all()  # one case bounds nothing


def test_seeds_are_averaged_at_equal_x() -> None:
    truth = np.tile([True, False], (2, 50))
    rng = np.random.default_rng(0)
    good, bad = truth + rng.normal(0, 0.3, truth.shape), rng.normal(size=truth.shape)
    draws = Draws.make(200, 2, 2, 0)
    both = roc([results_of(good, truth), results_of(bad, truth)], "t", "volume", draws)
    alone = [roc([results_of(s, truth)], "t", "volume", Draws.make(5, 1, 2, 0)) for s in (good, bad)]
    assert both is not None
    areas = [float(np.trapezoid(c.y, c.x)) for c in alone if c is not None]
    assert np.trapezoid(both.y, both.x) == pytest.approx(np.mean(areas), abs=0.01)
    middle = int(np.abs(both.x - 0.3).argmin())
    assert both.high[middle] - both.low[middle] > 0.3  # a seed alone is also drawn


def test_intervals_are_those_of_pooling_the_drawn_cases() -> None:
    rng = np.random.default_rng(1)
    truth = rng.random((6, 80)) < 0.3
    scores = np.round(rng.normal(size=truth.shape) + truth * rng.uniform(0, 2, (6, 1)), 1)
    draws = Draws.make(50, 1, 6, 3)
    curve = roc([results_of(scores, truth)], "t", "volume", draws)
    assert isinstance(curve, Curve)
    at = int(np.abs(curve.x - 0.2).argmin())
    samples = []
    for weights in draws.cases:
        each = np.repeat(weights, 80)
        fpr, tpr, _ = roc_curve(truth.ravel(), scores.ravel(), sample_weight=each, drop_intermediate=False)
        samples.append(np.interp(curve.x[at], fpr, tpr))
    low, high = np.percentile(samples, [2.5, 97.5])
    assert [curve.low[at], curve.high[at]] == pytest.approx([low, high], abs=0.02)


def test_without_lesions_or_scores_there_is_no_curve(folders: Folders) -> None:
    draws = Draws.make(5, 1, 1, 0)
    empty = CaseResult("a", {"t": ClassResult(candidates=Candidates(np.zeros(0, np.uint16), np.zeros(0, np.int32), 0))})
    assert roc([[empty]], "t", "host", draws) is None and froc([[empty]], "t", draws) is None
    for path in folders.predictions.glob("*_scores.npz"):
        path.unlink()
    folders.out.mkdir()
    (folders.out / "curves.csv").write_text("of an earlier report")
    assert folders.run("--overwrite") == 0
    assert not (folders.out / "curves.csv").exists()


def test_a_step_is_not_lost_to_rounding() -> None:
    """A hit after one false positive in 49 scans: 1 / 49 · 49 is a little less than 1."""
    nothing = Candidates(np.zeros(0, np.uint16), np.zeros(0, np.int32), 0)
    scan = Candidates(np.array([9, 8], np.uint16), np.array([0, 1], np.int32), 1)
    cases = [CaseResult(str(i), {"t": ClassResult(candidates=scan if i == 0 else nothing)}) for i in range(49)]
    curve = froc([cases], "t", Draws.make(5, 1, 49, 0))
    assert curve is not None
    assert curve.x[:2].tolist() == [0, 1 / 49] and curve.y[:2].tolist() == [0, 1]
