"""Curves and dot plots as SVG that stands inside a page: its text is text, its colors are the page's."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from zept_nnunet.evaluation.froc import FALSE_POSITIVES_PER_SCAN
from zept_nnunet.evaluation.html_methods import Key, Method

NUM_COLORS = 7
_DASHES = ((), (6, 2), (2, 1.5), (7, 2, 1.5, 2), (4, 1.5), (9, 2, 2, 2, 2, 2), (1, 1))
_MARKERS = "osD^vPX"
_INK = "#010203"  # becomes the color of the page's text
_COLORS = tuple(f"#0a0b{i:02x}" for i in range(NUM_COLORS))  # become the page's --method-0, --method-1, …
_LOWEST_RATE = 1 / 16  # left end of an FROC plot, whose axis is logarithmic
_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9.5,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def color_index(index: int) -> int:
    """Which of the page's colors the method of that number has."""
    return index % NUM_COLORS


def curve_figure(methods: Sequence[Method], class_name: str, curve: str) -> str | None:
    """All methods' ROC (in the host) or FROC curves of one class, with bands; None where no method has one."""
    scope = "host" if curve == "roc" else "volume"
    found = [(i, m, m.curve(class_name, scope, curve)) for i, m in enumerate(methods)]
    drawn = [(i, m, points) for i, m, points in found if points is not None]
    if not drawn:
        return None
    with mpl.rc_context(_STYLE):
        height = 3.5 + 0.2 * len(drawn)
        figure = Figure(figsize=(4.3, height))
        axes = figure.add_axes((0.12, 1 - 3.0 / height, 0.85, 2.85 / height))
        handles = []
        for i, method, points in drawn:
            x, y, low, high = (points[c].to_numpy(dtype=float) for c in ("x", "y", "ci_low", "ci_high"))
            marks = np.linspace(0.05, 0.95, 6) + 0.02 * i
            if curve == "froc":
                start = max(int(np.searchsorted(x, _LOWEST_RATE, side="right")) - 1, 0)
                x, y, low, high = np.maximum(x[start:], _LOWEST_RATE), y[start:], low[start:], high[start:]
                marks = np.asarray(FALSE_POSITIVES_PER_SCAN)
            line, is_step = _line(i), curve == "froc"
            axes.plot(x, y, drawstyle="steps-post" if is_step else "default", **{**line, "marker": "None"})
            at = np.searchsorted(x, marks, side="right") - 1
            height_at = y[at] if is_step else np.interp(marks, x, y)
            axes.plot(marks, height_at, **{**line, "linestyle": "None", "clip_on": False})
            if np.isfinite(low).all():
                axes.fill_between(
                    x, low, high, step="post" if is_step else None, color=line["color"], alpha=0.16, linewidth=0
                )
            handles.append((Line2D([], [], **line), f" {method.name}{_legend_value(method, class_name, curve)}"))
        _curve_axes(axes, curve)
        figure.legend(
            [h for h, _ in handles], [t for _, t in handles], loc="lower left", frameon=False, handlelength=3.4,
            bbox_to_anchor=(0.02, -0.01), fontsize=9.5, labelspacing=0.25,
        )  # fmt: skip
        what = "ROC curves within the host organ" if curve == "roc" else "FROC curves"
        return _svg(figure, f"{what}, {class_name}: {'; '.join(t.strip() for _, t in handles)}")


def _line(index: int) -> dict[str, Any]:
    dashes = _DASHES[index % len(_DASHES)]
    return {
        "color": _COLORS[color_index(index)],
        "linestyle": (0, dashes) if dashes else "-",
        "linewidth": 1.6,
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 4.5,
    }


def _legend_value(method: Method, class_name: str, curve: str) -> str:
    if curve == "roc":
        value = method.pooled.get(class_name, {}).get(("host", "auroc"), float("nan"))
        return f" (area {value:.3f})" if np.isfinite(value) else ""
    cell = method.cell(class_name, ("volume", "froc_score"))
    return f" (mean {cell.value:.3f})" if cell is not None else ""


def _curve_axes(axes: Axes, curve: str) -> None:
    axes.set_ylim(0, 1.02)
    axes.grid(color=_INK, alpha=0.12, linewidth=0.6)
    if curve == "roc":
        axes.set_xlim(-0.01, 1)
        axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.7, linestyle=(0, (1, 3)))
        axes.set(xlabel="false positive rate (voxels of the host)", ylabel="true positive rate")
        return
    axes.set_xscale("log", base=2)
    axes.set_xlim(_LOWEST_RATE, FALSE_POSITIVES_PER_SCAN[-1])
    axes.set_xticks(FALSE_POSITIVES_PER_SCAN, ["⅛", "¼", "½", "1", "2", "4", "8"])
    axes.minorticks_off()
    axes.set(xlabel="false positives per scan", ylabel="sensitivity (lesions)")


def healthy_figure(methods: Sequence[Method], class_name: str, rate: float | None, matched: Key | None) -> str | None:
    """False positives per healthy scan, a row for each method: its own threshold (filled), the matched one (hollow)."""
    own = ("volume", "false_positives_per_healthy_scan")
    rows = [(i, m) for i, m in enumerate(methods) if m.cell(class_name, own)]
    if not rows:
        return None
    with mpl.rc_context(_STYLE):
        height = 0.75 + 0.42 * len(rows)
        figure = Figure(figsize=(4.3, height))
        axes = figure.add_axes((0.03, 0.5 / height, 0.94, 1 - 0.55 / height))
        told = []
        for place, (i, method) in enumerate(rows):
            for key, shift, is_filled in ((own, 0.0, True), (matched, 0.22, False)):
                cell = method.cell(class_name, key) if key is not None else None
                if cell is None:
                    continue
                color, y = _COLORS[color_index(i)], place + shift
                low, high = cell.spread()
                if np.isfinite([low, high]).all():
                    axes.plot([max(low, 0), high], [y, y], color=color, linewidth=1.4)
                axes.plot(
                    [cell.value], [y], linestyle="None", marker=_MARKERS[i % len(_MARKERS)], markersize=6.5,
                    clip_on=False, color=color, markerfacecolor=color if is_filled else "none",
                )  # fmt: skip
                told.append(f"{method.name} {'own' if is_filled else 'matched'} {cell.value:.2f}")
            axes.text(0.0, place - 0.2, method.name, transform=axes.get_yaxis_transform(), fontsize=9.5, va="bottom")
        if rate is not None:
            axes.axvline(rate, color=_INK, linewidth=0.7, linestyle=(0, (1, 3)))
        axes.set_ylim(len(rows) - 0.55, -0.75)
        axes.set_yticks([])
        axes.set_xlim(left=0, right=max(axes.get_xlim()[1], 1.05 * (rate or 0), 0.1))
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=_INK, alpha=0.12, linewidth=0.6)
        axes.set_xlabel("false positives per healthy scan")
        return _svg(figure, f"False positives per healthy scan, {class_name}: {'; '.join(told)}")


def _svg(figure: Figure, description: str) -> str:
    """Bare SVG: no XML header, no metadata, no fixed size; identifiers of its own."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": description}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = text.replace(_INK, "currentColor")
    for i, color in enumerate(_COLORS):
        text = text.replace(color, f"var(--method-{i})")
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # no reference names them, and each figure has the same
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    label = escape(description, quote=True)
    return re.sub(r"<svg [^>]*>", lambda _: f'<svg {box.group()} role="img" aria-label="{label}">', text, count=1)
