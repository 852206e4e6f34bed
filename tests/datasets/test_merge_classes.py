"""Which class of a merge is which: names, hosts, left-out tumors, descriptions and vectors that carry over."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from tests.datasets.test_merge import KIDNEYS, ORGANS, SHAPE, make, merged, write_image
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
