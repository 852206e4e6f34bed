"""The hand-over of the stages in progress.png."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from zept_nnunet.training.progress import LABEL, StagesLogger, first_of_stage_two


@pytest.mark.parametrize(
    ("stages", "first"),
    [([1, 1, 2, 2], 2), ([1, 2], 1), ([2, 2], None), ([1, 1], None), ([], None), ([0.0, 2], None)],
)
def test_first_epoch_of_stage_two(stages: list[int], first: int | None) -> None:
    assert first_of_stage_two(stages) == first


@pytest.mark.parametrize(("stages", "at"), [([1, 1, 2, 2, 2], 1.5), ([2, 2, 2, 2, 2], None)])
def test_every_plot_holds_a_line_where_stage_two_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: list[int], at: float | None
) -> None:
    saved: list[tuple[Figure, str]] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: saved.append((figure, path)))
    hooks = list(plt.rcParams["figure.hooks"])
    logger = StagesLogger()
    log = logger.my_fantastic_logging
    for key in log:
        log[key] = [0.1 * epoch for epoch in range(len(stages))]
    log["stage"] = stages
    logger.plot_progress_png(str(tmp_path))
    ((figure, path),) = saved
    assert path == str(tmp_path / "progress.png")
    lines = [line for ax in figure.axes for line in ax.get_lines() if line.get_label() == LABEL]
    assert len(figure.axes) == 4 and len(lines) == (0 if at is None else 3)  # two axes share the epochs
    assert len({line.axes for line in lines}) == len(lines)
    assert all(line.get_xdata()[0] == at for line in lines)
    assert plt.rcParams["figure.hooks"] == hooks  # other figures get none
