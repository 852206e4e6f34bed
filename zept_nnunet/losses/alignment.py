"""Query–knowledge alignment (method, part 7)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE_BOUNDS = (0.01, 1.0)
_NEVER = -1e4  # a logit; not −inf, which makes a row without any other query NaN
HOST_WEIGHT = 0.5
"""Weight of "an organ and its tumor" as positives, beside 1 for "tumor and tumor"."""


def query_positives(hosts: tuple[tuple[int, ...], ...], num_organs: int) -> Tensor:
    """Positives of the query–query term, (N, N), N = Q + U: tumor–tumor 1, organ–its tumor 0.5, nothing with itself."""
    n = num_organs + len(hosts)
    positives = torch.zeros(n, n)
    positives[num_organs:, num_organs:] = 1
    for k, organs in enumerate(hosts):
        for i in organs:
            positives[i, num_organs + k] = positives[num_organs + k, i] = HOST_WEIGHT
    return positives.fill_diagonal_(0)


def query_to_knowledge(embedding: Tensor, knowledge: Tensor, temperature: Tensor, is_shown: Tensor) -> Tensor:
    """Each query whose class the image shows names it among all descriptions, by cosine similarity.

    embedding (B, N, E) of the first N classes, knowledge (M, E), M ≥ N, is_shown bool (B, N) → scalar; 0 where nothing
    is shown.
    """
    if not bool(is_shown.any()):
        return embedding.sum() * 0
    logits = _cosine(embedding, knowledge.expand(embedding.shape[0], -1, -1)) / _bounded(temperature)
    own = torch.arange(embedding.shape[1], device=embedding.device).expand(embedding.shape[0], -1)
    return F.cross_entropy(logits[is_shown], own[is_shown])


def query_to_query(embedding: Tensor, positives: Tensor, temperature: Tensor, is_shown: Tensor) -> Tensor:
    """Related queries are close. embedding (B, N, E), positives (N, N) with a zero diagonal, is_shown bool (B, N) →
    scalar.

    Each row is divided by its positives. The pair of a query with itself, queries whose class the image does not show,
    and rows without positives are left out; 0 where no row is left.
    """
    itself = torch.eye(embedding.shape[1], dtype=torch.bool, device=embedding.device)
    is_out = itself | ~(is_shown[:, :, None] & is_shown[:, None])  # (B, N, N)
    target = positives.to(embedding.device).masked_fill(is_out, 0.0)
    total = target.sum(-1, keepdim=True)  # (B, N, 1)
    counts = total[..., 0] > 0
    if not bool(counts.any()):
        return embedding.sum() * 0
    logits = _cosine(embedding, embedding) / _bounded(temperature)
    log_p = torch.log_softmax(logits.masked_fill(is_out, _NEVER), -1).masked_fill(is_out, 0.0)
    return -(target / total.clamp_min(1e-8) * log_p).sum(-1)[counts].mean()


def published_alignment(embedding: Tensor, knowledge: Tensor, positives: Tensor, temperature: Tensor) -> Tensor:
    """As the authors compute it: no L2 norm, and one target for both terms (itself, and every related class)."""
    n = embedding.shape[1]
    related = ((positives[:n, :n] > 0).float() + torch.eye(n)).to(embedding.device)
    loss = embedding.sum() * 0
    for other in (knowledge[:n].expand(embedding.shape[0], -1, -1), embedding):
        logits = _products(embedding.float(), other.float()) / _bounded(temperature)
        loss = loss - (related * torch.log_softmax(logits, -1)).sum(-1).mean()
    return loss


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return _products(F.normalize(a.float(), dim=-1, eps=1e-6), F.normalize(b.float(), dim=-1, eps=1e-6))


def _products(a: Tensor, b: Tensor) -> Tensor:
    """(B, N, E), (B, M, E) → (B, N, M) in float32: autocast would take the product in half precision, where the
    published one, of vectors without L2 norm, overflows once it is divided by the temperature.
    """
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.transpose(1, 2)


@torch.no_grad()
def bound_temperature(log_temperature: Tensor) -> None:
    """After an optimizer's step: keep the temperature within its bounds, where it has a gradient that can lead back."""
    low, high = (math.log(bound) for bound in TEMPERATURE_BOUNDS)
    log_temperature.clamp_(low + 1e-3, high - 1e-3)


def _bounded(temperature: Tensor) -> Tensor:
    return temperature.clamp(*TEMPERATURE_BOUNDS)
