"""Anomaly score map → visual prompts (method, parts 4 and 5). Pure functions, no parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zept_nnunet.network.logits import conjunction, union


def calibrated_score(support: Tensor, healthy: Tensor) -> Tensor:
    """Ours: log-odds that a voxel lies in the organ and is not healthy tissue, per organ.

    Both (B, Q, *). It needs no normalization over the patch, so it means the same in every patch.
    """
    return conjunction(support, -healthy)


def minmax_score(organ_maps: Tensor, eps: float = 1e-6) -> Tensor:
    """The authors': −maxᵢ zᵢ, min–max normalized over the patch. (B, Q, *) → (B, 1, *) in [0, 1].

    A constant patch scores 0 (theirs divides 0 by 0 there).
    """
    score = -organ_maps.amax(1, keepdim=True)
    axes = list(range(1, score.ndim))
    low, high = score.amin(axes, keepdim=True), score.amax(axes, keepdim=True)
    return (score - low) / (high - low).clamp_min(eps)


def over_hosts(organ_maps: Tensor, hosts: tuple[tuple[int, ...], ...]) -> list[Tensor | None]:
    """Per tumor the union (in log-odds) of its hosts' maps (B, *); None where the whole body is the host."""
    return [union(organ_maps[:, list(h)], 1) if h else None for h in hosts]


def shrink_to(score: Tensor, size: Sequence[int]) -> Tensor:
    """(B, Q, *) → (B, Q, size): the highest score in each coarse voxel, so that a small lesion is not averaged away."""
    if score.shape[1] == 0:
        return score.new_zeros(*score.shape[:2], *size)
    pool = F.adaptive_max_pool3d if score.ndim == 5 else F.adaptive_max_pool2d
    return pool(score, list(size))


def calibrated_prompts(support: Tensor, score: Tensor, hosts: tuple[tuple[int, ...], ...], threshold: float) -> Tensor:
    """Where each tumor's query may attend: its hosts' anomalous voxels.

    support, score (B, Q, V) → bool (B, U, V). A query whose mask would block everything attends its hosts' support
    instead, and the whole patch where no host is in sight: there is never an empty row.
    """
    support, score = support.detach(), score.detach()
    masks = []
    for in_host, anomaly in zip(over_hosts(support, hosts), over_hosts(score, hosts), strict=True):
        if in_host is None or anomaly is None:
            masks.append(torch.ones(support.shape[0], support.shape[2], dtype=torch.bool, device=support.device))
        else:
            masks.append(_first_non_empty(anomaly > threshold, in_host > 0))
    return torch.stack(masks, 1)


def minmax_prompts(score: Tensor, num_tumors: int, threshold: float) -> Tensor:
    """The authors': the same mask for every tumor, score ≥ threshold. (B, 1, V) → bool (B, U, V), no empty row."""
    mask = _first_non_empty(score.detach()[:, 0] >= threshold)
    return mask[:, None].expand(-1, num_tumors, -1)


def _first_non_empty(*masks: Tensor) -> Tensor:
    """The first mask (B, V) that allows anything, case by case; all True where none does."""
    result = torch.ones_like(masks[0])
    for mask in reversed(masks):
        result = torch.where(mask.any(-1, keepdim=True), mask, result)
    return result
