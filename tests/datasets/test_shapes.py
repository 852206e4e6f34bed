"""Implicit surfaces against geometry worked out by hand, and random fields."""

from __future__ import annotations

import numpy as np
import pytest

from zept_nnunet.datasets.shapes import BodyGrid, Ellipsoid, Range, Tube, smooth_field, smooth_union


def points(*rows: tuple[float, float, float]) -> np.ndarray:
    return np.asarray(rows, dtype=np.float32).T


def test_distance_to_a_ball_is_exact() -> None:
    ball = Ellipsoid((1, 2, 3), (5, 5, 5))
    np.testing.assert_allclose(ball.distance(points((11, 2, 3), (1, 4, 3), (1, 2, -2))), [5, -3, 0], atol=1e-4)


def test_distance_to_a_tube() -> None:
    tube = Tube((0, 0, 0), (0, 0, 10), 2, 4)
    found = tube.distance(points((3, 0, 0), (5, 0, 10), (0, 0, 16), (0, 0, 5)))
    np.testing.assert_allclose(found, [1, 1, 2, -3], atol=1e-5)


def test_smooth_union_holds_both_shapes_and_equals_the_plain_union_far_from_the_seam() -> None:
    a, b = np.array([-3.0, 10.0, 1.0]), np.array([20.0, -2.0, 1.0])
    np.testing.assert_allclose(
        smooth_union([a, b], 4.0), [-3, -2, 0]
    )  # at the seam it bulges by a quarter of the blend


@pytest.mark.parametrize("scale_mm", [6.0, (6.0, 9.0, 12.0)])
def test_smooth_field_has_unit_spread_and_repeats(scale_mm: float | tuple[float, ...]) -> None:
    axes = [np.arange(0, 120, 2.0)] * 3
    field = smooth_field(axes, scale_mm, np.random.default_rng(0))
    assert field.shape == (60, 60, 60)
    assert abs(float(field.mean())) < 0.1
    assert 0.85 < float(field.std()) < 1.15
    np.testing.assert_array_equal(field, smooth_field(axes, scale_mm, np.random.default_rng(0)))
    assert np.abs(np.diff(field, axis=0)).max() < 2.0  # smooth: far below the spread of independent voxels


def test_a_block_holds_every_voxel_of_a_box_of_body_coordinates() -> None:
    axes = [np.arange(-20, 21, 2.0)] * 3
    grid = BodyGrid(axes, np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32) + 5)
    box = grid.box(np.array([0.0, 0, 0]), np.array([3.0, 3, 3]))
    assert box is not None
    inside = ((grid.points_mm >= 0) & (grid.points_mm <= 3)).all(axis=0)
    assert inside[box].sum() == inside.sum() == 8
    assert grid.box(np.array([100.0, 0, 0]), np.array([120.0, 3, 3])) is None


def test_range() -> None:
    span = Range(-2, 3, "mm", "chosen")
    drawn = [span.draw(np.random.default_rng(i)) for i in range(50)]
    assert all(v in span for v in drawn) and len(set(drawn)) == 50
    assert 3.1 not in span
