"""Label maps on nnU-Net's grid; scores class by class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from tests.evaluation.small_folders import write_labels, write_scores
from zept_nnunet.errors import ZePTError
from zept_nnunet.evaluation.ranking import encode
from zept_nnunet.evaluation.reading import ScoreFile, grid_difference, present_values, read_label_map


@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIOWithReorient])
def test_the_array_is_that_of_nnunets_reader(reader: type, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 5, size=(4, 5, 6)).astype(np.uint8)
    direction = (0, 0, 1, -1, 0, 0, 0, 1, 0)  # an unusual orientation
    write_labels(tmp_path / "a.nii.gz", array, direction=direction, spacing=(3.0, 2.0, 1.0))
    expected, properties = reader().read_seg(str(tmp_path / "a.nii.gz"))
    found = read_label_map(tmp_path / "a.nii.gz", reorients=reader is NibabelIOWithReorient)
    np.testing.assert_array_equal(found.array, expected[0])
    assert found.spacing_mm == pytest.approx(properties["spacing"])
    assert found.array.dtype == np.uint8


def test_values_and_types(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.array([[[0, 1, 300]]], dtype=np.float32))
    sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
    found = read_label_map(tmp_path / "a.nii.gz")
    assert found.array.dtype == np.uint16 and present_values(found.array) == {0, 1, 300}
    for value, message in ((0.5, "no integers"), (np.nan, "no integers"), (-1, "0 to 65535")):
        image = sitk.GetImageFromArray(np.array([[[0, value]]], dtype=np.float32))
        sitk.WriteImage(image, str(tmp_path / "b.nii.gz"))
        with pytest.raises(ZePTError, match=message):
            read_label_map(tmp_path / "b.nii.gz")
    (tmp_path / "c.nii.gz").write_bytes(b"no image")
    with pytest.raises(ZePTError, match="cannot be read"):
        read_label_map(tmp_path / "c.nii.gz")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"spacing": (3.0, 1.5, 1.6)}, "spacing"),
        ({"origin": (10.0, -20.0, 31.0)}, "origin"),
        ({"direction": (1, 0, 0, 0, -1, 0, 0, 0, 1)}, "direction"),
    ],
)
def test_grids_that_differ(change: dict, word: str, tmp_path: Path) -> None:
    array = np.zeros((3, 4, 5))
    write_labels(tmp_path / "a.nii.gz", array)
    write_labels(tmp_path / "b.nii.gz", array, **change)
    a, b = (read_label_map(tmp_path / f"{n}.nii.gz") for n in "ab")
    assert grid_difference(a, a) is None
    assert (grid_difference(a, b) or "").startswith(word)
    write_labels(tmp_path / "c.nii.gz", array[:2])
    assert (grid_difference(a, read_label_map(tmp_path / "c.nii.gz")) or "").startswith("size")


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("count", [1, 3])
def test_scores_are_read_class_by_class(
    count: int, order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zept_nnunet.evaluation.reading._SLAB_VOXELS", 17)  # several slabs, the last one shorter
    logits = np.random.default_rng(0).normal(size=(count, 4, 5, 6)).astype(np.float16)
    names = tuple(f"tumor {k}" for k in range(count))
    write_scores(tmp_path / "a_scores.npz", np.asarray(logits, order=order), names)
    file = ScoreFile(tmp_path / "a_scores.npz")
    assert file.shape == logits.shape and file.classes == list(names)
    found = {name: codes.copy() for name, codes in file.codes()}
    for k, name in enumerate(names):
        np.testing.assert_array_equal(found[name], encode(logits[k]))


def test_files_that_hold_no_scores(tmp_path: Path) -> None:
    path = tmp_path / "a_scores.npz"
    for arrays, message in (
        ({"x": np.zeros(3)}, "no score file"),
        ({"logits": np.zeros((1, 2, 2, 2), dtype=np.float32), "classes": np.array(["a"])}, "must be float16"),
        ({"logits": np.zeros((1, 2, 2, 2), dtype=np.float16), "classes": np.array(["a", "b"])}, "one map for each"),
        ({"logits": np.zeros((2, 2, 2, 2), dtype=np.float16), "classes": np.array(["a", "a"])}, "twice"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(ZePTError, match=message):
            ScoreFile(path)
    path.write_bytes(b"no archive")
    with pytest.raises(ZePTError, match="no score file"):
        ScoreFile(path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a_scores.npz"
    write_scores(path, np.random.default_rng(0).normal(size=(1, 9, 30, 30)).astype(np.float16), ("a",))
    data = bytearray(path.read_bytes())
    data[2000:2200] = bytes(200)
    path.write_bytes(bytes(data))
    with pytest.raises(ZePTError, match=r"a_scores\.npz is damaged"):
        list(ScoreFile(path).codes())
