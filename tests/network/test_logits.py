from __future__ import annotations

import pytest
import torch

from zept_nnunet.network.logits import conjunction, less_certain, union


def _odds(p: torch.Tensor) -> torch.Tensor:
    return torch.log(p) - torch.log1p(-p)


def test_conjunction_equals_float64_product_of_probabilities() -> None:
    u, a = torch.meshgrid(torch.linspace(-12, 12, 49), torch.linspace(-12, 12, 49), indexing="ij")
    want = _odds(torch.sigmoid(u.double()) * torch.sigmoid(a.double()))
    assert torch.allclose(conjunction(u, a).double(), want, atol=2e-5)
    assert (conjunction(u, a) <= torch.minimum(u, a) + 1e-5).all()


def test_conjunction_is_finite_with_finite_gradient_at_extreme_logits() -> None:
    u = torch.tensor([-1e4, 1e4, 0.0, 1e4, -1e4], requires_grad=True)
    a = torch.tensor([1e4, 1e4, 0.0, -1e4, -1e4], requires_grad=True)
    conjunction(u, a).sum().backward()
    assert torch.isfinite(u.grad).all() and torch.isfinite(a.grad).all()


def test_less_certain_keeps_the_order_and_all_above_the_floor() -> None:
    z = torch.linspace(-1000, 20, 4081)
    low = less_certain(z, 4.0)
    assert torch.equal(low[z >= -4], z[z >= -4]) and (low.diff() > 0).all()
    below = z.double()[z < -4]
    torch.testing.assert_close(low[z < -4].double(), -4 - (1 + (-4 - below)).log(), atol=1e-5, rtol=1e-5)


def test_union_equals_float64_complement_of_product() -> None:
    torch.manual_seed(0)
    z = torch.randn(4, 3, 50) * 6
    nothing = torch.sigmoid(-z.double()).prod(1)
    want = torch.log1p(-nothing) - torch.log(nothing)
    assert torch.allclose(union(z, 1).double(), want, atol=1e-4)


def test_union_fills_the_hole_that_a_maximum_leaves() -> None:
    z = _odds(torch.tensor([[0.45, 0.45]]))
    assert torch.sigmoid(union(z, 1)).item() == pytest.approx(1 - 0.55**2, abs=1e-6)


def test_union_is_finite_with_finite_gradient_at_extreme_logits() -> None:
    z = torch.tensor([[-1e3, -1e3], [-80.0, -90.0], [1e3, -1e3], [1e3, 1e3], [-20.0, -20.0]], requires_grad=True)
    value = union(z, 1)
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(z.grad).all()
    assert value[1].item() == pytest.approx(torch.logsumexp(torch.tensor([-80.0, -90.0]), 0).item(), abs=1e-3)
    assert value[2].item() == pytest.approx(1e3)
