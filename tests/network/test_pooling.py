"""Means over neighbors and their gradients, which are written by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zept_nnunet.network.pooling import mean_of_neighbors

CASES = pytest.mark.parametrize(
    ("size", "kernel"), [((4, 5, 3), (3, 3, 3)), ((2, 6, 4), (1, 3, 5)), ((1, 2), (3, 3)), ((3, 2), (7, 5))]
)


@CASES
def test_a_mean_of_neighbors_is_over_those_on_the_grid(size: tuple[int, ...], kernel: tuple[int, ...]) -> None:
    x = torch.randn(2, 2, *size, generator=torch.Generator().manual_seed(0))
    wanted = torch.empty_like(x)
    for place in np.ndindex(*size):
        box = tuple(slice(max(0, i - k // 2), i + k // 2 + 1) for i, k in zip(place, kernel, strict=True))
        wanted[(..., *place)] = x[(..., *box)].flatten(2).mean(2)
    torch.testing.assert_close(mean_of_neighbors(x, kernel), wanted)


@CASES
def test_the_gradient_of_a_mean_of_neighbors_is_that_of_finite_differences(
    size: tuple[int, ...], kernel: tuple[int, ...]
) -> None:
    x = torch.randn(2, 2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mean_of_neighbors(x, kernel), (x,))
