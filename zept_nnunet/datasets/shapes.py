"""Geometry of the phantom: a fine grid in body coordinates, implicit surfaces on it, and smooth random fields.

An implicit surface is a function that is negative inside, and near its surface about the distance in mm.
Coordinates are millimetres (Z, Y, X): Z grows to the head, Y to the back, X to the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import BSpline  # type: ignore[import-untyped]

Triple = tuple[float, float, float]
Box = tuple[slice, slice, slice]
_SPLINE_STD = 0.479**1.5  # of a cubic B-spline of unit normal coefficients in 3D, averaged over positions


@dataclass(frozen=True)
class Range:
    """An interval from which a property is drawn uniformly, with its unit and where the figures come from."""

    low: float
    high: float
    unit: str
    source: str

    def draw(self, rng: np.random.Generator) -> float:
        """One value."""
        return float(rng.uniform(self.low, self.high))

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Ellipsoid:
    """Center and semi-axes in mm."""

    center_mm: Triple
    radii_mm: Triple

    def distance(self, points_mm: np.ndarray) -> np.ndarray:
        """(…) signed distance, first order, of points (3, …)."""
        q = points_mm - _column(self.center_mm, points_mm.ndim)
        r = _column(self.radii_mm, points_mm.ndim)
        scaled = np.sqrt(((q / r) ** 2).sum(axis=0))
        gradient = np.sqrt(((q / r**2) ** 2).sum(axis=0)) + 1e-6
        return scaled * (scaled - 1) / gradient

    def bounds(self, margin_mm: float) -> tuple[np.ndarray, np.ndarray]:
        """Corners of the box around it."""
        center, radii = np.asarray(self.center_mm), np.asarray(self.radii_mm)
        return center - radii - margin_mm, center + radii + margin_mm


@dataclass(frozen=True)
class Tube:
    """A straight vessel or duct between two points, its radius linear along it; all in mm."""

    start_mm: Triple
    end_mm: Triple
    start_radius_mm: float
    end_radius_mm: float

    def distance(self, points_mm: np.ndarray) -> np.ndarray:
        """(…) signed distance of points (3, …)."""
        start = _column(self.start_mm, points_mm.ndim)
        axis = _column(self.end_mm, points_mm.ndim) - start
        along = np.clip(((points_mm - start) * axis).sum(axis=0) / max(float((axis**2).sum()), 1e-6), 0, 1)
        away = np.sqrt(((points_mm - start - along * axis) ** 2).sum(axis=0))
        return away - (self.start_radius_mm + along * (self.end_radius_mm - self.start_radius_mm))

    def bounds(self, margin_mm: float) -> tuple[np.ndarray, np.ndarray]:
        """Corners of the box around it."""
        ends = np.asarray([self.start_mm, self.end_mm])
        margin = margin_mm + max(self.start_radius_mm, self.end_radius_mm)
        return ends.min(axis=0) - margin, ends.max(axis=0) + margin


def smooth_union(distances: Sequence[np.ndarray], blend_mm: float) -> np.ndarray:
    """Union of implicit surfaces whose seams are rounded over about ``blend_mm`` (polynomial smooth minimum)."""
    result = distances[0]
    for other in distances[1:]:
        h = np.clip(0.5 + 0.5 * (other - result) / blend_mm, 0, 1)
        result = other + (result - other) * h - blend_mm * h * (1 - h)
    return result


def smooth_field(
    axes_mm: Sequence[np.ndarray], scale_mm: float | Sequence[float], rng: np.random.Generator
) -> np.ndarray:
    """(Z, Y, X) float32 random field on a rectilinear grid: mean 0, standard deviation about 1.

    A cubic B-spline whose unit normal coefficients lie ``scale_mm`` apart (one number, or one per axis). Only sparse
    products with a fixed order of summation are used, so an equal generator gives equal bits.
    """
    scales = [scale_mm] * 3 if isinstance(scale_mm, (int, float)) else list(scale_mm)
    bases = []
    for axis, scale in zip(axes_mm, scales, strict=True):
        position = (axis - axis[0]) / scale
        count = int(np.floor(position[-1])) + 1  # intervals
        knots = np.arange(-3, count + 4, dtype=float)
        bases.append(BSpline.design_matrix(position, knots, 3, extrapolate=False).tocsr().astype(np.float32))
    field = rng.standard_normal([basis.shape[1] for basis in bases], dtype=np.float32)
    for axis_index, basis in enumerate(bases):
        moved = np.moveaxis(field, axis_index, 0)
        field = np.moveaxis((basis @ moved.reshape(moved.shape[0], -1)).reshape(-1, *moved.shape[1:]), 0, axis_index)
    return np.ascontiguousarray(field) / np.float32(_SPLINE_STD)


class BodyGrid:
    """A fine voxel grid that knows where each voxel lies in the body.

    Attributes:
        axes_mm: scanner coordinates of the voxel centers along Z, Y, X.
        points_mm: (3, Z, Y, X) float32, body coordinates of the voxel centers.
    """

    def __init__(self, axes_mm: Sequence[np.ndarray], points_mm: np.ndarray) -> None:
        self.axes_mm = tuple(np.asarray(axis) for axis in axes_mm)
        self.points_mm = points_mm
        others = ((1, 2), (0, 2), (0, 1))
        self._lowest = [points_mm[i].min(axis=others[i]) for i in range(3)]
        self._highest = [points_mm[i].max(axis=others[i]) for i in range(3)]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along Z, Y, X."""
        return self.points_mm.shape[1], self.points_mm.shape[2], self.points_mm.shape[3]

    def box(self, low_mm: np.ndarray, high_mm: np.ndarray) -> Box | None:
        """The smallest block of voxels that holds a box of body coordinates; None where it lies outside."""
        slices = []
        for i in range(3):
            inside = np.flatnonzero((self._highest[i] >= low_mm[i]) & (self._lowest[i] <= high_mm[i]))
            if inside.size == 0:
                return None
            slices.append(slice(int(inside[0]), int(inside[-1]) + 1))
        return slices[0], slices[1], slices[2]

    def points_in(self, box: Box) -> np.ndarray:
        """(3, z, y, x) body coordinates of a block's voxels."""
        return self.points_mm[:, box[0], box[1], box[2]]

    def points_where(self, mask: np.ndarray) -> np.ndarray:
        """(3, voxels) float64 body coordinates of the voxels in a mask (Z, Y, X)."""
        return self.points_mm[:, mask].astype(float)

    def sub_axes(self, box: Box) -> list[np.ndarray]:
        """Scanner coordinates along the three axes of a block."""
        return [axis[part] for axis, part in zip(self.axes_mm, box, strict=True)]


def _column(values: Sequence[float], ndim: int) -> np.ndarray:
    return np.asarray(values, dtype=np.float32).reshape(3, *([1] * (ndim - 1)))
