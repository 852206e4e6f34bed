"""The picture: which slices it shows, and what their pixels look like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from zept_nnunet.errors import ZePTError
from zept_nnunet.evaluation.picture import draw_picture, largest_tumor_slices


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((1.0, 2.0, 3.0))
    sitk.WriteImage(image, str(path))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    images, references, predictions = (tmp_path / name for name in ("images", "references", "predictions"))
    for case, width in (("a", 2), ("b", 4)):
        reference = np.zeros((3, 8, 8), dtype=np.uint8)
        reference[1, 2:4, :1] = 2
        reference[2, 2:4, :width] = 2
        prediction = np.zeros_like(reference)
        prediction[2, 2:4, :width] = 2
        write(images / f"{case}_0000.nii.gz", np.full(reference.shape, 40, dtype=np.int16))
        write(references / f"{case}.nii.gz", reference)
        write(predictions / f"{case}.nii.gz", prediction)
    return images, references, predictions


def test_the_slice_with_most_tumor_voxels_of_all_cases_is_chosen(folders: tuple[Path, Path, Path]) -> None:
    rows = largest_tumor_slices(*folders, {"liver tumor": 2, "absent tumor": 3})
    assert [(row.tumor, row.case, row.index) for row in rows] == [("liver tumor", "b", 2)]
    assert rows[0].dice == pytest.approx(2 * 8 / (10 + 8))
    assert rows[0].spacing_mm == (2.0, 1.0)


def test_a_png_is_written(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    rows = largest_tumor_slices(*folders, {"liver tumor": 2})
    draw_picture(rows, {"liver": 1, "liver tumor": 2}, {"liver tumor"}, tmp_path / "out.png", title="synthetic CT")
    assert (tmp_path / "out.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_missing_prediction_is_named(folders: tuple[Path, Path, Path]) -> None:
    (folders[2] / "b.nii.gz").unlink()
    with pytest.raises(ZePTError, match=r"b\.nii\.gz"):
        largest_tumor_slices(*folders, {"liver tumor": 2})


def test_a_prediction_of_another_size_is_named(folders: tuple[Path, Path, Path]) -> None:
    write(folders[2] / "b.nii.gz", np.zeros((2, 8, 8), dtype=np.uint8))
    with pytest.raises(ZePTError, match="same case"):
        largest_tumor_slices(*folders, {"liver tumor": 2})


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZePTError, match="Nothing to draw"):
        draw_picture([], {"liver": 1}, set(), tmp_path / "out.png", title="")
