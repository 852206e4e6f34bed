"""The plans' U-Net with one class for all tumors, and host-relative evidence for that class: a baseline's network.

What is left over between it and ZePT is ZePT's own: queries, prompts and knowledge. The relative head is the very one
(`relative.py`). Where an organ is comes from the network's own organ logits, compared without the tumor class: a tumor
voxel belongs to the organ that would win there if there were no tumors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zept_nnunet.network.logits import LOGIT_LIMIT
from zept_nnunet.network.relative import build_relative_head


class AnyTumorRelative(nn.Module):
    """Background, organs, any tumor: (B, C, *) → (B, 1 + Q + 1, *), a list fine to coarse with deep supervision.

    The finest logit of the last class gets Σ_h σ(u_h)·a_h more: a_h the relative head's anomaly logit of organ h, u_h
    the log-odds of organ h among background and organs, without gradient.
    """

    def __init__(self, unet: Any, spacing: Sequence[float], image_channels: int, noise: tuple[float, ...]):
        """
        Args:
            unet: with an `encoder`, and a `decoder` that has `stages` and `seg_layers` as nnU-Net's.
            spacing: of the patch's 2 or 3 axes.
            image_channels: C.
            noise: per image channel, see `RelativeFeatures`.
        """
        super().__init__()
        self.encoder, self.decoder = unet.encoder, unet.decoder
        self.decoder.seg_layers[-1] = _WithFeatures(self.decoder.seg_layers[-1])
        channels = self.encoder.output_channels[0]
        self.relative = build_relative_head(spacing, channels, image_channels, noise)
        last = self.relative.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)  # starts as the plain U-Net
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """x (B, C, *), normalized."""
        outputs = self.decoder(self.encoder(x))
        coarse = outputs[1:] if isinstance(outputs, list) else None
        finest = outputs[0] if isinstance(outputs, list) else outputs
        logits, features = finest[:, : self.num_classes], finest[:, self.num_classes :]
        support = organ_support(logits)
        anomaly = self.relative(x, features, support)
        evidence = (support.sigmoid() * anomaly).sum(1, keepdim=True).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
        fine = torch.cat((logits[:, :-1], logits[:, -1:] + evidence.to(logits.dtype)), 1)
        return fine if coarse is None else [fine, *coarse]

    @property
    def num_classes(self) -> int:
        """1 + Q + 1."""
        return int(self.decoder.seg_layers[-1].layer.out_channels)


def organ_support(logits: Tensor) -> Tensor:
    """(B, 1 + Q + 1, *) → (B, Q, *) float32, no gradient: log-odds of each organ among background and organs."""
    z = logits[:, :-1].detach().float()
    total = torch.logsumexp(z, 1, keepdim=True)
    log_p = (z - total)[:, 1:].clamp(max=-1e-6)
    return log_p - torch.log(-torch.expm1(log_p))


class _WithFeatures(nn.Module):
    """A segmentation layer that also hands on what it reads: (B, C_f, *) → (B, classes + C_f, *)."""

    def __init__(self, layer: Any):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.layer(x), x), 1)
