"""Rewrites what `docs/phantom.md` takes from the code: the picture of slices, and the tables between the markers.

python docs/make_phantom_page.py            # both (the picture takes some minutes)
python docs/make_phantom_page.py --tables   # the tables alone
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from zept_nnunet.datasets.lesion_table import lesion_tables
from zept_nnunet.datasets.lesions import LESION_TYPES, SEEN
from zept_nnunet.datasets.phantom import LABELS, SIZES, PhantomCase, draw_phantom_case
from zept_nnunet.datasets.phantom_parameters import PHASES
from zept_nnunet.training.anomalies import RANGES

HERE = Path(__file__).resolve().parent
PAGE, PICTURE = HERE / "phantom.md", HERE / "phantom.png"
BEGIN, END = "<!-- tables: begin (docs/make_phantom_page.py) -->", "<!-- tables: end -->"
WINDOW_HU = (-175, 250)
COLUMNS = 7
SEED = 2026


def page_with_tables(page: str) -> str:
    """The page with its tables as the code has them now."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{lesion_tables(RANGES)}\n\n{END}{after}"


def draw_picture() -> Figure:
    """A row a case: each contrast phase at full size, with lesions outlined, and a healthy case of size small."""
    cases: list[tuple[str, PhantomCase]] = []
    for i, phase in enumerate(tqdm(PHASES, desc="cases", unit="case")):
        classes = [t.name for t in LESION_TYPES.values()]
        case = draw_phantom_case(SIZES["full"], classes, (SEED, 1, i), test=True, phase=phase)
        cases.append((f"full\n{phase}", case))
    cases.append(("small\nhealthy, portal", draw_phantom_case(SIZES["small"], (), (SEED, 1, 9), phase="portal")))
    figure = Figure(figsize=(2.6 * COLUMNS, 2.05 * len(cases) + 0.5), dpi=80, facecolor="black")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(cases), COLUMNS, gridspec_kw={"wspace": 0.02, "hspace": 0.02})
    for row, (title, case) in zip(axes, cases, strict=True):
        for column, (axis, z) in enumerate(zip(row, _slices(case), strict=True)):
            axis.imshow(case.image_hu[z], cmap="gray", vmin=WINDOW_HU[0], vmax=WINDOW_HU[1])
            for kind in LESION_TYPES.values():
                mask = case.labels[z] == LABELS[kind.name]
                if mask.any():
                    axis.contour(mask, [0.5], colors="#ffd60a" if kind.role == SEEN else "#ff3b5c", linewidths=0.7)
            axis.set_axis_off()
            if column == 0:
                axis.text(2, 4, title, color="white", fontsize=8, va="top")
    figure.suptitle(
        "Synthetic CT phantom with synthetic lesions, window −175 to 250 HU. Yellow: types seen in training, "
        "red: unseen. Patient's right on the left.",
        color="white",
        fontsize=11,
        y=0.995,
    )
    figure.subplots_adjust(left=0, right=1, bottom=0, top=0.96)
    return figure


def _slices(case: PhantomCase) -> np.ndarray:
    """From the dome of the liver to the lower poles of the kidneys, head first."""
    organs = np.flatnonzero((case.labels > 0).any(axis=(1, 2)))
    return np.linspace(organs[-1] - 2, organs[0] + 2, COLUMNS).round().astype(int)


def main() -> None:
    """Rewrite the tables, and the picture unless told not to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", action="store_true", help="the tables alone")
    args = parser.parse_args()
    PAGE.write_text(page_with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    if not args.tables:
        draw_picture().savefig(PICTURE, facecolor="black")


if __name__ == "__main__":
    main()
