"""Label maps and scores from disk, without ever holding all classes of a large volume."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import SimpleITK as sitk

from zept_nnunet.errors import ZePTError
from zept_nnunet.evaluation.ranking import encode

SCORES_SUFFIX = "_scores.npz"  # as `zept predict --save_scores` writes
_SLAB_VOXELS = 1 << 22


@dataclass(frozen=True)
class LabelMap:
    """A segmentation on its grid.

    Attributes:
        array: (Z, Y, X) uint8, or uint16 where a value is above 255.
        spacing_mm: (Z, Y, X).
        grid: size, spacing, origin and direction, in SimpleITK's order.
    """

    array: np.ndarray
    spacing_mm: tuple[float, float, float]
    grid: dict[str, tuple[float, ...]]


def read_label_map(path: Path, reorients: bool = False) -> LabelMap:
    """Read a segmentation.

    Args:
        reorients: bring it to RAS first, as nnU-Net's NibabelIOWithReorient does.

    Raises:
        ZePTError: unreadable, not three-dimensional, or values that are no labels.
    """
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise ZePTError(f"{path} cannot be read as an image: {str(error).strip().splitlines()[-1]}") from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ZePTError(f"{path}: a 3D label map is wanted; found {image.GetDimension()} dimensions")
    if reorients:
        image = sitk.DICOMOrient(image, "RAS")
    view = sitk.GetArrayViewFromImage(image)
    is_integer = np.issubdtype(view.dtype, np.integer)
    if not is_integer and not (all((plane == np.rint(plane)).all() for plane in view) and _is_finite(path)):
        raise ZePTError(f"{path} holds values that are no integers: it is no label map")
    low, high = view.min(), view.max()
    if low < 0 or high > 65535:
        raise ZePTError(f"{path} holds values from {low} to {high}; labels are 0 to 65535")
    array = view.astype(np.uint8 if high < 256 else np.uint16)
    grid = {
        "size": tuple(image.GetSize()),
        "spacing": tuple(image.GetSpacing()),
        "origin": tuple(image.GetOrigin()),
        "direction": tuple(image.GetDirection()),
    }
    spacing = grid["spacing"]
    return LabelMap(array, (spacing[2], spacing[1], spacing[0]), grid)


def _is_finite(path: Path) -> bool:
    """Whether a file of floating-point numbers holds no NaN or infinity, which ITK reads as 0 from a NIfTI."""
    if not path.name.endswith((".nii", ".nii.gz")):
        return True  # these keep their NaN, which is no integer
    import nibabel

    data: Any = nibabel.load(str(path)).dataobj  # type: ignore[attr-defined]
    return all(np.isfinite(data[..., z]).all() for z in range(data.shape[-1]))


def grid_difference(reference: LabelMap, prediction: LabelMap) -> str | None:
    """What differs between two grids, in words; None: the same, to a thousandth of a voxel or of a direction cosine."""
    tolerance = {"size": 0.0, "spacing": 1e-3, "origin": 1e-3 * min(reference.spacing_mm), "direction": 1e-3}
    for key, limit in tolerance.items():
        ours, theirs = np.asarray(reference.grid[key]), np.asarray(prediction.grid[key])
        if key == "spacing":
            limit *= min(reference.spacing_mm)
        elif key == "origin":
            limit = max(limit, 1e-3)  # NIfTI holds origins as float32
        if np.abs(ours - theirs).max() > limit:
            return f"{key} {_numbers(theirs)} instead of {_numbers(ours)}"
    return None


def _numbers(values: np.ndarray) -> str:
    return "(" + ", ".join(f"{v:.6g}" for v in values) + ")"


def present_values(array: np.ndarray) -> set[int]:
    """The values of a label map."""
    found = np.zeros(int(array.max(initial=0)) + 1, dtype=bool)
    for plane in array:
        found[plane.ravel()] = True
    return set(np.flatnonzero(found).tolist())


class ScoreFile:
    """CASE_scores.npz: `logits` float16 (K, Z, Y, X) and `classes`, K names. Only one class is in memory at a time.

    Raises:
        ZePTError: not such a file.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                with archive.open("logits.npy") as file:
                    self.shape, self._fortran, dtype = _read_header(file)
                with archive.open("classes.npy") as file:
                    names = np.lib.format.read_array(file, allow_pickle=False)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ZePTError(
                f"{path} is no score file of zept predict --save_scores ({error}); write it again"
            ) from error
        self.classes = [str(n) for n in np.atleast_1d(names)]
        if dtype != np.float16 or len(self.shape) != 4 or self.shape[0] != len(self.classes):
            raise ZePTError(
                f"{path}: 'logits' must be float16 ({len(self.classes)}, Z, Y, X), one map for each of 'classes'; "
                f"found {dtype} {self.shape}"
            )
        if len(set(self.classes)) != len(self.classes):
            raise ZePTError(f"{path}: 'classes' names a class twice: {self.classes}")

    def codes(self) -> Iterator[tuple[str, np.ndarray]]:
        """Class by class, in the file's order: name and uint16 (Z, Y, X), as `ranking.encode` gives it.

        The array is the same one each time, written anew.

        Raises:
            ZePTError: the file ends early or is damaged.
        """
        grid = self.shape[1:]
        reverse = self._fortran and self.shape[0] == 1  # then the file holds (X, Y, Z) in C order
        if self._fortran and not reverse:
            logits = np.load(self.path, allow_pickle=False)["logits"]
            yield from ((name, encode(logits[k])) for k, name in enumerate(self.classes))
            return
        buffer = np.empty(grid[::-1] if reverse else grid, dtype=np.uint16)
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("logits.npy") as file:
                _read_header(file)
                for name in self.classes:
                    flat = buffer.reshape(-1)
                    for start in range(0, flat.size, _SLAB_VOXELS):
                        part = flat[start : start + _SLAB_VOXELS]
                        part[:] = encode(np.frombuffer(_read(file, part.nbytes), dtype=np.float16))
                    yield name, buffer.transpose() if reverse else buffer
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ZePTError(f"{self.path} is damaged ({error}); predict this case again with --save_scores") from error


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return shape, fortran, dtype


def _read(file: IO[bytes], size: int) -> bytes:
    data: bytes = file.read(size)
    while len(data) < size:
        more = file.read(size - len(data))
        if not more:
            raise EOFError("it ends too early")
        data += more
    return data
