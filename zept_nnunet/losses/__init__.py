"""Segmentation per class, query–knowledge alignment, and their weighted sum."""

from zept_nnunet.losses.zept_loss import TERMS, ZePTLoss

__all__ = ["TERMS", "ZePTLoss"]
