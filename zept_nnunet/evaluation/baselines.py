"""What the baselines compute from logits, label maps and Hounsfield units. Pure functions of arrays.

Logits are read channel by channel, so that memory holds a few volumes and not one per class.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage  # type: ignore[import-untyped]

from zept_nnunet.errors import ZePTError

LOWEST = -1000.0
"""Score where a class cannot be; the lower limit of what CASE_scores.npz holds."""
_MAD_TO_SD = 1.4826  # of a normal distribution
_SPREAD_FLOOR = 1.0  # HU: CT is stored in whole units


@dataclass(frozen=True)
class SoftmaxSummary:
    """Of the logits z over C classes, per voxel; all arrays (*,)."""

    labels: np.ndarray  # argmax, the first one where several are equal; uint16
    max_logit: np.ndarray  # max z, float32
    entropy: np.ndarray  # of the softmax, nats, 0 … log C, float32
    log_odds: dict[int, np.ndarray]  # channel → z minus logsumexp of all other channels: log-odds of its softmax


def summarize(channels: Iterable[np.ndarray], keep: Collection[int] = ()) -> SoftmaxSummary:
    """One pass over the channels of the logits.

    Args:
        channels: C arrays (*,), at least two, of finite logits.
        keep: channels whose log-odds are wanted. No probability is made, so none saturates.
    """
    kept: dict[int, np.ndarray] = {}
    rest: np.ndarray | None = None  # logsumexp of the channels not kept
    largest = labels = total = weighted = None
    for index, channel in enumerate(channels):
        z = np.asarray(channel, dtype=np.float32)
        if index in keep:
            kept[index] = z.copy()
        else:
            rest = z.copy() if rest is None else np.logaddexp(rest, z)
        if largest is None or labels is None or total is None or weighted is None:
            largest, labels = z.copy(), np.zeros(z.shape, dtype=np.uint16)
            total, weighted = np.ones_like(z), np.zeros_like(z)  # Σ e^(z − max), Σ (z − max) e^(z − max)
            continue
        new = np.maximum(largest, z)
        shift = new - largest
        shrink = np.exp(-shift)
        term = np.exp(z - new)
        weighted = shrink * (weighted - shift * total) + (z - new) * term
        total = shrink * total + term
        labels[z > largest] = index
        largest = new
    if largest is None or labels is None or total is None or weighted is None:
        raise ZePTError("there are no logits: wanted one channel per class, background first")
    log_odds = {}
    for index, z in kept.items():
        others = [rest] if rest is not None else []
        others += [other for i, other in kept.items() if i != index]
        log_odds[index] = z - np.logaddexp.reduce(np.stack(others), axis=0) if len(others) > 1 else z - others[0]
    return SoftmaxSummary(labels, largest, np.maximum(np.log(total) - weighted / total, 0), log_odds)


def nearest_host(labels: np.ndarray, hosts: Collection[int], spacing: Sequence[float]) -> np.ndarray:
    """Per voxel the label of the nearest host voxel: (*,) → (*,) of the same type; 0 where no host is in the volume.

    Args:
        labels: predicted label map.
        hosts: labels of the organs that host a tumor.
        spacing: voxel size along each axis.
    """
    is_host = np.isin(labels, list(hosts))
    if not is_host.any():
        return np.zeros_like(labels)
    indices = ndimage.distance_transform_edt(
        ~is_host, sampling=tuple(spacing), return_distances=False, return_indices=True
    )
    return labels[tuple(indices)]


@dataclass(frozen=True)
class TumorClass:
    """A class of the predictions: its label there, and the labels of its hosts (none: the whole body)."""

    name: str
    label: int
    hosts: tuple[int, ...]


def first_class(classes: Sequence[TumorClass], host: int) -> int | None:
    """The label that a tumor voxel of unknown type in this host gets: the first class that names the host."""
    return next((c.label for c in classes if host in c.hosts or not c.hosts), None)


def assign_to_hosts(
    labels: np.ndarray,
    score: np.ndarray,
    is_tumor: np.ndarray,
    classes: Sequence[TumorClass],
    spacing: Sequence[float],
    limit: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Give tumor voxels of unknown type, and their score, to the tumor classes of the nearest predicted host.

    Every class of a host gets the score. In the segmentation a voxel can be one class: the first one, in the order of
    `classes`, that names the host. Where no host is predicted, every class gets the score, and no voxel a class.

    Args:
        labels: (*,) predicted organs, in the labels of the output; 0 is background.
        score: (*,) higher is more anomalous.
        is_tumor: (*,) bool, the voxels to segment.
        classes: tumor classes of the output, in the order of their labels.
        spacing: voxel size along each axis.
        limit: (*,) bool, where a score counts; elsewhere every class gets the lowest one. None is everywhere.

    Returns:
        Segmentation (*,) of the type of `labels`, and scores (K, *) float32 within ±1000.
    """
    owner = nearest_host(labels, {h for c in classes for h in c.hosts}, spacing)
    counts = np.ones(labels.shape, dtype=bool) if limit is None else limit
    segmentation = labels.copy()
    for host in np.unique(owner).tolist():
        label = first_class(classes, host)
        if label is not None:
            segmentation[is_tumor & counts & (owner == host)] = label
    scores = np.full((len(classes), *labels.shape), LOWEST, dtype=np.float32)
    for k, c in enumerate(classes):
        inside = counts & (np.isin(owner, c.hosts) if c.hosts and owner.any() else True)
        scores[k][inside] = np.clip(score[inside], LOWEST, -LOWEST)
    return segmentation, scores


def fill_hosts(labels: np.ndarray, classes: Sequence[TumorClass]) -> np.ndarray:
    """Bool (*,): the predicted hosts, each with its holes; a hole is often a lesion that the organ model left out."""
    inside = np.zeros(labels.shape, dtype=bool)
    for host in sorted({h for c in classes for h in c.hosts}):
        inside |= ndimage.binary_fill_holes(labels == host)
    return inside


def host_deviation(
    image_hu: np.ndarray, labels: np.ndarray, classes: Sequence[TumorClass], spacing: Sequence[float], sigma_mm: float
) -> np.ndarray:
    """How far a voxel is from the median of its predicted host, in robust standard deviations, smoothed.

    |G ∗ (x − median) / (1.4826 · MAD)|, G a Gaussian of `sigma_mm`, normalized to the host so that nothing from outside
    enters. Smoothed before the absolute value is taken: noise cancels there, and would add up afterwards.

    Args:
        image_hu: (*,) the image; other units than HU work too, since the units cancel.
        labels: (*,) predicted organs.
        classes: tumor classes; their hosts are looked at.
        spacing: voxel size along each axis, mm.
        sigma_mm: of the Gaussian; 0 does not smooth.

    Returns:
        (*,) float32, 0 outside the hosts.
    """
    score = np.zeros(labels.shape, dtype=np.float32)
    for host in sorted({h for c in classes for h in c.hosts}):
        inside = ndimage.binary_fill_holes(labels == host)
        if not inside.any():
            continue
        box = ndimage.find_objects(inside.astype(np.uint8))[0]
        mask, x = inside[box], image_hu[box].astype(np.float32)
        median = np.median(x[mask])
        spread = max(_MAD_TO_SD * float(np.median(np.abs(x[mask] - median))), _SPREAD_FLOOR)
        deviation = np.where(mask, (x - median) / spread, 0).astype(np.float32)
        if sigma_mm > 0:
            sigma = [sigma_mm / s for s in spacing]
            weight = ndimage.gaussian_filter(mask.astype(np.float32), sigma, mode="constant")
            deviation = ndimage.gaussian_filter(deviation, sigma, mode="constant") / np.maximum(weight, 1e-6)
        score[box][mask] = np.abs(deviation[mask])
    return score


@dataclass(frozen=True)
class Evidence:
    """One tumor class in one case, as far as a threshold needs it."""

    scores: np.ndarray  # (N,) of the voxels whose score counts
    is_tumor: np.ndarray  # (N,) bool, the reference there
    tumor_voxels: int  # of the reference in the whole volume

    @classmethod
    def of(cls, score: np.ndarray, reference: np.ndarray) -> Evidence:
        """From a class's score (*,) and its reference mask (*,). A score of `LOWEST` is never tumor."""
        counts = score > LOWEST
        return cls(score[counts].astype(np.float32), reference[counts], int(reference.sum()))


@dataclass(frozen=True)
class Calibration:
    """A threshold, and the mean Dice that it gives on the cases that it was chosen on."""

    threshold: float
    dice: float


def choose_threshold(evidence: Sequence[Evidence], candidates: int = 200) -> Calibration:
    """The threshold with the best mean Dice: a voxel is tumor where its score is at least the threshold.

    Args:
        evidence: of the cases and classes whose reference holds tumor.
        candidates: how many quantiles of all scores are tried.

    Raises:
        ZePTError: there is none, or no score counts anywhere.
    """
    if not any(e.scores.size for e in evidence):
        raise ZePTError(
            "no threshold can be chosen: no validation case holds a tumor of the training labels in a predicted host. "
            "Choose another fold with -f, or train longer"
        )
    thresholds = np.unique(np.quantile(np.concatenate([e.scores for e in evidence]), np.linspace(0, 1, candidates)))
    dice = np.zeros(len(thresholds))
    for e in evidence:
        hits, everything = np.sort(e.scores[e.is_tumor]), np.sort(e.scores)
        predicted = everything.size - np.searchsorted(everything, thresholds, side="left")
        tp = hits.size - np.searchsorted(hits, thresholds, side="left")
        dice += 2 * tp / (predicted + e.tumor_voxels)
    best = int(np.argmax(dice))
    return Calibration(float(thresholds[best]), float(dice[best] / len(evidence)))
