"""Does a query's embedding find its own description among many? Ranks, and a plot of queries and texts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from zept_nnunet.inference.embeddings import CaseEmbeddings

COLUMNS = ("case", "fold", "class", "seen", "candidates", "number", "rank", "nearest")


def retrieval_table(
    cases: Iterable[CaseEmbeddings],
    candidates: Mapping[str, Mapping[str, np.ndarray]],
    unseen: Collection[str],
) -> pd.DataFrame:
    """The rank of each class's own description by cosine similarity, per case and set of candidates.

    Args:
        candidates: name of the set → names of its descriptions, the model's classes among them → vector (E).
        unseen: classes that training never showed.

    Returns:
        Columns `COLUMNS`; rank 1 is the best; a class that the scan does not show has no row.
    """
    rows = []
    for case in cases:
        for kind, vectors in candidates.items():
            names = list(vectors)
            texts = _unit(np.stack([vectors[n] for n in names]))
            for name, embedding in zip(case.names, case.embeddings, strict=True):
                if not np.isfinite(embedding).all():
                    continue
                similarity = texts @ _unit(embedding[None])[0]
                own = similarity[names.index(name)]
                rank = 1 + int((similarity > own).sum())
                nearest = names[int(similarity.argmax())]
                rows.append((case.case, case.fold, name, name not in unseen, kind, len(names), rank, nearest))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """Top-1 and top-5 shares per class and for all seen and unseen ones, beside what chance would give."""
    t = table.assign(top1=table["rank"] <= 1, top5=table["rank"] <= 5)
    t["chance1"], t["chance5"] = 1 / t["number"], (5 / t["number"]).clip(upper=1)
    groups = t.assign(**{"class": np.where(t["seen"], "(seen classes)", "(unseen classes)")})
    both = pd.concat([groups, t])
    found = both.groupby(["candidates", "seen", "class"], sort=True)
    shown = found[["top1", "top5", "chance1", "chance5"]].mean()
    shown["median rank"] = found["rank"].median()
    shown["scans"] = found["case"].nunique()
    return shown.sort_index(level=["candidates", "seen", "class"], ascending=[True, False, True])


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
