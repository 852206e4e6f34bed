"""One page that compares methods: figures, curves, cases and a volume viewer in a single file without any request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import jinja2
import numpy as np

from zept_nnunet.evaluation.case import rate_suffix
from zept_nnunet.evaluation.html_cases import (
    CLASS_COLORS,
    Choice,
    Folders,
    choose_cases,
    choose_slice,
    montage,
    panels_of,
    read_case,
)
from zept_nnunet.evaluation.html_figures import color_index, curve_figure, healthy_figure
from zept_nnunet.evaluation.html_methods import Cell, Key, Method, TumorClass, matched_rate, tumor_classes
from zept_nnunet.evaluation.html_retrieval import Retrieval
from zept_nnunet.evaluation.html_viewer import find_script, viewer_case
from zept_nnunet.evaluation.report import FEW_HEALTHY
from zept_nnunet.evaluation.retrieval import CONTROLS, SUMMARY_COLUMNS

TEMPLATE = "html_report.html.j2"
VIEWER_CASES = 2


@dataclass(frozen=True)
class Column:
    """A column of the table."""

    title: str
    key: Key
    digits: int = 3


@dataclass(frozen=True)
class Page:
    """What the page is made from.

    Attributes:
        methods: of evaluations; at least one.
        committed: of committed tables, after them.
        dataset_json: of the dataset; empty where it is not known.
        folders: None: no cases and no viewer.
        classes: names of the tumors to show; None: all.
        cases: those to show; None: chosen automatically.
        retrievals: of zept knowledge retrieve.
    """

    title: str
    methods: Sequence[Method]
    committed: Sequence[Method]
    dataset_json: Mapping[str, Any]
    folders: Folders | None = None
    classes: Sequence[str] | None = None
    cases: Sequence[str] | None = None
    retrievals: Sequence[Retrieval] = ()


def render(page: Page) -> str:
    """The page as text.

    Raises:
        ZePTError: names or files that do not fit.
    """
    classes = tumor_classes(page.methods, page.classes)
    methods = [*page.methods, *page.committed]
    rate = matched_rate(page.methods)
    columns = table_columns(rate)
    matched = columns[-1].key if rate is not None else None
    script = find_script()
    shown = _cases(page, classes, not isinstance(script, str))
    return (
        page_environment()
        .get_template(TEMPLATE)
        .render(
            title=page.title,
            version=version(),
            is_synthetic="zept_phantom" in page.dataset_json,
            methods=[_describe(i, m) for i, m in enumerate(methods)],
            classes=classes,
            colors=["#{:02x}{:02x}{:02x}".format(*CLASS_COLORS[i % len(CLASS_COLORS)]) for i in range(len(classes))],
            columns=[c.title for c in columns],
            groups=_groups(methods, classes, columns),
            rate=rate,
            curves={c: _curves(methods, classes, c) for c in ("roc", "froc")},
            healthy=[(c.name, healthy_figure(methods, c.name, rate, matched)) for c in classes],
            healthy_scans=_healthy_scans(page.methods, classes),
            few_healthy=FEW_HEALTHY,
            retrievals=page.retrievals,
            retrieval_titles=list(SUMMARY_COLUMNS.values()),
            controls=CONTROLS,
            cases=shown,
            script=script,
            viewer=[case["volumes"] for case in shown if case["volumes"] is not None],
            montages=[case["montage"] for case in shown if case["montage"] is not None],
        )
    )


def page_environment() -> jinja2.Environment:
    """Of every page's template."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("zept_nnunet.evaluation", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def version() -> str:
    """Of this package."""
    return metadata.version("zept-nnunet")


def table_columns(rate: float | None) -> list[Column]:
    """Those of the main table; without a matched rate, none at it."""
    columns = [
        Column("AUROC in host", ("host", "auroc")),
        Column("FPR95 in host", ("host", "fpr95")),
        Column("FROC score", ("volume", "froc_score")),
        Column("DSC", ("volume", "dsc")),
        Column("Lesion recall, own threshold", ("volume", "lesion_recall")),
        Column("False positives per healthy scan, own threshold", ("volume", "false_positives_per_healthy_scan"), 2),
    ]
    if rate is not None:
        suffix = rate_suffix(rate)
        columns += [
            Column(f"Lesion recall at {rate:g} FP", ("volume", f"lesion_recall{suffix}")),
            Column(
                f"False positives per healthy scan at {rate:g} FP",
                ("volume", f"false_positives_per_healthy_scan{suffix}"),
                2,
            ),
        ]
    return columns


def _describe(index: int, method: Method) -> dict[str, Any]:
    summary = method.summary or {}
    seeds = int(summary.get("seeds", 0))
    return {
        "name": method.name,
        "note": method.note,
        "source": method.source,
        "color": color_index(index),
        "is_committed": method.is_committed,
        "cases": len(summary.get("cases", ())),
        "seeds": seeds,
        "samples": summary.get("settings", {}).get("bootstrap_samples"),
        "problems": list(summary.get("problems", ())),
        "has_curves": method.curves is not None,
    }


def _groups(
    methods: Sequence[Method], classes: Sequence[TumorClass], columns: Sequence[Column]
) -> list[dict[str, Any]]:
    """Seen and unseen apart; in each class after class, and in that the methods."""
    found = []
    for seen in (False, True):
        members = [c for c in classes if c.seen == seen]
        rows = [
            {
                "class": c,
                "methods": [
                    {"index": i, "cells": [_cell(m.cell(c.name, column.key), column.digits) for column in columns]}
                    for i, m in enumerate(methods)
                    if c.name in m.cells
                ],
            }
            for c in members
        ]
        if rows:
            found.append({"seen": seen, "classes": rows})
    return found


def _cell(cell: Cell | None, digits: int) -> tuple[str, str]:
    """The figure, and its interval or spread in words."""
    if cell is None:
        return "–", ""
    value = f"{cell.value:.{digits}f}"
    if cell.seeds:
        return value, f"± {cell.sd:.{digits}f}" if np.isfinite(cell.sd) else "one seed"
    return value, f"[{cell.low:.{digits}f}, {cell.high:.{digits}f}]" if np.isfinite(cell.low) else ""


def _curves(methods: Sequence[Method], classes: Sequence[TumorClass], curve: str) -> list[tuple[TumorClass, str]]:
    found = [(c, curve_figure(methods, c.name, curve)) for c in classes]
    return [(c, svg) for c, svg in found if svg is not None]


def _healthy_scans(methods: Sequence[Method], classes: Sequence[TumorClass]) -> list[dict[str, Any]]:
    """Of each class, how many healthy test scans there are, and healthy validation scans of each method."""
    found = []
    for c in classes:
        summaries = [m.summary for m in methods if m.summary is not None]
        test = max((int(s.get("healthy_scans", {}).get(c.name, 0)) for s in summaries), default=0)
        validation = [int(v[c.name]) for s in summaries for v in s.get("calibration_healthy_scans", ()) if c.name in v]
        found.append({"name": c.name, "test": test, "validation": min(validation, default=0)})
    return found


def _cases(page: Page, classes: Sequence[TumorClass], with_viewer: bool) -> list[dict[str, Any]]:
    """What is shown of each case; only one is in memory at a time. The first two have volumes for the viewer."""
    if page.folders is None or not any(m.predictions for m in page.methods):
        return []
    found: list[dict[str, Any]] = []
    for choice in choose_cases(page.methods, classes, page.cases, page.folders):
        volumes = read_case(choice.case, page.methods, classes, page.folders)
        in_viewer = sum(c["montage"] is not None for c in found) < VIEWER_CASES
        in_viewer &= all(c["choice"].case != choice.case for c in found)
        found.append(
            {
                "choice": choice,
                "panels": panels_of(volumes, classes, choose_slice(volumes, classes, choice.class_name)),
                "dice": _dice_values(page.methods, choice),
                "montage": montage(volumes, classes) if in_viewer else None,
                "volumes": viewer_case(volumes, classes, choice.reason) if in_viewer and with_viewer else None,
            }
        )
    return found


def _dice_values(methods: Sequence[Method], choice: Choice) -> list[tuple[str, float]]:
    """Of the class that the case was chosen for, by each method whose prediction is shown."""
    found = []
    for method in methods if choice.class_name is not None else ():
        if method.predictions is not None:
            values = method.case_values("dsc")
            if choice.case in values.index and choice.class_name in values:
                found.append((method.name, float(values.loc[choice.case, choice.class_name])))
    return found
