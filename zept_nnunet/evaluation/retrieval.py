"""Does a query's embedding find its own description among many? Ranks, and a plot of queries and texts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from zept_nnunet.inference.embeddings import CaseEmbeddings

COLUMNS = ("case", "fold", "class", "seen", "candidates", "number", "rank", "nearest")
SUMMARY_COLUMNS = {  # of summary.csv, and their titles
    "top1": "Top-1",
    "top5": "Top-5",
    "chance1": "Top-1 by chance",
    "chance5": "Top-5 by chance",
    "swapped1": "Top-1, swapped",
    "swapped5": "Top-5, swapped",
    "blank1": "Top-1, blank images",
    "blank5": "Top-5, blank images",
    "median rank": "Median rank",
    "embeddings": "Embeddings",
    "scans": "Scans",
    "blank embeddings": "Embeddings of blank images",
    "blank images": "Asked of blank images",
}
COUNTS = ("embeddings", "scans", "blank embeddings", "blank images")
CONTROLS = (
    "Chance: a guess among the candidates. Swapped: the embedding of another class of the same scan in place of the "
    "class's own. Blank images: patches of one intensity; a class that the model does not find there is not retrieved. "
    "What a model sees is what its figures exceed these by."
)


def retrieval_table(
    cases: Iterable[CaseEmbeddings],
    candidates: Mapping[str, Mapping[str, np.ndarray]],
    unseen: Collection[str],
    keep_missing: bool = False,
) -> pd.DataFrame:
    """The rank of each class's own description by cosine similarity, per case and set of candidates.

    Args:
        candidates: name of the set → names of its descriptions, the model's classes among them → vector (E).
        unseen: classes that training never showed.
        keep_missing: a row with a rank of NaN for classes that the model does not find in a scan; else none.

    Returns:
        Columns `COLUMNS`; rank 1 is the best.
    """
    rows = []
    texts = {kind: _unit(np.stack([*vectors.values()])) for kind, vectors in candidates.items()}
    for case in cases:
        is_found = np.isfinite(case.embeddings).all(1)
        embeddings = _unit(np.where(is_found[:, None], case.embeddings, 0.0))
        for kind, vectors in candidates.items():
            names = list(vectors)
            similarity = texts[kind] @ embeddings.T
            for i, name in enumerate(case.names):
                if not is_found[i] and not keep_missing:
                    continue
                rank, nearest = float("nan"), ""
                if is_found[i]:
                    rank = 1 + int((similarity[:, i] > similarity[names.index(name), i]).sum())
                    nearest = names[int(similarity[:, i].argmax())]
                rows.append((case.case, case.fold, name, name not in unseen, kind, len(names), rank, nearest))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def swapped(cases: Iterable[CaseEmbeddings]) -> Iterator[CaseEmbeddings]:
    """Each scan with the embeddings of other classes in place of the classes' own, up to ten times.

    What is retrieved from these is what the descriptions' geometry gives away.
    """
    for case in cases:
        found = np.flatnonzero(np.isfinite(case.embeddings).all(1))
        last = len(found) - 1
        for shift in np.unique(np.linspace(1, last, min(last, 10)).round().astype(int)) if last > 0 else ():
            embeddings = np.full_like(case.embeddings, np.nan)
            embeddings[found] = case.embeddings[np.roll(found, shift)]
            yield replace(case, embeddings=embeddings)


def summarize(
    table: pd.DataFrame, swapped_table: pd.DataFrame | None = None, blank_table: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Top-1 and top-5 shares per class and for all seen and unseen ones, beside controls.

    Args:
        table: of the scans.
        swapped_table: of embeddings swapped between the classes of a scan.
        blank_table: of images that show nothing, missing ones kept: these count as not retrieved.

    Returns:
        Columns of `SUMMARY_COLUMNS`: what the scans give, chance, and the controls.
    """
    found = _grouped(table)
    shown = found[["top1", "top5", "chance1", "chance5"]].mean()
    shown["median rank"] = found["rank"].median()
    shown["embeddings"], shown["scans"] = found["rank"].count(), found["case"].nunique()
    for name, control in (("swapped", swapped_table), ("blank", blank_table)):
        if control is None:
            continue
        found = _grouped(control)
        means = found[["top1", "top5", "chance1", "chance5"]].mean()
        if name == "blank":  # every class has a row there
            shown = shown.reindex(shown.index.union(means.index))
            shown = shown.fillna({"embeddings": 0, "scans": 0}).combine_first(means[["chance1", "chance5"]])
            shown["blank embeddings"], shown["blank images"] = found["rank"].count(), found["rank"].size()
        shown[f"{name}1"], shown[f"{name}5"] = means["top1"], means["top5"]
    counts = [c for c in SUMMARY_COLUMNS if c in shown and c in COUNTS]
    shown = shown.astype(dict.fromkeys(counts, int))[[c for c in SUMMARY_COLUMNS if c in shown]]
    return shown.sort_index(level=["candidates", "seen", "class"], ascending=[True, False, True])


def _grouped(table: pd.DataFrame) -> Any:
    """By class, and all seen and all unseen ones together."""
    t = table.assign(top1=table["rank"] <= 1, top5=table["rank"] <= 5)
    t["chance1"], t["chance5"] = 1 / t["number"], (5 / t["number"]).clip(upper=1)
    groups = t.assign(**{"class": np.where(t["seen"], "(seen classes)", "(unseen classes)")})
    return pd.concat([groups, t]).groupby(["candidates", "seen", "class"], sort=True)


def plot_embeddings(
    cases: Collection[CaseEmbeddings], texts: Mapping[str, np.ndarray], unseen: Collection[str], path: Path
) -> None:
    """Queries of all scans and the descriptions of the model's classes on the two main axes of the descriptions.

    Nothing is drawn of a model with fewer than three classes.
    """
    from matplotlib.figure import Figure
    from sklearn.decomposition import PCA  # type: ignore[import-untyped]

    names = [n for n in next(iter(cases)).names if n in texts]
    vectors = _unit(np.stack([texts[n] for n in names]))
    if len(names) < 3:  # two axes want three points
        return
    pca = PCA(2).fit(vectors)
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.add_subplot()
    for i, name in enumerate(names):
        color = f"C{i % 10}"
        marker = "^" if name in unseen else "o"
        points = np.stack([c.embeddings[c.names.index(name)] for c in cases])
        points = points[np.isfinite(points).all(1)]
        if len(points):
            x, y = pca.transform(_unit(points)).T
            axes.scatter(x, y, s=14, alpha=0.5, color=color, marker=marker, linewidths=0)
        x, y = pca.transform(vectors[i : i + 1])[0]
        axes.scatter(x, y, s=110, color=color, marker="*", edgecolors="black", linewidths=0.6)
        axes.annotate(
            name + (" (unseen)" if name in unseen else ""), (x, y), (4, 4), textcoords="offset points", fontsize=8
        )
    axes.set_title("★ description   ● query of a scan   ▲ query of an unseen tumor", fontsize=10)
    axes.set_xlabel(f"main axis of the descriptions ({pca.explained_variance_ratio_[0]:.0%} of their variance)")
    axes.set_ylabel(f"second axis ({pca.explained_variance_ratio_[1]:.0%})")
    figure.savefig(path, dpi=110)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True).clip(1e-12))
