"""Gradients of means over neighbors, which are written by hand."""

from __future__ import annotations

import pytest
import torch

from zept_nnunet.network.pooling import mean_of_neighbors


@pytest.mark.parametrize(("size", "kernel"), [((4, 5, 3), (3, 3, 3)), ((2, 6, 4), (1, 3, 5)), ((1, 2), (3, 3))])
def test_the_gradient_of_a_mean_of_neighbors_is_that_of_finite_differences(
    size: tuple[int, ...], kernel: tuple[int, ...]
) -> None:
    x = torch.randn(2, 2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mean_of_neighbors(x, kernel), (x,))
