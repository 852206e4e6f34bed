"""Dice + BCE per annotated class (method, part 8)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn


class AnnotatedDiceBCE(nn.Module):
    """nnU-Net's memory-efficient soft Dice plus BCE, over the classes that each case annotates.

    A class that a case does not annotate neither rewards nor punishes.
    """

    def __init__(self, batch_dice: bool, ddp: bool = False):
        super().__init__()
        self.dice = MemoryEfficientSoftDiceLoss(
            apply_nonlin=torch.sigmoid, batch_dice=batch_dice, do_bg=True, smooth=1e-5, ddp=ddp
        )

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        is_annotated: Tensor,
        is_valid: Tensor | None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Mean over the annotated (case, class) pairs of 1 − Dice + BCE; 0 where there is none.

        BCE is the mean over all valid voxels of the cases that annotate the class, as in nnU-Net.

        logits (B, N, *), target bool (B, N, *), is_annotated bool (B, N) on any device,
        is_valid bool (B, 1, *) or None: False where the label is "ignore". weight (B, N, *) or None: how much a voxel
        counts for a class.
        """
        if weight is not None:
            is_valid = weight if is_valid is None else weight * is_valid
        logits = logits.float()
        classes = logits.shape[1]
        pairs = is_annotated.cpu()
        count = int(pairs.sum())
        if count == 0 or classes == 0:
            return logits.sum() * 0
        # classes that the same cases annotate go through the Dice together
        patterns, group = torch.unique(pairs.T, dim=0, return_inverse=True)
        total = logits.new_zeros(())
        for g, pattern in enumerate(patterns):
            if not pattern.any():
                continue
            members = (group == g).nonzero().flatten().tolist()
            everything = bool(pattern.all()) and len(members) == classes
            cases = pattern.nonzero().flatten().tolist()
            z = logits if everything else logits[cases][:, members]
            y = target if everything else target[cases][:, members]
            valid = is_valid if is_valid is None or everything else is_valid[cases]
            if weight is not None and valid is not None and not everything:
                valid = valid[:, members]
            dice = 1 + self.dice(z, y, valid)
            bce = F.binary_cross_entropy_with_logits(z, y.to(z.dtype), reduction="none")
            bce = bce.mean() if valid is None else (bce * valid).sum() / valid.expand_as(bce).sum().clamp_min(1)
            total = total + (dice + bce) * (len(members) * len(cases))
        return total / count
