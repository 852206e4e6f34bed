"""Attention of queries to tokens, and the feed-forward layer that follows it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention; the mask says where a query *may* attend."""

    def __init__(self, width: int, heads: int, zero_init: bool = False):
        super().__init__()
        if width % heads:
            raise ValueError(f"query width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.to_q, self.to_k = nn.Linear(width, width), nn.Linear(width, width)
        self.to_v, self.to_out = nn.Linear(width, width), nn.Linear(width, width)
        if zero_init:
            nn.init.zeros_(self.to_out.weight)
            nn.init.zeros_(self.to_out.bias)

    def forward(self, q: Tensor, x: Tensor, may_attend: Tensor | None = None) -> Tensor:
        """q (B, N, D), x (B, V, D), may_attend bool, broadcastable to (B, N, V), True in every row → (B, N, D)."""
        qh, kh, vh = (
            layer(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, N or V, D/H)
            for layer, t in ((self.to_q, q), (self.to_k, x), (self.to_v, x))
        )
        mask = None if may_attend is None else may_attend.unsqueeze(-3)  # (B, 1, N, V)
        return self.to_out(F.scaled_dot_product_attention(qh, kh, vh, attn_mask=mask).transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    """LN → 4D → GELU → D."""

    def __init__(self, width: int):
        super().__init__(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
