"""Object-aware feature grouping (method, part 2): fundamental queries gather the voxels that belong to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zept_nnunet.network.attention import Attention, FeedForward


def assign(scores: Tensor, temperature: float = 1.0, noisy: bool = False, hard: bool = True) -> Tensor:
    """Assign each voxel to a query: softmax *over the queries*, one-hot forward and soft backward where `hard`.

    scores (B, N, V) → (B, N, V). `noisy` adds Gumbel noise, as in training.
    """
    if noisy:
        uniform = torch.rand_like(scores, dtype=torch.float32).clamp_(1e-6, 1 - 1e-6)
        scores = scores - torch.log(-torch.log(uniform)).to(scores.dtype)
    soft = torch.softmax(scores / temperature, dim=1)
    if not hard:
        return soft
    one_hot = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
    return one_hot + soft - soft.detach()  # straight-through


class GroupingBlock(nn.Module):
    """Cross-attention, then grouping, then a feed-forward layer; one block per scale.

    Without `groups` (ablation) no voxel is assigned to a query.
    """

    def __init__(self, width: int, heads: int, temperature: float = 1.0, groups: bool = True):
        super().__init__()
        self.temperature = temperature
        self.groups = groups
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.feed_forward = FeedForward(width)
        if not groups:
            return
        self.to_q, self.to_k = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.to_v, self.to_out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, q: Tensor, x: Tensor) -> Tensor:
        """q (B, N, D) organ and background queries, x (B, V, D) tokens of the scale → (B, N, D)."""
        q = q + self.attention(self.norm(q), x)
        if not self.groups:
            return q + self.feed_forward(q)
        # (W_q q)·(W_k x) = (W_kᵀ W_q q)·x and Σ_j Â W_v x = W_v Σ_j Â x: there are far fewer queries than voxels
        scores = (self.to_q(q) @ self.to_k.weight) @ x.transpose(1, 2) / q.shape[-1] ** 0.5  # (B, N, V)
        assignment = assign(scores, self.temperature, noisy=self.training)
        # G = W_o[Σ_j Â W_v x / (Σ_j Â + 1)] + q
        with torch.autocast(x.device.type, enabled=False):  # float16 cannot hold the sum of 30,000 tokens
            assignment, w, b = assignment.float(), self.to_v.weight.float(), self.to_v.bias.float()
            voxels = assignment.sum(-1, keepdim=True)
            gathered = (assignment @ x.float() @ w.T + voxels * b) / (voxels + 1)
        grouped = self.to_out(gathered) + q
        return grouped + self.feed_forward(grouped)
