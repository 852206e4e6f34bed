"""Queries see tokens as a set: there is no positional encoding (docs/method.md)."""

from __future__ import annotations

import torch

from zept_nnunet.network.grouping import GroupingBlock
from zept_nnunet.network.query_decoder import AdvancedLayer


@torch.no_grad()
def test_the_order_of_the_tokens_says_nothing() -> None:
    torch.manual_seed(0)
    q, x, order = torch.randn(2, 5, 16), torch.randn(2, 40, 16), torch.randperm(40)
    for p in (grouping := GroupingBlock(16, 4).eval()).parameters():
        p.add_(0.1 * torch.randn_like(p))
    torch.testing.assert_close(grouping(q, x[:, order]), grouping(q, x))
    layer, mask, sees = AdvancedLayer(16, 4), torch.rand(2, 5, 40) > 0.5, torch.ones(5, 5, dtype=torch.bool)
    torch.testing.assert_close(layer(q, x[:, order], mask[..., order], sees), layer(q, x, mask, sees))
    assert (layer(q, x[:, order], mask, sees) - layer(q, x, mask, sees)).abs().max() > 1e-3  # each with its own mask
