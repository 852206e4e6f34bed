"""Networks with few query channels, in which every part is at work."""

from __future__ import annotations

import math
from typing import Any

import torch

from tests.small_plans import DATASET_JSON
from zept_nnunet.network.zept import ZePT
from zept_nnunet.plans_block import build_block

TWO_KIDNEYS = {
    "background": 0,
    "liver": 1,
    "left kidney": 2,
    "right kidney": 3,
    "spleen": 4,
    "liver tumor": 5,
    "kidney tumor": 6,
}
"""The kidney tumor has two hosts; the spleen's tumors have no label, so that it holds synthetic anomalies."""


def narrow_block(
    labels: dict[str, int] | None = None, variant: str = "zept", width: int = 16, **zept: Any
) -> dict[str, Any]:
    """A plans block of 4 heads; `zept` as in dataset.json."""
    block = build_block({**DATASET_JSON, "labels": labels or TWO_KIDNEYS, "zept": zept}, variant)
    return {**block, "decoder": {**block["decoder"], "width": width, "heads": 4}}


@torch.no_grad()
def randomize(network: ZePT, seed: int = 0) -> ZePT:
    """Weights of the query path as after a training: none is zero, and the maps differ from voxel to voxel."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in network.named_parameters():
        if name.startswith(("encoder.", "decoder.stages", "decoder.transpconvs")):
            continue
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            p.copy_(noise / math.prod(p.shape[1:]) ** 0.5)
        elif p.ndim == 1:
            p.add_(0.3 * noise)
    for head in (*network.support_heads, *network.healthy_heads, *network.tumor_heads):
        head.norm.weight.mul_(2)
        if head.bias is not None:  # else a few large entries of a query decide for the whole map
            head.bias.weight.mul_(0.1)
            head.bias.bias.zero_()
    return network
