"""Queries from knowledge, and the layers that refine the advanced queries (method, parts 1 and 5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zept_nnunet.network.attention import Attention, FeedForward


class QueryGenerator(nn.Module):
    """Knowledge vector (E) → query (D), plus a token that all queries of the set share."""

    def __init__(self, knowledge_width: int, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(knowledge_width, width), nn.GELU(), nn.Linear(width, width))
        self.token = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, knowledge: Tensor) -> Tensor:
        """(N, E) unit vectors → (N, D)."""
        # a unit vector of E entries has entries of size 1/√E: scale them to 1
        return self.mlp(knowledge * knowledge.shape[-1] ** 0.5) + self.token


class AdvancedLayer(nn.Module):
    """Masked cross-attention to the visual prompt, self-attention, feed-forward."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.cross_norm, self.self_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.cross_attention, self.self_attention = Attention(width, heads), Attention(width, heads)
        self.feed_forward = FeedForward(width)

    def forward(self, t: Tensor, x: Tensor, may_attend: Tensor | None, may_attend_query: Tensor) -> Tensor:
        """t (B, U, D), x (B, V, D), may_attend (B, U, V) or None, may_attend_query (U, U) → (B, U, D)."""
        t = t + self.cross_attention(self.cross_norm(t), x, may_attend)
        normed = self.self_norm(t)
        t = t + self.self_attention(normed, normed, may_attend_query)
        return t + self.feed_forward(t)


class JointAttention(nn.Module):
    """Self-attention over all queries. It starts as the identity, so that stage II begins where stage I ended."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, zero_init=True)

    def forward(self, q: Tensor, may_attend_query: Tensor) -> Tensor:
        """q (B, N, D), may_attend_query (N, N) → (B, N, D)."""
        normed = self.norm(q)
        return q + self.attention(normed, normed, may_attend_query)


class MaskHead(nn.Module):
    """z(v) = ⟨LN(W q), F(v)⟩ at one scale; ours divides by √C and adds a bias that the query sets."""

    def __init__(self, width: int, channels: int, scaled: bool):
        super().__init__()
        self.project, self.norm = nn.Linear(width, channels), nn.LayerNorm(channels)
        self.bias = nn.Linear(width, 1) if scaled else None
        self.scale = channels**-0.5 if scaled else 1.0
        if self.bias is not None:
            nn.init.zeros_(self.bias.weight)
            nn.init.constant_(self.bias.bias, -2.0)  # most voxels belong to no given class

    def forward(self, q: Tensor, features: Tensor) -> Tensor:
        """q (B, N, D), features (B, C, *) → logits (B, N, *)."""
        weight = self.norm(self.project(q)) * self.scale
        z = torch.bmm(weight.to(features.dtype), features.flatten(2))
        if self.bias is not None:
            z = z + self.bias(q)
        return z.unflatten(2, features.shape[2:])


def query_visibility(is_added: Tensor) -> Tensor:
    """Which query may attend which, bool (N, N): everyone sees the trained ones and itself, nobody an added one."""
    return ~is_added[None, :] | torch.eye(len(is_added), dtype=torch.bool, device=is_added.device)
