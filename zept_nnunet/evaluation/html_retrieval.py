"""What `zept knowledge retrieve` found, for the page that compares methods."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

import pandas as pd  # type: ignore[import-untyped]

from zept_nnunet.errors import ZePTError
from zept_nnunet.evaluation.retrieval import COUNTS, SUMMARY_COLUMNS

_WANTED = ("candidates", "seen", "class", *SUMMARY_COLUMNS)


@dataclass(frozen=True)
class Row:
    """One class, or all seen or unseen ones together; cells in the order of `SUMMARY_COLUMNS`."""

    name: str
    seen: bool
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Retrieval:
    """One folder's table, by set of candidates, and its plot, PNG in base64; None: there is none."""

    name: str
    groups: tuple[tuple[str, tuple[Row, ...]], ...]
    plot: str | None


def read_retrieval(folder: Path) -> Retrieval:
    """Read summary.csv and embeddings.png.

    Raises:
        ZePTError: the folder is not one that the command wrote.
    """
    path = folder / "summary.csv"
    if not path.is_file():
        raise ZePTError(
            f"--retrieval {folder} holds no summary.csv; give a folder that zept knowledge retrieve -o wrote"
        )
    try:
        table = pd.read_csv(path)
        missing = [c for c in _WANTED if c not in table.columns]
        if missing:
            raise ValueError(f"no column {', '.join(missing)}")
        numbers = table[[*SUMMARY_COLUMNS]].astype(float)
        table[list(numbers)] = numbers
    except (ValueError, UnicodeDecodeError) as error:  # pandas' parser errors are of the first kind
        raise ZePTError(f"{path} cannot be read: {error}. Run zept knowledge retrieve again") from error
    groups = tuple(
        (str(name), tuple(_row(values) for _, values in rows.iterrows()))
        for name, rows in table.groupby("candidates", sort=False)
    )
    plot = folder / "embeddings.png"
    png = base64.b64encode(plot.read_bytes()).decode("ascii") if plot.is_file() else None
    return Retrieval(folder.resolve().name, groups, png)


def _row(values: pd.Series) -> Row:
    return Row(str(values["class"]), bool(values["seen"]), tuple(_cell(c, values[c]) for c in SUMMARY_COLUMNS))


def _cell(column: str, value: float) -> str:
    if pd.isna(value):
        return "–"
    return f"{value:.0f}" if column in COUNTS else f"{value:.1f}" if column == "median rank" else f"{value:.3f}"
