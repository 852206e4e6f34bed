"""What differs between the outputs of two networks, to the bit."""

from __future__ import annotations

import torch

from zept_nnunet.network.zept import ZePTOutput


def differing(a: ZePTOutput, b: ZePTOutput) -> set[str]:
    """Names of the fields that are not equal in every bit; a list of another length differs."""
    mine, theirs = a._asdict(), b._asdict()
    return {name for name, value in mine.items() if not _same(value, theirs[name])}


def _same(a: torch.Tensor | list[torch.Tensor] | None, b: torch.Tensor | list[torch.Tensor] | None) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return a is b
