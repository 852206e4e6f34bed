"""The tables in the docs are what the code says."""

from __future__ import annotations

from pathlib import Path

from zept_nnunet.datasets.lesion_table import lesion_tables, relation
from zept_nnunet.training.anomalies import RANGES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "phantom.md"


def test_the_page_holds_the_tables_of_the_code() -> None:
    page = PAGE.read_text(encoding="utf-8")
    begin, end = page.index("<!-- tables: begin"), page.index("<!-- tables: end")
    held = page[begin:end].split("-->", 1)[1].strip()
    assert held == lesion_tables(RANGES), "run: python docs/make_phantom_page.py --tables"


def test_a_changed_range_changes_the_tables() -> None:
    assert lesion_tables(RANGES) != lesion_tables({**RANGES, "radius_mm": (4.0, 99.0, "mm")})


def test_relation() -> None:
    assert relation((1, 2, "mm"), (0, 3, "mm")) == "inside"
    assert relation((1, 4, "mm"), (0, 3, "mm")) == "overlaps"
    assert relation((4, 5, "mm"), (0, 3, "mm")) == "outside"
