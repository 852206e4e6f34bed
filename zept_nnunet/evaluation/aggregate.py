"""From cases to one figure per class, with confidence intervals by bootstrap over seeds and cases together.

Seeds of one method are evaluated on the same cases, so a bootstrap sample draws seeds and cases, each with replacement,
and takes every drawn case in every drawn seed. All metrics and classes share the draws; two methods share the drawn
cases, which makes their comparison paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from zept_nnunet.evaluation.case import CaseResult, ClassResult, rate_suffix
from zept_nnunet.evaluation.classes import EvaluatedClass
from zept_nnunet.evaluation.froc import FALSE_POSITIVES_PER_SCAN, froc_sensitivities
from zept_nnunet.evaluation.ranking import NUM_CODES, RANKING_METRICS, ranking_metrics

Key = tuple[str, str]  # scope, metric
FROC_NAMES = tuple(f"froc_sensitivity_at_{rate:g}" for rate in FALSE_POSITIVES_PER_SCAN)


@dataclass(frozen=True)
class Draws:
    """How often each seed and each case counts in each bootstrap sample: (B, S) and (B, N)."""

    seeds: np.ndarray
    cases: np.ndarray

    @classmethod
    def make(cls, samples: int, seeds: int, cases: int, seed: int, method: int = 0) -> Draws:
        """Equal numbers give equal draws. Methods (0, 1) of one `seed` share the cases and draw their own seeds."""
        case_rng, seed_rng = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1 + method])
        return cls(
            seed_rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=samples).astype(float),
            case_rng.multinomial(cases, np.full(cases, 1 / cases), size=samples).astype(float),
        )


@dataclass(frozen=True)
class Estimate:
    """A figure, its bootstrap distribution (B,), and over how many cases (or lesions' cases) it was taken."""

    value: float
    samples: np.ndarray
    cases: int

    def interval(self) -> tuple[float, float]:
        """95 % percentile interval. Samples in which the figure is not defined do not count.

        NaN where it was taken over fewer than two cases: drawing one case again and again says nothing.
        """
        finite = self.samples[np.isfinite(self.samples)]
        if not len(finite) or self.cases < 2:
            return float("nan"), float("nan")
        low, high = np.percentile(finite, [2.5, 97.5])
        return float(low), float(high)


def aggregate(
    seeds: Sequence[Sequence[CaseResult]],
    c: EvaluatedClass,
    draws: Draws,
    fp_rates: Sequence[float] = (),
    cases: frozenset[str] | None = None,
) -> dict[Key, Estimate]:
    """Every aggregate of one class.

    Args:
        seeds: S lists of the same N cases in the same order.
        fp_rates: rates at which matched figures were taken.
        cases: only these count (a stratum); None: all.
    """
    none = ClassResult()
    wanted = [cases is None or r.case in cases for r in seeds[0]]
    table = [
        [r.classes.get(c.name, none) if use else none for r, use in zip(results, wanted, strict=True)]
        for results in seeds
    ]
    found: dict[Key, Estimate] = {}

    def ratio(key: Key, numerator: np.ndarray, denominator: np.ndarray) -> None:
        """Σ numerator / Σ denominator, (S, N) each; NaN: the case does not count."""
        usable = np.isfinite(numerator) & np.isfinite(denominator)
        found[key] = _ratio(np.where(usable, numerator, 0.0), np.where(usable, denominator, 0.0), draws)

    def values(key: Key) -> np.ndarray:
        return np.array([[e.values.get(key, np.nan) for e in row] for row in table], dtype=float)

    means = {k for row in table for e in row for k in e.values if k[1].startswith(("dsc", "nsd", *RANKING_METRICS))}
    for key in sorted(means):
        ratio(key, values(key), np.ones_like(values(key)))
    if not c.is_tumor:
        return found
    suffixes = ["", *(rate_suffix(rate) for rate in fp_rates)]
    for suffix in suffixes:
        if not any(suffix in e.lesions for row in table for e in row):
            continue
        counts = np.array([[_counts(e, suffix) for e in row] for row in table])  # (S, N, 3)
        reference, predicted, matched = counts[..., 0], counts[..., 1], counts[..., 2]
        healthy = np.array([[e.healthy for e in row] for row in table])
        ratio(("volume", f"lesion_recall{suffix}"), matched, reference)
        ratio(("volume", f"lesion_precision{suffix}"), matched, predicted)
        false, scans = predicted - matched, np.ones_like(matched)
        ratio(("volume", f"false_positives_per_scan{suffix}"), false, scans)
        ratio(("volume", f"false_positives_per_healthy_scan{suffix}"), np.where(healthy, false, np.nan), scans)
    if any(e.candidates is not None for row in table for e in row):
        found |= _froc(table, draws)
        found["volume", "patient_auroc"] = _patient_auroc(
            np.array([[e.holds for e in row] for row in table]), values(("volume", "max_score")), draws
        )
    return found


def _counts(entry: ClassResult, suffix: str) -> tuple[float, float, float]:
    counts = entry.lesions.get(suffix)
    return (np.nan, np.nan, np.nan) if counts is None else (counts.reference, counts.predicted, counts.matched)


def _ratio(numerator: np.ndarray, denominator: np.ndarray, draws: Draws) -> Estimate:
    with np.errstate(invalid="ignore"):
        value = float(numerator.sum() / np.float64(denominator.sum()))
        above = ((draws.seeds @ numerator) * draws.cases).sum(axis=1)
        below = ((draws.seeds @ denominator) * draws.cases).sum(axis=1)
        return Estimate(value, above / below, int((denominator > 0).any(axis=0).sum()))


def _froc(table: Sequence[Sequence[ClassResult]], draws: Draws) -> dict[Key, Estimate]:
    """Sensitivities of each seed, averaged over seeds."""
    per_seed, sampled = [], []
    for row in table:
        scans = [e.candidates for e in row if e.candidates is not None]
        use = [e.candidates is not None for e in row]
        per_seed.append(froc_sensitivities(scans)[0])
        sampled.append(froc_sensitivities(scans, draws.cases[:, use]))
    value = np.mean(per_seed, axis=0)  # (7,)
    samples = mean_over_seeds(np.stack(sampled), draws)  # (B, 7)
    cases = sum(any(row[i].candidates is not None for row in table) for i in range(len(table[0])))
    found = {("volume", name): Estimate(float(value[i]), samples[:, i], cases) for i, name in enumerate(FROC_NAMES)}
    found["volume", "froc_score"] = Estimate(float(value.mean()), samples.mean(axis=1), cases)
    return found


def mean_over_seeds(values: np.ndarray, draws: Draws) -> np.ndarray:
    """(S, B, …) → (B, …), each sample weighting the seeds as drawn."""
    weights = draws.seeds / draws.seeds.sum(axis=1, keepdims=True)
    return np.einsum("bs,sb...->b...", weights, values)


def _patient_auroc(holds: np.ndarray, scores: np.ndarray, draws: Draws) -> Estimate:
    """Does a case hold the class? Its score is the highest of the volume. (S, N) each; per seed, then the mean."""
    values, sampled = [], []
    for truth, score in zip(holds, scores, strict=True):
        usable = np.isfinite(score)
        positive, negative = np.flatnonzero(truth & usable), np.flatnonzero(~truth & usable)
        wins = (score[positive][:, None] > score[negative]) + 0.5 * (score[positive][:, None] == score[negative])
        with np.errstate(invalid="ignore"):
            values.append(float(wins.sum() / np.float64(wins.size)))
            plus, minus = draws.cases[:, positive], draws.cases[:, negative]
            sampled.append(((plus @ wins) * minus).sum(axis=1) / (plus.sum(axis=1) * minus.sum(axis=1)))
    cases = int(np.isfinite(scores).any(axis=0).sum())
    return Estimate(float(np.mean(values)), mean_over_seeds(np.stack(sampled), draws), cases)


def group(estimates: Sequence[Mapping[Key, Estimate]]) -> dict[Key, Estimate]:
    """The mean over classes of every metric that all of them have and that is defined for at least one."""
    found = {}
    for key in sorted(set.intersection(*(set(e) for e in estimates))) if estimates else []:
        those = [e[key] for e in estimates if np.isfinite(e[key].value)]
        if those:
            samples = np.mean([e.samples for e in those], axis=0)
            found[key] = Estimate(float(np.mean([e.value for e in those])), samples, max(e.cases for e in those))
    return found


def difference(ours: Mapping[Key, Estimate], theirs: Mapping[Key, Estimate]) -> dict[Key, Estimate]:
    """Ours minus theirs, sample by sample."""
    return {
        key: Estimate(a.value - theirs[key].value, a.samples - theirs[key].samples, min(a.cases, theirs[key].cases))
        for key, a in ours.items()
        if key in theirs
    }


def pooled_ranking(seeds: Sequence[Sequence[CaseResult]], name: str) -> dict[Key, float]:
    """AUROC, AUPR and FPR95 over the voxels of all cases together; the mean over seeds."""
    found = {}
    for scope in ("volume", "host"):
        per_seed = []
        for results in seeds:
            positives, negatives = np.zeros(NUM_CODES, dtype=np.int64), np.zeros(NUM_CODES, dtype=np.int64)
            for result in results:
                if name in result.classes and scope in result.classes[name].histograms:
                    codes, on_positives, on_negatives = result.classes[name].histograms[scope]
                    positives[codes] += on_positives
                    negatives[codes] += on_negatives
            if positives.any() or negatives.any():
                per_seed.append(ranking_metrics(positives, negatives))
        for metric in RANKING_METRICS if per_seed else ():
            found[scope, metric] = float(np.mean([m[metric] for m in per_seed]))
    return found
