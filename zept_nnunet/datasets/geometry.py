"""How the images of a raw dataset are stored: orientation and spacing, from the headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from zept_nnunet.datasets.merge import MergeSource


@dataclass(frozen=True)
class Geometry:
    """Of a dataset's training images, from their headers alone."""

    cases: int
    orientations: dict[str, int]  # "RAS", … → images
    spacing: tuple[float, ...]  # median, x y z in mm
    spread: tuple[tuple[float, float], ...]  # smallest and largest
    mismatched: list[str]  # cases whose label lies on another grid than the image
    unread: int  # headers that SimpleITK cannot read


def geometry_of(source: MergeSource) -> Geometry:
    """Read the headers of all training images and labels; no voxels."""
    orientations: dict[str, int] = {}
    spacings, mismatched, unread = [], [], 0
    for case, files in tqdm(source.cases.items(), desc=f"headers of {source.folder.name}", unit="case"):
        try:
            image, label = (_header(Path(f)) for f in (files["images"][0], files["label"]))
        except RuntimeError:
            unread += 1
            continue
        spacings.append(image.GetSpacing())
        if image.GetDimension() == 3:
            code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())
            orientations[code] = orientations.get(code, 0) + 1
        close = np.allclose(image.GetSpacing(), label.GetSpacing(), rtol=1e-3)
        if image.GetSize() != label.GetSize() or not close:
            mismatched.append(case)
    array = np.array([s for s in spacings if len(s) == len(spacings[0])]) if spacings else np.zeros((0, 3))
    median = tuple(np.median(array, axis=0).tolist()) if len(array) else ()
    spread = tuple(zip(array.min(0).tolist(), array.max(0).tolist(), strict=True)) if len(array) else ()
    return Geometry(len(source.cases), orientations, median, spread, mismatched, unread)


def _header(path: Path) -> Any:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader
