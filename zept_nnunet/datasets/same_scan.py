"""The same scan in two datasets, found by its content, whatever its name, its grid and how it was cropped.

Landmarks and their surroundings, as in feature-based registration, but without rotation: both scans are brought into
one orientation by their headers. A landmark is an extremum of a difference of Gaussians; what describes it is the
smoothed intensity around it. Two scans are taken for one where landmarks that look alike agree on how the one must be
shifted to lie on the other, and the two then correlate.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage  # type: ignore[import-untyped]
from scipy.spatial import cKDTree  # type: ignore[import-untyped]

from zept_nnunet.errors import ZePTError

GRID_MM = 4.0
"""Voxels of the grid that all scans are compared on."""

_FINE_MM, _COARSE_MM = 8.0, 12.8  # the Gaussians whose difference has the landmarks
_APART_MM = 12.0  # half of the window in which a landmark is the extremum
_STEP_MM = 16.0  # between the 27 points that describe a landmark
_CT_WINDOW = (-200.0, 300.0)  # HU, as the narrowest that published datasets are clipped to
MAX_LANDMARKS = 128
_NEAREST = 12  # landmarks of other scans that a landmark is compared with
_ALIKE = 1.2  # distance of two descriptions, whose length is √27 = 5.2
_MIN_VOTES = 5  # landmarks that must agree on a shift
_SHIFT_MM = 6.0  # within which shifts agree
_MIN_CORRELATION = 0.85  # on real CT the same scan had 0.96 and more, resampled, cropped, clipped or noisy; others 0.63
_MIN_OVERLAP = 500  # voxels of the common grid


@dataclass(frozen=True)
class Landmarks:
    """Of one scan: where they are, in mm of the scan's own (x, y, z) towards left, back and head, and what surrounds
    them. Both (N, …) float32.
    """

    positions: np.ndarray  # (N, 3)
    descriptions: np.ndarray  # (N, 27), mean 0, standard deviation 1


@dataclass(frozen=True)
class SameScan:
    """Two scans that are one. `correlation` is that of the part that both show."""

    first: str
    second: str
    correlation: float


def _read(path: Path) -> sitk.Image:
    try:
        return sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise ZePTError(f"{path} cannot be read: {str(error).strip().splitlines()[-1]}") from error


def read_on_grid(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """A scan on the grid that all are compared on: float32 (z, y, x) and the position in mm (x, y, z) of its first
    voxel; None where it has not three dimensions.

    Raises:
        ZePTError: the file cannot be read.
    """
    image = _read(path)
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        return None
    image = sitk.Cast(sitk.DICOMOrient(image, "LPS"), sitk.sitkFloat32)
    shrink = [max(1, int(GRID_MM / s)) for s in image.GetSpacing()]
    image = sitk.BinShrink(image, [min(f, n) for f, n in zip(shrink, image.GetSize(), strict=True)])
    size = [max(1, int(n * s / GRID_MM)) for n, s in zip(image.GetSize(), image.GetSpacing(), strict=True)]
    grid = sitk.Image(size, sitk.sitkFloat32)
    grid.SetSpacing([GRID_MM] * 3)
    grid.SetDirection(image.GetDirection())
    corner = [(GRID_MM - s) / 2 / s for s in image.GetSpacing()]  # so that both grids begin at the same edge
    grid.SetOrigin(image.TransformContinuousIndexToPhysicalPoint(corner))
    on_grid = sitk.Resample(image, grid, sitk.Transform(), sitk.sitkLinear, 0.0, sitk.sitkFloat32, True)
    array = sitk.GetArrayFromImage(on_grid)
    if array.min() <= _CT_WINDOW[0]:  # CT, and it shows air
        array = array.clip(*_CT_WINDOW)
    return array, np.asarray(grid.GetOrigin(), dtype=np.float32)


def landmarks_of(array: np.ndarray, origin: np.ndarray) -> Landmarks:
    """The strongest landmarks of a scan on the grid; none where it is too small to hold one.

    array (z, y, x), origin (x, y, z) in mm, as from `read_on_grid`.
    """
    none = Landmarks(np.zeros((0, 3), np.float32), np.zeros((0, 27), np.float32))
    reach = int(np.ceil(_STEP_MM / GRID_MM)) + 1
    if min(array.shape) <= 2 * reach or not np.isfinite(array).all():
        return none
    fine, coarse = (ndimage.gaussian_filter(array, mm / GRID_MM, mode="nearest") for mm in (_FINE_MM, _COARSE_MM))
    difference = fine - coarse
    window = 2 * round(_APART_MM / GRID_MM) + 1
    is_extremum = (difference == ndimage.maximum_filter(difference, window)) | (
        difference == ndimage.minimum_filter(difference, window)
    )
    inside = np.zeros_like(is_extremum)
    inside[(slice(reach, -reach),) * 3] = True
    where = np.argwhere(is_extremum & inside)
    strength = np.abs(difference[tuple(where.T)])
    where = where[np.argsort(-strength, kind="stable")[:MAX_LANDMARKS]]
    exact = where + _offsets_of_extrema(difference, where)
    steps = np.array(list(itertools.product((-1, 0, 1), repeat=3))) * _STEP_MM / GRID_MM
    points = (exact[:, None] + steps[None]).reshape(-1, 3).T
    around = ndimage.map_coordinates(fine, points, order=1, mode="nearest").reshape(len(where), 27)
    spread = around.std(1, keepdims=True)
    keep = spread[:, 0] > 1e-3
    described = ((around - around.mean(1, keepdims=True)) / np.maximum(spread, 1e-6))[keep]
    positions = origin + exact[keep][:, ::-1] * GRID_MM
    return Landmarks(positions.astype(np.float32), described.astype(np.float32)) if keep.any() else none


def _offsets_of_extrema(difference: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Where between the voxels each extremum lies: the vertex of a parabola along each axis, within half a voxel."""
    offsets = np.zeros(where.shape)
    for axis in range(3):
        step = np.eye(3, dtype=int)[axis]
        before, at, after = (difference[tuple((where + d * step).T)] for d in (-1, 0, 1))
        curvature = before - 2 * at + after
        safe = np.where(curvature == 0, 1, curvature)
        offsets[:, axis] = np.where(curvature == 0, 0, 0.5 * (before - after) / safe).clip(-0.5, 0.5)
    return offsets


def candidates(scans: Mapping[str, Landmarks]) -> Iterator[tuple[str, str, np.ndarray]]:
    """Pairs of scans whose landmarks agree on a shift: names in the order given, and mm (x, y, z) from the first one's
    positions to the second one's.
    """
    names = list(scans)
    numbers = [len(scans[n].positions) for n in names]
    owner = np.repeat(np.arange(len(names), dtype=np.int32), numbers)
    if not len(owner):
        return
    positions = np.concatenate([scans[n].positions for n in names])
    descriptions = np.concatenate([scans[n].descriptions for n in names])
    tree = cKDTree(descriptions)
    votes = []  # (2, N) landmarks of two scans that look alike; 8 bytes each, as there are up to 1536 of a scan
    for i, end in enumerate(itertools.accumulate(numbers)):
        if not numbers[i]:
            continue
        mine = np.arange(end - numbers[i], end)
        _, found = tree.query(descriptions[mine], k=min(_NEAREST + 1, len(owner)), distance_upper_bound=_ALIKE)
        found = found.reshape(len(mine), -1)
        row, column = np.nonzero(found < len(owner))  # the tree names one that does not exist where there are fewer
        alike = np.stack((mine[row], found[row, column])).astype(np.int32)
        votes.append(np.sort(alike[:, owner[alike[1]] != i], axis=0))  # landmarks stand in the order of their scans
    first, second = np.concatenate(votes, axis=1)
    votes.clear()
    pair = owner[first].astype(np.int64)
    pair *= len(names)
    pair += owner[second]
    order = np.argsort(pair, kind="stable")
    pair = pair[order]
    starts = np.concatenate(([0], np.flatnonzero(pair[1:] != pair[:-1]) + 1))
    ends = np.append(starts[1:], len(pair))
    is_enough = ends - starts >= _MIN_VOTES
    for start, end in zip(starts[is_enough], ends[is_enough], strict=True):
        its = order[start:end]
        shift = _common(positions[second[its]] - positions[first[its]])
        if shift is not None:
            yield names[owner[first[its[0]]]], names[owner[second[its[0]]]], shift


def _common(shifts: np.ndarray) -> np.ndarray | None:
    """The shift (3,) that most agree on, of (N, 3); None where too few do."""
    near = cKDTree(shifts).query_ball_point(shifts, _SHIFT_MM)
    most = max(near, key=len)
    return np.median(shifts[most], axis=0) if len(most) >= _MIN_VOTES else None


def correlation_of(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], shift: np.ndarray
) -> float:
    """Pearson's correlation of what two scans on the grid both show, the second moved back by `shift`; 0 where that
    is next to nothing. Details alone count: bodies of any two patients are alike in the large.
    """
    a, b = (
        ndimage.gaussian_filter(array, 1.0, mode="nearest") - ndimage.gaussian_filter(array, 3.0, mode="nearest")
        for array, _ in (first, second)
    )
    start = ((first[1] + shift - second[1]) / GRID_MM)[::-1]  # the first one's first voxel, in the second one's voxels
    low = np.ceil(np.maximum(0, -start)).astype(int)
    high = np.floor(np.minimum(a.shape, np.array(b.shape) - 1 - start)).astype(int)
    if (high - low).min() < 1 or np.prod(high - low) < _MIN_OVERLAP:
        return 0.0
    part = a[tuple(slice(lo, hi) for lo, hi in zip(low, high, strict=True))]
    moved = ndimage.shift(b, -(start + low), order=1, mode="nearest")[tuple(slice(0, n) for n in part.shape)]
    if part.shape != moved.shape or part.std() < 1e-3 or moved.std() < 1e-3:
        return 0.0
    return float(np.corrcoef(part.ravel(), moved.ravel())[0, 1])


def find_same_scans(
    paths: Mapping[str, Path], scans: Mapping[str, Landmarks], skip: Iterable[frozenset[str]] = ()
) -> list[SameScan]:
    """Pairs of scans that are one, by names. Scans without landmarks are compared by their voxels, which must be equal.

    Args:
        paths: of each scan's file.
        scans: their landmarks.
        skip: pairs that need no look.

    Raises:
        ZePTError: a file cannot be read.
    """
    skipped, found = set(skip), []
    for a, b, shift in candidates(scans):
        if frozenset((a, b)) in skipped:
            continue
        pair = [read_on_grid(paths[name]) for name in (a, b)]
        if pair[0] is None or pair[1] is None:
            continue
        correlation = correlation_of(pair[0], pair[1], shift)
        if correlation >= _MIN_CORRELATION:
            found.append(SameScan(a, b, correlation))
    first: dict[str, str] = {}  # digest → the first scan that has it
    for name in without_landmarks(scans):
        twin = first.setdefault(voxel_digest(paths[name]), name)
        if twin != name and frozenset((twin, name)) not in skipped:
            found.append(SameScan(twin, name, 1.0))
    return found


def without_landmarks(scans: Mapping[str, Landmarks]) -> list[str]:
    """Names of the scans that show no landmark: too small, or not of three dimensions."""
    return [name for name, landmarks in scans.items() if not len(landmarks.positions)]


def voxel_digest(path: Path) -> str:
    """Of an image's size and voxels, whatever its file format, type of numbers and compression.

    Raises:
        ZePTError: the file cannot be read.
    """
    array = sitk.GetArrayFromImage(_read(path)).astype(np.float64)
    digest = hashlib.sha256(repr(array.shape).encode())
    digest.update(array.tobytes())
    return digest.hexdigest()


def read_landmarks(path: Path) -> Landmarks:
    """As `landmarks_of`, from a file; none where it has not three dimensions.

    Raises:
        ZePTError: as `read_on_grid`.
    """
    on_grid = read_on_grid(path)
    return landmarks_of(*on_grid) if on_grid is not None else Landmarks(np.zeros((0, 3)), np.zeros((0, 27)))


def groups_of(names: Sequence[str], pairs: Iterable[SameScan]) -> dict[str, str]:
    """Each name → one name that stands for all that are the same scan, also by way of a third."""
    ties = Ties()
    for pair in pairs:
        ties.tie(pair.first, pair.second)
    return {name: ties.root(name) for name in names}


class Ties:
    """Names that are tied together, also by way of others."""

    def __init__(self) -> None:
        self._leader: dict[str, str] = {}

    def root(self, name: str) -> str:
        """One name that stands for all that are tied to this one, the first in alphabetical order."""
        while self._leader.get(name, name) != name:
            name = self._leader[name]
        return name

    def tie(self, a: str, b: str) -> None:
        """From now on both have one root."""
        low, high = sorted((self.root(a), self.root(b)))
        self._leader[high] = low


def summary(pairs: Sequence[SameScan]) -> str:
    """The pairs in words, a line each; all of them, as each must be looked at."""
    return "\n".join(f"  {p.first} = {p.second} (correlation {p.correlation:.3f})" for p in pairs)
