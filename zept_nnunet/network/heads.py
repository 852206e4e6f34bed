"""From the maps of atomic classes to nnU-Net's output channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zept_nnunet.network.logits import LOGIT_LIMIT, union
from zept_nnunet.taxonomy import Taxonomy


def for_decoding(
    organ_logits: Tensor,
    tumor_logits: Tensor,
    hosts: Sequence[Sequence[int]],
    thresholds: Sequence[float | None],
    come_first: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """(B, Q, *) and (B, U, *) → the same for nnU-Net's decoding, with every calibrated tumor's threshold at 0.

    A tumor that comes first wins against its own hosts wherever it lies above its threshold: an organ's map may call
    healthy what no training label ever called a tumor, and where both are above one half the tumor's own map is the
    better judge of where it ends. So its logit is counted from that of its strongest host, where that one is above
    background. An organ's logit stays what it is, or an added tumor would hand voxels of its host to a third class.
    Inside its host this is linear: windows, mirrored copies and folds, which nnU-Net averages, decide as their mean
    does, up to the rounding of its half precision.

    Args:
        hosts: organs of each tumor; none: the whole body.
        thresholds: of each tumor, None where it was not calibrated.
        come_first: of each tumor whether it does.
    """
    if not any(come_first) and all(t is None for t in thresholds):
        return organ_logits, tumor_logits
    limit = LOGIT_LIMIT / 2  # sums stay within nnU-Net's range
    organs, tumors = organ_logits.float().clamp(-limit, limit), []
    for k, (of, threshold, is_first) in enumerate(zip(hosts, thresholds, come_first, strict=True)):
        margin = (tumor_logits[:, k].float() - (threshold or 0.0)).clamp(-limit, limit)
        if is_first and organs.shape[1]:
            host = organs[:, list(of)] if of else organs
            margin = margin + host.amax(1).clamp_min(0)
        tumors.append(margin)
    return organs, torch.stack(tumors, 1)


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
