"""What a comparison page is made of: methods from `zept evaluate -o` folders, and from committed benchmark tables."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from zept_nnunet.errors import ZePTError
from zept_nnunet.evaluation.case import rate_suffix
from zept_nnunet.names import normalize_name

Key = tuple[str, str]  # scope, metric
_RERUN = "write it with zept evaluate -o"
_METRICS_COLUMNS = {"case", "class", "seen", "scope", "metric", "value", "ci_low", "ci_high", "seed", "cases"}
_CURVES_COLUMNS = {"class", "scope", "curve", "x", "y", "ci_low", "ci_high"}
_RESULTS_COLUMNS = {"method", "seed", "case", "class", "scope", "metric", "value"}
_SETTINGS = ("phantom", "size", "configuration", "epochs", "iterations", "minutes", "test_cases")


@dataclass(frozen=True)
class Cell:
    """A figure: with its 95 % interval, or with the standard deviation over seeds and how many they are."""

    value: float
    low: float = float("nan")
    high: float = float("nan")
    sd: float = float("nan")
    seeds: int = 0

    def spread(self) -> tuple[float, float]:
        """What a plot draws: the interval, else mean ± standard deviation; NaN where there is neither."""
        return (self.value - self.sd, self.value + self.sd) if self.seeds else (self.low, self.high)


@dataclass(frozen=True)
class TumorClass:
    """A tumor class of the page."""

    name: str
    seen: bool
    hosts: tuple[str, ...]
    reference_values: tuple[int, ...]
    cases: int
    """Test cases that hold it."""


@dataclass(frozen=True)
class Method:
    """One row of the page: `note` says what the method is, `source` of a committed one where its figures are from.

    `summary` and `metrics` are None for a method of a committed table.
    """

    name: str
    note: str
    cells: Mapping[str, Mapping[Key, Cell]]
    """Class → figures."""
    pooled: Mapping[str, Mapping[Key, float]]
    summary: Mapping[str, Any] | None = None
    metrics: pd.DataFrame | None = None
    curves: pd.DataFrame | None = None
    predictions: Path | None = None
    source: str = ""

    @property
    def is_committed(self) -> bool:
        return self.summary is None

    def cell(self, class_name: str, key: Key) -> Cell | None:
        """None where the figure is missing or not defined."""
        found = self.cells.get(class_name, {}).get(key)
        return found if found is not None and np.isfinite(found.value) else None

    def curve(self, class_name: str, scope: str, curve: str) -> pd.DataFrame | None:
        """Its points, or None."""
        if self.curves is None:
            return None
        c = self.curves
        rows = c[(c["class"] == class_name) & (c["scope"] == scope) & (c["curve"] == curve)]
        return rows if len(rows) else None

    def case_values(self, metric: str) -> pd.DataFrame:
        """(case × class) of the seed whose predictions are shown, else of the first."""
        assert self.metrics is not None and self.summary is not None
        folders = [Path(p).resolve() for p in self.summary.get("inputs", {}).get("predictions", [])]
        shown = None if self.predictions is None else self.predictions.resolve()
        seed = folders.index(shown) if shown in folders else 0
        m = self.metrics
        rows = m[(m["seed"] == seed) & (m["metric"] == metric) & (m["scope"] == "volume")]
        return rows.pivot_table(index="case", columns="class", values="value", dropna=False)


def parse_method(text: str) -> tuple[str, Path, Path | None]:
    """`NAME=EVALUATION_FOLDER[:PREDICTIONS_FOLDER]`.

    Raises:
        ZePTError: another form, or a folder that is not there.
    """
    name, _, folders = text.partition("=")
    name = name.strip()
    if not name or not folders:
        raise ZePTError(f"--method wants NAME=EVALUATION_FOLDER[:PREDICTIONS_FOLDER]; got {text!r}")
    evaluation, predictions = Path(folders), None
    if ":" in folders and not evaluation.is_dir():
        first, _, second = folders.rpartition(":")
        evaluation, predictions = Path(first), Path(second)
    for folder, what in ((evaluation, "zept evaluate -o wrote"), (predictions, "holds the predictions")):
        if folder is not None and not folder.is_dir():
            raise ZePTError(f"--method {name}: {folder} is no folder; give the one that {what}")
    return name, evaluation, predictions


def read_method(name: str, folder: Path, predictions: Path | None = None, note: str = "") -> Method:
    """Read what `zept evaluate -o` left in a folder; curves.csv may be missing.

    Raises:
        ZePTError: a file is missing or damaged.
    """
    path = folder / "summary.json"
    if not path.is_file():
        raise ZePTError(f"{folder} holds no summary.json, so it is no evaluation; {_RERUN}")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        classes = {n: (c["role"], c["seen"], c["reference_values"]) for n, c in summary["classes"].items()}
        cases = list(summary["cases"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ZePTError(f"{path} is damaged ({error!r}); {_RERUN}") from error
    if not classes or not cases:
        raise ZePTError(f"{path} names no class or no case; {_RERUN}")
    metrics = _read_table(folder / "metrics.csv", _METRICS_COLUMNS)
    has_curves = (folder / "curves.csv").is_file()
    curves = _read_table(folder / "curves.csv", _CURVES_COLUMNS) if has_curves else None
    cells: dict[str, dict[Key, Cell]] = {}
    pooled: dict[str, dict[Key, float]] = {}
    columns = ["case", "class", "scope", "metric", "value", "ci_low", "ci_high"]
    aggregates = metrics.loc[metrics["case"].isin(("mean", "pooled")), columns]
    for case, c, scope, metric, value, low, high in aggregates.itertuples(index=False, name=None):
        if case == "mean":
            cells.setdefault(c, {})[scope, metric] = Cell(value, low, high)
        else:
            pooled.setdefault(c, {})[scope, metric] = float(value)
    note = "; ".join(part for part in (note, _operating_point(predictions)) if part)
    return Method(name, note, cells, pooled, summary, metrics, curves, predictions)


def _operating_point(predictions: Path | None) -> str:
    """Where the method itself reports a tumor, by the plans beside its predictions; "" where there are none."""
    path = None if predictions is None else predictions / "plans.json"
    if path is None or not path.is_file():
        return ""
    try:
        block = json.loads(path.read_text(encoding="utf-8")).get("zept") or {}
        entries = list((block.get("thresholds") or {}).values())
        rates = sorted({float(entry["false_positives_per_scan"]) for entry in entries})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ZePTError(f"{path} is damaged ({error!r}); predict again") from error
    if not rates:
        return "reports a tumor by nnU-Net's decoding"
    stated = " or ".join(f"{rate:g}" for rate in rates)
    return f"reports a tumor from thresholds calibrated to {stated} false positives per healthy scan"


def _read_table(path: Path, columns: Collection[str]) -> pd.DataFrame:
    if not path.is_file():
        raise ZePTError(f"{path} is missing; {_RERUN}")
    try:
        table = pd.read_csv(path, dtype={"case": str, "class": str, "scope": str, "metric": str, "curve": str})
        numbers = [c for c in ("value", "x", "y", "ci_low", "ci_high", "seed") if c in columns]
        missing = sorted(set(columns) - set(table.columns))
        if missing:
            raise ValueError(f"no column {', '.join(missing)}")
        table[numbers] = table[numbers].astype(float)
    except (ValueError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ZePTError(f"{path} cannot be read: {error}. Wanted the columns {', '.join(sorted(columns))}") from error
    return table


def read_results(path: Path, purposes: Mapping[str, str]) -> list[Method]:
    """The methods of a table that benchmarks/zero_shot.py wrote, each with its settings: mean and SD over seeds.

    Raises:
        ZePTError: no such table.
    """
    if not path.is_file():
        raise ZePTError(f"--results {path} is no file; give a table that benchmarks/zero_shot.py wrote")
    table = _read_table(path, _RESULTS_COLUMNS)
    settings = [s for s in _SETTINGS if s in table.columns]
    found = []
    for values, rows in table.groupby(["method", *settings], dropna=False, sort=False):
        of = dict(zip(["method", *settings], values, strict=True))
        name = str(of["method"])
        cells: dict[str, dict[Key, Cell]] = {}
        pooled: dict[str, dict[Key, float]] = {}
        for (case, c, scope, metric), each in rows.groupby(["case", "class", "scope", "metric"])["value"]:
            if case == "pooled":
                pooled.setdefault(c, {})[scope, metric] = float(each.mean())
            else:
                cell = Cell(float(each.mean()), sd=float(each.std()), seeds=len(each))
                cells.setdefault(c, {})[scope, metric] = cell
        seeds = rows["seed"].nunique()
        source = f"from {'/'.join(path.resolve().parts[-3:])}, {seeds} seed{'s' * (seeds != 1)}"
        note = "; ".join(part for part in (purposes.get(name, ""), _describe(of)) if part)
        found.append(Method(f"{name} ({path.name})", note, cells, pooled, source=source))
    if not found:
        raise ZePTError(f"--results {path} holds no row; leave it out")
    return found


def _describe(settings: Mapping[str, Any]) -> str:
    of = {k: v for k, v in settings.items() if not pd.isna(v)}
    parts = [str(of[k]) for k in ("size", "configuration") if k in of]
    parts += [f"{of['test_cases']:g} test cases"] if "test_cases" in of else []
    if "minutes" in of:
        parts.append(f"{of['minutes']:g} minutes")
    elif "epochs" in of:
        parts.append(f"{of['epochs']:g} × {of.get('iterations', float('nan')):g} iterations")
    return ", ".join(parts)


def check_methods(methods: Sequence[Method]) -> None:
    """Raise where they cannot stand in one table.

    Raises:
        ZePTError: two of one name, or evaluations of different cases.
    """
    names = [m.name for m in methods]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ZePTError(f"--method names {twice[0]!r} twice; give each method its own name")
    first = methods[0]
    assert first.summary is not None
    for method in methods[1:]:
        assert method.summary is not None
        differing = sorted(set(first.summary["cases"]) ^ set(method.summary["cases"]))
        if differing:
            raise ZePTError(
                f"{first.name!r} and {method.name!r} were evaluated on different cases (such as {differing[0]}), so "
                "their figures cannot be compared; evaluate both on the same references"
            )


def tumor_classes(methods: Sequence[Method], only: Sequence[str] | None = None) -> list[TumorClass]:
    """The tumors that any method was evaluated on, unseen ones first.

    Args:
        only: names of those wanted; None: all.

    Raises:
        ZePTError: a name that is no tumor, or no tumor at all.
    """
    found: dict[str, TumorClass] = {}
    for method in methods:
        assert method.summary is not None
        described = method.summary["classes"]
        for name, c in described.items():
            if c["role"] != "tumor" or name in found:
                continue
            within = set(c.get("host_values") or ())
            hosts = [n for n, o in described.items() if o["role"] == "organ" and set(o["reference_values"]) <= within]
            dsc = method.summary.get("aggregates", {}).get(name, {}).get("dsc (volume)", {})
            cases = int(dsc.get("cases") or 0)
            found[name] = TumorClass(name, bool(c["seen"]), tuple(hosts), tuple(c["reference_values"]), cases)
    if not found:
        raise ZePTError("no method was evaluated on a tumor class; evaluate predictions of a dataset with tumors")
    if only is not None:
        known = {normalize_name(n): n for n in found}
        wrong = [n for n in only if normalize_name(n) not in known]
        if wrong:
            raise ZePTError(f"--classes: {wrong[0]!r} is no tumor of the evaluations; known: {sorted(found)}")
        found = {known[normalize_name(n)]: found[known[normalize_name(n)]] for n in only}
    return sorted(found.values(), key=lambda c: c.seen)


def matched_rate(methods: Sequence[Method]) -> float | None:
    """The first rate of false positives per healthy scan at which a method was evaluated; None: there is none."""
    for method in methods:
        rates = (method.summary or {}).get("settings", {}).get("false_positive_rates", [])
        for rate in rates:
            key = ("volume", f"lesion_recall{rate_suffix(rate)}")
            if any(key in figures for figures in method.cells.values()):
                return float(rate)
    return None
