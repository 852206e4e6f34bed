"""ZePT for nnU-Net v2: one model for organs, the tumors it was trained on, and tumor types it was never shown."""

from __future__ import annotations

import re
from importlib import metadata

from zept_nnunet.errors import ZePTError

__all__ = ["ZePTError", "check_nnunet_version"]

NNUNET_MINIMUM = (2, 8)  # nnUNet_extTrainer, by which nnU-Net finds external trainers, came with 2.8.0
NNUNET_BELOW = (3,)


def check_nnunet_version() -> str:
    """The installed nnunetv2's version, read from its metadata (neither nnunetv2 nor torch is imported).

    Raises:
        ZePTError: nnunetv2 is not installed, or too old or too new for this package.
    """
    wanted = 'zept-nnunet wants nnunetv2>=2.8,<3; run: pip install "nnunetv2>=2.8,<3"'
    try:
        found = metadata.version("nnunetv2")
    except metadata.PackageNotFoundError:
        raise ZePTError(f"nnunetv2 is not installed. {wanted}") from None
    release = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if not NNUNET_MINIMUM <= release < NNUNET_BELOW:
        raise ZePTError(f"nnunetv2 {found} is installed. {wanted}")
    return found
