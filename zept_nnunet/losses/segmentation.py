"""Dice + BCE per annotated class (method, part 8).

The Dice of a class is counted where the class is. Of an absent one it is 0 whatever is predicted, until the prediction
is less than a millionth of a voxel; there it leaps to 1. With many rare classes, most of them absent from a patch, that
leap pays more than finding the few that are present: in one of two trainings on the phantom the maps of abnormal
tissue, and then those of tumors, fell to nothing (docs/method.md).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn


class AnnotatedDiceBCE(nn.Module):
    """nnU-Net's memory-efficient soft Dice plus BCE, over the classes that each case annotates.

    A class that a case does not annotate neither rewards nor punishes.
    """

    def __init__(self, batch_dice: bool, ddp: bool = False):
        super().__init__()
        self.gathers = ddp and batch_dice
        self.batch_dice = batch_dice
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
        """Mean of the BCE over the annotated (case, class) pairs, and of 1 − Dice over those of them that show the
        class (with `batch_dice`, that show it in any case of the batch); 0 where there is none.

        The BCE of a class is the mean over all valid voxels of the cases that annotate it, as in nnU-Net.

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
        bces, dices, shown = logits.new_zeros(()), logits.new_zeros(()), 0
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
            bce = F.binary_cross_entropy_with_logits(z, y.to(z.dtype), reduction="none")
            if valid is None:
                bce = bce.mean()
            else:  # class by class: how much one weighs must not depend on which others the same cases annotate
                axes = [0, *range(2, bce.ndim)]
                bce = ((bce * valid).sum(axes) / valid.sum(axes).clamp_min(1)).mean()
            bces = bces + bce * (len(members) * len(cases))
            dice, number = self._dice(z, y, valid)
            dices, shown = dices + dice, shown + number
        return bces / count + dices / max(shown, 1)

    def _dice(self, z: Tensor, y: Tensor, valid: Tensor | None) -> tuple[Tensor, int]:
        """Sum of 1 − Dice over the (case, class) pairs that show the class, and their number."""
        total, number = z.new_zeros(()), 0
        is_shown = (y if valid is None else y & (valid > 0)).flatten(2).any(2)  # (B, N)
        whole = slice(None)
        if self.batch_dice:
            is_shown = is_shown.any(0, keepdim=True)
            if self.gathers and dist.is_initialized():  # every process must give the Dice the same classes
                flags = is_shown.to(torch.uint8)
                dist.all_reduce(flags, op=dist.ReduceOp.MAX)
                is_shown = flags.bool()
        for case, flags in enumerate(is_shown.tolist()):
            which = [c for c, flag in enumerate(flags) if flag]
            if not which:
                continue
            of = whole if self.batch_dice else slice(case, case + 1)
            mask = valid if valid is None else valid[of]
            mask = mask if mask is None or mask.shape[1] == 1 else mask[:, which]
            loss = 1 + self.dice(z[of][:, which], y[of][:, which], mask)
            pairs = len(which) * (z.shape[0] if self.batch_dice else 1)
            total, number = total + loss * pairs, number + pairs
        return total, number
