"""`zept evaluate` on what `zept add-tumor` and `zept predict --save_scores` have written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from sklearn.metrics import roc_auc_score

import zept_nnunet.trainers
from tests.inference.model_folder import make_model_folder
from zept_nnunet.cli import main
from zept_nnunet.inference.add_tumor import TumorRequest, add_tumors

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # nnU-Net's own warnings, in its predictor


def test_predictions_with_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", str(Path(zept_nnunet.trainers.__path__[0])))
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    axes = {"transpose_forward": [2, 0, 1], "transpose_backward": [1, 2, 0]}
    folder = make_model_folder(tmp_path / "model", **axes)
    model = add_tumors(folder, [TumorRequest("pancreas tumor", ("pancreas",))]).folder
    images, predictions, references = (tmp_path / n for n in ("images", "predictions", "references"))
    images.mkdir()
    references.mkdir()
    image = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=(22, 16, 20)).astype(np.float32))
    image.SetSpacing((1.0, 0.8, 1.5))
    image.SetDirection((0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0))
    sitk.WriteImage(image, str(images / "a_0000.nii.gz"))
    flags = "-f 0 -device cpu -npp 1 -nps 1 --disable_progress_bar --save_scores".split()
    command = ["predict", "-i", str(images), "-o", str(predictions), "-m", str(model), *flags]
    assert main(command) == 0

    reference = np.zeros((22, 16, 20), dtype=np.uint8)
    reference[4:15, 3:12, 2:18] = 3
    reference[6:9, 5:8, 5:9] = 6  # the added tumor
    reference[10:13, 5:8, 10:14] = 4
    written = sitk.GetImageFromArray(reference)
    written.CopyInformation(image)
    sitk.WriteImage(written, str(references / "a.nii.gz"))
    out = tmp_path / "out"
    assert main(["evaluate", "-r", str(references), "-i", str(predictions), "-o", str(out), "--bootstrap", "5"]) == 0

    classes = json.loads((out / "summary.json").read_text())["classes"]
    assert [n for n, c in classes.items() if not c["seen"]] == ["pancreas tumor"]
    assert classes["pancreas tumor"]["host_values"] == [3, 6]
    rows = pd.read_csv(out / "metrics.csv").set_index(["case", "class", "scope", "metric"])["value"]
    scores = np.load(predictions / "a_scores.npz")
    predicted = sitk.GetArrayFromImage(sitk.ReadImage(str(predictions / "a.nii.gz")))
    for name, value in (("pancreas tumor", 6), ("liver_tumor", 4)):
        truth, prediction = reference == value, predicted == value
        logits = scores["logits"][scores["classes"].tolist().index(name)].astype(float)
        assert rows["a", name, "volume", "auroc"] == pytest.approx(
            roc_auc_score(truth.ravel(), logits.ravel()), abs=1e-6
        )
        dice = 2 * (truth & prediction).sum() / (truth.sum() + prediction.sum())
        assert rows["a", name, "volume", "dsc"] == pytest.approx(dice, abs=1e-6)
