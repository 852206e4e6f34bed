"""Histogram metrics equal scikit-learn's on the full list of voxels, ties, signed zeros and infinities included."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score, roc_curve

from zept_nnunet.evaluation.ranking import NAN_CODE, NUM_CODES, decode, dice_at, encode, ranking_metrics


def histograms(scores: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes = encode(scores)
    return np.bincount(codes[truth], minlength=NUM_CODES), np.bincount(codes[~truth], minlength=NUM_CODES)


def test_codes_sort_as_the_numbers_do() -> None:
    values = np.arange(NUM_CODES, dtype=np.uint16).view(np.float16)
    numbers = values[~np.isnan(values)]
    order = np.argsort(encode(numbers), kind="stable")
    assert (np.diff(numbers[order].astype(np.float64)[1:-1]) >= 0).all()  # between the infinities
    assert numbers[order][0] == -np.inf and numbers[order][-1] == np.inf
    assert encode(np.float16([-0.0]))[0] == encode(np.float16([0.0]))[0]
    assert (encode(values[np.isnan(values)]) == NAN_CODE).all()
    assert (encode(numbers) != NAN_CODE).all()
    np.testing.assert_array_equal(decode(encode(numbers)), numbers.astype(np.float64))
    assert np.isnan(decode(np.array([NAN_CODE])))[0]


@pytest.mark.parametrize("levels", [None, 5, 2], ids=["fine", "five-levels", "two-levels"])
@pytest.mark.parametrize("seed", range(4))
def test_equal_to_scikit_learn(seed: int, levels: int | None) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.random(4000) < 0.07
    scores = rng.normal(truth * 1.2, 2.0)
    scores = (np.round(scores * levels / 8) if levels else scores).astype(np.float16)
    scores[:3] = [-np.inf, -0.0, 0.0] if levels is None else scores[:3]
    finite = np.where(np.isinf(scores), -60000, scores).astype(np.float64)  # scikit-learn takes no infinity
    found = ranking_metrics(*histograms(scores, truth))
    fpr, tpr, _ = roc_curve(truth, finite, drop_intermediate=False)
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, finite), abs=1e-6)
    assert found["aupr"] == pytest.approx(average_precision_score(truth, finite), abs=1e-6)
    assert found["fpr95"] == pytest.approx(fpr[tpr >= 0.95].min(), abs=1e-6)


def test_counts_beyond_32_bits_add_up() -> None:
    positives, negatives = np.zeros((2, NUM_CODES), dtype=np.int64)
    positives[[100, 300]] = 1 << 40
    negatives[[50, 200]] = 1 << 40
    assert ranking_metrics(positives, negatives)["auroc"] == pytest.approx(0.75, abs=1e-6)  # 3 of 4 pairs in order


def test_shuffled_labels_bring_auroc_to_a_half() -> None:
    rng = np.random.default_rng(3)
    truth = rng.random(40_000) < 0.1
    scores = (truth * 3 + rng.normal(size=truth.size)).astype(np.float16)
    assert ranking_metrics(*histograms(scores, truth))["auroc"] > 0.97
    assert ranking_metrics(*histograms(scores, rng.permutation(truth)))["auroc"] == pytest.approx(0.5, abs=0.02)


def test_a_missing_side_is_nan() -> None:
    some, nothing = np.ones(NUM_CODES, dtype=np.int64), np.zeros(NUM_CODES, dtype=np.int64)
    assert np.isnan(list(ranking_metrics(nothing, some).values())).all()
    assert np.isnan(list(ranking_metrics(some, nothing).values())).all()
    assert np.isnan(dice_at(nothing, some, 5))


def test_dice_at_a_threshold() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(500) < 0.3
    scores = rng.normal(truth, 1).astype(np.float16)
    code = int(encode(np.float16([0.4]))[0])
    expected = f1_score(truth, scores >= np.float16(0.4))
    assert dice_at(*histograms(scores, truth), code) == pytest.approx(expected, abs=1e-9)
