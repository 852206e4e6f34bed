"""NSD equals DeepMind's surface-distance, and geometry worked out by hand."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy import ndimage
from surface_distance import metrics as library

from zept_nnunet.evaluation.overlap import dice, surface_dice


def library_surface_dice(
    reference: np.ndarray, prediction: np.ndarray, spacing_mm: tuple[float, ...], tolerance_mm: float
) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it names scipy.ndimage's old modules
        distances = library.compute_surface_distances(reference, prediction, spacing_mm)
    return library.compute_surface_dice_at_tolerance(distances, tolerance_mm)


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (5.0, 0.8, 0.7)])
@pytest.mark.parametrize("tolerance_mm", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_equal_to_surface_distance(seed: int, tolerance_mm: float, spacing_mm: tuple[float, ...]) -> None:
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.normal(size=(16, 24, 28)), 2)
    reference = field > 0.06
    prediction = ndimage.gaussian_filter(field + 0.04 * rng.normal(size=field.shape), 0.7) > 0.05
    expected = library_surface_dice(reference, prediction, spacing_mm, tolerance_mm)
    assert 0 < expected < 1 or tolerance_mm == 3.0
    assert surface_dice(reference, prediction, spacing_mm, tolerance_mm) == pytest.approx(expected, abs=1e-6)


def test_a_crop_gives_the_same() -> None:
    reference, prediction = np.zeros((2, 12, 12, 12), dtype=bool)
    reference[3:8, 2:9, 4:10] = True
    prediction[4:9, 2:9, 4:10] = True
    box = (slice(3, 9), slice(2, 9), slice(4, 10))
    whole = surface_dice(reference, prediction, (2, 1, 1), 1.0)
    assert surface_dice(reference[box], prediction[box], (2, 1, 1), 1.0) == whole


def test_parallel_plates() -> None:
    """Two plates, 4 mm apart: nothing of one lies within 3 mm of the other, everything within 4 mm."""
    reference, prediction = np.zeros((2, 12, 20, 20), dtype=bool)
    reference[2] = True
    prediction[4] = True
    spacing = (2.0, 1.0, 1.0)
    assert surface_dice(reference, prediction, spacing, 4.0) == 1.0
    # Plate 2 has its faces at 4 and 6 mm, plate 4 at 8 and 10 mm: at 2 mm one face of each is near the other.
    assert surface_dice(reference, prediction, spacing, 2.0) == pytest.approx(0.5, abs=0.06)  # and parts of the rim
    assert surface_dice(reference, prediction, spacing, 1.0) == 0.0


def test_empty_masks() -> None:
    empty, full = np.zeros((3, 4, 5), dtype=bool), np.ones((3, 4, 5), dtype=bool)
    assert np.isnan(surface_dice(empty, full, (1, 1, 1), 3))
    assert np.isnan(surface_dice(empty, empty, (1, 1, 1), 3))
    assert surface_dice(full, empty, (1, 1, 1), 3) == 0
    assert np.isnan(dice(0, 0, 5)) and np.isnan(dice(0, 0, 0))
    assert dice(0, 5, 0) == 0
    assert dice(2, 4, 4) == 0.5
