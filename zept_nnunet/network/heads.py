"""From the maps of atomic classes to nnU-Net's output channels."""

from __future__ import annotations

import torch
from torch import Tensor

from zept_nnunet.network.logits import LOGIT_LIMIT, union
from zept_nnunet.taxonomy import Taxonomy


def to_channels(taxonomy: Taxonomy, organ_logits: Tensor, tumor_logits: Tensor) -> Tensor:
    """(B, Q, *) and (B, U, *) → (B, heads, *), contiguous, within ±1000.

    Background is a constant 0 logit, so that argmax means: the strongest class above 0.5, else background. A region is
    the union of its labels' maps.
    """
    channels = []
    for organs, tumors in taxonomy.channel_indices():
        members = [organ_logits[:, i] for i in organs] + [tumor_logits[:, k] for k in tumors]
        if not members:
            channels.append(organ_logits.new_zeros(organ_logits.shape[0], *organ_logits.shape[2:]))
        elif len(members) == 1:
            channels.append(members[0])
        else:
            channels.append(union(torch.stack(members, 1), 1).to(members[0].dtype))
    return torch.stack(channels, 1).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
