"""Probability calculus in log-odds, without clamping and without dividing probabilities."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LOGIT_LIMIT = 1000.0
"""nnU-Net's sliding window multiplies logits by up to 10 in float16: beyond ±6000 it stops with an inf."""


def conjunction(u: Tensor, a: Tensor) -> Tensor:
    """Log-odds of σ(u)·σ(a): u + a − log(1 + eᵘ + eᵃ). Never exceeds min(u, a). Any equal shapes."""
    return u + a - torch.logaddexp(F.softplus(u), a)


def less_certain(z: Tensor, floor: float) -> Tensor:
    """z from −floor up; below it −floor − log(1 + (−floor − z)), which keeps the order. Any shape."""
    return torch.maximum(z, z.new_tensor(-floor)) - torch.log1p((-floor - z).clamp_min(0))


def union(z: Tensor, dim: int = 1) -> Tensor:
    """Log-odds of 1 − ∏(1 − σ(zᵢ)) over `dim`: log(exp(Σ softplus zᵢ) − 1), in float32.

    A maximum would leave holes where two maps stand at 0.45 each.
    """
    z = z.float()
    if z.shape[dim] == 1:
        return z.squeeze(dim)
    s = F.softplus(z).sum(dim)  # −log of the probability that no class is there
    is_tiny = s < 1e-6  # there log(eˢ − 1) ≈ log s ≈ logsumexp z, which does not underflow
    safe = torch.where(is_tiny, torch.ones_like(s), s)
    # log(eˢ − 1) = s + log(1 − e⁻ˢ), by the branch that keeps its digits
    log1mexp = torch.where(safe < math.log(2), torch.log(-torch.expm1(-safe)), torch.log1p(-torch.exp(-safe)))
    return torch.where(is_tiny, torch.logsumexp(z, dim), safe + log1mexp)
