"""Thresholds at a given rate of false positives per healthy scan, taken from validation cases.

In a healthy scan every component of {score ≥ t} is a false positive. Their number is wanted at every t. Lowering t adds
voxels and joins components; the joins are the edges of a maximum spanning forest over neighboring voxels, so
components(t) = voxels with score ≥ t − forest edges with score ≥ t, for all t at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_matrix  # type: ignore[import-untyped]
from scipy.sparse.csgraph import minimum_spanning_tree  # type: ignore[import-untyped]

from zept_nnunet.evaluation.ranking import NAN_CODE, NUM_CODES

MAX_VOXELS, MAX_SHARE = 200_000, 0.01
"""Of each scan only so many of the highest voxels are looked at, and so large a share of it: no threshold lets more of
a healthy scan through, however few components that are. A smooth map floods an organ as one of them."""

_NEIGHBORS = [d for d in np.ndindex(3, 3, 3) if d > (1, 1, 1)]  # 13: one of each pair of opposite ones


def count_components(codes: np.ndarray, max_voxels: int | None = None) -> tuple[np.ndarray, int]:
    """26-connected components of {code ≥ t}, for every t.

    Args:
        codes: (Z, Y, X) uint16, as `ranking.encode` gives them; `NAN_CODE` never counts.
        max_voxels: default: `MAX_SHARE` of the voxels, at most `MAX_VOXELS`.

    Returns:
        (65536,) int64 counts, indexed by t, and the lowest t for which they were counted (0 below it).
    """
    if max_voxels is None:
        max_voxels = min(MAX_VOXELS, int(np.ceil(MAX_SHARE * codes.size)))
    histogram = np.zeros(NUM_CODES, dtype=np.int64)
    for plane in codes:
        histogram += np.bincount(plane.ravel(), minlength=NUM_CODES)
    histogram[NAN_CODE] = 0
    above = np.cumsum(histogram[::-1])[::-1]  # voxels with code ≥ t
    lowest = int(np.searchsorted(-above, -max_voxels))  # the first t with at most that many
    lowest = min(max(lowest, NAN_CODE + 1), NUM_CODES - 1)
    flat = np.flatnonzero(codes.ravel() >= lowest)
    values = codes.ravel()[flat].astype(np.int64)
    places = np.stack(np.unravel_index(flat, codes.shape), axis=1)
    edges = _edges(flat, places, codes.shape)
    counts = np.bincount(values, minlength=NUM_CODES)
    if len(edges[0]):
        weight = np.minimum(values[edges[0]], values[edges[1]])
        graph = coo_matrix((NUM_CODES - weight, edges), shape=(len(flat), len(flat))).tocsr()  # > 0, small is high
        forest = NUM_CODES - minimum_spanning_tree(graph).data.astype(np.int64)
        counts = counts - np.bincount(forest, minlength=NUM_CODES)
    result = np.cumsum(counts[::-1])[::-1]
    result[:lowest] = 0
    return result, lowest


def _edges(flat: np.ndarray, places: np.ndarray, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of neighbors, as indices into `flat`, which ascends."""
    starts, stops = [], []
    for step in np.asarray(_NEIGHBORS) - 1:
        inside = np.all((places + step >= 0) & (places + step < shape), axis=1)
        wanted = flat[inside] + step @ np.array([shape[1] * shape[2], shape[2], 1])
        found = np.searchsorted(flat, wanted)
        there = (found < len(flat)) & (flat[np.minimum(found, len(flat) - 1)] == wanted)
        starts.append(np.flatnonzero(inside)[there])
        stops.append(found[there])
    return np.concatenate(starts), np.concatenate(stops)


def matched_threshold(total: np.ndarray, lowest: int, scans: int, rate: float) -> int:
    """The lowest code t such that at t and everywhere above it at most `rate` components a scan stand.

    Coming from above means: a map that falls apart before it floods an organ cannot pass as the one component that the
    flood is. How much may pass at all is `count_components`' to say.

    Args:
        total: (65536,) components of all healthy scans together.
        lowest: the lowest code at which all of them were counted; the threshold never lies below.
        scans: number of healthy scans.
        rate: false positives a scan.
    """
    exceeding = np.flatnonzero(total[lowest:] > rate * scans)
    return min(int(lowest + exceeding[-1] + 1), NUM_CODES - 1) if len(exceeding) else lowest
