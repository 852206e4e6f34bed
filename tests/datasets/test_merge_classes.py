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
from zept_nnunet.taxonomy import annotated_for


def run(*flags: str, datasets: tuple[str, ...] = ("101", "102")) -> int:
    return main(["merge", "-d", *datasets, "-o", "110", "--no-content-check", *flags])


def with_map(raw: Path, text: str) -> tuple[str, str]:
    path = raw.parent / "map.yaml"
    path.write_text(text)
    return "--map", str(path)


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
    "but for its spelling": ("{101: {liver: the_organ}, 102: {spleen: the organ tumour}}", None),
    "background": ("{101: {liver: background}}", "'background' is not a name for a class"),
    "ignore": ("{101: {liver: Ignore}}", "'Ignore' is not a name for a class"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dry", [True, False])
def test_names_that_no_dataset_could_have_are_refused(raw: Path, name: str, dry: bool, capsys: Any) -> None:
    make(raw, "Dataset101_A", {"background": 0, "liver": 1, "liver tumor": 2}, cases=2)
    make(raw, "Dataset102_B", {"background": 0, "spleen": 1, "spleen tumor": 2}, cases=2)
    text, words = NAMES[name]
    assert run(*with_map(raw, f"labels: {text}"), *(["--dry-run"] if dry else [])) == (0 if words is None else 1)
    assert words is None or re.search(words, capsys.readouterr().err)
    assert dry or bool(list(raw.glob("Dataset110*"))) == (words is None)


def test_the_merged_labels_have_no_gap(raw: Path) -> None:
    make(raw, "Dataset101_A", LITS)
    make(raw, "Dataset102_B", KIDNEYS)
    assert run() == 0
    labels = json.loads((merged(raw)[0] / "dataset.json").read_text())["labels"]
    assert sorted(labels.values()) == list(range(len(labels)))
