"""Means and maxima over neighboring voxels, on grids of any size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_of_neighbors(x: Tensor, kernel: Sequence[int]) -> Tensor:
    """Mean over the voxels of a box that lie on the grid: (B, C, *) → (B, C, *).

    Padded by hand where PyTorch's pooling refuses: an axis shorter than the kernel.

    Args:
        kernel: odd, of each of the 2 or 3 axes.
    """
    pool = F.avg_pool3d if x.ndim == 5 else F.avg_pool2d
    if all(size >= k for size, k in zip(x.shape[2:], kernel, strict=True)):
        half = tuple(k // 2 for k in kernel)
        return pool(x, tuple(kernel), stride=1, padding=half, count_include_pad=False)
    around = [k // 2 for k in reversed(kernel) for _ in range(2)]
    inside = torch.ones_like(x[:1, :1])
    return pool(F.pad(x, around), tuple(kernel), stride=1) / pool(F.pad(inside, around), tuple(kernel), stride=1)


def highest_nearby(x: Tensor) -> Tensor:
    """Highest value among a voxel and its neighbors, diagonal ones too: (B, C, *) → (B, C, *)."""
    for axis in range(2, x.ndim):  # one axis after the other; on a CPU many times faster than PyTorch's pooling
        highest = x.clone()
        for a, b in ((slice(1, None), slice(None, -1)), (slice(None, -1), slice(1, None))):
            to, of = ((*[slice(None)] * axis, s) for s in (a, b))
            highest[to] = torch.maximum(highest[to], x[of])
        x = highest
    return x
