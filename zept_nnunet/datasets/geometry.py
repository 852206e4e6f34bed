"""How the images of a raw dataset are stored: orientation and spacing, from the headers alone."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm  # type: ignore[import-untyped]

from zept_nnunet.errors import ZePTError

if TYPE_CHECKING:
    from zept_nnunet.datasets.merge import MergeSource

_ITK_ENDINGS = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")


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
    """Read the headers of all training images and labels; no voxels.

    Raises:
        ZePTError: a file is missing or broken.
    """
    orientations: dict[str, int] = {}
    spacings, mismatched, unread = [], [], 0
    for case, files in tqdm(source.cases.items(), desc=f"headers of {source.folder.name}", unit="case"):
        headers = [read_header(Path(f)) for f in (*files["images"], files["label"])]
        image, label = headers[0], headers[-1]
        if image is None or label is None:
            unread += 1
            continue
        spacings.append(image.GetSpacing())
        if image.GetDimension() == 3:
            code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())
            orientations[code] = orientations.get(code, 0) + 1
        if not on_one_grid(image, label):
            mismatched.append(case)
    array = np.array([s for s in spacings if len(s) == len(spacings[0])]) if spacings else np.zeros((0, 3))
    median = tuple(np.median(array, axis=0).tolist()) if len(array) else ()
    spread = tuple(zip(array.min(0).tolist(), array.max(0).tolist(), strict=True)) if len(array) else ()
    return Geometry(len(source.cases), orientations, median, spread, mismatched, unread)


def read_header(path: Path) -> Any:
    """Size, spacing, origin and direction of an image, as SimpleITK's reader tells them; no voxels. None where
    SimpleITK cannot read such a file, and nnU-Net perhaps can.

    Raises:
        ZePTError: the file is missing or broken.
    """
    if not path.is_file():
        raise ZePTError(f"{path} is missing; restore the file, or remove the case from its dataset")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        if path.name.endswith(_ITK_ENDINGS) and not _nibabel_reads(path):
            raise ZePTError(
                f"{path} cannot be read; restore the file ({str(error).strip().splitlines()[-1].strip()})"
            ) from error
        return None
    return reader


def on_one_grid(a: Any, b: Any) -> bool:
    """Whether two headers of `read_header` have the same voxels: as many, in the same place, to a tenth of a voxel."""
    if a.GetSize() != b.GetSize():
        return False
    return (
        np.allclose(a.GetSpacing(), b.GetSpacing(), rtol=1e-3)
        and np.allclose(a.GetDirection(), b.GetDirection(), atol=1e-3)
        and np.allclose(a.GetOrigin(), b.GetOrigin(), rtol=0, atol=0.1 * min(a.GetSpacing()))
    )


def in_words(header: Any) -> str:
    """Voxels, spacing, origin and direction of an image or of a header of `read_header`, for a message."""
    numbers = (header.GetSize(), header.GetSpacing(), header.GetOrigin(), header.GetDirection())
    names = ("voxels", "spacing", "origin", "direction")
    return ", ".join(f"{n} ({', '.join(f'{v:.6g}' for v in x)})" for n, x in zip(names, numbers, strict=True))


def _nibabel_reads(path: Path) -> bool:
    """Whether nibabel can read a NIfTI header that SimpleITK refuses: it takes directions that are not orthonormal."""
    import nibabel

    try:
        nibabel.load(path)
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, zlib.error):
        return False
    return True
