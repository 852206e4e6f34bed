"""Dice, and normalized surface Dice (NSD) at a tolerance in mm.

NSD is that of Nikolov et al., "Clinically applicable segmentation of head and neck anatomy for radiotherapy" (JMIR
2021), as DeepMind's `surface-distance` computes it: surface elements with their area, at the corners of the voxels. The
areas come from that library. Distances come from a search tree over the surface elements and not from two distance
transforms over the volume: the same numbers, with memory that grows with the surface.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.spatial import cKDTree  # type: ignore[import-untyped]
from surface_distance import lookup_tables  # type: ignore[import-untyped]


def dice(intersection: int, reference: int, prediction: int) -> float:
    """2·|R∩P| / (|R| + |P|) from voxel counts. NaN where the reference is empty: Dice is over cases that hold it."""
    return 2 * intersection / (reference + prediction) if reference else float("nan")


def surface_dice(
    reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float], tolerance_mm: float
) -> float:
    """Share of both surfaces, by area, that lies within the tolerance of the other one.

    Args:
        reference, prediction: (Z, Y, X) bool, at least one voxel wide around nothing: crops of the masks are enough,
            as the outside of the array counts as background.
        spacing_mm: in the arrays' axis order.
        tolerance_mm: inclusive.

    Returns:
        0 where only the reference holds something; NaN where the reference is empty.
    """
    if not reference.any():
        return float("nan")
    if not prediction.any():
        return 0.0
    areas = lookup_tables.create_table_neighbour_code_to_surface_area(np.asarray(spacing_mm, dtype=float))
    ours, our_area = _surface(reference, areas)
    theirs, their_area = _surface(prediction, areas)
    spacing = np.asarray(spacing_mm, dtype=float)
    near_ours = _distances_mm(ours, theirs, spacing) <= tolerance_mm
    near_theirs = _distances_mm(theirs, ours, spacing) <= tolerance_mm
    within = our_area[near_ours].sum() + their_area[near_theirs].sum()
    return float(within / (our_area.sum() + their_area.sum()))


def _surface(mask: np.ndarray, areas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners (n, 3) that lie between inside and outside, and the area in mm² of the surface element at each."""
    kernel = np.asarray(lookup_tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL, dtype=np.uint8)
    padded = np.pad(mask, 1).view(np.uint8)
    size = tuple(n + 1 for n in mask.shape)
    codes = np.zeros(size, dtype=np.uint8)
    for offset in np.ndindex(2, 2, 2):
        codes += kernel[offset] * padded[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
    corners = np.argwhere((codes != 0) & (codes != 255))
    return corners, areas[codes[tuple(corners.T)]]


def _distances_mm(points: np.ndarray, targets: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """(n,) distance of each point to the nearest target."""
    _, nearest = cKDTree(targets * spacing).query(points * spacing)
    return np.sqrt((((points - targets[nearest]) * spacing) ** 2).sum(axis=1))
