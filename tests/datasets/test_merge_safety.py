"""What a merge checks before and while it writes: files, grids, folds, test scans, reruns."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from tests.datasets.test_merge import LITS, ORGANS, SHAPE, make, merged, organ_masks, with_scans, write_image
from zept_nnunet.cli import main
from zept_nnunet.datasets import merge_write
from zept_nnunet.datasets.merge import Merge

LIVER, SPLEEN = {"background": 0, "liver": 1}, {"background": 0, "spleen": 1}


def run(*flags: str, datasets: tuple[str, ...] = ("101", "102")) -> int:
    return main(["merge", "-d", *datasets, "-o", "110", "--no-content-check", *flags])


def two(raw: Path, cases: int = 5) -> tuple[Path, Path]:
    return make(raw, "Dataset101_A", LIVER, cases), make(raw, "Dataset102_B", SPLEEN, cases)


def nothing_is_left(raw: Path) -> bool:
    return not list(raw.glob("Dataset110*")) and not list((raw.parent / "nnUNet_preprocessed").rglob("*.json"))


# ---------------------------------------------------------------------------------------------------- reruns
def change_label(folder: Path) -> None:
    label = np.zeros(SHAPE, np.uint8)
    label[5:7] = 1
    write_image(folder / "labelsTr" / "case0.nii.gz", label)


def change_block(folder: Path) -> None:
    content = json.loads((folder / "dataset.json").read_text())
    content["zept"] = {"knowledge": {"liver": "Brown."}}
    (folder / "dataset.json").write_text(json.dumps(content))


@pytest.mark.parametrize("change", [change_label, change_block])
def test_a_source_that_changed_is_merged_anew(raw: Path, change: Any, capsys: Any) -> None:
    first, _ = two(raw)
    assert run() == 0
    target, before = merged(raw)
    written = target.stat().st_ino
    capsys.readouterr()
    assert run() == 0 and "were there already" in capsys.readouterr().out
    assert target.stat().st_ino == written
    change(first)
    assert run() == 0 and "changed since" in capsys.readouterr().out
    _, after = merged(raw)
    if change is change_block:
        assert after["zept"]["knowledge"] == {"liver": "Brown."}
    else:
        label = sitk.GetArrayFromImage(sitk.ReadImage(str(target / "labelsTr" / "d101_case0.nii.gz")))
        assert (label[5:7] == 1).all() and not label[1].any()
    assert not list(raw.glob(".zept*")) and before["dataset"] == after["dataset"]


def test_an_interrupted_merge_takes_no_label_of_a_source_that_changed(raw: Path, monkeypatch: Any) -> None:
    first, _ = two(raw)
    write, written = merge_write.write_label, []

    def stops(self: Merge, source: Any, case: str, files: Any, path: Path) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(case)
        write(self, source, case, files, path)

    monkeypatch.setattr(merge_write, "write_label", stops)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(merge_write, "write_label", write)
    change_label(first)
    os.utime(first / "labelsTr" / "case0.nii.gz", (time.time() + 9, time.time() + 9))
    assert run() == 0
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(merged(raw)[0] / "labelsTr" / "d101_case0.nii.gz")))
    assert (label[5:7] == 1).all()


# ---------------------------------------------------------------------------------------------------- before writing
def test_a_taken_target_is_refused_in_the_dry_run(raw: Path, capsys: Any) -> None:
    two(raw)
    make(raw, "Dataset110_Mine", LITS)
    assert run("-o", "Dataset110_Mine", "--dry-run") == 1
    assert "is not what this merge would make" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["labelsTr/case2.nii.gz", "imagesTr/case2_0000.nii.gz"])
def test_a_file_that_is_broken_is_named_in_the_dry_run(raw: Path, what: str, capsys: Any) -> None:
    first, _ = two(raw)
    (first / what).write_bytes(b"broken")
    for flags in (["--dry-run"], []):
        assert run(*flags) == 1
        assert what in capsys.readouterr().err
    assert nothing_is_left(raw)


def test_a_label_that_is_missing_is_named_in_the_dry_run(raw: Path, capsys: Any) -> None:
    first, _ = two(raw)
    (first / "labelsTr/case2.nii.gz").unlink()
    assert run("--dry-run") == 1
    assert "case2.nii.gz" in capsys.readouterr().err


def test_a_label_that_ends_too_early_is_named(raw: Path, capsys: Any) -> None:
    first, _ = two(raw)
    path = first / "labelsTr" / "case2.nii.gz"
    rng = np.random.default_rng(0)
    write_image(path, rng.integers(0, 2, (30, 40, 50)).astype(np.uint8))
    write_image(first / "imagesTr" / "case2_0000.nii.gz", np.zeros((30, 40, 50), np.float32))
    path.write_bytes(path.read_bytes()[:2000])
    assert run() == 1
    assert "case2.nii.gz" in capsys.readouterr().err and nothing_is_left(raw)


def moved(path: Path, what: str) -> None:
    image = sitk.ReadImage(str(path))
    if what == "origin":
        image.SetOrigin((30.0, 0.0, 0.0))
    elif what == "spacing":
        image.SetSpacing((1.0, 1.0, 4.0))
    else:
        image.SetDirection((-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0))
    sitk.WriteImage(image, str(path))


@pytest.mark.parametrize("what", ["origin", "spacing", "direction"])
def test_a_label_on_another_grid_than_its_image_is_reported(raw: Path, what: str, capsys: Any) -> None:
    first, _ = two(raw)
    moved(first / "labelsTr" / "case3.nii.gz", what)
    assert run("--dry-run") == 0
    assert "different grids in 1 cases: case3" in capsys.readouterr().out


@pytest.mark.parametrize("as_files", [True, False])
@pytest.mark.parametrize("what", ["origin", "spacing", "direction", "broken"])
def test_masks_on_another_grid_are_refused_in_the_dry_run(raw: Path, as_files: bool, what: str, capsys: Any) -> None:
    folder = organ_masks(raw, as_files)
    path = folder / "case3" / "liver.nii.gz" if as_files else folder / "case3.nii.gz"
    if what == "broken":
        path.write_bytes(b"broken")
    else:
        moved(path, what)
    assert run("--organs-from", str(folder), "--dry-run", datasets=("101",)) == 1
    assert str(path) in capsys.readouterr().err


def test_values_that_the_model_does_not_have_are_refused(raw: Path, capsys: Any) -> None:
    folder = organ_masks(raw, False)
    write_image(folder / "case3.nii.gz", np.full(SHAPE, 200, np.uint8))
    assert run("--organs-from", str(folder), datasets=("101",)) == 1
    error = capsys.readouterr().err
    assert "200" in error and "case3.nii.gz" in error and nothing_is_left(raw)


def test_an_organ_that_is_empty_in_every_case_is_told(raw: Path, capsys: Any) -> None:
    folder = organ_masks(raw, False)
    flags = ["--organs-from", str(folder), "--organs", "liver", "spleen"]
    assert run(*flags, datasets=("101",)) == 0
    said = capsys.readouterr().out
    assert re.search(r"WARNING: .*spleen", said) and not re.search(r"WARNING: .*liver", said)


# ---------------------------------------------------------------------------------------------------- folds
def test_datasets_of_fewer_cases_than_folds_are_merged(raw: Path, capsys: Any) -> None:
    two(raw, cases=3)
    assert run() == 0
    assert "fewer cases than folds" in capsys.readouterr().out
    splits = json.loads(next((raw.parent / "nnUNet_preprocessed").rglob("splits_final.json")).read_text())
    assert len(splits) == 5 and sorted(c for s in splits for c in s["val"]) == sorted(merged(raw)[1]["dataset"])


def test_fewer_cases_than_folds_in_all_are_as_many_folds(raw: Path, capsys: Any) -> None:
    two(raw, cases=2)
    assert run() == 0
    assert "4 folds" in capsys.readouterr().out
    splits = json.loads(next((raw.parent / "nnUNet_preprocessed").rglob("splits_final.json")).read_text())
    assert [len(s["val"]) for s in splits] == [1, 1, 1, 1]


def test_folds_that_cannot_be_read_are_named(raw: Path, capsys: Any) -> None:
    two(raw)
    path = raw.parent / "nnUNet_preprocessed" / "Dataset110_Merged101102" / "splits_final.json"
    path.parent.mkdir()
    path.write_text('[{"train": ')
    for flags in (["--dry-run"], []):
        assert run(*flags) == 1
        assert str(path) in capsys.readouterr().err


def test_the_folds_are_there_before_the_dataset(raw: Path, monkeypatch: Any) -> None:
    two(raw)
    rename, seen = Path.rename, []

    def watch(self: Path, target: Any) -> Path:
        if Path(target).name.startswith("Dataset110"):
            seen.append(json.loads(next((raw.parent / "nnUNet_preprocessed").rglob("splits_final.json")).read_text()))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watch)
    assert run() == 0
    assert len(seen) == 1 and len(seen[0]) == 5
    assert [p.name for p in (raw.parent / "nnUNet_preprocessed" / "Dataset110_Merged101102").iterdir()] == [
        "splits_final.json"
    ]


# ---------------------------------------------------------------------------------------------------- test scans
def test_test_scans_kept_as_training_images_are_compared(raw: Path, capsys: Any) -> None:
    with_scans(raw)
    (raw / "Dataset102_S").rename(raw / "Dataset103_S")
    make(raw, "Dataset102_S", ORGANS)
    assert main(["merge", "-d", "101", "102", "-o", "110", "--test", "103"]) == 1
    error = capsys.readouterr().err
    assert "d101_case1 = test Dataset103_S" in error and "--allow-overlap Dataset103_S" in error


def test_a_test_dataset_without_scans_or_description_is_refused(raw: Path, capsys: Any) -> None:
    two(raw)
    flags = ["merge", "-d", "101", "102", "-o", "110", "--dry-run", "--test", "103"]
    (raw / "Dataset103_T").mkdir()
    assert main(flags) == 1 and "Dataset103_T" in capsys.readouterr().err
    content = {"channel_names": {"0": "CT"}, "labels": LIVER, "numTraining": 0, "file_ending": ".nii.gz"}
    (raw / "Dataset103_T" / "dataset.json").write_text(json.dumps(content))
    assert main(flags) == 1 and "holds no scan" in capsys.readouterr().err


def test_small_scans_are_compared_by_their_voxels_and_counted(raw: Path, capsys: Any) -> None:
    first, second = two(raw)
    path = second / "imagesTr" / "case4_0000.nii.gz"
    path.write_bytes((first / "imagesTr" / "case1_0000.nii.gz").read_bytes())
    assert main(["merge", "-d", "101", "102", "-o", "110"]) == 0
    said = capsys.readouterr().out
    assert "d101_case1 = d102_case4" in said and "10 scans" in said
    assert merged(raw)[1]["zept_merge"]["same_scans"] == {"d102_case4": "d101_case1"}


def test_every_overlap_is_listed(raw: Path, capsys: Any) -> None:
    first, _ = two(raw, cases=12)
    (first / "imagesTs").mkdir()
    for path in (first / "imagesTr").iterdir():
        (first / "imagesTs" / path.name.replace("case", "t")).write_bytes(path.read_bytes())
    assert main(["merge", "-d", "101", "102", "-o", "110", "--dry-run"]) == 1
    assert capsys.readouterr().err.count(" = test Dataset101_A/t") == 12


# ---------------------------------------------------------------------------------------------------- names of datasets
def test_a_dataset_of_another_name_is_refused(raw: Path, capsys: Any) -> None:
    two(raw)
    assert run(datasets=("Dataset101_Wrong", "102")) == 1
    assert "'Dataset101_Wrong' names 0 datasets" in capsys.readouterr().err


def test_a_dataset_without_file_ending_is_refused(raw: Path, capsys: Any) -> None:
    first, _ = two(raw)
    content = json.loads((first / "dataset.json").read_text())
    del content["file_ending"]
    (first / "dataset.json").write_text(json.dumps(content))
    assert run("--dry-run") == 1
    assert "file_ending" in capsys.readouterr().err


def test_the_reader_is_chosen_once_for_each_dataset(raw: Path, monkeypatch: Any) -> None:
    from nnunetv2.imageio import reader_writer_registry

    two(raw)
    choose, chosen = reader_writer_registry.determine_reader_writer_from_dataset_json, []

    def counts(dataset_json: Any, example: Any = None, **more: Any) -> Any:
        chosen.append(example)
        return choose(dataset_json, example, **more)

    monkeypatch.setattr(reader_writer_registry, "determine_reader_writer_from_dataset_json", counts)
    assert run() == 0
    assert len(chosen) == 2
