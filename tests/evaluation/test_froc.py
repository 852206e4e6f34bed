"""Candidates against a loop over all voxels, and FROC worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from zept_nnunet.evaluation.froc import Candidates, find_candidates, find_peaks, froc_sensitivities
from zept_nnunet.evaluation.ranking import encode

SPACING = (3.0, 1.0, 1.5)


def slow_peaks(codes: np.ndarray, spacing: tuple[float, ...], distance: float, limit: int) -> list[tuple[int, ...]]:
    order = sorted(np.ndindex(codes.shape), key=lambda p: (-int(codes[p]), p))
    found: list[tuple[int, ...]] = []
    for p in order:
        if len(found) == limit or codes[p] == codes.min():
            break
        if all(sum(((a - b) * s) ** 2 for a, b, s in zip(p, q, spacing, strict=True)) > distance**2 for q in found):
            found.append(p)
    return found


@pytest.mark.parametrize("levels", [1.0, 100.0], ids=["ties", "fine"])
@pytest.mark.parametrize("seed", range(3))
def test_peaks_equal_the_loop(seed: int, levels: float) -> None:
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(9, 21, 18)), 1)
    codes = encode(np.round(field / field.std() * levels).astype(np.float16))
    expected = slow_peaks(codes, SPACING, 6.0, 25)
    positions, values = find_peaks(codes.copy(), SPACING, 6.0, 25)
    assert [tuple(p) for p in positions.tolist()] == expected
    np.testing.assert_array_equal(values, [codes[p] for p in expected])


def test_a_constant_map_has_no_candidate() -> None:
    assert len(find_peaks(encode(np.full((4, 5, 6), -1000, dtype=np.float16)), SPACING)[0]) == 0


def test_what_a_candidate_hits() -> None:
    lesions = np.zeros((8, 40, 60), dtype=np.uint8)
    lesions[2:4, 5:10, 5:15] = 1
    lesions[5, 30:34, 30:34] = 2
    scores = np.full(lesions.shape, -5, dtype=np.float16)
    scores[3, 7, 8] = 4  # in lesion 1
    scores[2, 7, 40] = 3  # far from both
    scores[2, 9, 14] = 2  # farther than 10 mm from the first, in lesion 1 again: not counted
    scores[5, 31, 35] = 1  # 3 mm beside lesion 2, along X
    scores[5, 12, 55] = 0
    spacing = (3.0, 1.0, 1.5)
    found = find_candidates(encode(scores), lesions, 2, spacing, 3.0)
    np.testing.assert_array_equal(found.codes, encode(np.float16([4, 3, 1, 0])))
    assert found.hits.tolist() == [1, 0, 2, 0]
    assert find_candidates(encode(scores), lesions, 2, spacing, 2.9).hits.tolist() == [1, 0, 0, 0]


def test_lighting_up_everything_wins_nothing() -> None:
    lesions = np.zeros((6, 30, 30), dtype=np.uint8)
    lesions[2, 15:18, 15:18] = 1
    flooded = np.full(lesions.shape, -9, dtype=np.float16)
    flooded[:, 5:25, 5:25] = 7  # the organ as one component, which overlaps the lesion
    found = find_candidates(encode(flooded), lesions, 1, (3.0, 2.0, 2.0), 0.0)
    assert found.hits[0] == 0 and len(found.hits) > 5


def test_sensitivities_by_hand() -> None:
    codes = encode(np.float16([9, 8, 7, 6]))
    scans = [
        Candidates(codes[[0, 1, 3]], np.array([1, 0, 2]), 2),  # hit at 9, false at 8, hit at 6
        Candidates(codes[[2]], np.array([0]), 1),  # false at 7, its lesion is never found
    ]
    # threshold: false positives a scan, lesions found of 3: 9: 0, 1; 8: 0.5, 1; 7: 1, 1; 6: 1, 2
    expected = [1 / 3, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 2 / 3, 2 / 3]
    np.testing.assert_allclose(froc_sensitivities(scans)[0], expected)
    weights = np.array([[1.0, 1.0], [2.0, 0.0]])  # the second sample holds the first scan twice
    np.testing.assert_allclose(froc_sensitivities(scans, weights)[1], [1 / 2, 1 / 2, 1 / 2, 1, 1, 1, 1])


def test_equal_scores_are_one_threshold() -> None:
    code = encode(np.float16([1, 1, 1]))
    scans = [Candidates(code, np.array([1, 0, 0]), 1)]
    np.testing.assert_array_equal(froc_sensitivities(scans)[0], [0, 0, 0, 0, 1, 1, 1])


def test_no_lesion_no_sensitivity() -> None:
    nothing = Candidates(np.zeros(0, dtype=np.uint16), np.zeros(0, dtype=np.int32), 0)
    assert np.isnan(froc_sensitivities([nothing])).all()
    missed = Candidates(nothing.codes, nothing.hits, 2)
    np.testing.assert_array_equal(froc_sensitivities([missed])[0], np.zeros(7))
