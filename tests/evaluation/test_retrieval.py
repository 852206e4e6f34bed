from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from zept_nnunet.evaluation.retrieval import plot_embeddings, retrieval_table, summarize
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


def test_plot(tmp_path: Path) -> None:
    plot_embeddings(CASES, TEXTS, UNSEEN, tmp_path / "e.png")
    assert (tmp_path / "e.png").stat().st_size > 10_000
