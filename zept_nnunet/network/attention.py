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
        if q.shape[1] * self.heads < q.shape[2] and x.shape[1] > q.shape[1]:
            return self._few_queries(q, x, may_attend)
        qh, kh, vh = (
            layer(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, N or V, D/H)
            for layer, t in ((self.to_q, q), (self.to_k, x), (self.to_v, x))
        )
        mask = None if may_attend is None else may_attend.unsqueeze(-3)  # (B, 1, N, V)
        return self.to_out(F.scaled_dot_product_attention(qh, kh, vh, attn_mask=mask).transpose(1, 2).flatten(2))

    def _few_queries(self, q: Tensor, x: Tensor, may_attend: Tensor | None) -> Tensor:
        """The same, with the keys' and values' weights moved to the queries' side: (W_q q)·(W_k x) = (W_kᵀ W_q q)·x.

        Tokens are not projected then, and every head attends to the tokens themselves. It pays while all heads of all
        queries together are fewer than a token's numbers. A key's bias moves all scores of a row alike, which softmax
        does not see.
        """
        batch, number, width = q.shape
        heads, size = self.heads, width // self.heads
        qh = self.to_q(q).unflatten(-1, (heads, size)).transpose(1, 2)  # (B, H, N, D/H)
        rows = (qh @ self.to_k.weight.view(heads, size, width)).flatten(1, 2)  # (B, H·N, D)
        mask = None
        if may_attend is not None:
            mask = may_attend.expand(batch, number, x.shape[1]).repeat(1, heads, 1)
        seen = F.scaled_dot_product_attention(rows, x, x, attn_mask=mask, scale=size**-0.5)
        values = seen.unflatten(1, (heads, number)) @ self.to_v.weight.view(heads, size, width).transpose(1, 2)
        values = values.transpose(1, 2).flatten(2) + self.to_v.bias
        return self.to_out(values)


class FeedForward(nn.Sequential):
    """LN → 4D → GELU → D."""

    def __init__(self, width: int):
        super().__init__(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
