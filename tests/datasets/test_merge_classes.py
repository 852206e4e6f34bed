"""Which class of a merge is which: names, hosts, left-out tumors, descriptions and vectors that carry over."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from tests.datasets.test_merge import KIDNEYS, LITS, ORGANS, SHAPE, make, merged, write_image
from zept_nnunet.cli import main
from zept_nnunet.declarations import annotated_patterns
from zept_nnunet.taxonomy import Taxonomy, annotated_for

LIVER = {"background": 0, "liver": 1}


def run(*flags: str, datasets: tuple[str, ...] = ("101", "102")) -> int:
    return main(["merge", "-d", *datasets, "-o", "110", "--no-content-check", *flags])


def with_map(raw: Path, text: str) -> tuple[str, str]:
    path = raw.parent / "map.yaml"
    path.write_text(text)
    return "--map", str(path)


def hosts_of(raw: Path) -> dict[str, tuple[str, ...]]:
    return {t.name: t.hosts for t in Taxonomy.from_dataset_json(merged(raw)[1]).tumors}


def test_a_tumor_that_is_left_out_belongs_to_the_nearest_of_its_hosts(raw: Path) -> None:
    make(raw, "Dataset101_Organs", ORGANS)
    folder = make(raw, "Dataset102_Kidneys", KIDNEYS)
    label = np.zeros(SHAPE, np.uint8)  # left kidney, a tumor beside it, a gap, a tumor beside the right kidney
    label[:, :, 0:2], label[:, :, 2:4], label[:, :, 8:10], label[:, :, 10:12] = 1, 3, 3, 2
    write_image(folder / "labelsTr" / "case0.nii.gz", label)
    assert run(*with_map(raw, "labels: {102: {kidney_tumour: null}}")) == 0
    target, content = merged(raw)
    result = sitk.GetArrayFromImage(sitk.ReadImage(str(target / "labelsTr" / "d102_case0.nii.gz")))
    left, right = content["labels"]["left_kidney"], content["labels"]["right_kidney"]
    assert (result[:, :, 0:4] == left).all() and (result[:, :, 8:12] == right).all() and not result[:, :, 4:8].any()
    assert set(annotated_for("d102_case0", annotated_patterns(content)) or ()) == {"left_kidney", "right_kidney"}


NAMES = {
    "two classes of one name": ("{101: {liver tumor: tumor}, 102: {spleen tumor: tumor}}", "two classes.*'tumor'"),
    "background": ("{101: {liver: background}}", "'background' is not a name for a class"),
    "ignore": ("{101: {liver: Ignore}}", "'Ignore' is not a name for a class"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dry", [True, False])
def test_names_that_no_dataset_could_have_are_refused(raw: Path, name: str, dry: bool, capsys: Any) -> None:
    make(raw, "Dataset101_A", {"background": 0, "liver": 1, "liver tumor": 2}, cases=2)
    make(raw, "Dataset102_B", {"background": 0, "spleen": 1, "spleen tumor": 2}, cases=2)
    text, words = NAMES[name]
    assert run(*with_map(raw, f"labels: {text}"), *(["--dry-run"] if dry else [])) == 1
    assert re.search(words, capsys.readouterr().err)
    assert not list(raw.glob("Dataset110*"))


WHOLE_BODY = {"tumors": {"lesion": {"hosts": []}}}


def test_declared_hosts_of_the_whole_body_stay(raw: Path) -> None:
    make(raw, "Dataset101_A", LIVER)
    make(raw, "Dataset102_B", {"background": 0, "lesion": 1}, zept=WHOLE_BODY)
    assert run() == 0
    assert hosts_of(raw) == {"lesion": ()}


def test_a_tumor_that_names_its_organ_gets_it_where_its_own_dataset_has_none(raw: Path) -> None:
    make(raw, "Dataset101_A", {"background": 0, "liver": 1, "spleen": 2})
    zept = {"tumors": {"hepatic lesion": {"hosts": []}}}
    make(raw, "Dataset102_B", {"background": 0, "hepatic lesion": 1}, zept=zept)
    assert run() == 0
    assert hosts_of(raw) == {"hepatic lesion": ("liver",)}


def test_a_lesion_of_nowhere_in_two_datasets_is_a_conflict_that_a_map_settles(raw: Path, capsys: Any) -> None:
    make(raw, "Dataset101_A", LIVER)
    make(raw, "Dataset102_B", {"background": 0, "lesion": 1}, zept=WHOLE_BODY)
    make(raw, "Dataset103_C", {"background": 0, "lesion": 1}, zept=WHOLE_BODY)
    three = ("101", "102", "103")
    assert run(datasets=three) == 1
    error = capsys.readouterr().err
    assert "'lesion' of Dataset103_C" in error and "--map" in error
    settled = with_map(raw, "labels: {102: {lesion: liver tumor}, 103: {lesion: lesion}}")
    assert run(*settled, datasets=three) == 0
    assert hosts_of(raw) == {"liver tumor": ("liver",), "lesion": ()}


@pytest.mark.filterwarnings("ignore:.*the whole body:UserWarning")
def test_a_generic_tumor_whose_dataset_says_nothing_of_organs_is_a_conflict(raw: Path, capsys: Any) -> None:
    make(raw, "Dataset101_A", LIVER)
    make(raw, "Dataset102_B", {"background": 0, "tumor": 1})
    assert run() == 1
    assert "'tumor' of Dataset102_B" in capsys.readouterr().err
    assert run(*with_map(raw, "labels: {102: {tumor: liver tumor}}")) == 0
    assert hosts_of(raw) == {"liver tumor": ("liver",)}


def test_patterns_that_disagree_are_refused_in_the_dry_run(raw: Path, capsys: Any) -> None:
    make(raw, "Dataset101_A", LITS, zept={"annotated": {"case*": ["liver"], "*0": ["liver", "tumor"]}})
    make(raw, "Dataset102_B", LIVER)
    assert run("--dry-run") == 1
    assert "disagree" in capsys.readouterr().err


def test_the_merged_labels_have_no_gap(raw: Path) -> None:
    make(raw, "Dataset101_A", LITS)
    make(raw, "Dataset102_B", KIDNEYS)
    assert run() == 0
    labels = json.loads((merged(raw)[0] / "dataset.json").read_text())["labels"]
    assert sorted(labels.values()) == list(range(len(labels)))
