"""Partial volume, labels by majority, and noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from zept_nnunet.datasets.phantom_scanner import Protocol, average_down, majority_label, scan

QUIET = Protocol((12, 40, 40), (5.0, 2.0, 2.0), (1, 1, 1), 10.0, 0.7, 0.0, 0.0, 0.0)


def test_partial_volume_is_the_mean_of_what_a_voxel_holds() -> None:
    fine = np.zeros((2, 4, 4), dtype=np.float32)
    fine[:, :2, :1] = 100.0
    np.testing.assert_array_equal(average_down(fine, (2, 2, 2)), [[[50, 0], [0, 0]]])


def test_a_voxel_takes_the_label_that_fills_most_of_it() -> None:
    fine = np.array([[[1, 1, 1, 9, 9, 9, 9, 20]]], dtype=np.uint8)
    np.testing.assert_array_equal(majority_label(fine, {1: 1, 9: 5}, (1, 1, 4)), [[[1, 5]]])
    np.testing.assert_array_equal(majority_label(fine, {1: 1}, (1, 1, 4)), [[[1, 0]]])


def test_ties_and_background() -> None:
    fine = np.array([[[1, 1, 0, 0, 2, 2, 1, 1]]], dtype=np.uint8)
    np.testing.assert_array_equal(majority_label(fine, {1: 1, 2: 2}, (1, 1, 4)), [[[0, 1]]])


def test_noise_has_the_stated_strength_and_is_correlated() -> None:
    image = scan(np.zeros((12, 40, 40), dtype=np.float32), QUIET, np.random.default_rng(0)).astype(float)
    middle = image[:, 14:26, 14:26]
    assert middle.std() == pytest.approx(10.0, rel=0.15)
    neighbours = np.corrcoef(image[:, :, 1:].ravel(), image[:, :, :-1].ravel())[0, 1]
    assert 0.2 < neighbours < 0.9
    assert image[:, :6, :6].std() < middle.std()  # less noise at the corner


def test_artifacts_change_the_image_and_the_same_seed_gives_the_same_image() -> None:
    ideal = np.zeros((12, 40, 40), dtype=np.float32)
    ideal[:, 10:30, 10:30] = 60
    ideal[:, 20, 20] = 900
    quiet = scan(ideal, QUIET, np.random.default_rng(1))
    np.testing.assert_array_equal(quiet, scan(ideal, QUIET, np.random.default_rng(1)))
    for protocol in (replace(QUIET, streak_hu=25.0), replace(QUIET, motion_voxels=1.5)):
        assert (scan(ideal, protocol, np.random.default_rng(1)) != quiet).any()
