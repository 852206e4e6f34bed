"""Components at every threshold at once equal cc3d's at each, and thresholds keep to the rate."""

from __future__ import annotations

import cc3d
import numpy as np
import pytest
from scipy import ndimage

from zept_nnunet.evaluation.calibration import MAX_SHARE, count_components, matched_threshold
from zept_nnunet.evaluation.ranking import NUM_CODES, decode, encode


def codes_of(seed: int, levels: float) -> np.ndarray:
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(8, 14, 16)), 0.8)
    return encode(np.round(field / field.std() * levels).astype(np.float16))


@pytest.mark.parametrize("levels", [2.0, 50.0], ids=["ties", "fine"])
@pytest.mark.parametrize("seed", range(3))
def test_counts_equal_those_of_each_threshold(seed: int, levels: float) -> None:
    codes = codes_of(seed, levels)
    counts, lowest = count_components(codes, max_voxels=codes.size)
    assert lowest == 1  # all voxels were looked at
    for t in np.unique(codes)[::7]:
        assert counts[t] == cc3d.connected_components((codes >= t).view(np.uint8), return_N=True)[1]


def test_a_limit_keeps_the_highest_voxels() -> None:
    codes = codes_of(0, 50.0)
    everything, _ = count_components(codes, max_voxels=codes.size)
    limited, lowest = count_components(codes, max_voxels=300)
    assert 250 < (codes >= lowest).sum() <= 300
    np.testing.assert_array_equal(limited[lowest:], everything[lowest:])
    assert not limited[:lowest].any()


def test_no_neighbors_across_the_border() -> None:
    codes = np.ones((3, 4, 5), dtype=np.uint16)
    codes[0, 0, 4] = codes[0, 1, 0] = 9  # neighbors in memory, not in space
    assert count_components(codes, max_voxels=codes.size)[0][9] == 2


@pytest.mark.parametrize("rate", [0.9, 1.0, 50.0])
@pytest.mark.parametrize("height", [0.0, 6.0], ids=["constant", "one bump"])
def test_a_smooth_map_cannot_flood_as_one_component(height: float, rate: float) -> None:
    """However many false positives are allowed, no more than the share of a healthy scan passes."""
    grid = np.indices((20, 30, 30)) - np.array([10, 15, 15]).reshape(3, 1, 1, 1)
    codes = encode((height * np.exp(-(grid**2).sum(0) / 40) - 15).astype(np.float16))
    counts, lowest = count_components(codes)
    threshold = matched_threshold(counts, lowest, scans=1, rate=rate)
    assert np.isfinite(decode(np.array(threshold)))
    assert (codes >= threshold).mean() <= MAX_SHARE
    assert (codes >= threshold).any() == (height > 0 and rate >= 1)


def test_the_threshold_keeps_to_the_rate_from_above() -> None:
    total = np.zeros(NUM_CODES, dtype=np.int64)
    total[:900] = 1  # everything has joined
    total[900:950] = 12
    total[950:960] = 5
    total[960:990] = 2
    assert matched_threshold(total, 0, scans=5, rate=1.0) == 950
    assert matched_threshold(total, 0, scans=5, rate=0.4) == 960
    assert matched_threshold(total, 0, scans=5, rate=0.0) == 990
    assert matched_threshold(total, 0, scans=5, rate=100) == 0
    assert matched_threshold(total, 955, scans=5, rate=100) == 955  # never below what was counted
