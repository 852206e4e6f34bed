"""Means and maxima over neighboring voxels, on grids of any size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def mean_of_neighbors(x: Tensor, kernel: Sequence[int]) -> Tensor:
    """Mean over the voxels of a box that lie on the grid: (B, C, *) → (B, C, *).

    One axis after the other: on a CPU several times faster than PyTorch's pooling.

    Args:
        kernel: odd, of each of the 2 or 3 axes.
    """
    mean: Tensor = _Mean.apply(x, tuple(kernel))
    return mean


class _Mean(torch.autograd.Function):
    """By hand, since autograd would make a full map for every slice that is added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: tuple[int, ...]) -> Tensor:
        ctx.kernel = kernel
        return _box(x, kernel, is_adjoint=False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _box(gradient, ctx.kernel, is_adjoint=True), None


def _box(x: Tensor, kernel: tuple[int, ...], is_adjoint: bool) -> Tensor:
    """Sums over boxes, divided by the voxels summed; the adjoint divides first."""
    for axis, size in enumerate(kernel, start=2):
        length, half = x.shape[axis], size // 2
        if half == 0:
            continue
        x = _divide_(x.clone(), axis, half) if is_adjoint else x
        total = x.clone()
        for step in range(1, min(half, length - 1) + 1):
            total.narrow(axis, step, length - step).add_(x.narrow(axis, 0, length - step))
            total.narrow(axis, 0, length - step).add_(x.narrow(axis, step, length - step))
        x = total if is_adjoint else _divide_(total, axis, half)
    return x


def _divide_(x: Tensor, axis: int, half: int) -> Tensor:
    """In place, by the voxels of this axis that lie at most `half` away: by all of them, then at the edges by fewer."""
    length, everywhere = x.shape[axis], 2 * half + 1
    x.div_(everywhere)
    for place in {*range(min(half, length)), *range(max(0, length - half), length)}:
        count = min(place, half) + min(length - 1 - place, half) + 1
        x.narrow(axis, place, 1).mul_(everywhere / count)
    return x


def highest_nearby(x: Tensor) -> Tensor:
    """Highest value among a voxel and its neighbors, diagonal ones too: (B, C, *) → (B, C, *)."""
    for axis in range(2, x.ndim):  # one axis after the other; on a CPU many times faster than PyTorch's pooling
        highest = x.clone()
        for a, b in ((slice(1, None), slice(None, -1)), (slice(None, -1), slice(1, None))):
            to, of = ((*[slice(None)] * axis, s) for s in (a, b))
            highest[to] = torch.maximum(highest[to], x[of])
        x = highest
    return x
