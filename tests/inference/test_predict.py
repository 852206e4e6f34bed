from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

import zept_nnunet.trainers
from tests.inference.model_folder import make_model_folder, read_json, write_checkpoint
from zept_nnunet.commands import predict as command
from zept_nnunet.errors import ZePTError
from zept_nnunet.inference.add_tumor import TumorRequest, add_tumors
from zept_nnunet.inference.predict import Exports, ZePTPredictor, write_image

pytestmark = pytest.mark.filterwarnings("default")  # nnU-Net's own, in its predictor and its workers
TUMORS = ("liver_tumor", "spleen_tumor", "pancreas tumor")
HOSTS = ("liver", "spleen", "pancreas")
SIZE_XYZ = (20, 16, 22)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folds, transposed axes, and a tumor that was added."""
    axes = {"transpose_forward": [2, 0, 1], "transpose_backward": [1, 2, 0]}
    return add_tumors(
        make_model_folder(tmp_path_factory.mktemp("model"), **axes), [TumorRequest("pancreas tumor", ("pancreas",))]
    ).folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two oblique images: one on the model's spacing, one to be resampled; both with an empty margin to crop."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for case, spacing in (("a", (1.0, 1.0, 1.0)), ("b", (1.0, 0.8, 1.5))):
        array = np.zeros(SIZE_XYZ[::-1], dtype=np.float32)
        array[2:, :, 3:] = rng.normal(size=array[2:, :, 3:].shape) + 0.1
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(spacing)
        image.SetOrigin((5.0, -7.0, 11.0))
        image.SetDirection((0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0))
        sitk.WriteImage(image, str(folder / f"{case}_0000.nii.gz"))
    return folder


@pytest.fixture(autouse=True)
def trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", str(Path(zept_nnunet.trainers.__path__[0])))
    monkeypatch.setenv("nnUNet_def_n_proc", "1")


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())
    return parser.parse_args(["predict", *argv])


def predict(model: Path, images: Path, output: Path, *flags: str) -> None:
    argv = ("-i", str(images), "-o", str(output), "-m", str(model), "-f", "0", "1", "-device", "cpu")
    args = parse(*argv, "-npp", "1", "-nps", "1", "--disable_progress_bar", *flags)
    assert args.func(args) == 0


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


@pytest.fixture(scope="module")
def predicted(model: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_extTrainer", str(Path(zept_nnunet.trainers.__path__[0])))
        output = tmp_path_factory.mktemp("predicted")
        predict(model, images, output, "--save_scores", "--save_anomaly_maps")
    return output


def test_segmentation_is_the_stock_predictors(predicted: Path, model: Path, images: Path, tmp_path: Path) -> None:
    stock = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    stock.initialize_from_trained_model_folder(str(model), (0, 1))
    stock.predict_from_files_sequential(str(images), str(tmp_path))
    for case in "ab":
        ours, theirs = read(predicted / f"{case}.nii.gz"), read(tmp_path / f"{case}.nii.gz")
        assert np.array_equal(ours, theirs)
        assert len(np.unique(ours)) > 2  # something to compare


def test_scores_are_the_tumors_logits_on_the_native_grid(predicted: Path) -> None:
    for case in "ab":
        segmentation = read(predicted / f"{case}.nii.gz")
        with np.load(predicted / f"{case}_scores.npz") as scores:
            logits, classes = scores["logits"], scores["classes"]
        assert tuple(classes) == TUMORS
        assert logits.dtype == np.float16
        assert logits.shape == (3, *segmentation.shape)
        assert np.isfinite(logits).all()
        for k, label in enumerate((4, 5, 6)):
            # background emits 0, so a tumor's voxel has a logit above 0 that no other tumor exceeds
            here = segmentation == label
            assert (logits[k][here] > 0).all()
            assert (logits[k][here] >= logits.max(0)[here]).all()
        outside = np.zeros(segmentation.shape, dtype=bool)
        outside[:2] = outside[:, :, :3] = True
        assert (logits[0][outside] == logits[0].min()).all()
        assert not segmentation[outside].any()
    assert not list(predicted.glob("*partial*"))


def test_tumors_are_predicted_somewhere(predicted: Path) -> None:
    assert any((read(predicted / f"{case}.nii.gz") >= 4).any() for case in "ab")


def test_anomaly_maps_lie_on_the_image(predicted: Path, images: Path) -> None:
    for case in "ab":
        image = sitk.ReadImage(str(images / f"{case}_0000.nii.gz"))
        for host in HOSTS:
            anomaly = sitk.ReadImage(str(predicted / f"{case}_anomaly_{host}.nii.gz"))
            assert anomaly.GetPixelID() == sitk.sitkFloat32
            assert anomaly.GetSize() == image.GetSize()
            for value, wanted in (
                (anomaly.GetSpacing(), image.GetSpacing()),
                (anomaly.GetOrigin(), image.GetOrigin()),
                (anomaly.GetDirection(), image.GetDirection()),
            ):
                np.testing.assert_allclose(value, wanted, atol=1e-5)
            values = sitk.GetArrayFromImage(anomaly)
            assert np.isfinite(values).all()
            assert values.std() > 0
            prompt = sitk.ReadImage(str(predicted / f"{case}_prompt_{host}.nii.gz"))
            assert prompt.GetPixelID() == sitk.sitkUInt8
            assert (prompt.GetSize(), prompt.GetOrigin()) == (anomaly.GetSize(), anomaly.GetOrigin())
            assert set(np.unique(sitk.GetArrayFromImage(prompt))) <= {0, 1}


def test_continue_prediction_makes_what_is_missing(predicted: Path, model: Path, images: Path, tmp_path: Path) -> None:
    for path in predicted.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "a_scores.npz").unlink()
    before = (tmp_path / "b.nii.gz").stat().st_mtime_ns
    predict(model, images, tmp_path, "--save_scores", "--continue_prediction")
    assert (tmp_path / "a_scores.npz").is_file()
    assert (tmp_path / "b.nii.gz").stat().st_mtime_ns == before


def test_without_the_flags_nothing_else_is_written(model: Path, images: Path, tmp_path: Path) -> None:
    predict(model, images, tmp_path, "--disable_tta", "-npp", "0", "-nps", "0")
    assert {p.name for p in tmp_path.iterdir()} == {
        "a.nii.gz",
        "b.nii.gz",
        "dataset.json",
        "plans.json",
        "predict_from_raw_data_args.json",
    }


def test_an_error_of_an_export_worker_is_raised() -> None:
    with pytest.raises(ValueError, match="no such export"), Exports(1) as exports:
        exports.submit(_Broken(), np.zeros(1))  # type: ignore[arg-type]


class _Broken:
    def __reduce__(self) -> Any:
        raise ValueError("no such export")


# ---------------------------------------------------------------------------------------------------- geometry
@pytest.mark.parametrize("axcodes", ["LPS", "RAS", "PIR"])
def test_nibabel_readers(axcodes: str, tmp_path: Path) -> None:
    import nibabel
    from nibabel.orientations import axcodes2ornt, ornt_transform
    from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient

    array = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    image = nibabel.Nifti1Image(array, np.diag([1.0, 2.0, 3.0, 1.0]))
    image = image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axcodes)))
    nibabel.save(image, str(tmp_path / "in.nii.gz"))
    for reader in (NibabelIO(), NibabelIOWithReorient()):
        data, properties = reader.read_images((str(tmp_path / "in.nii.gz"),))
        write_image(data[0], tmp_path / "out.nii.gz", properties)
        back = nibabel.load(str(tmp_path / "out.nii.gz"))
        np.testing.assert_allclose(back.affine, image.affine, atol=1e-5)
        np.testing.assert_allclose(back.get_fdata(), image.get_fdata(), atol=1e-5)


def test_readers_that_know_only_the_spacing(tmp_path: Path) -> None:
    write_image(np.ones((2, 3, 4)), tmp_path / "out.nii.gz", {"spacing": (3.0, 2.0, 1.0)})
    assert sitk.ReadImage(str(tmp_path / "out.nii.gz")).GetSpacing() == (1.0, 2.0, 3.0)


# ---------------------------------------------------------------------------------------------------- what is refused
def test_bad_arguments(model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_results", raising=False)
    base = ("-i", str(images), "-o", str(tmp_path / "out"), "-device", "cpu")
    of_model = (*base, "-m", str(model))
    for argv, message in (
        (base, "say which model"),
        ((*base, "-d", "1"), "say which model"),
        ((*base, "-d", "1", "-c", "2d"), "nnUNet_results is not set"),
        ((*of_model, "-d", "1"), "leave -d and -c out"),
        ((*base, "-m", str(tmp_path)), "not a model folder"),
        (of_model, r"fold 2 has no checkpoint_final\.pth"),
        ((*of_model, "-f", "0", "-chk", "x.pth"), r"fold 0 has no x\.pth"),
        ((*of_model, "-f", "one"), "'one'"),
        ((*of_model, "-part_id", "1"), "-part_id"),
        ((*of_model, "-step_size", "0"), "-step_size"),
        (("-i", str(tmp_path / "nowhere"), *of_model[2:]), "is no folder"),
        ((*of_model, "-f", "0", "-npp", "0", "-nps", "0", "--save_scores"), "worker processes"),
    ):
        args = parse(*argv)
        with pytest.raises(ZePTError, match=message):
            args.func(args)


def test_scores_of_a_stock_model(model: Path) -> None:
    predictor = ZePTPredictor(device=torch.device("cpu"), save_scores=True)
    predictor.network, predictor.trainer_name = torch.nn.Identity(), "nnUNetTrainer"
    assert not predictor.has_scores
    with pytest.raises(ZePTError, match="trained by nnUNetTrainer"):
        predictor.check_scores_available()


def test_weights_of_other_classes_are_refused(tmp_path: Path) -> None:
    model = make_model_folder(tmp_path, folds=(0,))
    other = make_model_folder(
        tmp_path / "other",
        {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "liver": 1, "liver_tumor": 2},
            "numTraining": 5,
            "file_ending": ".nii.gz",
        },
        folds=(),
    )
    write_checkpoint(model, 0, read_json(other / "plans.json"), read_json(other / "dataset.json"))
    predictor = ZePTPredictor(device=torch.device("cpu"))
    with pytest.raises(ZePTError, match="other classes"):
        predictor.initialize_from_trained_model_folder(str(model), [0])
