"""nnU-Net's progress.png, with a line where stage II begins."""

from __future__ import annotations

from contextvars import ContextVar
from itertools import pairwise
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from nnunetv2.training.logging.nnunet_logger import LocalLogger

LABEL = "stage II"
_switch: ContextVar[int] = ContextVar("_switch")


class StagesLogger(LocalLogger):
    """nnU-Net's, whose log holds the stage of each epoch."""

    def plot_progress_png(self, output_folder: str) -> None:
        """nnU-Net's plot; the line is drawn by a hook of the figure, since nnU-Net saves and closes it."""
        switch = first_of_stage_two(self.my_fantastic_logging.get("stage", []))
        if switch is None:
            super().plot_progress_png(output_folder)
            return
        _switch.set(switch)
        with mpl.rc_context({"figure.hooks": [f"{__name__}:mark_stages"]}):
            super().plot_progress_png(output_folder)


def first_of_stage_two(stages: list[Any]) -> int | None:
    """The first epoch of stage II after one of stage I, None where there is none."""
    return next((e for e, (before, now) in enumerate(pairwise(stages), 1) if (before, now) == (1, 2)), None)


def mark_stages(figure: Figure) -> None:
    """Draw the line into every plot that `figure` will get, once where two share their epochs."""
    marked: list[Any] = []

    def mark(changed: Figure) -> None:
        for ax in changed.axes:
            if not any(ax is other or ax.get_shared_x_axes().joined(ax, other) for other in marked):
                marked.append(ax)
                ax.axvline(_switch.get() - 0.5, color="k", linestyle="--", linewidth=3, label=LABEL)

    figure.add_axobserver(mark)
