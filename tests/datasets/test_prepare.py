"""Each recipe on a small tree that imitates the official layout; wrong and incomplete trees."""

from __future__ import annotations

import json
import locale
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from zept_nnunet.cli import main
from zept_nnunet.datasets.prepare import expected_cases, labels_of, locale_kept, recipes
from zept_nnunet.taxonomy import Taxonomy

SHAPE = (4, 6, 8)
SPACING = (0.8, 0.9, 2.5)


@pytest.fixture
def raw(tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For nnU-Net's own code too, which reads the variables when it is imported."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setattr(f"nnunetv2.paths.{name}", str(tmp_path / name), raising=False)
    return tmp_path / "nnUNet_raw"


def nifti(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING)
    sitk.WriteImage(image, str(path))


def ct(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-900, 900, SHAPE).astype(np.int16)


def labels(values: list[int]) -> np.ndarray:
    """A label map that holds each value, one voxel at least."""
    array = np.zeros(SHAPE, np.uint8)
    array.ravel()[1 : 1 + len(values)] = values
    return array


def dicom(folder: Path, array: np.ndarray, ending: str = ".dcm", names: Sequence[str] | None = None) -> None:
    """A series of one file a slice, from the feet up under names that say nothing of their order unless given."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    uid = f"1.2.826.0.1.{abs(hash(str(folder))) % 10**9}"
    with locale_kept():
        _write_slices(folder, array, writer, uid, ending, names or [f"{(z * 7 + 3) % 10}_slice" for z in range(99)])


def _write_slices(folder: Path, array: np.ndarray, writer: Any, uid: str, ending: str, names: Sequence[str]) -> None:
    for z, slice_ in enumerate(array):
        image = sitk.GetImageFromArray(slice_[None])
        image.SetSpacing(SPACING)
        image.SetOrigin((0.0, 0.0, z * SPACING[2]))
        for tag, value in (
            ("0020|000e", uid),
            ("0020|000d", uid + ".1"),
            ("0008|0018", f"{uid}.2.{z}"),
            ("0020|0032", f"0\\0\\{z * SPACING[2]}"),
            ("0020|0037", "1\\0\\0\\0\\1\\0"),
            ("0008|0060", "CT"),
            ("0020|0013", str(z)),
        ):
            image.SetMetaData(tag, value)
        path = folder / f"{names[z]}.dcm"
        writer.SetFileName(str(path))
        writer.Execute(image)
        if ending != ".dcm":
            path.rename(path.with_suffix(ending))


def files(image: str, label: str, cases: list[str], values: list[int]) -> Callable[[Path], None]:
    """A layout of pairs: patterns with {} for the case."""

    def write(root: Path) -> None:
        for i, case in enumerate(cases):
            nifti(root / image.format(case), ct(i))
            nifti(root / label.format(case), labels(values))

    return write


def btcv(root: Path) -> None:
    files("RawData/Training/img/img{}.nii.gz", "RawData/Training/label/label{}.nii.gz",
          expected_cases(recipes()["BTCV"]), list(range(1, 14)))(root)  # fmt: skip
    nifti(root / "RawData/Testing/img/img0061.nii.gz", ct())


PANCREAS = np.s_[1:3, 1, 2:6]  # rows near one side only


def pancreas_ct(root: Path, turned: bool = False, clear: bool = True, some: slice = slice(None)) -> None:
    """All 82 labels, two of whose images were withdrawn. Soft tissue in fat shows which way the labels' rows run."""
    for case in expected_cases(recipes()["Pancreas-CT"])[some]:
        image = np.full(SHAPE, -100 if clear else 60, np.int16)
        image[PANCREAS] = 60
        dicom(root / f"Pancreas-CT/PANCREAS_{case}/11-24-2015-x/Pancreas-{case}", image)
    label = np.zeros(SHAPE, np.uint8)
    label[PANCREAS] = 1
    for i in range(1, 83)[some]:
        nifti(root / f"TCIA_pancreas_labels-02-05-2017/label{i:04d}.nii.gz", label[:, ::-1] if turned else label)


def chaos(root: Path) -> None:
    """Images and labels are numbered from the head down, the labels without a position."""
    from_the_feet = range(SHAPE[0] - 1, -1, -1)
    for case in expected_cases(recipes()["CHAOS"]):
        dicom(root / f"Train_Sets/CT/{case}/DICOM_anon", ct(), names=[f"i{k:04d},0000b" for k in from_the_feet])
        (root / f"Train_Sets/CT/{case}/Ground").mkdir()
        for z, k in enumerate(from_the_feet):
            slice_ = sitk.GetImageFromArray(labels([255, 255])[z])
            sitk.WriteImage(slice_, str(root / f"Train_Sets/CT/{case}/Ground/liver_GT_{k:03d}.png"))
    dicom(root / "Test_Sets/CT/3/DICOM_anon", ct())


def ircadb(root: Path) -> None:
    for i in range(1, 21):
        folder = root / f"3Dircadb1/3Dircadb1.{i}"
        dicom(folder / "PATIENT_DICOM", ct(i), "")
        for j, name in enumerate(("liver", "skin", *(("livertumor01", "livertumor02") if i % 2 else ()))):
            dicom(folder / "MASKS_DICOM" / name, (labels([0] * j + [255]) > 0).astype(np.int16) * 255, "")


def word(root: Path) -> None:
    for part, case in (("Tr", "word_0002"), ("Val", "word_0001"), ("Ts", "word_0003")):
        files(f"WORD-V0.1.0/images{part}/{{}}.nii.gz", f"WORD-V0.1.0/labels{part}/{{}}.nii.gz", [case],
              list(range(1, 17)))(root)  # fmt: skip


def amos(root: Path) -> None:
    for part, case in (("Tr", "amos_0001"), ("Va", "amos_0008"), ("Tr", "amos_0507")):
        files(f"amos22/images{part}/{{}}.nii.gz", f"amos22/labels{part}/{{}}.nii.gz", [case], list(range(1, 16)))(root)
    nifti(root / "amos22/imagesTs/amos_0002.nii.gz", ct())
    listed = {
        "training": [{"image": f"./imagesTr/amos_{n}.nii.gz"} for n in ("0001", "0507")],
        "validation": [{"image": "./imagesVa/amos_0008.nii.gz"}],
        "test": [{"image": "./imagesTs/amos_0002.nii.gz"}],
    }
    (root / "amos22/dataset.json").write_text(json.dumps(listed))


def totalsegmentator(root: Path) -> None:
    for case in ("s0000", "s0011"):
        nifti(root / f"Totalsegmentator_dataset_v201/{case}/ct.nii.gz", ct())
        for i, name in enumerate(labels_of(recipes()["TotalSegmentator"])):
            mask = np.zeros(SHAPE, np.uint8)
            mask.ravel()[i] = 1
            nifti(root / f"Totalsegmentator_dataset_v201/{case}/segmentations/{name}.nii.gz", mask)
    (root / "Totalsegmentator_dataset_v201/meta.csv").write_text("image_id;age;split\ns0000;70;train\ns0011;60;test\n")


def abdomen_1k(root: Path) -> None:
    files("AbdomenCT-1K-ImagePart1/{}_0000.nii.gz", "Mask/{}.nii.gz", ["Case_00001", "Case_00002"], [1, 2, 3, 4])(root)
    nifti(root / "AbdomenCT-1K-ImagePart3/Case_00999_0000.nii.gz", ct())


def flare(root: Path) -> None:
    cases = expected_cases(recipes()["FLARE22"])
    files("FLARE22Train/images/{}_0000.nii.gz", "FLARE22Train/labels/{}.nii.gz", cases, list(range(1, 14)))(root)


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "LiTS": files("Training Batch 1/volume-{}.nii", "Training Batch 1/segmentation-{}.nii",
                  [str(i) for i in range(131)], [1, 2]),
    "KiTS23": files("dataset/{}/imaging.nii.gz", "dataset/{}/segmentation.nii.gz",
                    expected_cases(recipes()["KiTS23"]), [1, 2, 3]),
    "BTCV": btcv,
    "Pancreas-CT": pancreas_ct,
    "CHAOS": chaos,
    "3D-IRCADb-01": ircadb,
    "WORD": word,
    "AbdomenCT-1K": abdomen_1k,
    "AMOS22": amos,
    "CT-ORG": files("volume-{}.nii.gz", "labels-{}.nii.gz", [str(i) for i in range(140)], [1, 2, 3, 4, 5, 6]),
    "FLARE22": flare,
    "TotalSegmentator": totalsegmentator,
    "one-tumor": files("images/{}.nii.gz", "labels/{}.nii.gz", ["a", "b"], [1]),
}  # fmt: skip
CASES = {
    "KiTS23": 489,
    "CHAOS": 20,
    "LiTS": 131,
    "BTCV": 30,
    "Pancreas-CT": 80,
    "3D-IRCADb-01": 20,
    "CT-ORG": 140,
    "FLARE22": 50,
}
MSD = [name for name, recipe in recipes().items() if recipe["kind"] == "msd"]


def test_every_recipe_is_tested_and_says_where_its_facts_come_from() -> None:
    assert set(LAYOUTS) | set(MSD) == set(recipes())
    for name, recipe in recipes().items():
        assert recipe["pitfalls"] and recipe["license"] and recipe["citation"], name
        assert name == "one-tumor" or recipe["source"].startswith("http")
        assert recipe["tested_on_download"] is False


def prepared(raw: Path, name: str, *flags: str) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The dataset, its dataset.json, and its cases as nnU-Net finds them."""
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    source = raw.parent / "download"
    assert main(["prepare", name, str(source), "-d", "150", *flags]) == 0
    folder = next(raw.glob("Dataset150_*"))
    content = json.loads((folder / "dataset.json").read_text())
    return folder, content, get_filenames_of_train_images_and_targets(str(folder), dict(content))


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_official_layout_becomes_a_raw_dataset(raw: Path, name: str) -> None:
    LAYOUTS[name](raw.parent / "download")
    _, content, cases = prepared(raw, name)
    assert len(cases) == content["numTraining"] == CASES.get(name, 2)
    values = list(content["labels"].values())
    assert values == list(range(len(values))) and len(values) == len(labels_of(recipes()[name])) + 1
    Taxonomy.from_dataset_json(content)
    seen = set()
    for case in list(cases.values())[:3]:
        image, label = (sitk.ReadImage(str(p)) for p in (case["images"][0], case["label"]))
        assert image.GetSize() == label.GetSize() == SHAPE[::-1]
        assert np.allclose(image.GetSpacing(), SPACING) and np.allclose(label.GetSpacing(), SPACING)
        seen |= set(np.unique(sitk.GetArrayFromImage(label)).tolist())
    assert seen >= ({0, 1, 3} if name == "3D-IRCADb-01" else set(values)), "every label keeps its voxels"
    assert content["zept_recipe"]["recipe"] == name and content["zept_recipe"]["license"]


def test_dicom_slices_are_stacked_by_position_and_masks_by_structure(raw: Path) -> None:
    ircadb(raw.parent / "download")
    _, content, cases = prepared(raw, "3D-IRCADb-01")
    assert content["labels"] == {"background": 0, "liver": 1, "liver cyst": 2, "liver tumor": 3}
    image = sitk.GetArrayFromImage(sitk.ReadImage(str(cases["1"]["images"][0])))
    assert np.array_equal(image, ct(1))
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(cases["1"]["label"]))).ravel()
    assert label[:6].tolist() == [0, 1, 0, 3, 3, 0]  # liver, skin (left out), two tumor masks


def test_png_labels_lie_on_the_dicom_slices_that_they_are_numbered_with(raw: Path, capsys: Any) -> None:
    root = raw.parent / "download"
    chaos(root)
    _, _, cases = prepared(raw, "CHAOS")
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(cases["1"]["label"])))
    assert np.array_equal(label, labels([1, 1])), "the marked slice is the lowest, whose file has the highest number"
    (root / "Train_Sets/CT/14/Ground/liver_GT_001.png").unlink()
    assert main(["prepare", "CHAOS", str(root), "-d", "151"]) == 1
    assert "Train_Sets/CT/14/Ground holds 3 slices" in capsys.readouterr().err


def test_reading_dicom_leaves_text_files_utf8(raw: Path) -> None:
    """In the locale that SimpleITK leaves behind Python would read them as ASCII."""
    before = locale.getencoding() if sys.version_info >= (3, 11) else locale.getpreferredencoding(False)
    chaos(raw.parent / "download")
    prepared(raw, "CHAOS")
    after = locale.getencoding() if sys.version_info >= (3, 11) else locale.getpreferredencoding(False)
    assert after == before


@pytest.mark.parametrize("turned", [False, True])
def test_pancreas_labels_lie_on_soft_tissue_whichever_way_their_rows_run(raw: Path, turned: bool) -> None:
    pancreas_ct(raw.parent / "download", turned, some=slice(2))
    _, _, cases = prepared(raw, "Pancreas-CT", "--partial")
    image, label = (sitk.ReadImage(str(p)) for p in (cases["0001"]["images"][0], cases["0001"]["label"]))
    assert image.GetOrigin() == label.GetOrigin() and image.GetDirection() == label.GetDirection()
    expected = np.zeros(SHAPE)
    expected[PANCREAS] = 1
    assert np.array_equal(sitk.GetArrayFromImage(label), expected)


def test_a_pancreas_label_that_fits_both_ways_is_refused(raw: Path, capsys: Any) -> None:
    pancreas_ct(raw.parent / "download", clear=False, some=slice(2))
    assert main(["prepare", "Pancreas-CT", str(raw.parent / "download"), "-d", "150", "--partial"]) == 1
    error = capsys.readouterr().err
    assert "label0001.nii.gz" in error and "either way" in error and not list(raw.iterdir())


def test_labels_of_withdrawn_cases_are_left_out(raw: Path, capsys: Any) -> None:
    pancreas_ct(raw.parent / "download", some=slice(2))
    nifti(raw.parent / "download/TCIA_pancreas_labels-02-05-2017/label0025.nii.gz", labels([1]))
    _, _, cases = prepared(raw, "Pancreas-CT", "--partial")
    assert set(cases) == {"0001", "0002"}
    assert "1 cases that are not the dataset's are left out: 0025" in capsys.readouterr().out


def test_test_images_and_their_labels_come_along_where_published(raw: Path) -> None:
    word(raw.parent / "download")
    folder, _, _ = prepared(raw, "WORD")
    assert [p.name for p in (folder / "imagesTs").iterdir()] == ["word_0003_0000.nii.gz"]
    assert [p.name for p in (folder / "labelsTs").iterdir()] == ["word_0003.nii.gz"]


def test_ones_own_tumor_gets_its_name(raw: Path) -> None:
    LAYOUTS["one-tumor"](raw.parent / "download")
    _, content, _ = prepared(raw, "one-tumor", "--tumor", "colon tumor")
    assert content["labels"] == {"background": 0, "colon tumor": 1}
    assert content["zept"]["tumors"] == {"colon tumor": {"hosts": []}}


# ---------------------------------------------------------------------------------------------------- wrong trees
@pytest.mark.parametrize("name", [n for n, r in recipes().items() if r["kind"] != "msd"])
def test_an_empty_tree_is_refused_by_the_first_file_that_is_missing(raw: Path, name: str, capsys: Any) -> None:
    (raw.parent / "download").mkdir()
    assert main(["prepare", name, str(raw.parent / "download"), "-d", "150"]) == 1
    error = capsys.readouterr().err
    first = (expected_cases(recipes()[name]) or ["CASE"])[0]
    assert re.search(rf"holds no \S*{re.escape(first)}", error), error
    assert not list(raw.iterdir())


INCOMPLETE = {
    "LiTS": ("Training Batch 1/volume-17.nii", "volume-17.nii"),
    "KiTS23": ("dataset/case_00000/imaging.nii.gz", "case_00000/imaging.nii.gz"),
    "BTCV": ("RawData/Training/label/label0021.nii.gz", "label/label0021.nii.gz"),
    "CHAOS": ("Train_Sets/CT/14/DICOM_anon", "Train_Sets/CT/14/DICOM_anon/*.dcm"),
    "3D-IRCADb-01": ("3Dircadb1/3Dircadb1.7/MASKS_DICOM/liver", "3Dircadb1.7/MASKS_DICOM/liver/*"),
    "AMOS22": ("amos22/imagesVa/amos_0008.nii.gz", "imagesTr/amos_0008.nii.gz"),
    "TotalSegmentator": ("Totalsegmentator_dataset_v201/s0011/segmentations/liver.nii.gz",
                         "s0011/segmentations/liver.nii.gz"),
    "WORD": ("WORD-V0.1.0/labelsVal/word_0001.nii.gz", "word_0001.nii.gz"),
    "FLARE22": ("FLARE22Train/images/FLARE22_Tr_0050_0000.nii.gz", "images/FLARE22_Tr_0050_0000.nii.gz"),
}  # fmt: skip


@pytest.mark.parametrize("name", INCOMPLETE)
def test_an_incomplete_tree_is_refused_by_the_first_file_that_is_missing(raw: Path, name: str, capsys: Any) -> None:
    removed, named = INCOMPLETE[name]
    LAYOUTS[name](raw.parent / "download")
    path = raw.parent / "download" / removed
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(["prepare", name, str(raw.parent / "download"), "-d", "150"]) == 1
    assert f"{named} is missing" in capsys.readouterr().err
    assert not list(raw.iterdir())


def test_a_part_of_a_download_will_do_where_that_is_said(raw: Path) -> None:
    LAYOUTS["LiTS"](raw.parent / "download")
    for i in range(2, 131):
        for kind in ("volume", "segmentation"):
            (raw.parent / f"download/Training Batch 1/{kind}-{i}.nii").unlink()
    _, content, _ = prepared(raw, "LiTS", "--partial")
    assert content["numTraining"] == 2


def test_a_case_that_the_download_lists_is_missed(raw: Path, capsys: Any) -> None:
    root = raw.parent / "download"
    totalsegmentator(root)
    shutil.rmtree(root / "Totalsegmentator_dataset_v201/s0011")
    assert main(["prepare", "TotalSegmentator", str(root), "-d", "150"]) == 1
    assert "s0011/ct.nii.gz is missing (found 1 of 2 images)" in capsys.readouterr().err
    (root / "Totalsegmentator_dataset_v201/meta.csv").unlink()
    assert main(["prepare", "TotalSegmentator", str(root), "-d", "150"]) == 1
    assert "meta.csv is missing, which lists the cases" in capsys.readouterr().err
    assert prepared(raw, "TotalSegmentator", "--partial")[1]["numTraining"] == 1


def test_what_is_left_out_is_said(raw: Path, capsys: Any) -> None:
    root = raw.parent / "download"
    abdomen_1k(root)
    prepared(raw, "AbdomenCT-1K")
    assert "1 images have no label and are left out: Case_00999" in capsys.readouterr().out


@pytest.mark.parametrize("removed", ["imaging", "segmentation"])
def test_a_part_of_a_download_leaves_out_cases_that_lack_a_file(raw: Path, capsys: Any, removed: str) -> None:
    """KiTS23 comes with every segmentation; its images are downloaded one by one."""
    root = raw.parent / "download"
    cases = ["case_00000", "case_00001", "case_00400"]
    files("dataset/{}/imaging.nii.gz", "dataset/{}/segmentation.nii.gz", cases, [1, 2, 3])(root)
    (root / f"dataset/case_00001/{removed}.nii.gz").unlink()
    _, content, found = prepared(raw, "KiTS23", "--partial")
    assert content["numTraining"] == 2 and set(found) == {"case_00000", "case_00400"}
    assert "1 cases lack a file and are left out: case_00001" in capsys.readouterr().out


def test_a_file_that_is_there_twice_is_named_with_its_copy(raw: Path, capsys: Any) -> None:
    root = raw.parent / "download"
    files("a/volume-{}.nii", "a/segmentation-{}.nii", ["0", "1"], [1, 2])(root)
    shutil.copytree(root / "a", root / "b")
    assert main(["prepare", "LiTS", str(root), "-d", "150", "--partial"]) == 1
    error = capsys.readouterr().err
    assert "a/volume-0.nii" in error and "b/volume-0.nii" in error and "twice" in error
    shutil.rmtree(root)
    chaos(root)
    shutil.copytree(root / "Train_Sets", root / "copy/Train_Sets")
    assert main(["prepare", "CHAOS", str(root), "-d", "150", "--partial"]) == 1
    error = capsys.readouterr().err
    assert "download/Train_Sets/CT/1/" in error and "copy/Train_Sets/CT/1/" in error and not list(raw.iterdir())


def test_other_label_values_and_other_grids_are_refused(raw: Path, capsys: Any) -> None:
    root = raw.parent / "download"
    files("{}/imaging.nii.gz", "{}/segmentation.nii.gz", ["case_00000", "case_00587"], [1, 2, 3])(root)
    path = root / "case_00587/segmentation.nii.gz"
    nifti(path, labels([1, 2, 3, 7]))
    assert main(["prepare", "KiTS23", str(root), "-d", "150", "--partial"]) == 1
    error = capsys.readouterr().err
    assert str(path) in error and "[7]" in error and not list(raw.iterdir())
    nifti(path, np.zeros((2, 2, 2), np.uint8))
    assert main(["prepare", "KiTS23", str(root), "-d", "150", "--partial"]) == 1
    assert "(2, 2, 2) voxels" in capsys.readouterr().err and not list(raw.iterdir())


@pytest.mark.parametrize("change", ["direction", "origin", "spacing"])
@pytest.mark.parametrize("name", ["TotalSegmentator", "KiTS23"])
def test_labels_that_lie_elsewhere_than_the_image_are_refused(raw: Path, capsys: Any, name: str, change: str) -> None:
    root = raw.parent / "download"
    if name == "KiTS23":
        files("{}/imaging.nii.gz", "{}/segmentation.nii.gz", ["case_00000"], [1, 2, 3])(root)
        path = root / "case_00000/segmentation.nii.gz"
    else:
        totalsegmentator(root)
        path = root / "Totalsegmentator_dataset_v201/s0000/segmentations/liver.nii.gz"
    image = sitk.ReadImage(str(path))
    if change == "direction":
        image.SetDirection((-1, 0, 0, 0, 1, 0, 0, 0, 1))
    elif change == "origin":
        image.SetOrigin((0.0, 0.0, SPACING[2]))
    else:
        image.SetSpacing(tuple(2 * s for s in SPACING))
    sitk.WriteImage(image, str(path))
    assert main(["prepare", name, str(root), "-d", "150", "--partial"]) == 1
    error = capsys.readouterr().err
    assert str(path) in error and "does not lie on its image" in error and not list(raw.iterdir())
    image.SetDirection((1, 0, 0, 0, 1, 0, 0, 0, 1))
    image.SetSpacing(SPACING)
    image.SetOrigin((0.01, 0.0, 0.0))  # as rounding leaves it
    sitk.WriteImage(image, str(path))
    prepared(raw, name, "--partial")


@pytest.mark.parametrize("side", ["PATIENT_DICOM", "MASKS_DICOM/liver"])
def test_a_dicom_slice_without_its_mask_or_image_is_named(raw: Path, capsys: Any, side: str) -> None:
    root = raw.parent / "download"
    folder = root / "3Dircadb1.1"
    dicom(folder / "PATIENT_DICOM", ct(), "")
    dicom(folder / "MASKS_DICOM/liver", (labels([1]) > 0).astype(np.int16) * 255, "")
    (folder / side / "7_slice").unlink()  # z = 2
    assert main(["prepare", "3D-IRCADb-01", str(root), "-d", "150", "--partial"]) == 1
    error = capsys.readouterr().err
    other = {"PATIENT_DICOM": "MASKS_DICOM/liver", "MASKS_DICOM/liver": "PATIENT_DICOM"}[side]
    assert str(folder / other / "7_slice") in error and f"{side} holds no slice at" in error
    assert not list(raw.iterdir())


def test_uncompressed_files_are_compressed(raw: Path) -> None:
    """nnU-Net copies labels to names that end as dataset.json says; readers go by the ending."""
    files("volume-{}.nii", "segmentation-{}.nii", ["0", "1"], [1, 2])(raw.parent / "download")
    folder, content, cases = prepared(raw, "LiTS", "--partial")
    assert content["file_ending"] == ".nii.gz"
    for case, its in cases.items():
        for path, kind in ((its["images"][0], "volume"), (its["label"], "segmentation")):
            path = Path(path)
            assert path.name.endswith(".nii.gz") and path.read_bytes()[:2] == b"\x1f\x8b" and folder in path.parents
            was = sitk.ReadImage(str(raw.parent / f"download/{kind}-{case}.nii"))
            assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))), sitk.GetArrayFromImage(was))


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--tumor", "GTV"], "GTV"),
        (["--tumor", "GTV", "--host", "colon"], "colon GTV"),
        (["--tumor", "colon tumor", "--host", "colon"], "colon tumor"),
        (["--host", "Colon"], "Colon tumor"),
    ],
)
def test_ones_own_class_is_a_tumor_whatever_its_name(raw: Path, flags: list[str], name: str) -> None:
    LAYOUTS["one-tumor"](raw.parent / "download")
    _, content, _ = prepared(raw, "one-tumor", *flags)
    assert content["labels"] == {"background": 0, name: 1}
    taxonomy = Taxonomy.from_dataset_json(content)
    assert [t.name for t in taxonomy.tumors] == [name] and not taxonomy.organs


@pytest.mark.parametrize("number", ["0", "000", "²", "٣", "1000", "Dataset000_X", "Dataset٣٣٣_X"])
def test_an_id_that_is_none_is_refused(raw: Path, capsys: Any, number: str) -> None:
    LAYOUTS["one-tumor"](raw.parent / "download")
    assert main(["prepare", "one-tumor", str(raw.parent / "download"), "-d", number]) == 1
    assert "-d wants an ID from 1 to 999" in capsys.readouterr().err and not list(raw.iterdir())


def test_a_recipe_says_its_label_values(capsys: Any) -> None:
    for name, words in (
        ("LiTS", "liver = 1, liver tumor = 2"),
        ("3D-IRCADb-01", "liver tumor = livertumor*"),
        ("TotalSegmentator", "spleen, "),
    ):
        assert main(["prepare", name]) == 0
        assert words in capsys.readouterr().out


def test_an_id_in_any_folder_of_nnunet_is_taken(raw: Path, capsys: Any) -> None:
    LAYOUTS["one-tumor"](raw.parent / "download")
    for folder in ("nnUNet_preprocessed", "nnUNet_results"):
        taken = raw.parent / folder / "Dataset150_Other"
        taken.mkdir()
        assert main(["prepare", "one-tumor", str(raw.parent / "download"), "-d", "150"]) == 1
        error = capsys.readouterr().err
        assert f"belongs to {taken}" in error
        taken.rmdir()


def test_bad_arguments_are_refused(raw: Path, capsys: Any) -> None:
    root = raw.parent / "download"
    LAYOUTS["one-tumor"](root)
    (raw / "Dataset151_Taken").mkdir()
    for arguments, words in (
        (["LITSS", str(root), "-d", "150"], "there is no recipe"),
        (["lits", str(root)], "wanted both"),
        (["lits", str(root / "nowhere"), "-d", "150"], "is no folder"),
        (["KiTS23", str(root), "-d", "150", "--tumor", "x tumor"], "are for one-tumor"),
        (["one-tumor", str(root), "-d", "0x"], "wants an ID"),
        (["one-tumor", str(root), "-d", "151"], f"belongs to {raw / 'Dataset151_Taken'}"),
        (["KiTS23", str(root), "-d", "150", "--host", "kidney"], "are for one-tumor"),
    ):
        assert main(["prepare", *arguments]) == 1
        assert words in capsys.readouterr().err
    assert main(["prepare"]) == 0 and "Decathlon" in capsys.readouterr().out
    assert main(["prepare", "LiTS"]) == 0 and "NOT YET RUN on the real download" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- MSD
def decathlon(name: str, root: Path) -> Path:
    """The task's folder as unpacked, one training case and one test image."""
    recipe = recipes()[name]
    folder = root / recipe["task"]
    title = recipe["task"].split("_")[1].lower()
    training = [{"image": f"./imagesTr/{title}_001.nii.gz", "label": f"./labelsTr/{title}_001.nii.gz"}]
    nifti(folder / training[0]["image"], ct())
    nifti(folder / training[0]["label"], labels(list(recipe["written"])))
    nifti(folder / f"imagesTs/{title}_002.nii.gz", ct())
    content = {
        "name": title,
        "description": "",
        "reference": "",
        "licence": "CC-BY-SA 4.0",
        "release": "1.0",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {"0": "background", **{str(v): label for v, label in recipe["written"].items()}},
        "numTraining": 1,
        "numTest": 1,
        "training": training,
        "test": [f"./imagesTs/{title}_002.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", MSD)
def test_the_decathlon_goes_through_nnunets_own_converter(tmp_path: Path, name: str) -> None:
    from tests.commands import Workspace

    workspace = Workspace(tmp_path)
    folder = decathlon(name, tmp_path)
    workspace.run("zept", "prepare", name, folder, "-d", "150", "-np", "1")
    made = next(workspace.raw.glob("Dataset150_*"))
    content = json.loads((made / "dataset.json").read_text())
    assert list(content["labels"])[1:] == list(recipes()[name]["labels"]) and content["numTraining"] == 1
    assert len(list((made / "imagesTr").glob("*_0000.nii.gz"))) == len(list((made / "labelsTr").iterdir())) == 1
    assert len(list((made / "imagesTs").iterdir())) == 1
    assert {t.label for t in Taxonomy.from_dataset_json(content).classes} == set(recipes()[name]["labels"].values())


def test_a_decathlon_task_that_is_another_or_incomplete_is_refused(raw: Path, capsys: Any) -> None:
    folder = decathlon("MSD-Liver", raw.parent)
    assert main(["prepare", "MSD-Spleen", str(folder), "-d", "150"]) == 1
    assert "is not called Task09_Spleen" in capsys.readouterr().err
    (folder / "labelsTr/liver_001.nii.gz").unlink()
    assert main(["prepare", "MSD-Liver", str(folder), "-d", "150"]) == 1
    assert "labelsTr/liver_001.nii.gz is missing" in capsys.readouterr().err
    content = json.loads((folder / "dataset.json").read_text())
    content["labels"]["2"] = "lesion"
    (folder / "dataset.json").write_text(json.dumps(content))
    assert main(["prepare", "MSD-Liver", str(folder), "-d", "150"]) == 1
    assert "names the labels" in capsys.readouterr().err and not list(raw.iterdir())


@pytest.mark.slow
def test_a_part_of_a_decathlon_task_will_do_where_one_says_so(raw: Path, capsys: Any) -> None:
    """A case without a label and a test image that is not there are left out, the download stays as it is."""
    folder = decathlon("MSD-Spleen", raw.parent)
    content = json.loads((folder / "dataset.json").read_text())
    more = {"image": "./imagesTr/spleen_003.nii.gz", "label": "./labelsTr/spleen_003.nii.gz"}
    content |= {"training": [*content["training"], more], "numTraining": 2}
    (folder / "dataset.json").write_text(json.dumps(content))
    nifti(folder / more["image"], ct())
    (folder / "imagesTs/spleen_002.nii.gz").unlink()
    before = sorted(folder.rglob("*"))
    command = ["prepare", "MSD-Spleen", str(folder), "-d", "150", "-np", "1"]
    assert main(command) == 1
    assert "--partial" in capsys.readouterr().err and not list(raw.iterdir())
    assert main([*command, "--partial"]) == 0
    said = capsys.readouterr().out
    assert "1 cases lack a file and are left out: spleen_003.nii.gz" in said and "1 of 1 test images" in said
    (made,) = raw.iterdir()
    assert json.loads((made / "dataset.json").read_text())["numTraining"] == 1
    assert [p.name for p in (made / "imagesTr").iterdir()] == ["spleen_001_0000.nii.gz"]
    assert [p.name for p in (made / "labelsTr").iterdir()] == ["spleen_001.nii.gz"]
    assert sorted(folder.rglob("*")) == before and not list((made / "imagesTs").iterdir())


def test_decathlon_labels_are_read(raw: Path, capsys: Any) -> None:
    folder = decathlon("MSD-Spleen", raw.parent)
    path = folder / "labelsTr/spleen_001.nii.gz"
    for label, words in (
        (np.full(SHAPE, 7, np.uint8), "the values [7]"),
        (np.zeros((2, 2, 2), np.uint8), "(2, 2, 2) voxels"),
    ):
        nifti(path, label)
        assert main(["prepare", "MSD-Spleen", str(folder), "-d", "150"]) == 1
        error = capsys.readouterr().err
        assert str(path) in error and words in error and not list(raw.iterdir())
    path.write_bytes(b"none")
    assert main(["prepare", "MSD-Spleen", str(folder), "-d", "150"]) == 1
    assert f"{path} cannot be read" in capsys.readouterr().err and not list(raw.iterdir())


def test_a_decathlon_test_image_that_is_missing_is_named(raw: Path, capsys: Any) -> None:
    folder = decathlon("MSD-Spleen", raw.parent)
    (folder / "imagesTs/spleen_002.nii.gz").unlink()
    assert main(["prepare", "MSD-Spleen", str(folder), "-d", "150"]) == 1
    assert "imagesTs/spleen_002.nii.gz is missing, which dataset.json lists" in capsys.readouterr().err


@pytest.mark.slow
def test_a_decathlon_image_that_nnunet_cannot_convert_leaves_nothing(raw: Path, capsys: Any) -> None:
    folder = decathlon("MSD-Spleen", raw.parent)
    (folder / "imagesTs/spleen_002.nii.gz").write_bytes(b"none")
    assert main(["prepare", "MSD-Spleen", str(folder), "-d", "150", "-np", "1"]) == 1
    error = capsys.readouterr().err
    assert "nnUNetv2_convert_MSD_dataset" in error and "spleen_002.nii.gz" in error, error
    assert not list(raw.iterdir())
