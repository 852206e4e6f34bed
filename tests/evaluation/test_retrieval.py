from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from zept_nnunet.evaluation.retrieval import SUMMARY_COLUMNS, plot_embeddings, retrieval_table, summarize, swapped
from zept_nnunet.inference.embeddings import CaseEmbeddings

NAMES = ("liver", "spleen", "odd tumor")
TEXTS = dict(zip(NAMES, np.eye(4), strict=False))
UNSEEN = ("odd tumor",)


def case(name: str, *rows: list[float]) -> CaseEmbeddings:
    return CaseEmbeddings(name, "0", NAMES, np.array(rows, dtype=np.float32))


CASES = [
    case("a", [9, 1, 0, 0], [0, 2, 0, 0], [3, 2, 1, 0]),  # the tumor's own text is third
    case("b", [1, 2, 0, 0], [np.nan] * 4, [0, 0, 0.1, 0]),  # no spleen; the liver's is second
]


def test_ranks_worked_out_by_hand() -> None:
    table = retrieval_table(CASES, {"own": TEXTS}, UNSEEN)
    found = {(r["case"], r["class"]): (r["rank"], r["nearest"], r["seen"], r["number"]) for _, r in table.iterrows()}
    assert found == {
        ("a", "liver"): (1, "liver", True, 3),
        ("a", "spleen"): (1, "spleen", True, 3),
        ("a", "odd tumor"): (3, "liver", False, 3),
        ("b", "liver"): (2, "spleen", True, 3),
        ("b", "odd tumor"): (1, "odd tumor", False, 3),
    }


def test_length_does_not_count() -> None:
    longer = {name: vector * (100 if name == "spleen" else 1) for name, vector in TEXTS.items()}
    assert retrieval_table(CASES, {"own": TEXTS}, UNSEEN).equals(retrieval_table(CASES, {"own": longer}, UNSEEN))


def test_summary() -> None:
    more = TEXTS | {f"other {i}": np.array([1.0, 1.0, 1.0, i]) for i in range(17)}
    shown = summarize(retrieval_table(CASES, {"own": TEXTS, "all": more}, UNSEEN)).reset_index()
    seen = shown[(shown["candidates"] == "own") & (shown["class"] == "(seen classes)")].iloc[0]
    assert seen["top1"] == pytest.approx(2 / 3) and seen["top5"] == 1 and seen["chance1"] == pytest.approx(1 / 3)
    assert seen["chance5"] == 1 and seen["scans"] == 2
    of_all = shown[(shown["candidates"] == "all") & (shown["class"] == "odd tumor")].iloc[0]
    assert of_all["chance5"] == pytest.approx(0.25) and of_all["top1"] == 0.5 and not of_all["seen"]


def test_controls_worked_out_by_hand() -> None:
    """Case a: liver, spleen and tumor with each other's embeddings; case b: liver and tumor."""
    both = list(swapped(CASES))
    assert [c.case for c in both] == ["a", "a", "b"]
    np.testing.assert_array_equal(both[0].embeddings, CASES[0].embeddings[[2, 0, 1]])
    np.testing.assert_array_equal(both[2].embeddings[[0, 2]], CASES[1].embeddings[[2, 0]])
    assert np.isnan(both[2].embeddings[1]).all()
    blank = [case("x", [1, 0, 0, 0], *[[np.nan] * 4] * 2), case("y", *[[np.nan] * 4] * 3)]
    tables = (
        retrieval_table(CASES, {"own": TEXTS}, UNSEEN),
        retrieval_table(both, {"own": TEXTS}, UNSEEN),
        retrieval_table(blank, {"own": TEXTS}, UNSEEN, keep_missing=True),
    )
    shown = summarize(*tables).loc["own"].droplevel("seen")
    assert list(shown.columns) == list(SUMMARY_COLUMNS)
    # liver: by [3 2 1] first, by [0 2 0] and [0 0 .1] not; spleen: by [9 1 0] and [3 2 1] second; tumor: never
    assert shown["swapped1"].to_dict() == pytest.approx(
        {"liver": 1 / 3, "spleen": 0, "odd tumor": 0, "(seen classes)": 1 / 5, "(unseen classes)": 0}
    )
    assert shown["blank1"].to_dict() == pytest.approx(
        {"liver": 1 / 2, "spleen": 0, "odd tumor": 0, "(seen classes)": 1 / 4, "(unseen classes)": 0}
    )
    assert shown.loc["(seen classes)", ["blank embeddings", "blank images", "embeddings"]].tolist() == [1, 4, 3]


def test_a_class_that_no_scan_shows_has_a_row_beside_blank_images() -> None:
    seen = [case("a", [9, 1, 0, 0], [0, 2, 0, 0], [np.nan] * 4)]
    blank = retrieval_table(seen, {"own": TEXTS}, UNSEEN, keep_missing=True)
    shown = summarize(retrieval_table(seen, {"own": TEXTS}, UNSEEN), None, blank).loc["own", False, "odd tumor"]
    assert shown["embeddings"] == shown["scans"] == shown["blank embeddings"] == 0
    assert np.isnan(shown["top1"]) and shown["chance1"] == pytest.approx(1 / 3)


def test_many_classes_are_swapped_ten_times() -> None:
    names = tuple(f"class {i}" for i in range(40))
    many = CaseEmbeddings("a", "0", names, np.eye(40, dtype=np.float32))
    found = list(swapped([many]))
    assert len(found) == 10 and not any((c.embeddings.argmax(1) == np.arange(40)).any() for c in found)
    assert not list(swapped([case("b", [1, 0, 0, 0], *[[np.nan] * 4] * 2)]))


def test_plot(tmp_path: Path) -> None:
    plot_embeddings(CASES, TEXTS, UNSEEN, tmp_path / "e.png")
    assert (tmp_path / "e.png").stat().st_size > 10_000
