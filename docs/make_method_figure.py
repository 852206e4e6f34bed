"""Draws docs/method.svg: the network's data flow, stage I and stage II.

python docs/make_method_figure.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

PICTURE = Path(__file__).resolve().parent / "method.svg"
GRAY, BLUE, ORANGE, GREEN = "#e6e6e6", "#cfe2f3", "#fce0c3", "#d9ead3"
# name → x, y of the middle, width, height, text, color
BOXES = {
    "image": (1.0, 5.0, 1.5, 0.9, "CT patch", GRAY),
    "unet": (3.4, 5.0, 2.0, 0.9, "nnU-Net's encoder\nand decoder", GRAY),
    "features": (6.1, 5.0, 2.0, 0.9, "features F$^l$,\ncoarse to fine", GRAY),
    "organ text": (1.0, 7.6, 1.7, 0.9, "descriptions\nof organs", GREEN),
    "tumor text": (1.0, 2.2, 1.7, 0.9, "descriptions\nof tumors", GREEN),
    "q": (3.4, 7.6, 2.0, 0.9, "organ queries (MLP)\n+ background", BLUE),
    "t": (3.4, 2.2, 2.0, 0.9, "tumor queries\n(MLP)", ORANGE),
    "grouping": (6.1, 7.6, 2.0, 0.9, "grouping,\none block a scale", BLUE),
    "organ maps": (9.0, 7.6, 2.2, 0.9, "organ maps:\nsupport u, healthy h", BLUE),
    "score": (9.0, 5.0, 2.2, 0.9, "score: deviation\nfrom the own organ", ORANGE),
    "advanced": (6.1, 2.2, 2.0, 0.9, "masked attention,\n4 layers", ORANGE),
    "tumor maps": (9.0, 2.2, 2.2, 0.9, "evidence a\nper tumor", ORANGE),
    "gate": (11.9, 2.2, 2.2, 0.9, "tumor maps\nσ(u)·σ(a)", ORANGE),
    "output": (14.6, 5.0, 1.7, 0.9, "nnU-Net's\nchannels", GRAY),
    "alignment": (9.0, 0.3, 2.4, 0.8, "query–knowledge\nalignment", GREEN),
}
# from, to, text, bend
ARROWS = (
    ("image", "unet", "", 0.0),
    ("unet", "features", "", 0.0),
    ("organ text", "q", "", 0.0),
    ("tumor text", "t", "", 0.0),
    ("q", "t", "", 0.5),
    ("q", "grouping", "", 0.0),
    ("features", "grouping", "", 0.0),
    ("features", "advanced", "", 0.0),
    ("grouping", "organ maps", "", 0.0),
    ("organ maps", "score", "where", 0.0),
    ("features", "score", "", 0.0),
    ("score", "advanced", "visual prompts", 0.0),
    ("score", "gate", "evidence", 0.0),
    ("t", "advanced", "", 0.0),
    ("advanced", "tumor maps", "", 0.0),
    ("tumor maps", "gate", "", 0.0),
    ("organ maps", "output", "healthy h", -0.2),
    ("gate", "output", "", 0.15),
    ("tumor maps", "alignment", "features where it is", 0.0),
)


def draw() -> Figure:
    """The figure; stage I in blue, stage II in orange, text in green."""
    figure = Figure(figsize=(11.5, 6.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlim(-0.1, 15.6)
    axes.set_ylim(-0.2, 8.7)
    axes.axis("off")
    patches = {}
    for name, (x, y, width, height, text, color) in BOXES.items():
        style = "round,pad=0.05"
        patch = FancyBboxPatch((x - width / 2, y - height / 2), width, height, boxstyle=style, fc=color, ec="#555555")
        patches[name] = axes.add_patch(patch)
        axes.text(x, y, text, ha="center", va="center", fontsize=9)
    for start, end, text, bend in ARROWS:
        (x0, y0), (x1, y1) = BOXES[start][:2], BOXES[end][:2]
        axes.add_patch(
            FancyArrowPatch(
                (x0, y0), (x1, y1), patchA=patches[start], patchB=patches[end], arrowstyle="-|>", mutation_scale=11,
                color="#555555", connectionstyle=f"arc3,rad={bend}", shrinkA=2, shrinkB=2,
            )
        )  # fmt: skip
        if text:
            # an arc bends to the side of its direction by rad times half of its length
            x, y = (x0 + x1) / 2 + bend * (y1 - y0) / 2, (y0 + y1) / 2 - bend * (x1 - x0) / 2
            axes.text(x, y, text, ha="center", va="center", fontsize=8, bbox={"fc": "white", "ec": "none", "pad": 0.8})
    axes.text(2.05, 6.35, "hosts", ha="right", va="center", fontsize=8)
    legend = "blue: stage I    orange: stage II    green: descriptions and their alignment    gray: nnU-Net"
    axes.text(15.4, 0.3, legend, ha="right", va="center", fontsize=8)
    return figure


if __name__ == "__main__":
    mpl.rcParams["svg.hashsalt"] = "zept"  # equal bytes whenever it is drawn
    figure = draw()
    FigureCanvasSVG(figure).print_svg(str(PICTURE), metadata={"Date": None})
    print(PICTURE)
