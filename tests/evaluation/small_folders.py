"""Folders as nnU-Net and `zept predict --save_scores` leave them, small: two organs, a seen and an unseen tumor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

SHAPE = (10, 24, 26)
SPACING_MM = (3.0, 1.5, 1.5)  # Z Y X
LABELS = {"background": 0, "liver": 1, "pancreas": 2, "liver tumor": 3}
RAW_JSON = {
    "channel_names": {"0": "CT"},
    "labels": LABELS,
    "numTraining": 1,
    "file_ending": ".nii.gz",
    "zept": {"unseen": {"pancreas tumor": {"hosts": ["pancreas"], "label": 4}}},
}
PREDICTION_JSON = {  # after zept add-tumor
    **RAW_JSON,
    "labels": {**LABELS, "pancreas tumor": 4},
    "zept": {"tumors": {"pancreas tumor": {"hosts": ["pancreas"]}}},
}
PLANS = {"zept": {"taxonomy": {"tumors": [{"name": "liver tumor"}, {"name": "pancreas tumor", "added": True}]}}}
TUMORS = ("liver tumor", "pancreas tumor")


def write_labels(path: Path, array: np.ndarray, **geometry: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array.astype(np.uint8))
    image.SetSpacing(geometry.get("spacing", SPACING_MM)[::-1])
    image.SetOrigin(geometry.get("origin", (10.0, -20.0, 30.0)))
    image.SetDirection(geometry.get("direction", (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    sitk.WriteImage(image, str(path))


def draw_reference(seed: int, tumors: tuple[str, ...] = TUMORS) -> np.ndarray:
    """(Z, Y, X): a liver and a pancreas, with one or two boxes of each tumor."""
    rng = np.random.default_rng([1, seed])
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[1:9, 2:22, 1:14] = 1
    labels[1:9, 2:22, 15:25] = 2
    for name, value, low_x, high_x in (("liver tumor", 3, 2, 10), ("pancreas tumor", 4, 16, 22)):
        for y in (3, 13)[: int(rng.integers(1, 3))] if name in tumors else ():
            z, x = int(rng.integers(2, 5)), int(rng.integers(low_x, high_x))
            labels[z : z + 3, y : y + 5, x : x + 3] = value
    return labels


def draw_prediction(reference: np.ndarray, seed: int, quality: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """A noisy segmentation (Z, Y, X), and scores float16 (2, Z, Y, X) of which it is the one above 0."""
    rng = np.random.default_rng([2, seed])
    labels = np.where(np.isin(reference, (2, 4)), 2, np.where(reference > 0, 1, 0)).astype(np.uint8)
    scores = []
    for value, host in ((3, 1), (4, 2)):
        score = rng.normal(size=SHAPE) - 2.6 + quality * (reference == value) + (labels == host)
        scores.append(np.where(labels == 0, -1000, np.round(score, 1)).astype(np.float16))
        labels[(scores[-1] > 0) & (labels == host)] = value
    return labels, np.stack(scores)


def write_predictions(
    folder: Path, references: dict[str, np.ndarray], seed: int = 0, quality: float = 2.0, scores: bool = True
) -> Path:
    """Segmentations, scores, dataset.json and plans.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(PREDICTION_JSON))
    (folder / "plans.json").write_text(json.dumps(PLANS))
    for index, (case, reference) in enumerate(references.items()):
        labels, logits = draw_prediction(reference, 100 * seed + index, quality)
        write_labels(folder / f"{case}.nii.gz", labels)
        if scores:
            write_scores(folder / f"{case}_scores.npz", logits)
    return folder


def write_scores(path: Path, logits: np.ndarray, classes: tuple[str, ...] = TUMORS) -> None:
    np.savez_compressed(path, logits=logits, classes=np.array(classes, dtype=np.str_))


def write_references(folder: Path, references: dict[str, np.ndarray]) -> Path:
    for case, array in references.items():
        write_labels(folder / f"{case}.nii.gz", array)
    return folder


def draw_references(healthy: int = 2, with_tumors: int = 3) -> dict[str, np.ndarray]:
    cases = {f"case_{i:03d}": draw_reference(i) for i in range(with_tumors)}
    return cases | {f"healthy_{i:03d}": draw_reference(50 + i, ()) for i in range(healthy)}
