"""ROC and FROC curves of each tumor class with intervals from the bootstrap, as `curves.csv` holds them.

An ROC curve is over the voxels of all cases together. Its points are thresholds of the exact curve, chosen so close
that no part of it strays by `STEP` from the line between two of them; the counts of each case at these thresholds are
all that the bootstrap needs, so memory depends on no number of voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from zept_nnunet.evaluation.aggregate import Draws, mean_over_seeds
from zept_nnunet.evaluation.case import SCOPES, CaseResult
from zept_nnunet.evaluation.froc import FALSE_POSITIVES_PER_SCAN, froc_sensitivities, froc_steps
from zept_nnunet.evaluation.ranking import NUM_CODES
from zept_nnunet.evaluation.run import MethodResult

COLUMNS = ["class", "seen", "scope", "curve", "x", "y", "ci_low", "ci_high"]
STEP = 0.02  # along x and y together: a curve from (0, 0) to (1, 1) has 2 / STEP parts and 4 / STEP points at most


@dataclass(frozen=True)
class Curve:
    """Points (n,), mean over seeds, and the 95 % interval of each y (NaN: none).

    `x`: false positive rate, or false positives per scan. Of an ROC curve straight lines join the points, and a jump is
    two points of one x; an FROC curve keeps its y up to the next x.
    """

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray


def curves_table(result: MethodResult, draws: Draws) -> pd.DataFrame:
    """Every curve of every tumor class that is defined."""
    parts = []
    for c in result.table.tumors:
        curves = {(scope, "roc"): roc(result.seeds, c.name, scope, draws) for scope in SCOPES}
        curves["volume", "froc"] = froc(result.seeds, c.name, draws)
        for (scope, name), curve in curves.items():
            if curve is not None:
                fixed = {"class": c.name, "seen": c.seen, "scope": scope, "curve": name}
                points = {"x": curve.x, "y": curve.y, "ci_low": curve.low, "ci_high": curve.high}
                parts.append(pd.DataFrame(points).assign(**fixed)[COLUMNS])
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=COLUMNS)


def roc(seeds: Sequence[Sequence[CaseResult]], name: str, scope: str, draws: Draws) -> Curve | None:
    """Of the pooled voxels of all cases; None where there are no positives or no negatives."""
    counts = [_counts_above(results, name, scope) for results in seeds]
    rates = []
    for positives, negatives in counts:
        if not positives.sum() or not negatives.sum():
            return None
        rates.append(_rates(negatives.sum(axis=0, keepdims=True), positives.sum(axis=0, keepdims=True)))
    where = np.unique(np.concatenate([fpr[0] for fpr, _ in rates]))
    jumps = np.mean([_both_sides(fpr[0], tpr[0], where) for fpr, tpr in rates], axis=0)
    x, y = np.repeat(where, 2), jumps.T.ravel()
    kept = _thin(x + y, STEP)
    kept = kept[np.append(True, (np.diff(x[kept]) > 0) | (np.diff(y[kept]) > 0))]
    samples = []
    for positives, negatives in counts:
        drawn = [_rates(draws.cases @ negatives, draws.cases @ positives)]
        sides = [_both_sides(f, t, where).T.ravel()[kept] for fpr, tpr in drawn for f, t in zip(fpr, tpr, strict=True)]
        samples.append(np.stack(sides))
    holding = int((counts[0][0][:, -1] > 0).sum())
    return Curve(x[kept], y[kept], *_intervals(mean_over_seeds(np.stack(samples), draws), holding))


def _counts_above(results: Sequence[CaseResult], name: str, scope: str) -> tuple[np.ndarray, np.ndarray]:
    """Positives and negatives of each case at or above each of L thresholds, descending: (N, L) each."""
    found = [r.classes[name].histograms.get(scope) if name in r.classes else None for r in results]
    pooled = np.zeros((2, NUM_CODES))
    for histogram in found:
        if histogram is not None:
            pooled[:, histogram[0]] += histogram[1:]
    used = np.flatnonzero(pooled.any(axis=0))[::-1]
    totals = np.maximum(pooled.sum(axis=1, keepdims=True), 1)
    levels = used[_thin((pooled[:, used].cumsum(axis=1) / totals).sum(axis=0), STEP / 2)]
    above = np.zeros((2, len(results), len(levels)))
    for i, histogram in enumerate(found):
        if histogram is not None and len(levels):
            codes, *both = histogram  # codes ascend
            first = np.searchsorted(codes, levels)
            for k, values in enumerate(both):
                above[k, i] = np.append(np.cumsum(values[::-1])[::-1], 0)[first]
    return above[0], above[1]


def _rates(negatives: np.ndarray, positives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates (B, 1 + L) from counts (B, L), beginning with 0; NaN where there are none."""
    with np.errstate(invalid="ignore"):
        fpr, tpr = negatives / negatives[:, -1:], positives / positives[:, -1:]
    return np.insert(fpr, 0, 0.0, axis=1), np.insert(tpr, 0, 0.0, axis=1)


def _both_sides(fpr: np.ndarray, tpr: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The curve's lowest and highest y at each x, which differ at a jump: (2, len(where))."""
    lowest = -np.interp(-where, -fpr[::-1], -tpr[::-1])
    return np.stack([lowest, np.interp(where, fpr, tpr)])


def _thin(along: np.ndarray, step: float) -> np.ndarray:
    """Indices of the points to keep: first and last of all that lie in one part of length `step`."""
    if not len(along):
        return np.zeros(0, dtype=np.int64)
    part = np.floor(along / step)
    ends = np.flatnonzero(np.diff(part))
    return np.unique(np.concatenate([[0], ends, ends + 1, [len(along) - 1]]))


def froc(seeds: Sequence[Sequence[CaseResult]], name: str, draws: Draws) -> Curve | None:
    """Up to the highest rate of the FROC score; None where no scan holds a lesion."""
    found = [[r.classes[name].candidates if name in r.classes else None for r in results] for results in seeds]
    scans = [[c for c in row if c is not None] for row in found]
    if any(not sum(c.lesions for c in row) for row in scans):
        return None
    limit = FALSE_POSITIVES_PER_SCAN[-1]
    steps = np.unique(np.concatenate([froc_steps(row) for row in scans]))
    steps = steps[steps <= limit]
    y = np.mean([froc_sensitivities(row, None, steps)[0] for row in scans], axis=0)
    x = np.unique(np.concatenate([[0.0], FALSE_POSITIVES_PER_SCAN, steps[_thin(y, STEP)]]))
    y = np.mean([froc_sensitivities(row, None, x)[0] for row in scans], axis=0)
    samples = [
        froc_sensitivities(row, draws.cases[:, [c is not None for c in all_cases]], x)
        for row, all_cases in zip(scans, found, strict=True)
    ]
    count = sum(any(row[i] is not None for row in found) for i in range(len(found[0])))
    return Curve(x, y, *_intervals(mean_over_seeds(np.stack(samples), draws), count))


def _intervals(samples: np.ndarray, cases: int) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile intervals over the samples (B, n) that are defined; NaN where it were over fewer than 2 cases."""
    defined = samples[np.isfinite(samples).all(axis=1)]
    if cases < 2 or not len(defined):
        nothing = np.full(samples.shape[1], np.nan)
        return nothing, nothing
    low, high = np.percentile(defined, [2.5, 97.5], axis=0)
    return low, high
