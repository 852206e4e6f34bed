"""Exact ranking metrics in bounded memory, from histograms of float16 scores.

A float16 has 65536 bit patterns, so counting how often each stands on positives and on negatives loses nothing: the
metrics equal those of the full list of voxels, ties included. Counts of slabs, cases and whole test sets add up.
"""

from __future__ import annotations

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve  # type: ignore[import-untyped]

NUM_CODES = 1 << 16
RANKING_METRICS = ("auroc", "aupr", "fpr95")


def _order() -> np.ndarray:
    """(65536,) uint16: float16 bit pattern → its place in ascending order; −0 stands with +0, NaN below all."""
    bits = np.arange(NUM_CODES, dtype=np.uint32)
    codes = np.where(bits >> 15, NUM_CODES - 1 - bits, bits | 0x8000)
    codes[0x8000] = codes[0]  # −0 equals +0
    codes[np.isnan(bits.astype(np.uint16).view(np.float16))] = 0
    return codes.astype(np.uint16)


_CODE_OF_BITS = _order()
NAN_CODE = 0  # no number has it: the lowest, −infinity, stands above the 1023 NaN patterns of negative sign


def encode(scores: np.ndarray) -> np.ndarray:
    """float16 of any shape → uint16 of that shape that sorts equally. NaN becomes `NAN_CODE`."""
    return _CODE_OF_BITS[np.ascontiguousarray(scores, dtype=np.float16).view(np.uint16)]


def decode(codes: np.ndarray) -> np.ndarray:
    """Inverse of `encode`, as float64; `NAN_CODE` becomes NaN."""
    codes = np.asarray(codes, dtype=np.uint32)
    bits = np.where(codes & 0x8000, codes & 0x7FFF, NUM_CODES - 1 - codes).astype(np.uint16)
    values = bits.view(np.float16).astype(np.float64)
    return np.where(codes == NAN_CODE, np.nan, values)


def ranking_metrics(positives: np.ndarray, negatives: np.ndarray) -> dict[str, float]:
    """AUROC, AUPR and FPR at 95 % TPR by scikit-learn's definitions.

    Args:
        positives, negatives: (65536,) how many voxels hold each code.

    Returns:
        `auroc`; `aupr`, which is average precision; `fpr95`, the lowest false positive rate at which the true positive
        rate is at least 0.95. NaN where there are no positives or no negatives.
    """
    if not positives.any() or not negatives.any():
        return dict.fromkeys(RANKING_METRICS, float("nan"))
    above, below = np.flatnonzero(positives), np.flatnonzero(negatives)
    scores = np.concatenate([above, below]).astype(np.float64)
    truth = np.concatenate([np.ones(len(above), dtype=np.int8), np.zeros(len(below), dtype=np.int8)])
    weights = np.concatenate([positives[above], negatives[below]]).astype(np.float64)
    fpr, tpr, _ = roc_curve(truth, scores, sample_weight=weights, drop_intermediate=False)
    return {
        "auroc": float(roc_auc_score(truth, scores, sample_weight=weights)),
        "aupr": float(average_precision_score(truth, scores, sample_weight=weights)),
        "fpr95": float(fpr[np.flatnonzero(tpr >= 0.95)[0]]),
    }


def dice_at(positives: np.ndarray, negatives: np.ndarray, code: int) -> float:
    """Dice of {score ≥ code} against the positives; NaN where there are none."""
    total = int(positives.sum())
    if not total:
        return float("nan")
    hit = int(positives[code:].sum())
    return 2 * hit / (total + hit + int(negatives[code:].sum()))
