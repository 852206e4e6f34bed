"""The baselines' formulas against float64 and against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from zept_nnunet.errors import ZePTError
from zept_nnunet.evaluation.baselines import (
    LOWEST,
    Evidence,
    TumorClass,
    assign_to_hosts,
    choose_threshold,
    fill_hosts,
    host_deviation,
    nearest_host,
    summarize,
)

CLASSES = (
    TumorClass("liver tumor", 4, (1,)),
    TumorClass("kidney tumor", 5, (2, 3)),
    TumorClass("bright liver tumor", 6, (1,)),
)


@pytest.mark.parametrize("scale", [1.0, 30.0, 900.0])
def test_softmax_scores_equal_float64(scale: float) -> None:
    rng = np.random.default_rng(0)
    z = (scale * rng.uniform(-1, 1, size=(6, 5, 4, 3))).astype(np.float32)
    summary = summarize(iter(z), keep={2, 5})
    z64 = z.astype(np.float64)
    np.testing.assert_array_equal(summary.labels, z64.argmax(0))
    np.testing.assert_array_equal(summary.max_logit, z.max(0))
    log_p = z64 - np.logaddexp.reduce(z64, axis=0)
    np.testing.assert_allclose(summary.entropy, -(np.exp(log_p) * log_p).sum(0), atol=2e-5, rtol=1e-4)
    for k in (2, 5):
        others = np.logaddexp.reduce(np.delete(z64, k, axis=0), axis=0)
        np.testing.assert_allclose(summary.log_odds[k], z64[k] - others, rtol=1e-5, atol=1e-5 * scale)
    assert set(summary.log_odds) == {2, 5}


def test_log_odds_do_not_saturate_and_two_kept_classes_count_against_each_other() -> None:
    z = np.array([[-500.0], [400.0], [900.0]], dtype=np.float32)
    summary = summarize(z, keep={1, 2})
    assert summary.log_odds[2][0] == 500 and summary.log_odds[1][0] == -500
    assert summary.entropy[0] == 0
    equal = summarize(np.full((4, 1), 7.0), keep={3})
    assert equal.entropy[0] == pytest.approx(math.log(4), rel=1e-6)
    assert equal.log_odds[3][0] == pytest.approx(-math.log(3), rel=1e-6)
    assert equal.labels[0] == 0
    with pytest.raises(ZePTError, match="no logits"):
        summarize([])


def test_nearest_host_equals_a_loop() -> None:
    rng = np.random.default_rng(1)
    labels = rng.choice([0, 1, 2, 3], size=(4, 6, 7), p=[0.85, 0.05, 0.05, 0.05]).astype(np.uint16)
    spacing = (4.0, 1.0, 1.7)
    found = nearest_host(labels, {1, 3}, spacing)
    hosts = np.argwhere((labels == 1) | (labels == 3))
    for voxel in np.ndindex(labels.shape):
        distances = np.linalg.norm((hosts - voxel) * spacing, axis=1)
        nearest = {int(labels[tuple(h)]) for h in hosts[np.isclose(distances, distances.min())]}
        assert int(found[voxel]) in nearest
    assert not nearest_host(labels, {9}, spacing).any()


def test_tumor_voxels_go_to_the_first_class_of_their_host_and_scores_to_each() -> None:
    labels = np.array([[1, 0, 0, 0, 0, 3, 0]], dtype=np.uint16)
    score = np.array([[-2.0, 5.0, 6.0, -9999.0, 7.0, 8.0, 1.0]], dtype=np.float32)
    is_tumor = np.array([[0, 1, 1, 0, 1, 1, 0]], dtype=bool)
    segmentation, scores = assign_to_hosts(labels, score, is_tumor, CLASSES, (1.0, 1.0))
    np.testing.assert_array_equal(segmentation, [[1, 4, 4, 0, 5, 5, 0]])
    low = LOWEST
    np.testing.assert_array_equal(scores[0, 0], [-2, 5, 6, low, low, low, low][:7])
    np.testing.assert_array_equal(scores[2], scores[0])
    np.testing.assert_array_equal(scores[1, 0, 4:], [7, 8, 1])
    assert (scores[1, 0, :3] == low).all()


def test_a_limit_binds_segmentation_and_scores() -> None:
    labels = np.array([[1, 1, 0]], dtype=np.uint16)
    limit = labels == 1
    segmentation, scores = assign_to_hosts(labels, np.ones((1, 3)), np.ones((1, 3), bool), CLASSES, (1, 1), limit)
    np.testing.assert_array_equal(segmentation, [[4, 4, 0]])
    np.testing.assert_array_equal(scores[0], [[1, 1, LOWEST]])


def test_without_a_predicted_host_no_voxel_is_tumor_but_the_score_stays() -> None:
    labels = np.zeros((2, 2), dtype=np.uint16)
    segmentation, scores = assign_to_hosts(labels, np.full((2, 2), 3.0), np.ones((2, 2), bool), CLASSES, (1, 1))
    assert not segmentation.any() and (scores == 3).all()
    body = (TumorClass("any lesion", 1, ()),)
    segmentation, scores = assign_to_hosts(labels, np.full((2, 2), 3.0), np.ones((2, 2), bool), body, (1, 1))
    assert (segmentation == 1).all() and (scores == 3).all()


def test_holes_of_hosts_are_filled() -> None:
    labels = np.zeros((5, 5, 5), dtype=np.uint16)
    labels[1:4, 1:4, 1:4] = 1
    labels[2, 2, 2] = 0
    labels[0, 0, 0] = 7  # hosts nothing
    expected = np.zeros_like(labels, dtype=bool)
    expected[1:4, 1:4, 1:4] = True
    np.testing.assert_array_equal(fill_hosts(labels, CLASSES), expected)


def test_host_deviation_without_smoothing_is_the_robust_z_score() -> None:
    rng = np.random.default_rng(2)
    labels = rng.choice([0, 1, 2], size=(6, 7, 8)).astype(np.uint16)
    labels[:, :, 0] = 0
    image = rng.normal(100, 20, size=labels.shape)
    score = host_deviation(image, labels, CLASSES, (3, 1, 1), sigma_mm=0)
    from scipy import ndimage

    for host in (1, 2):
        inside = ndimage.binary_fill_holes(labels == host)
        median = np.median(image[inside])
        mad = np.median(np.abs(image[inside] - median))
        own = inside & (labels == host)
        np.testing.assert_allclose(score[own], np.abs(image[own] - median) / (1.4826 * mad), rtol=1e-4)
    assert not score[:, 0, 0][labels[:, 0, 0] == 0].any()


def test_host_deviation_smooths_inside_the_host_alone_and_sees_both_signs() -> None:
    labels = np.zeros((16, 24, 24), dtype=np.uint16)
    labels[2:14, 4:20, 4:20] = 1
    rng = np.random.default_rng(3)
    image = np.where(labels == 1, 100 + rng.normal(0, 10, labels.shape), -1000.0)
    image[6:10, 6:10, 6:10] -= 40
    image[6:10, 14:18, 14:18] += 40
    smooth = host_deviation(image, labels, CLASSES, (3, 1, 1), sigma_mm=1.5)
    assert smooth[8, 8, 8] > 2 and smooth[8, 16, 16] > 2
    edge = smooth[7, 4, 4:20]
    assert edge.max() < 2  # the -1000 HU beside it do not enter
    other = np.where(labels == 1, image, 3000.0)
    np.testing.assert_allclose(host_deviation(other, labels, CLASSES, (3, 1, 1), 1.5), smooth, rtol=1e-5, atol=1e-6)
    assert not smooth[labels == 0].any()
    constant = np.full(labels.shape, 50.0)
    assert not host_deviation(constant, labels, CLASSES, (3, 1, 1), 1.5).any()


def test_the_threshold_has_the_best_mean_dice_of_a_loop() -> None:
    rng = np.random.default_rng(4)
    evidence, raw = [], []
    for _ in range(3):
        reference = rng.random((6, 6, 6)) < 0.2
        score = rng.normal(reference * 1.5, 1).astype(np.float32)
        score[0] = LOWEST
        evidence.append(Evidence.of(score, reference))
        raw.append((score, reference))

    def mean_dice(threshold: float) -> float:
        values = []
        for score, reference in raw:
            predicted = score >= threshold
            values.append(2 * (predicted & reference).sum() / (predicted.sum() + reference.sum()))
        return float(np.mean(values))

    found = choose_threshold(evidence)
    assert found.dice == pytest.approx(mean_dice(found.threshold), abs=1e-9)
    best = max(mean_dice(float(t)) for score, _ in raw for t in np.unique(score) if t > LOWEST)
    assert best - 0.01 < found.dice <= best
    with pytest.raises(ZePTError, match="no threshold"):
        choose_threshold([])
