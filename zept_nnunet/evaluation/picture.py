"""A picture of predictions: for each tumor the slice where its reference is largest, and the prediction beside it.

Works on folders in nnU-Net's layout, and reads nothing but images: which classes there are, and which of them were
unseen in training, the caller says.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from zept_nnunet.errors import ZePTError

WINDOW_HU = (-160.0, 240.0)
ORGAN_OPACITY, TUMOR_OPACITY = 0.5, 0.8
ORGAN_COLORS = ("#2563eb", "#22c55e", "#06b6d4", "#a78bfa", "#84cc16", "#0f766e", "#93c5fd", "#6b7280")
SEEN_COLORS = ("#ffd60a", "#ff8c00", "#ff4d9d", "#ffe9a8", "#c8553d")
UNSEEN_COLORS = ("#ff0033", "#d000ff", "#ff00aa", "#8b0000")


@dataclass(frozen=True)
class TumorSlice:
    """One row of the picture: an axial slice (Y, X) of one case.

    Attributes:
        tumor: the class that the slice was chosen for.
        case: the case's identifier.
        index: number of the slice, from the foot of the volume.
        image_hu, reference, prediction: (Y, X).
        dice: of the tumor in the whole case; NaN where neither file holds it.
        spacing_mm: pixel size (Y, X).
    """

    tumor: str
    case: str
    index: int
    image_hu: np.ndarray
    reference: np.ndarray
    prediction: np.ndarray
    dice: float
    spacing_mm: tuple[float, float]


def largest_tumor_slices(
    images: str | os.PathLike[str],
    references: str | os.PathLike[str],
    predictions: str | os.PathLike[str],
    tumors: Mapping[str, int],
    file_ending: str = ".nii.gz",
) -> list[TumorSlice]:
    """For each tumor (name to label value) the axial slice of all cases in which its reference has most voxels.

    A tumor that no reference holds has no row.

    Raises:
        ZePTError: where a folder holds no case, or a prediction or image is missing or has another size.
    """
    files = sorted(Path(references).glob(f"*{file_ending}"))
    if not files:
        raise ZePTError(f"Wanted references named CASE{file_ending} in {references}; found none.")
    best: dict[str, tuple[int, TumorSlice]] = {}
    for file in files:
        case = file.name[: -len(file_ending)]
        reference, spacing_mm = _read(file)
        image, _ = _read(Path(images) / f"{case}_0000{file_ending}", like=reference)
        prediction, _ = _read(Path(predictions) / file.name, like=reference)
        for tumor, value in tumors.items():
            area = (reference == value).sum(axis=(1, 2))  # (Z,)
            index = int(area.argmax())
            if area[index] > best.get(tumor, (0, None))[0]:
                dice = _dice(reference == value, prediction == value)
                arrays = (image[index], reference[index], prediction[index])
                best[tumor] = (int(area[index]), TumorSlice(tumor, case, index, *arrays, dice, spacing_mm[1:]))
    return [best[tumor][1] for tumor in tumors if tumor in best]


def draw_picture(
    rows: Sequence[TumorSlice],
    classes: Mapping[str, int],
    unseen: Collection[str],
    output: str | os.PathLike[str],
    *,
    title: str,
) -> None:
    """Draw one row a tumor: CT, CT with the reference, CT with the prediction, and a legend; write a PNG.

    Args:
        rows: from ``largest_tumor_slices``.
        classes: name to label value, background left out.
        unseen: names of the classes that no training label held; they get their own colors and a hatched legend entry.
        output: the PNG; its folder exists.
        title: of the whole picture.

    Raises:
        ZePTError: where there is no row to draw.
    """
    if not rows:
        raise ZePTError(f"Nothing to draw in {output}: no reference holds a tumor. Choose cases that hold one.")
    tumors = {row.tumor for row in rows}
    colors = _class_colors(classes, tumors, unseen)
    heights = [row.image_hu.shape[0] * row.spacing_mm[0] / (row.image_hu.shape[1] * row.spacing_mm[1]) for row in rows]
    figure = Figure(
        figsize=(11, sum(3.5 * height + 0.3 for height in heights) + 1.2), facecolor="white", layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        seen = "UNSEEN in training" if row.tumor in unseen else "seen in training"
        panels: tuple[tuple[str, np.ndarray | None], ...] = (
            (f"{row.case}, slice {row.index}", None),
            ("reference", row.reference),
            (f"prediction (Dice of {row.tumor} {row.dice:.2f})", row.prediction),
        )
        for axis, (name, labels) in zip(line, panels, strict=True):
            _draw_panel(axis, row, labels, classes, colors, tumors)
            axis.set_title(name, fontsize=9)
        color = "#c00020" if row.tumor in unseen else "black"
        line[0].set_ylabel(f"{row.tumor}\n({seen})", fontsize=10, color=color, fontweight="bold")
    handles = [
        Patch(
            facecolor=colors[name] if name in tumors or name in unseen else _over_tissue(colors[name]),
            edgecolor="black",
            hatch="///" if name in unseen else "",
            label=f"{name} (unseen)" if name in unseen else f"{name} (seen)" if name in tumors else name,
        )
        for name in classes
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=12)
    figure.savefig(output, dpi=130)


def _draw_panel(
    axis: Axes,
    row: TumorSlice,
    labels: np.ndarray | None,
    classes: Mapping[str, int],
    colors: Mapping[str, tuple[float, float, float]],
    tumors: Collection[str],
) -> None:
    low, high = WINDOW_HU
    gray = np.clip((row.image_hu.astype(float) - low) / (high - low), 0, 1)
    pixels = np.repeat(gray[..., None], 3, axis=-1)  # (Y, X, RGB)
    if labels is not None:
        for name, value in classes.items():
            opacity = TUMOR_OPACITY if name in tumors else ORGAN_OPACITY
            mask = labels == value
            pixels[mask] = (1 - opacity) * pixels[mask] + opacity * np.asarray(colors[name])
    axis.imshow(pixels, aspect=row.spacing_mm[0] / row.spacing_mm[1], interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])


def _over_tissue(color: tuple[float, float, float]) -> tuple[float, float, float]:
    """What an organ's color looks like in the picture, over the gray of soft tissue."""
    red, green, blue = (ORGAN_OPACITY * part + (1 - ORGAN_OPACITY) * 0.6 for part in color)
    return red, green, blue


def _class_colors(
    classes: Mapping[str, int], tumors: Collection[str], unseen: Collection[str]
) -> dict[str, tuple[float, float, float]]:
    """Cool colors for organs, warm ones for seen tumors, reds and magentas for unseen ones."""
    colors: dict[str, tuple[float, float, float]] = {}
    for palette, names in (
        (ORGAN_COLORS, [name for name in classes if name not in tumors and name not in unseen]),
        (SEEN_COLORS, [name for name in classes if name in tumors and name not in unseen]),
        (UNSEEN_COLORS, [name for name in classes if name in unseen]),
    ):
        for number, name in enumerate(names):
            colors[name] = to_rgb(palette[number % len(palette)])
    return colors


def _read(path: Path, like: np.ndarray | None = None) -> tuple[np.ndarray, tuple[float, float, float]]:
    """(Z, Y, X) array and spacing in mm in the same order; checked against the size of ``like``."""
    if not path.is_file():
        raise ZePTError(f"Wanted an image at {path}; there is none. Predict every case of the reference folder first.")
    image = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(image)
    if like is not None and array.shape != like.shape:
        raise ZePTError(f"{path} has {array.shape} voxels, its reference {like.shape}. They must be the same case.")
    x, y, z = image.GetSpacing()
    return array, (z, y, x)


def _dice(reference: np.ndarray, prediction: np.ndarray) -> float:
    total = int(reference.sum()) + int(prediction.sum())
    return 2 * int((reference & prediction).sum()) / total if total else float("nan")
