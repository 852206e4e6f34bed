"""Merging partially labeled datasets: which class is which, what each case labels, what is refused, how it goes on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from tests.datasets.test_same_scan import patient, resampled
from tests.real_ct import data_folder, write_real_ct_dataset
from zept_nnunet.cli import main
from zept_nnunet.datasets import merge_write
from zept_nnunet.datasets.merge import Merge
from zept_nnunet.taxonomy import Taxonomy, annotated_for, annotated_patterns

SHAPE = (8, 10, 12)


def write_image(path: Path, array: np.ndarray, spacing: tuple[float, ...] = (1.0, 1.0, 2.0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))


def make(
    raw: Path, name: str, labels: dict[str, Any], cases: int = 5, zept: dict[str, Any] | None = None, **content: Any
) -> Path:
    """A raw dataset whose cases hold every label; each class fills one slice."""
    folder = raw / name
    values = sorted({v for value in labels.values() for v in (value if isinstance(value, list) else [value])})
    for i in range(cases):
        rng = np.random.default_rng([int(name[7:10]), i])
        label = np.zeros(SHAPE, np.uint8)
        for value in values:
            label[value % SHAPE[0], 2:8, 2:10] = value
        write_image(folder / "imagesTr" / f"case{i}_0000.nii.gz", rng.normal(size=SHAPE).astype(np.float32))
        write_image(folder / "labelsTr" / f"case{i}.nii.gz", label)
    dataset = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": cases, "file_ending": ".nii.gz"}
    dataset |= content | ({"zept": zept} if zept else {})
    (folder / "dataset.json").write_text(json.dumps(dataset))
    return folder


ORGANS = {"background": 0, "liver": 1, "left_kidney": 2, "right_kidney": 3}
LITS = {"background": 0, "Liver": 1, "tumor": 2}
KIDNEYS = {"background": 0, "kidney left": 1, "Right Kidney": 2, "kidney_tumour": 3}


def three(raw: Path) -> None:
    make(raw, "Dataset101_Organs", ORGANS)
    make(raw, "Dataset102_LiTS", LITS)
    make(raw, "Dataset103_Kidneys", KIDNEYS)


def merge(*flags: str) -> int:
    return main(["merge", "-d", "101", "102", "103", "-o", "110", "--no-content-check", *flags])


def merged(raw: Path) -> tuple[Path, dict[str, Any]]:
    folder = next(raw.glob("Dataset110_*"))
    return folder, json.loads((folder / "dataset.json").read_text())


def test_labels_are_matched_by_meaning_and_what_each_case_labels_is_told(raw: Path) -> None:
    three(raw)
    assert merge() == 0
    folder, content = merged(raw)
    assert list(content["labels"]) == [
        "background", "liver", "left_kidney", "right_kidney", "liver tumor", "kidney_tumour",
    ]  # fmt: skip
    taxonomy = Taxonomy.from_dataset_json(content)
    hosts = {t.name: t.hosts for t in taxonomy.tumors}
    assert hosts == {"liver tumor": ("liver",), "kidney_tumour": ("left_kidney", "right_kidney")}
    patterns = annotated_patterns(content)
    assert annotated_for("d101_case0", patterns) == ("liver", "left_kidney", "right_kidney")
    assert annotated_for("d102_case3", patterns) == ("liver", "liver tumor")
    assert set(annotated_for("d103_case3", patterns)) == {"left_kidney", "right_kidney", "kidney_tumour"}
    assert content["numTraining"] == 15 == len(content["dataset"])

    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    files = get_filenames_of_train_images_and_targets(str(folder), content)
    for case, table in (("d102_case1", {0: 0, 1: 1, 2: 4}), ("d103_case0", {0: 0, 1: 2, 2: 3, 3: 5})):
        source = raw / {"d102": "Dataset102_LiTS", "d103": "Dataset103_Kidneys"}[case[:4]]
        image = Path(files[case]["images"][0])
        assert image.resolve() == (source / "imagesTr" / f"{case[5:]}_0000.nii.gz").resolve()
        before = sitk.ReadImage(str(source / "labelsTr" / f"{case[5:]}.nii.gz"))
        after = sitk.ReadImage(str(files[case]["label"]))
        assert after.GetSpacing() == before.GetSpacing()
        wanted = np.vectorize(table.get)(sitk.GetArrayFromImage(before))
        assert np.array_equal(sitk.GetArrayFromImage(after), wanted)


@pytest.mark.filterwarnings("ignore:.*the whole body:UserWarning")
def test_labels_of_public_datasets_are_matched_by_what_they_mean_there(raw: Path) -> None:
    make(raw, "Dataset101_Organs", {"background": 0, "liver": 1, "lungs": 2})
    make(
        raw,
        "Dataset102_HepaticVessel",
        {"background": 0, "Vessel": 1, "Tumour": 2},
        zept={"dataset": "MSD Task08 HepaticVessel"},
    )
    make(raw, "Dataset103_Lung", {"background": 0, "cancer": 1}, zept={"dataset": "MSD Task06 Lung"})
    assert merge() == 0
    taxonomy = Taxonomy.from_dataset_json(merged(raw)[1])
    assert {o.name for o in taxonomy.organs} == {"liver", "lungs", "hepatic vessels"}
    assert {t.name: t.hosts for t in taxonomy.tumors} == {"liver tumor": ("liver",), "lung tumor": ("lungs",)}


def test_folds_are_stratified_by_source_and_keep_patients_together(raw: Path, tmp_path: Path) -> None:
    make(raw, "Dataset101_A", {"background": 0, "liver": 1}, cases=10)
    make(raw, "Dataset102_B", {"background": 0, "spleen": 1}, cases=5)
    for kind in ("imagesTr", "labelsTr"):  # case0 … case9 are two scans each of five patients
        for path in sorted((raw / "Dataset101_A" / kind).iterdir()):
            number = int(path.name[4])
            path.rename(path.with_name(f"p{number // 2}_{number % 2}{path.name[5:]}"))
    (tmp_path / "map.yaml").write_text('patients: {101: "^(p[0-9]+)_"}\n')
    flags = [
        "merge",
        "-d",
        "101",
        "102",
        "-o",
        "Dataset110_AB",
        "--no-content-check",
        "--map",
        str(tmp_path / "map.yaml"),
    ]
    assert main(flags) == 0
    splits = json.loads((tmp_path / "nnUNet_preprocessed" / "Dataset110_AB" / "splits_final.json").read_text())
    assert len(splits) == 5
    for fold in splits:
        assert not set(fold["train"]) & set(fold["val"]) and len(fold["train"]) + len(fold["val"]) == 15
        assert sum(c.startswith("d102") for c in fold["val"]) == 1
        patients = [c[:7] for c in fold["val"] if c.startswith("d101")]
        assert len(patients) == 2 and len(set(patients)) == 1


CONFLICTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "one holds the other": (ORGANS, {"background": 0, "kidney": 1}, "'kidney'.*may overlap"),
    "organ and tumor": (
        {"background": 0, "liver": 1, "liver mass": 2},
        {"background": 0, "liver": 1, "liver mass": 2},
        "is an organ, and",
    ),
    "two labels of one meaning": (
        {"background": 0, "liver": 1},
        {"background": 0, "liver": 1, "hepar": 2},
        "would all become",
    ),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_conflicts_are_shown_and_refused(raw: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, words = CONFLICTS[name]
    make(raw, "Dataset101_A", first)
    zept = {"organs": ["liver mass"]} if name == "organ and tumor" else None
    make(raw, "Dataset102_B", second, zept=zept)
    if name == "two labels of one meaning":
        content = json.loads((raw / "Dataset102_B/dataset.json").read_text())
        content["labels"] = {"background": 0, "liver": 1, "livers": 2}
        (raw / "Dataset102_B/dataset.json").write_text(json.dumps(content))
    assert main(["merge", "-d", "101", "102", "-o", "110", "--no-content-check"]) == 1
    error = capsys.readouterr().err
    assert re.search(words, error) and "--map" in error
    assert not list(raw.glob("Dataset110*"))


def test_a_map_settles_conflicts_and_leaves_labels_out(raw: Path, tmp_path: Path) -> None:
    make(raw, "Dataset101_Organs", ORGANS)
    make(raw, "Dataset102_B", {"background": 0, "kidney": 1, "kidney tumor": 2, "spleen": 3})
    (tmp_path / "map.yaml").write_text("labels:\n  102: {kidney: null, kidney tumor: null, spleen: milt}\n")
    assert (
        main(["merge", "-d", "101", "102", "-o", "110", "--no-content-check", "--map", str(tmp_path / "map.yaml")]) == 0
    )
    folder, content = merged(raw)
    assert list(content["labels"]) == ["background", "liver", "left_kidney", "right_kidney", "milt"]
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "labelsTr" / "d102_case0.nii.gz")))
    assert set(np.unique(label)) == {0, 4}
    assert annotated_for("d102_case0", annotated_patterns(content)) == ("milt",)


def test_a_tumor_that_is_left_out_belongs_to_its_organ_again(raw: Path, tmp_path: Path) -> None:
    make(raw, "Dataset101_Organs", ORGANS)
    make(raw, "Dataset102_LiTS", LITS)
    (tmp_path / "map.yaml").write_text("labels: {102: {tumor: null}}\n")
    assert (
        main(["merge", "-d", "101", "102", "-o", "110", "--no-content-check", "--map", str(tmp_path / "map.yaml")]) == 0
    )
    folder, _ = merged(raw)
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "labelsTr" / "d102_case0.nii.gz")))
    assert (label[1, 2:8, 2:10] == 1).all() and (label[2, 2:8, 2:10] == 1).all()


BAD_MAPS = {
    "no YAML": ("labels: {", "cannot be read as YAML"),
    "another entry": ("lables: {}", "wanted the entries"),
    "no dataset": ("labels: {x: {liver: a}}", "no dataset ID"),
    "not merged": ("labels: {104: {liver: a}}", "which are not merged"),
    "no class": ("labels: {101: {colon: a}}", "which is no class there"),
    "no group": ('patients: {101: "^p"}', "has no group"),
    "no expression": ('patients: {101: "("}', "no regular expression"),
    "a number as name": ("labels: {101: {liver: 3}}", "wants DATASET"),
}


@pytest.mark.parametrize("name", BAD_MAPS)
def test_bad_maps_are_refused(raw: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    three(raw)
    text, words = BAD_MAPS[name]
    (tmp_path / "map.yaml").write_text(text)
    assert merge("--map", str(tmp_path / "map.yaml")) == 1
    assert words in capsys.readouterr().err and not list(raw.glob("Dataset110*"))


def test_datasets_of_different_channels_are_refused(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(raw, "Dataset101_A", {"background": 0, "liver": 1})
    make(raw, "Dataset102_B", {"background": 0, "spleen": 1}, channel_names={"0": "T2"})
    assert main(["merge", "-d", "101", "102", "-o", "110"]) == 1
    assert "channels" in capsys.readouterr().err


def test_orientations_and_grids_that_differ_are_reported(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(raw, "Dataset101_A", {"background": 0, "liver": 1})
    folder = make(raw, "Dataset102_B", {"background": 0, "spleen": 1})
    path = str(folder / "imagesTr" / "case0_0000.nii.gz")
    sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(path), "RAS"), path)
    write_image(folder / "labelsTr" / "case1.nii.gz", np.zeros(SHAPE, np.uint8), (1.0, 1.0, 3.0))
    assert main(["merge", "-d", "101", "102", "-o", "110", "--no-content-check", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "stored in 2 orientations (LPS, RAS)" in said and "different grids in 2 cases: case0, case1" in said
    assert "1.00 (1.00–1.00) × 1.00 (1.00–1.00) × 2.00 (2.00–2.00)" in said
    assert not list(raw.glob("Dataset110*")) and not list(raw.glob(".zept*"))


def test_an_interrupted_merge_goes_on_and_leaves_no_half_written_case(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three(raw)
    write, written = merge_write.write_label, []

    def fails_at_the_fourth(self: Merge, source: Any, case: str, files: Any, path: Path) -> None:
        if len(written) == 3:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(case)
        write(self, source, case, files, path)

    monkeypatch.setattr(merge_write, "write_label", fails_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        merge()
    assert not list(raw.glob("Dataset110*"))

    def counts(self: Merge, source: Any, case: str, files: Any, path: Path) -> None:
        written.append(case)
        write(self, source, case, files, path)

    monkeypatch.setattr(merge_write, "write_label", counts)
    assert merge() == 0
    assert len(written) == 15, "the three that were there are not written again"
    folder, _ = merged(raw)
    assert len(list((folder / "labelsTr").iterdir())) == 15 and not list(raw.glob(".zept_merge*"))
    assert all(sitk.ReadImage(str(p)).GetSize() == SHAPE[::-1] for p in (folder / "labelsTr").iterdir())
    assert merge() == 0 and len(written) == 15  # it is there


def test_another_dataset_under_that_id_is_left_alone(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    three(raw)
    taken = make(raw, "Dataset110_Mine", LITS)
    assert merge() == 1 and "belongs to Dataset110_Mine" in capsys.readouterr().err
    assert merge("-o", "Dataset110_Mine") == 1 and "is not what this merge would make" in capsys.readouterr().err
    assert json.loads((taken / "dataset.json").read_text())["labels"] == LITS


def test_patterns_unseen_tumors_and_descriptions_of_the_datasets_carry_over(raw: Path) -> None:
    zept = {
        "annotated": {"case0": ["liver"]},
        "unseen": {"spleen tumor": {"hosts": ["spleen"], "label": 3}, "liver tumor": {"hosts": ["liver"]}},
        "knowledge": {"spleen": "An organ."},
    }
    make(raw, "Dataset101_A", {"background": 0, "liver": 1, "spleen": 2}, zept=zept)
    make(raw, "Dataset102_LiTS", LITS)
    assert main(["merge", "-d", "101", "102", "-o", "110", "--no-content-check"]) == 0
    _, content = merged(raw)
    assert content["zept"]["unseen"] == {"spleen tumor": {"hosts": ["spleen"]}}  # the other one is labeled now
    assert content["zept"]["knowledge"] == {"spleen": "An organ."}
    patterns = annotated_patterns(content)
    assert annotated_for("d101_case0", patterns) == ("liver",)
    assert annotated_for("d101_case1", patterns) == ("liver", "spleen")


def test_memory_does_not_grow_with_the_number_of_cases(raw: Path) -> None:
    """The peak of writing 40 cases is that of 5, but for names and paths."""
    import tracemalloc

    peaks = []
    for number, cases in ((101, 5), (103, 40)):
        make(raw, f"Dataset{number}_A", {"background": 0, "liver": 1}, cases)
        make(raw, f"Dataset{number + 1}_B", {"background": 0, "spleen": 1}, cases)
        tracemalloc.start()
        ids = [str(number), str(number + 1)]
        assert main(["merge", "-d", *ids, "-o", str(number + 10), "--no-content-check"]) == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    per_case = np.prod(SHAPE) * 8
    assert peaks[1] - peaks[0] < 70 * per_case / 2


# ---------------------------------------------------------------------------------------------------- content
def with_scans(raw: Path, tests: bool = False) -> None:
    """Dataset 102's case2 is a resampled scan of dataset 101; with `tests` its test image is another one."""
    for number, organ in ((101, "liver"), (102, "spleen")):
        folder = make(raw, f"Dataset{number}_S", {"background": 0, organ: 1})
        for i in range(5):
            is_same = (number, i) == (102, 2)
            image = resampled(patient(1011), (3.0, 2.5, 2.5)) if is_same else patient(number * 10 + i, (40, 60, 60))
            image = patient(1011) if (number, i) == (101, 1) else image
            sitk.WriteImage(image, str(folder / "imagesTr" / f"case{i}_0000.nii.gz"))
            label = sitk.Image(image.GetSize(), sitk.sitkUInt8) + 1
            label.CopyInformation(image)
            sitk.WriteImage(label, str(folder / "labelsTr" / f"case{i}.nii.gz"))
    if tests:
        (raw / "Dataset101_S" / "imagesTs").mkdir()
        sitk.WriteImage(resampled(patient(1011), (2.0, 2.5, 4.0)), str(raw / "Dataset101_S/imagesTs/t0_0000.nii.gz"))


def test_the_same_scan_of_two_datasets_stays_in_one_fold(raw: Path, tmp_path: Path, capsys: Any) -> None:
    with_scans(raw)
    assert main(["merge", "-d", "101", "102", "-o", "110"]) == 0
    assert "d101_case1 = d102_case2" in capsys.readouterr().out
    _, content = merged(raw)
    assert content["zept_merge"]["same_scans"] == {"d102_case2": "d101_case1"}
    folder = next((tmp_path / "nnUNet_preprocessed").iterdir())
    for fold in json.loads((folder / "splits_final.json").read_text()):
        assert ("d101_case1" in fold["val"]) == ("d102_case2" in fold["val"])


def test_a_training_scan_among_the_test_scans_is_refused_unless_allowed_by_name(raw: Path, capsys: Any) -> None:
    with_scans(raw, tests=True)
    assert main(["merge", "-d", "101", "102", "-o", "110"]) == 1
    error = capsys.readouterr().err
    assert "test Dataset101_S/t0" in error and "--allow-overlap Dataset101_S" in error
    assert not list(raw.glob("Dataset110*"))
    assert main(["merge", "-d", "101", "102", "-o", "110", "--allow-overlap", "101"]) == 0


# ---------------------------------------------------------------------------------------------------- organs of a model
def organ_masks(raw: Path, as_files: bool) -> Path:
    """TotalSegmentator's output for a dataset with tumors alone: liver in the upper half."""
    make(raw, "Dataset101_Tumors", {"background": 0, "liver tumor": 1}, zept={"tumors": {"liver tumor": {"hosts": []}}})
    folder = raw.parent / "totalsegmentator"
    for i in range(5):
        mask = np.zeros(SHAPE, np.uint8)
        mask[:4] = 1
        if as_files:
            write_image(folder / f"case{i}" / "liver.nii.gz", mask)
        else:
            write_image(folder / f"case{i}.nii.gz", mask * 5)
    return folder


@pytest.mark.parametrize("as_files", [True, False])
def test_organs_of_totalsegmentator_lie_under_the_tumors_and_are_called_a_models(raw: Path, as_files: bool) -> None:
    folder = organ_masks(raw, as_files)
    flags = ["merge", "-d", "101", "-o", "110", "--no-content-check", "--organs-from", str(folder)]
    assert main(flags) == 0
    target, content = merged(raw)
    assert content["labels"] == {"background": 0, "liver": 1, "liver tumor": 2}
    assert content["zept"]["tumors"] == {"liver tumor": {"hosts": ["liver"]}}
    record = content["zept_merge"]["sources"]["Dataset101_Tumors"]["organs_from"]
    assert record["made_by"] == "a model" and record["structures"] == ["liver"]
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(target / "labelsTr" / "d101_case0.nii.gz")))
    tumor = np.zeros(SHAPE, bool)
    tumor[1, 2:8, 2:10] = True
    assert np.array_equal(label == 2, tumor)
    assert (label[:4][~tumor[:4]] == 1).all() and not label[4:].any()


def test_masks_that_are_missing_or_on_another_grid_are_named(raw: Path, capsys: Any) -> None:
    folder = organ_masks(raw, True)
    flags = ["merge", "-d", "101", "-o", "110", "--no-content-check", "--organs-from", str(folder)]
    assert main([*flags, "--organs", "gizzard"]) == 1 and "gizzard" in capsys.readouterr().err
    write_image(folder / "case3" / "liver.nii.gz", np.zeros((3, 4, 5), np.uint8))
    assert main(flags) == 1 and str(Path("case3") / "liver.nii.gz") in capsys.readouterr().err
    (folder / "case3" / "liver.nii.gz").unlink()
    assert main(flags) == 1 and "is missing" in capsys.readouterr().err
    assert not list(raw.glob("Dataset110*"))


# ---------------------------------------------------------------------------------------------------- real CT
@pytest.mark.slow
@pytest.mark.skipif(not data_folder("abdomen_ct").is_dir(), reason=f"no real CT at {data_folder('abdomen_ct')}")
def test_a_real_ct_with_synthetic_lesions_is_merged_with_the_phantom(raw: Path, capsys: Any) -> None:
    real = write_real_ct_dataset(raw, 101, cases=3)
    assert main(["phantom", "-d", "102", "--size", "tiny"]) == 0
    phantom = next(raw.glob("Dataset102_*"))
    assert main(["merge", "-d", "101", "102", "-o", "110"]) == 1
    assert "d101_synthetic_lesions_00 = test" in capsys.readouterr().err, "the test case is what was deformed"
    assert main(["merge", "-d", "101", "102", "-o", "110", "--allow-overlap", "101"]) == 0
    assert "are test scans too (allowed)" in capsys.readouterr().out
    folder, content = merged(raw)
    labels = content["labels"]
    assert {"liver", "kidney left", "liver synthetic lesion", "liver tumor", "pancreas"} <= set(labels)
    patterns = annotated_patterns(content)
    real_case, phantom_case = (next(c for c in content["dataset"] if c.startswith(f"d{i}_")) for i in (101, 102))
    assert "pancreas" not in annotated_for(real_case, patterns)
    assert "liver synthetic lesion" not in annotated_for(phantom_case, patterns)
    for case, source in ((real_case, real), (phantom_case, phantom)):
        own = json.loads((source / "dataset.json").read_text())["labels"]
        before = sitk.GetArrayFromImage(sitk.ReadImage(str(source / "labelsTr" / f"{case[5:]}.nii.gz")))
        after = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "labelsTr" / f"{case}.nii.gz")))
        for name, value in own.items():
            assert np.array_equal(before == value, after == labels[name]), name
