"""On one real CT: organs come out where they are."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from tests.commands import Workspace
from tests.real_ct import NAMES, ORGANS, data_folder, write_real_ct_dataset

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not data_folder("abdomen_ct").is_dir(),
        reason=f"no real CT at {data_folder('abdomen_ct')}; see tests/real_ct.py",
    ),
]
MIN_DICE = 0.6  # one patient, minutes of training: where the organs are, not how exactly


def test_organs_of_a_real_ct_come_out_where_they_are(workspace: Workspace, tmp_path: Path) -> None:
    folder = write_real_ct_dataset(workspace.raw, 910, cases=8)
    workspace.run("zept", "plan", "-d", "910", "-pl", "ZePTSmallPlanner", "-c", "3d_fullres", "-np", "1", "-npfp", "1")
    workspace.train(910, "3d_fullres", "0", "ZePTTrainerRealCT", "-p", "ZePTSmallPlans")
    workspace.run(
        "nnUNetv2_predict", "-i", folder / "imagesTs", "-o", tmp_path / "pred", "-d", "910", "-tr", "ZePTTrainerRealCT",
        "-p", "ZePTSmallPlans", "-c", "3d_fullres", "-f", "0", "-device", "cpu", "-npp", "1", "-nps", "1",
        "--disable_tta",
    )  # fmt: skip
    predicted, reference = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(p / "original.nii.gz")))
        for p in (tmp_path / "pred", folder / "labelsTs")
    )
    dice = {}
    for organ in ORGANS:
        a, b = predicted == NAMES.index(organ) + 1, reference == NAMES.index(organ) + 1
        dice[organ] = round(2 * float((a & b).sum()) / max(1, int(a.sum() + b.sum())), 3)
    print(f"real CT, Dice per organ: {dice}")
    if "ZEPT_TEST_PICTURES" in os.environ:
        _draw(folder, predicted, Path(os.environ["ZEPT_TEST_PICTURES"]) / "real_ct.png")
    assert {organ: d for organ, d in dice.items() if d < MIN_DICE} == {}, dice


def _draw(folder: Path, predicted: np.ndarray, file: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    hu = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "imagesTs" / "original_0000.nii.gz")))
    reference = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "labelsTs" / "original.nii.gz")))
    figure, axes = plt.subplots(3, 3, figsize=(12, 12))
    slices = np.argsort([-(reference[z] > 0).sum() for z in range(len(hu))])[:12:4]
    for row, z in zip(axes, slices, strict=True):
        for ax, overlay, title in zip(
            row, (None, reference, predicted), ("CT", "reference", "prediction"), strict=True
        ):
            ax.imshow(hu[z][::-1, ::-1], cmap="gray", vmin=-175, vmax=250)
            if overlay is not None:
                shown = np.ma.masked_equal(overlay[z][::-1, ::-1], 0)
                ax.imshow(shown, cmap="tab10", vmin=0, vmax=9, alpha=0.6, interpolation="nearest")
            ax.set_title(f"{title}, slice {z}")
            ax.axis("off")
    figure.suptitle("real CT (one patient), trained on deformed copies with synthetic lesions")
    figure.savefig(file, dpi=70)
    plt.close(figure)
