"""From the maps of atomic classes to nnU-Net's output channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zept_nnunet.network.logits import LOGIT_LIMIT, union
from zept_nnunet.taxonomy import Taxonomy


def at_thresholds(
    organ_logits: Tensor,
    tumor_logits: Tensor,
    hosts: Sequence[Sequence[int]],
    thresholds: Sequence[float | None],
) -> tuple[Tensor, Tensor]:
    """(B, Q, *) and (B, U, *) → the same, with the threshold of every tumor that has one at 0.

    Where such a tumor lies above its threshold it also wins against its own hosts: an organ's map may call healthy what
    no training label ever called a tumor, and where both maps are above one half the tumor's own is the better judge of
    where it ends. Where it lies below, its hosts stay what they were against background. An organ is lowered, not the
    tumor raised: so the mean over windows, mirrored copies and folds, which nnU-Net takes, never shows a tumor whose
    mean lies below its threshold, nor hides one above it behind a host, however much they disagree.

    Args:
        hosts: organs of each tumor; none: the whole body.
        thresholds: of each tumor; None: the stronger of it and its hosts wins.
    """
    if all(t is None for t in thresholds):
        return organ_logits, tumor_logits
    shift = tumor_logits.new_tensor([t or 0.0 for t in thresholds])
    margin = tumor_logits - shift.view(1, -1, *[1] * (tumor_logits.ndim - 2))
    organs = []
    for organ in range(organ_logits.shape[1]):
        logit = organ_logits[:, organ]
        for k, (of, threshold) in enumerate(zip(hosts, thresholds, strict=True)):
            if threshold is not None and (organ in of or not of):
                logit = torch.minimum(logit, -margin[:, k])
        organs.append(logit)
    return torch.stack(organs, 1) if organs else organ_logits, margin


def keep_to_annotated(
    organ_logits: Tensor,
    tumor_logits: Tensor,
    support: Tensor,
    hosts: Sequence[Sequence[int]],
    is_annotated: Tensor,
) -> tuple[Tensor, Tensor]:
    """(B, Q, *) and (B, U, *) → the same as somebody who labels nothing but the annotated classes would have it.

    What the reference of a partially labeled case can be compared with: a tumor that the case does not label belongs to
    its host there (log-odds of either), another class that it does not label to nothing. Of several hosts it belongs to
    the one whose support is the strongest at the voxel: healthy maps are low there, of all of them.

    Args:
        support: (B, Q, *), each organ with any tumor in it.
        hosts: organs of each tumor.
        is_annotated: bool (B or 1, Q + U).
    """
    num_organs, shape = organ_logits.shape[1], [-1, *[1] * (organ_logits.ndim - 2)]
    nothing = organ_logits.new_full((), -LOGIT_LIMIT)
    labels = [flag.view(shape) for flag in is_annotated.to(organ_logits.device).unbind(1)]
    given = [torch.where(labels[num_organs + k], nothing, tumor_logits[:, k]) for k in range(len(hosts))]
    strongest = [support[:, list(of)].argmax(1) if len(of) > 1 else None for of in hosts]
    organs = []
    for organ in range(num_organs):
        members = [organ_logits[:, organ]]
        for k, of in enumerate(hosts):
            if organ in of:
                which = strongest[k]
                members.append(given[k] if which is None else given[k].where(which == of.index(organ), nothing))
        whole = union(torch.stack(members, 1), 1).to(organ_logits.dtype)
        organs.append(torch.where(labels[organ], whole, nothing))
    tumors = [torch.where(labels[num_organs + k], tumor_logits[:, k], nothing) for k in range(len(hosts))]
    return (
        torch.stack(organs, 1) if organs else organ_logits,
        torch.stack(tumors, 1) if tumors else tumor_logits,
    )


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
