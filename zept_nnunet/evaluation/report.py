"""What is written: metrics.csv in long form, comparison.csv, summary.json, and the table in the terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from zept_nnunet.evaluation.aggregate import Draws, Estimate, Key, aggregate, difference, group, pooled_ranking
from zept_nnunet.evaluation.case import Settings
from zept_nnunet.evaluation.classes import EvaluatedClass
from zept_nnunet.evaluation.lesions import DEFAULT_MATCHING_IOU
from zept_nnunet.evaluation.ranking import decode
from zept_nnunet.evaluation.run import MethodResult, healthy_scans

COLUMNS = ["case", "class", "seen", "scope", "metric", "value", "unit", "ci_low", "ci_high", "seed", "cases"]
ORGAN_GROUP, SEEN_GROUP, UNSEEN_GROUP = "(organs)", "(seen tumors)", "(unseen tumors)"
LIBRARIES = (
    "zept-nnunet",
    "numpy",
    "scipy",
    "scikit-learn",
    "surface-distance",
    "connected-components-3d",
    "SimpleITK",
)
FEW_HEALTHY = 30

Aggregates = dict[tuple[str, bool], dict[Key, Estimate]]  # (class or group, seen) → figures


def aggregates(
    result: MethodResult,
    settings: Settings,
    draws: Draws,
    strata: Mapping[str, Mapping[str, frozenset[str]]] | None = None,
) -> Aggregates:
    """Every class, every stratum as `CLASS [STRATUM]`, and the groups: organs, seen and unseen tumors.

    Organs that no case labels do not count in theirs.
    """
    rates = settings.fp_rates if any(result.thresholds) else ()
    found: Aggregates = {}
    for c in result.table.classes:
        found[c.name, c.seen] = aggregate(result.seeds, c, draws, rates)
        for stratum, cases in sorted((strata or {}).get(c.name, {}).items()):
            found[f"{c.name} [{stratum}]", c.seen] = aggregate(result.seeds, c, draws, rates, cases)
    tumors = [(c.name, c.seen) for c in result.table.tumors]
    organs = [(c.name, c.seen) for c in result.table.classes if not c.is_tumor]
    for name, seen, keys in (
        (ORGAN_GROUP, True, [k for k in organs if found[k]]),
        (SEEN_GROUP, True, [k for k in tumors if k[1]]),
        (UNSEEN_GROUP, False, [k for k in tumors if not k[1]]),
    ):
        if keys:
            found[name, seen] = group([found[k] for k in keys])
    return found


def unit(metric: str) -> str:
    """Of a metric's value."""
    if metric.startswith("false_positives_per"):
        return "lesions/scan"
    if metric.startswith("false_positives"):
        return "lesions"
    return "logit" if metric == "max_score" else "fraction"


def metrics_table(result: MethodResult, figures: Aggregates) -> pd.DataFrame:
    """Rows of every case, then of the pooled voxels (`case` = pooled), then the aggregates (`case` = mean)."""
    rows: list[dict[str, Any]] = []
    for seed, results in enumerate(result.seeds):
        for r in results:
            for c in result.table.classes:
                if c.name not in r.classes:
                    continue
                for (scope, metric), value in sorted(r.classes[c.name].values.items()):
                    rows.append(_row(r.case, c.name, c.seen, scope, metric, value) | {"seed": seed})
    for c in result.table.tumors:
        for (scope, metric), value in pooled_ranking(result.seeds, c.name).items():
            rows.append(_row("pooled", c.name, c.seen, scope, metric, value))
    for (name, seen), estimates in figures.items():
        for (scope, metric), estimate in sorted(estimates.items()):
            rows.append(_row("mean", name, seen, scope, metric, estimate.value) | _interval(estimate))
    frame = pd.DataFrame(rows, columns=COLUMNS)
    return frame.astype({"seed": "Int64", "cases": "Int64"})


def comparison_table(ours: Aggregates, theirs: Aggregates) -> pd.DataFrame:
    """Ours minus theirs, where both have the figure."""
    rows = []
    for key, estimates in ours.items():
        for (scope, metric), estimate in sorted(difference(estimates, theirs.get(key, {})).items()):
            rows.append(_row("mean", *key, scope, metric, estimate.value) | _interval(estimate))
    return pd.DataFrame(rows, columns=[c for c in COLUMNS if c != "seed"]).astype({"cases": "Int64"})


def _row(case: str, name: str, seen: bool, scope: str, metric: str, value: float) -> dict[str, Any]:
    return {
        "case": case,
        "class": name,
        "seen": seen,
        "scope": scope,
        "metric": metric,
        "value": value,
        "unit": unit(metric),
    }


def _interval(estimate: Estimate) -> dict[str, Any]:
    low, high = estimate.interval()
    return {"ci_low": low, "ci_high": high, "cases": estimate.cases}


def notes(result: MethodResult) -> list[str]:
    """What a reader of the figures must know."""
    found = list(result.notes)
    if result.with_scores and not any(result.thresholds):
        found.append("no --calibration: no figures at a matched rate of false positives")
    healthy = healthy_scans(result.seeds[0], [c.name for c in result.table.tumors])
    few = {name: count for name, count in healthy.items() if count < FEW_HEALTHY}
    if few:
        counts = ", ".join(f"{name}: {count}" for name, count in few.items())
        found.append(f"fewer than {FEW_HEALTHY} healthy scans bound no rate of false positives ({counts})")
    return found


def summary(
    result: MethodResult, figures: Aggregates, settings: Settings, inputs: Mapping[str, Any], draws: Draws
) -> dict[str, Any]:
    """Content of summary.json; what is NaN becomes null."""
    classes = {c.name: _describe(c) for c in result.table.classes}
    thresholds = [
        {name: {f"{rate:g}": float(decode(np.array([code]))[0]) for rate, code in at.items()} for name, at in t.items()}
        for t in result.thresholds
    ]
    return {
        "complete": not result.problems,
        "problems": result.problems,
        "notes": notes(result),
        "inputs": dict(inputs),
        "settings": {
            "nsd_tolerance_mm": settings.tolerance_mm,
            "lesion_matching_iou": settings.lesion_iou,
            "default_lesion_matching_iou": DEFAULT_MATCHING_IOU,
            "false_positive_rates": list(settings.fp_rates),
            "bootstrap_samples": len(draws.cases),
        },
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "seeds": len(result.seeds),
        "cases": [r.case for r in result.seeds[0]],
        "healthy_scans": dict(healthy_scans(result.seeds[0], [c.name for c in result.table.tumors])),
        "not_annotated": {r.case: r.not_annotated for r in result.seeds[0] if r.not_annotated},
        "thresholds_logit": thresholds,
        "calibration_healthy_scans": result.calibration_scans,
        "classes": classes,
        "aggregates": {
            name: {
                f"{metric} ({scope})": {
                    "value": _number(e.value),
                    "ci": [_number(v) for v in e.interval()],
                    "cases": e.cases,
                }
                for (scope, metric), e in sorted(estimates.items())
            }
            for (name, _), estimates in figures.items()
        },
    }


def _describe(c: EvaluatedClass) -> dict[str, Any]:
    return {
        "role": "tumor" if c.is_tumor else "organ",
        "seen": c.seen,
        "reference_values": list(c.reference_values),
        "prediction_values": None if c.prediction_values is None else list(c.prediction_values),
        "host_values": None if c.host_values is None else list(c.host_values),
    }


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


# ---------------------------------------------------------------------------------------------------- terminal
_TABLES: dict[str, dict[str, Key]] = {
    "segmentation and lesions": {
        "DSC": ("volume", "dsc"),
        "NSD": ("volume", "nsd"),
        "lesion recall": ("volume", "lesion_recall"),
        "precision": ("volume", "lesion_precision"),
        "FP/healthy scan": ("volume", "false_positives_per_healthy_scan"),
    },
    "ranking": {
        "AUROC host": ("host", "auroc"),
        "AUPR host": ("host", "aupr"),
        "FPR95 host": ("host", "fpr95"),
        "AUROC volume": ("volume", "auroc"),
        "FROC": ("volume", "froc_score"),
        "patient AUROC": ("volume", "patient_auroc"),
    },
}


def terminal_tables(figures: Aggregates, settings: Settings) -> str:
    """The main aggregates with their intervals."""
    tables = dict(_TABLES)
    for rate in settings.fp_rates:
        suffix = f"_at_fp_{rate:g}"
        tables[f"at {rate:g} false positives per healthy validation scan"] = {
            "DSC": ("volume", f"dsc{suffix}"),
            "lesion recall": ("volume", f"lesion_recall{suffix}"),
            "precision": ("volume", f"lesion_precision{suffix}"),
            "FP/healthy test scan": ("volume", f"false_positives_per_healthy_scan{suffix}"),
        }
    parts = []
    for title, columns in tables.items():
        rows = [
            {"class": name, "seen": "yes" if seen else "no"}
            | {column: _cell(estimates.get(key)) for column, key in columns.items()}
            for (name, seen), estimates in figures.items()
            if any(key in estimates for key in columns.values())
        ]
        if rows:
            parts.append(f"{title} (mean, 95 % interval)\n{pd.DataFrame(rows).to_string(index=False)}")
    return "\n\n".join(parts)


def _cell(estimate: Estimate | None) -> str:
    if estimate is None or not np.isfinite(estimate.value):
        return "–"
    low, high = estimate.interval()
    return f"{estimate.value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if np.isfinite(low) else "")


def write(folder: Path, tables: Mapping[str, pd.DataFrame], content: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Write all files under other names, then rename them: nothing half-written stands under its name."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = []
    try:
        for name, frame in tables.items():
            partial.append((folder / f".{name}.partial", folder / name))
            frame.to_csv(partial[-1][0], index=False)
        for name, values in content:
            partial.append((folder / f".{name}.partial", folder / name))
            partial[-1][0].write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for source, target in partial:
            os.replace(source, target)
    finally:
        for source, _ in partial:
            source.unlink(missing_ok=True)
