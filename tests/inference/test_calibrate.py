"""A threshold that was chosen is the one that nnU-Net's own predictor decodes by."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import cc3d
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

import zept_nnunet.trainers
from tests.inference.model_folder import make_model_folder, read_json
from zept_nnunet.cli import main
from zept_nnunet.evaluation.ranking import decode, encode
from zept_nnunet.inference import calibrate
from zept_nnunet.inference.add_tumor import TumorRequest, add_tumors
from zept_nnunet.inference.remove_tumor import remove_tumors
from zept_nnunet.network.heads import at_thresholds

pytestmark = pytest.mark.filterwarnings("default")  # nnU-Net's own, in its predictor and its workers
TUMORS = ("liver_tumor", "spleen_tumor", "pancreas tumor")
FLAGS = ("-device", "cpu", "-npp", "1", "-nps", "1", "--disable_progress_bar", "--disable_tta")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", str(Path(zept_nnunet.trainers.__path__[0])))
    monkeypatch.setenv("nnUNet_def_n_proc", "1")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return add_tumors(make_model_folder(tmp_path), [TumorRequest("pancreas tumor", ("pancreas",))]).folder


def write_images(folder: Path, cases: str) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for case in cases:
        image = sitk.GetImageFromArray(rng.normal(size=(18, 20, 16)).astype(np.float32))
        sitk.WriteImage(image, str(folder / f"{case}_0000.nii.gz"))
    return folder


def predict(model: Path, images: Path, output: Path, folds: tuple[int, ...] = (0, 1)) -> dict[str, np.ndarray]:
    """By nnU-Net's own predictor."""
    output.mkdir()
    predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), folds)
    predictor.predict_from_files_sequential(str(images), str(output))
    paths = sorted(output.glob("?.nii.gz"))
    return {p.name[0]: sitk.GetArrayFromImage(sitk.ReadImage(str(p))) for p in paths}


def components(segmentations: dict[str, np.ndarray], label: int) -> int:
    return sum(int(cc3d.connected_components(s == label, connectivity=26).max()) for s in segmentations.values())


def test_the_stock_predictor_reports_a_tumor_from_its_threshold_on(model: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "healthy", "abc")
    before = (model / "plans.json").read_bytes()
    flags = ("-i", str(images), "-o", str(tmp_path / "scores"), "-m", str(model), "-f", "0", "1", "--save_scores")
    assert main(["predict", *flags, *FLAGS]) == 0
    scores = {}
    for case in "abc":
        with np.load(tmp_path / "scores" / f"{case}_scores.npz") as file:
            scores[case] = file["logits"].astype(float)

    for rate in (0.3, 5.0):  # none is allowed in three scans; fifteen are
        assert main(["calibrate", str(model), "-i", str(images), "--rate", str(rate), *FLAGS]) == 0
        entries = read_json(model / "plans.json")["zept"]["thresholds"]
        assert set(entries) == set(TUMORS)
        assert all(e["scans"] == 3 and e["false_positives_per_scan"] == rate for e in entries.values())
        found = predict(model, images, tmp_path / f"at_{rate}")
        logits = np.array([entries[name]["logit"] for name in TUMORS])
        for case, segmentation in found.items():
            margins = scores[case] - logits[:, None, None, None]
            clear = np.abs(margins).min(0) > 0.02  # float16 and the sliding window's weights
            for k, (host, label) in enumerate(((1, 4), (2, 5), (3, 6))):
                assert (margins[k][(segmentation == label) & clear] > 0).all()
                above = (margins[k] > 0) & clear  # another organ or tumor may be stronger there
                assert not np.isin(segmentation[above], (0, host)).any()
        above = [{case: scores[case][k] >= logits[k] for case in scores} for k in range(3)]
        total = [components(masks, True) for masks in above]
        assert all(n <= rate * 3 for n in total)
        if rate < 1:
            assert not any((s >= 4).any() for s in found.values())
    assert any((s >= 4).any() for s in found.values())

    again = tmp_path / "again"  # scores do not depend on the thresholds
    assert main(["predict", *flags[:3], str(again), *flags[4:], *FLAGS]) == 0
    with np.load(again / "a_scores.npz") as file:
        assert np.array_equal(file["logits"].astype(float), scores["a"])

    assert main(["calibrate", str(model), "--remove"]) == 0
    assert (model / "plans.json").read_bytes() == before


def test_held_out_cases_serve_without_scans(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Case a has a liver tumor, so it says nothing of liver tumors, and counts for the others."""
    raw, preprocessed = tmp_path / "raw" / "Dataset999_Small", tmp_path / "preprocessed" / "Dataset999_Small"
    write_images(raw / "imagesTr", "abcd")
    (preprocessed / "gt_segmentations").mkdir(parents=True)
    for case in "abcd":
        label = np.ones((18, 20, 16), dtype=np.uint8)
        label[:4] = 4 if case == "a" else 3
        for folder in (raw / "labelsTr", preprocessed / "gt_segmentations"):
            folder.mkdir(exist_ok=True)
            sitk.WriteImage(sitk.GetImageFromArray(label), str(folder / f"{case}.nii.gz"))
    dataset_json = read_json(model.parent / "ZePTTrainer__nnUNetPlans__3d_fullres" / "dataset.json")
    (raw / "dataset.json").write_text(json.dumps(dataset_json))
    split = [{"train": ["c", "d"], "val": ["a", "b"]}, {"train": ["a", "b"], "val": ["c", "d"]}]
    (preprocessed / "splits_final.json").write_text(json.dumps(split))
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.setenv(name, str(tmp_path / name.removeprefix("nnUNet_")))
    seen = []
    load = calibrate.ZePTPredictor.initialize_from_trained_model_folder

    def spy(self: calibrate.ZePTPredictor, folder: str, folds: tuple[int, ...], checkpoint_name: str) -> None:
        seen.append(folds)
        load(self, folder, folds, checkpoint_name=checkpoint_name)

    monkeypatch.setattr(calibrate.ZePTPredictor, "initialize_from_trained_model_folder", spy)
    assert main(["calibrate", str(model), "--rate", "1", *FLAGS]) == 0
    assert seen == [(0,), (1,)]
    entries = read_json(model / "plans.json")["zept"]["thresholds"]
    assert {n: e["scans"] for n, e in entries.items()} == {"liver_tumor": 3, "spleen_tumor": 4, "pancreas tumor": 4}
    assert not list(model.parent.glob(".*calibrate*"))
    assert "nnUNetv2_predict applies them" in capsys.readouterr().out

    for case in "bcd":  # no scan is left for the liver: its threshold stays, and the command says so
        shutil.copyfile(*(preprocessed / "gt_segmentations" / f"{c}.nii.gz" for c in ("a", case)))
    assert main(["calibrate", str(model), "--rate", "2", *FLAGS]) == 0
    again = read_json(model / "plans.json")["zept"]["thresholds"]
    assert again["liver_tumor"] == entries["liver_tumor"]
    assert again["spleen_tumor"]["false_positives_per_scan"] == 2
    assert "no healthy scan for liver_tumor" in capsys.readouterr().out


def test_a_removed_tumor_takes_its_threshold_along(model: Path) -> None:
    entry = {"logit": -1.0, "false_positives_per_scan": 0.1, "scans": 9}
    calibrate.write_thresholds(model, {"pancreas tumor": entry})
    back = remove_tumors(model, ["pancreas tumor"], model.parent / "back")
    assert "thresholds" not in read_json(back.folder / "plans.json")["zept"]
    calibrate.write_thresholds(model, {"pancreas tumor": entry, "liver_tumor": entry})
    back = remove_tumors(model, ["pancreas tumor"], model.parent / "back_again")
    assert set(read_json(back.folder / "plans.json")["zept"]["thresholds"]) == {"liver_tumor"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rate", "0"), "--rate wants more than 0"),
        (("-i", "nowhere"), "nowhere is no folder"),
        (("-i", "EMPTY"), "holds no image; healthy scans are wanted in nnU-Net's naming, CASE_0000.nii.gz"),
        (("-f", "4"), "holds the trained folds ['0', '1']; -f asks for ['4']"),
        (("--remove", "-i", "EMPTY"), "--remove takes no scans"),
        (("-npp", "0"), "-npp and -nps want 1 or more"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(
    model: Path, tmp_path: Path, flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    before = (model / "plans.json").read_bytes()
    flags = tuple(str(tmp_path / "empty") if f == "EMPTY" else f for f in flags)
    assert main(["calibrate", str(model), *FLAGS, *flags]) == 1
    assert message in capsys.readouterr().err
    assert (model / "plans.json").read_bytes() == before


def test_a_score_that_is_saved_as_the_threshold_is_reported() -> None:
    """Scores are float16: between two neighbors of them the decoding agrees with what calibration counted."""
    for code in encode(np.array([-700.0, -3.0, -1e-6, 0.0, 1e-6, 0.37, 12.0, 1000.0], dtype=np.float16)).tolist():
        at = float(decode(np.array(code)))
        below = float(np.nextafter(np.float16(at), np.float16(-np.inf)))
        organ, tumor = at_thresholds(
            torch.full((1, 1, 2), 0.1), torch.tensor([[[at, below]]]).float(), [[0]], [calibrate._boundary(code)]
        )
        strongest = torch.cat((torch.zeros(1, 1, 2), organ, tumor), 1).argmax(1)[0].tolist()
        assert strongest[0] == 2 and strongest[1] == 1, (at, below)


def test_scans_that_cannot_be_read_leave_nothing_behind(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "damaged"
    images.mkdir()
    (images / "a_0000.nii.gz").write_bytes(b"no image")
    before = (model / "plans.json").read_bytes()
    assert main(["calibrate", str(model), "-i", str(images), *FLAGS]) == 1
    assert re.search(r"one of a in .*damaged could not be predicted .* No threshold", capfd.readouterr().err)
    assert (model / "plans.json").read_bytes() == before and not list(model.parent.glob(".*calibrate*"))


def test_a_damaged_threshold_can_be_removed(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (model / "plans.json").read_bytes()
    plans = read_json(model / "plans.json")
    plans["zept"]["thresholds"] = {"no tumor": {"logit": 1.0}}
    (model / "plans.json").write_text(json.dumps(plans))
    assert main(["calibrate", str(model), *FLAGS]) == 1
    assert "--remove" in capsys.readouterr().err
    assert main(["calibrate", str(model), "--remove"]) == 0
    assert (model / "plans.json").read_bytes() == before
