"""FROC from score maps: candidates, which lesion each one hits, and sensitivity at given false positives per scan.

Free-response ROC, scored as LUNA16 does (Setio et al., Medical Image Analysis 2017): sensitivity at 1/8 … 8 false
positives a scan, and the mean of the seven. Candidates are points, not components of a thresholded map: a map that
lights up a whole organ would be one component that overlaps every lesion, and win without finding any.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zept_nnunet.evaluation.ranking import NAN_CODE

FALSE_POSITIVES_PER_SCAN = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
PEAK_DISTANCE_MM = 10.0
MAX_CANDIDATES = 100
_BLOCK = 8
_MAX_TIES = 4096  # blocks: of a wide plateau only the first of these are searched for its first voxel


@dataclass(frozen=True)
class Candidates:
    """The candidates of one scan, best first.

    Attributes:
        codes: (n,) score, as `ranking.encode` gives it.
        hits: (n,) number of the lesion that a candidate is the first to hit; 0: a false positive. Candidates that hit
            a lesion again are left out, as in LUNA16.
        lesions: lesions in the scan.
    """

    codes: np.ndarray
    hits: np.ndarray
    lesions: int


def find_peaks(
    codes: np.ndarray, spacing_mm: Sequence[float], distance_mm: float = PEAK_DISTANCE_MM, limit: int = MAX_CANDIDATES
) -> tuple[np.ndarray, np.ndarray]:
    """The highest voxel, then the highest that is farther than `distance_mm` from it, and so on.

    Stops at `limit` peaks, and where nothing stands above the lowest score of the scan. Of equal voxels the first in
    array order is taken.

    Args:
        codes: (Z, Y, X) uint16. Changed in place: what a peak has suppressed becomes 0.

    Returns:
        Positions (n, 3) and codes (n,), descending.
    """
    floor = int(codes[codes != NAN_CODE].min(initial=np.iinfo(np.uint16).max))
    grid = tuple(-(-n // _BLOCK) for n in codes.shape)
    blocks = np.zeros(grid, dtype=np.uint16)  # maximum of each block of voxels
    for z in range(grid[0]):
        slab = codes[z * _BLOCK : (z + 1) * _BLOCK].max(axis=0)
        padded = np.pad(slab, [(0, g * _BLOCK - n) for g, n in zip(grid[1:], slab.shape, strict=True)])
        blocks[z] = padded.reshape(grid[1], _BLOCK, grid[2], _BLOCK).max(axis=(1, 3))
    positions: list[tuple[int, ...]] = []
    found: list[int] = []
    reach = [int(distance_mm // s) for s in spacing_mm]
    while len(found) < limit:
        highest = int(blocks.max())
        if highest <= floor:
            break
        # Array order of voxels is not that of blocks: of all blocks with the highest value the first voxel counts.
        place = min(
            _first_in_block(codes, block, highest) for block in np.argwhere(blocks == highest)[:_MAX_TIES].tolist()
        )
        positions.append(place)
        found.append(highest)
        low = [max(p - r, 0) for p, r in zip(place, reach, strict=True)]
        high = [min(p + r + 1, n) for p, r, n in zip(place, reach, codes.shape, strict=True)]
        axes = [
            ((np.arange(a, b) - p) * s) ** 2 for a, b, p, s in zip(low, high, place, spacing_mm, strict=True)
        ]  # squared distance along each axis
        near = axes[0][:, None, None] + axes[1][None, :, None] + axes[2][None, None, :] <= distance_mm**2
        codes[tuple(map(slice, low, high))][near] = 0
        for block in itertools.product(
            *(range(a // _BLOCK, (b - 1) // _BLOCK + 1) for a, b in zip(low, high, strict=True))
        ):
            blocks[block] = codes[_inside(block)].max()
    return np.asarray(positions, dtype=np.int64).reshape(-1, 3), np.asarray(found, dtype=np.uint16)


def _inside(block: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(b * _BLOCK, (b + 1) * _BLOCK) for b in block)


def _first_in_block(codes: np.ndarray, block: Sequence[int], value: int) -> tuple[int, ...]:
    inside = np.argwhere(codes[_inside(block)] == value)[0]
    return tuple(int(i + b * _BLOCK) for i, b in zip(inside, block, strict=True))


def find_candidates(
    codes: np.ndarray, lesions: np.ndarray, count: int, spacing_mm: Sequence[float], tolerance_mm: float
) -> Candidates:
    """Peaks of a score map, and the lesion that each one hits: the nearest within the tolerance.

    Args:
        codes: (Z, Y, X) uint16; changed in place.
        lesions: (Z, Y, X) components, 1 … `count`, 0 elsewhere.
        tolerance_mm: inclusive; 0 wants the peak inside the lesion.
    """
    positions, values = find_peaks(codes, spacing_mm)
    spacing = np.asarray(spacing_mm, dtype=float)
    reach = np.floor(tolerance_mm / spacing).astype(int)
    kept: list[int] = []
    hits: list[int] = []
    seen: set[int] = set()
    for i, place in enumerate(positions):
        low = np.maximum(place - reach, 0)
        window = lesions[tuple(slice(a, b) for a, b in zip(low, place + reach + 1, strict=True))]
        there = np.argwhere(window)
        distance = np.sqrt((((there + low - place) * spacing) ** 2).sum(axis=1))
        lesion = int(window[tuple(there[distance.argmin()])]) if len(there) and distance.min() <= tolerance_mm else 0
        if lesion in seen:
            continue
        if lesion:
            seen.add(lesion)
        kept.append(i)
        hits.append(lesion)
    return Candidates(values[kept], np.asarray(hits, dtype=np.int32), count)


def froc_sensitivities(
    scans: Sequence[Candidates],
    weights: np.ndarray | None = None,
    rates: Sequence[float] | np.ndarray = FALSE_POSITIVES_PER_SCAN,
) -> np.ndarray:
    """Sensitivity at each of R rates of false positives per scan, over all lesions of all scans.

    The curve is a step function: the sensitivity of the lowest threshold with at most that many false positives.

    Args:
        scans: n of them.
        weights: (B, n) how often each scan counts, per bootstrap sample; None: each once, B = 1.

    Returns:
        (B, R); NaN where the scans hold no lesion.
    """
    weights = np.ones((1, len(scans))) if weights is None else weights
    scan, is_hit, ends = _in_order(scans)
    lesions = weights @ np.array([s.lesions for s in scans], dtype=float)
    rates = np.asarray(rates, dtype=float)
    result = np.full((len(weights), len(rates)), np.nan)
    for b, w in enumerate(weights):
        if not lesions[b]:
            continue
        each = w[scan]
        false = np.cumsum(each * ~is_hit)[ends]
        true = np.concatenate([[0.0], np.cumsum(each * is_hit)[ends]])
        allowed = rates * w.sum() + 1e-6  # false positives are whole numbers, a rate times the scans may not be
        result[b] = true[np.searchsorted(false, allowed, side="right")] / lesions[b]
    return result


def froc_steps(scans: Sequence[Candidates]) -> np.ndarray:
    """False positives per scan at which the sensitivity rises, ascending."""
    _, is_hit, ends = _in_order(scans)
    gained = np.diff(np.cumsum(is_hit)[ends], prepend=0) > 0
    return np.unique(np.cumsum(~is_hit)[ends][gained] / max(len(scans), 1))


def _in_order(scans: Sequence[Candidates]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All candidates by descending score: their scan, whether they hit a lesion, and where each score ends."""
    scan = np.repeat(np.arange(len(scans)), [len(s.codes) for s in scans])
    codes = np.concatenate([np.zeros(0, dtype=np.int64), *(s.codes for s in scans)]).astype(np.int64)
    is_hit = np.concatenate([np.zeros(0, dtype=np.int32), *(s.hits for s in scans)]) > 0
    order = np.argsort(-codes, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(codes[order])), len(codes) - 1) if len(codes) else np.zeros(0, dtype=int)
    return scan[order], is_hit[order], ends
