"""Cases for a comparison page: which ones, and the slice of each as image, reference, predictions, anomaly score."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import SimpleITK as sitk
from matplotlib.image import imsave
from scipy import ndimage  # type: ignore[import-untyped]

from zept_nnunet.errors import ZePTError
from zept_nnunet.evaluation.classes import FILE_ENDINGS
from zept_nnunet.evaluation.html_methods import Method, TumorClass

# One for each class of the page: Okabe and Ito's, told apart by the color-blind
CLASS_COLORS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167), (240, 228, 66), (213, 94, 0))
WINDOW_HU = (-160.0, 240.0)
SCORE_LIMIT = 4.0  # log-odds at which the anomaly map is fully dark or bright
_SCORE_COLORS = "inferno"
_OPACITY = 0.55
_WIDTH = 384  # pixels of a panel, at least


@dataclass(frozen=True)
class Folders:
    """Where references and images stand, how the images are named, and whether they are CT."""

    references: Path
    images: Path
    file_ending: str
    is_ct: bool

    @classmethod
    def find(cls, references: Path, images: Path, dataset_json: Mapping[str, Any]) -> Folders:
        """Take the file ending from the references.

        Raises:
            ZePTError: a folder is missing, or holds no file that can be read.
        """
        for folder in (references, images):
            if not folder.is_dir():
                raise ZePTError(f"{folder} is no folder; with -d both labelsTs and imagesTs of the dataset are wanted")
        for ending in FILE_ENDINGS:
            if any(references.glob(f"*{ending}")):
                channel = str((dataset_json.get("channel_names") or {}).get("0", "CT"))
                return cls(references, images, ending, channel.upper() == "CT")
        raise ZePTError(f"{references} holds no reference named CASE + one of {list(FILE_ENDINGS)}")


@dataclass(frozen=True)
class Choice:
    """A case to show, why, and the class whose largest slice is shown (None: a healthy scan)."""

    case: str
    reason: str
    class_name: str | None


@dataclass
class CaseVolumes:
    """One case, all arrays (Z, Y, X) in LPS; label maps hold 1 + index of a shown class, else 0."""

    case: str
    image: np.ndarray  # 0 … 1
    reference: np.ndarray
    predictions: dict[str, np.ndarray] = field(default_factory=dict)
    anomaly: dict[str, np.ndarray] = field(default_factory=dict)  # method → 0 … 1
    prompts: dict[str, np.ndarray] = field(default_factory=dict)
    like: Any = None
    """The SimpleITK image that all of them have the geometry of."""


@dataclass(frozen=True)
class Panel:
    """A picture: PNG in base64, and what it shows."""

    title: str
    png: str
    alt: str


# ---------------------------------------------------------------------------------------------------- choice
def choose_cases(
    methods: Sequence[Method], classes: Sequence[TumorClass], wanted: Sequence[str] | None, folders: Folders
) -> list[Choice]:
    """Those wanted; else for each class the case with the highest and the lowest Dice, and one healthy scan.

    Dice and false positives are those of the first method that has a folder of predictions.

    Raises:
        ZePTError: a wanted case was not evaluated.
    """
    judge = next(m for m in methods if m.predictions is not None)
    assert judge.summary is not None
    cases = list(judge.summary["cases"])
    if wanted is not None:
        unknown = [case for case in wanted if case not in cases]
        if unknown:
            raise ZePTError(f"--cases: {unknown[0]!r} was not evaluated; there are {cases[0]} … {cases[-1]}")
        return [_describe_wanted(case, classes, folders) for case in wanted]
    found = []
    dice = judge.case_values("dsc")
    for c in classes:
        ordered = [] if c.name not in dice else [str(case) for case in dice[c.name].dropna().sort_values().index]
        for place, reason in ((-1, "highest"), (0, "lowest"))[: len(ordered)]:
            found.append(Choice(ordered[place], f"{c.name}: {reason} Dice of all cases, {judge.name}", c.name))
    healthy = _healthy_scan(judge, classes, folders)
    return found + ([] if healthy is None else [healthy])


def _describe_wanted(case: str, classes: Sequence[TumorClass], folders: Folders) -> Choice:
    reference = sitk.GetArrayFromImage(_read(folders.references / (case + folders.file_ending)))
    counts = {c.name: int(np.isin(reference, c.reference_values).sum()) for c in classes}
    largest = max(counts, key=counts.__getitem__)
    return Choice(case, largest, largest) if counts[largest] else Choice(case, "none of the tumors of this page", None)


def _healthy_scan(judge: Method, classes: Sequence[TumorClass], folders: Folders) -> Choice | None:
    """Of the scans without any tumor the one in which the judge reports most lesions of the shown classes."""
    assert judge.summary is not None
    recall, false = judge.case_values("lesion_recall"), judge.case_values("false_positives")
    every = [n for n, c in judge.summary["classes"].items() if c["role"] == "tumor"]
    values = {v for n in every for v in judge.summary["classes"][n]["reference_values"]}
    shown = [c.name for c in classes if c.name in false]
    none = recall[[n for n in every if n in recall]].isna().all(axis=1) & false[shown].notna().any(axis=1)
    counts = false.loc[none, shown].sum(axis=1).sort_values(ascending=False, kind="stable")
    for case, count in counts.items():
        reference = sitk.GetArrayFromImage(_read(folders.references / f"{case}{folders.file_ending}"))
        if not values & set(np.unique(reference).tolist()):
            reason = f"healthy scan in which {judge.name} reports most false lesions ({count:g})"
            return Choice(str(case), reason, None)
    return None


# ---------------------------------------------------------------------------------------------------- reading
def read_case(case: str, methods: Sequence[Method], classes: Sequence[TumorClass], folders: Folders) -> CaseVolumes:
    """Image, reference, and of each method with a folder its prediction, and anomaly maps and prompts where there are.

    Raises:
        ZePTError: a file is missing, unreadable, or of another size.
    """
    reference = _read(folders.references / (case + folders.file_ending))
    labels = sitk.GetArrayFromImage(reference)
    image = sitk.GetArrayFromImage(_read(folders.images / f"{case}_0000{folders.file_ending}", reference))
    found = CaseVolumes(
        case,
        _windowed(image, folders.is_ct),
        _indexed(labels, [c.reference_values for c in classes]),
        like=reference,
    )
    for method in methods:
        if method.predictions is None or method.summary is None:
            continue
        values = [(method.summary["classes"].get(c.name) or {}).get("prediction_values") or () for c in classes]
        predicted = _read(method.predictions / (case + folders.file_ending), reference)
        found.predictions[method.name] = _indexed(sitk.GetArrayFromImage(predicted), values)
        maps = sorted(method.predictions.glob(f"{case}_anomaly_*.nii.gz"))
        if maps:
            score = np.max([sitk.GetArrayFromImage(_read(path, reference)) for path in maps], axis=0)
            is_probability = score.min() >= 0 and score.max() <= 1  # as ZePTTrainerPaper writes it
            found.anomaly[method.name] = (
                score if is_probability else np.clip(score / (2 * SCORE_LIMIT) + 0.5, 0, 1)
            ).astype(np.float32)
        prompts = sorted(method.predictions.glob(f"{case}_prompt_*.nii.gz"))
        if prompts:
            found.prompts[method.name] = np.any(
                [sitk.GetArrayFromImage(_read(path, reference)) > 0.5 for path in prompts], axis=0
            )
    return found


def _read(path: Path, like: Any = None) -> Any:
    """A SimpleITK image in LPS, checked against the size of another."""
    if not path.is_file():
        raise ZePTError(f"{path} is missing; give the folder that holds it, or choose other cases with --cases")
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise ZePTError(f"{path} cannot be read as an image: {str(error).strip().splitlines()[-1]}") from error
    if image.GetDimension() != 3:
        raise ZePTError(f"{path}: a 3D image is wanted; found {image.GetDimension()} dimensions")
    image = sitk.DICOMOrient(image, "LPS")
    if like is not None and image.GetSize() != like.GetSize():
        raise ZePTError(f"{path} has {image.GetSize()} voxels, its reference {like.GetSize()}: not the same case")
    return image


def _windowed(image: np.ndarray, is_ct: bool) -> np.ndarray:
    low, high = WINDOW_HU if is_ct else np.percentile(image, [0.5, 99.5])
    return np.clip((image.astype(np.float32) - low) / max(high - low, 1e-6), 0, 1)


def _indexed(labels: np.ndarray, values: Sequence[Sequence[int]]) -> np.ndarray:
    found = np.zeros(labels.shape, dtype=np.uint8)
    for index, of_class in enumerate(values, start=1):
        found[np.isin(labels, list(of_class))] = index
    return found


# ---------------------------------------------------------------------------------------------------- pictures
def choose_slice(volumes: CaseVolumes, classes: Sequence[TumorClass], class_name: str | None) -> int:
    """Where the class is largest; in a scan without it, where most is predicted, else the middle."""
    indices = [i for i, c in enumerate(classes, start=1) if c.name == class_name]
    area = np.isin(volumes.reference, indices).sum(axis=(1, 2))
    if not area.any():
        area = sum((p > 0).sum(axis=(1, 2)) for p in volumes.predictions.values())
    return int(np.argmax(area)) if np.any(area) else len(volumes.image) // 2


def panels_of(volumes: CaseVolumes, classes: Sequence[TumorClass], index: int) -> list[Panel]:
    """Image, reference, each method's prediction (the reference's outline in it), anomaly scores and prompts."""
    where = f"case {volumes.case}, axial slice {index}"
    reference = volumes.reference[index]
    named = _names(reference, classes)
    panels = [
        _panel(volumes, index, "image", f"Image: {where}"),
        _panel(volumes, index, "reference", f"Reference, {named}: {where}", reference),
    ]
    for name, prediction in volumes.predictions.items():
        alt = f"Prediction of {name}, {_names(prediction[index], classes)}: {where}"
        panels.append(_panel(volumes, index, name, alt, prediction[index], reference > 0))
    for name, score in volumes.anomaly.items():
        colors = mpl.colormaps[_SCORE_COLORS](_stretch(score[index], volumes))[..., :3]
        outline = _outline(_enlarge(reference > 0, volumes))
        colors[outline] = 1
        panels.append(Panel(f"{name}: anomaly score", _png(colors), f"Anomaly score of {name}: {where}"))
    for name, prompt in volumes.prompts.items():
        alt = f"Visual prompts of {name}: {where}"
        panels.append(
            _panel(volumes, index, f"{name}: visual prompts", alt, prompt[index] * len(CLASS_COLORS), reference > 0)
        )
    return panels


def montage(volumes: CaseVolumes, classes: Sequence[TumorClass], count: int = 12) -> Panel:
    """Slices across the volume, reference filled: what stands where the viewer cannot run."""
    used = np.flatnonzero((volumes.reference > 0).any(axis=(1, 2)))
    low, high = (used[0] - 2, used[-1] + 2) if len(used) else (0, len(volumes.image) - 1)
    places = np.unique(np.linspace(max(low, 0), min(high, len(volumes.image) - 1), count).round().astype(int))
    tiles = [_colored(volumes, i, volumes.reference[i]) for i in places]
    columns = 4
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
    alt = f"Axial slices {places[0]} to {places[-1]} of case {volumes.case} with its reference"
    step = max(1, round(columns * tiles[0].shape[1] / 1200))
    return Panel("montage", _png(np.concatenate(rows)[::step, ::step]), alt)


def _names(labels: np.ndarray, classes: Sequence[TumorClass]) -> str:
    return ", ".join(classes[i - 1].name for i in np.unique(labels) if i) or "no tumor in this slice"


def _panel(
    volumes: CaseVolumes,
    index: int,
    title: str,
    alt: str,
    labels: np.ndarray | None = None,
    outline: np.ndarray | None = None,
) -> Panel:
    pixels = _colored(volumes, index, labels)
    if outline is not None:
        pixels[_outline(_enlarge(outline, volumes))] = 1
    return Panel(title, _png(pixels), alt)


def _colored(volumes: CaseVolumes, index: int, labels: np.ndarray | None) -> np.ndarray:
    """(Y, X, RGB) in 0 … 1: gray, and each class filled with its color."""
    pixels = np.repeat(_stretch(volumes.image[index], volumes)[..., None], 3, axis=-1)
    if labels is None:
        return pixels
    large = _enlarge(labels, volumes)
    for value in np.unique(large[large > 0]):
        color = np.asarray(CLASS_COLORS[(value - 1) % len(CLASS_COLORS)]) / 255
        mask = large == value
        pixels[mask] = (1 - _OPACITY) * pixels[mask] + _OPACITY * color
        pixels[_outline(mask)] = color
    return pixels


def _size(volumes: CaseVolumes) -> tuple[int, int]:
    """Pixels (Y, X) of a panel: square ones, however long the voxels are."""
    x, y, _ = volumes.like.GetSpacing()
    rows, columns = volumes.image.shape[1:]
    width = max(columns, _WIDTH)
    return max(1, round(width * rows * y / (columns * x))), width


def _enlarge(labels: np.ndarray, volumes: CaseVolumes) -> np.ndarray:
    rows, columns = (
        np.minimum(((np.arange(n) + 0.5) * old / n).astype(int), old - 1)
        for n, old in zip(_size(volumes), labels.shape, strict=True)
    )
    return labels[np.ix_(rows, columns)]


def _stretch(plane: np.ndarray, volumes: CaseVolumes) -> np.ndarray:
    rows, columns = ((np.arange(n) + 0.5) * old / n - 0.5 for n, old in zip(_size(volumes), plane.shape, strict=True))
    grid = np.meshgrid(rows, columns, indexing="ij")
    return np.asarray(ndimage.map_coordinates(plane.astype(np.float32), grid, order=1, mode="nearest"))


def _outline(mask: np.ndarray) -> np.ndarray:
    return mask & ~ndimage.binary_erosion(mask, iterations=2, border_value=1)


def _png(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    imsave(buffer, np.round(pixels * 255).astype(np.uint8), format="png")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
