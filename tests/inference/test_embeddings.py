from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch

import zept_nnunet.trainers
from tests.inference.model_folder import make_model_folder
from tests.inference.test_add_tumor import disk_of
from tests.small_plans import make_network
from zept_nnunet.cli import main
from zept_nnunet.errors import ZePTError
from zept_nnunet.evaluation.retrieval import SUMMARY_COLUMNS
from zept_nnunet.inference.add_tumor import TumorRequest, add_tumors
from zept_nnunet.inference.embeddings import BLANK_VALUES, Embedder

pytestmark = pytest.mark.filterwarnings("default")  # nnU-Net's own, in its predictor


@pytest.fixture(autouse=True)
def trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", str(Path(zept_nnunet.trainers.__path__[0])))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model_folder(tmp_path_factory.mktemp("model"))
    return add_tumors(folder, [TumorRequest("pancreas tumor", ("pancreas",))]).folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image of one patch, one of several."""
    folder = tmp_path_factory.mktemp("images")
    for case, size in (("small", (16, 24, 16)), ("large", (20, 40, 16))):
        image = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=size).astype(np.float32))
        sitk.WriteImage(image, str(folder / f"{case}_0000.nii.gz"))
    return folder


def test_the_embeddings_are_those_that_training_aligns() -> None:
    network = make_network().eval()
    x = torch.randn(2, 1, 16, 24, 16)
    with torch.inference_mode():
        output = network(x)
        network.decoder.deep_supervision = False
        embeddings, voxels = network.forward_embeddings(x)
    wanted = torch.cat((output.organ_embedding, output.tumor_embedding), 1)
    torch.testing.assert_close(embeddings, wanted, rtol=0, atol=1e-5)
    maps = torch.cat((output.support[0], output.tumor[0]), 1)
    assert torch.equal(voxels, (maps > 0).flatten(2).sum(2))


def test_embeddings_of_scans(model: Path, images: Path) -> None:
    found = {(c.case, c.fold): c for c in Embedder(model, ("0", "1")).cases(images)}
    assert set(found) == {("small", "0"), ("small", "1"), ("large", "0"), ("large", "1")}
    small = found["small", "0"]
    assert small.names == ("liver", "spleen", "pancreas", "liver_tumor", "spleen_tumor", "pancreas tumor")
    assert small.embeddings.shape == (6, 384) and np.isfinite(small.embeddings).all()
    assert not np.allclose(small.embeddings, found["small", "1"].embeddings, atol=1e-3)
    assert not np.allclose(small.embeddings, found["large", "0"].embeddings, atol=1e-6)


@pytest.fixture(scope="module")
def finds_no_tumor(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tumor maps are low everywhere; over many voxels what they say adds up."""
    folder = tmp_path_factory.mktemp("blind") / "model"
    shutil.copytree(model, folder)
    path = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    weights = checkpoint["network_weights"]
    weights["deviation_weight"].fill_(-30.0)  # nothing but the heads speaks
    for name, values in weights.items():
        if name.startswith("tumor_heads.2."):
            values.fill_(-3.0 if name.endswith("bias.bias") else 0.0)
    torch.save(checkpoint, path)
    return folder


def test_a_class_that_the_model_does_not_find_has_no_embedding(finds_no_tumor: Path, images: Path) -> None:
    for case in Embedder(finds_no_tumor).cases(images):
        found = dict(zip(case.names, np.isfinite(case.embeddings).all(1), strict=True))
        assert found["liver"] and not found["liver_tumor"] and not found["pancreas tumor"]


def test_blank_images(model: Path, finds_no_tumor: Path, tmp_path: Path) -> None:
    found = list(Embedder(model, ("0", "1")).blank())
    assert [(c.case, c.fold) for c in found] == [(f"blank {v:g}", f) for v in BLANK_VALUES for f in ("0", "1")]
    for case in Embedder(finds_no_tumor).blank():
        assert np.isfinite(case.embeddings).all(1).tolist()[3:] == [False] * 3  # organs come first
    flat = make_model_folder(tmp_path, dimensions=2, folds=(0,))
    assert len(list(Embedder(flat).blank())) == len(BLANK_VALUES)


def test_command(model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(retrieve(model, images, tmp_path / "out")) == 0
    out = capsys.readouterr().out
    assert "(unseen classes)" in out and "swapped1" in out and "Blank images: patches" in out
    table = pd.read_csv(tmp_path / "out" / "retrieval.csv")
    assert len(table) == 2 * 2 * 6 and set(table[~table["seen"]]["class"]) == {"pancreas tumor"}
    assert set(table["number"]) == {6, 314} and table["rank"].between(1, 314).all()
    assert (tmp_path / "out" / "embeddings.png").is_file()
    summary = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert list(summary.columns) == ["candidates", "seen", "class", *SUMMARY_COLUMNS]
    assert len(summary) == 2 * (6 + 2) and summary[[*SUMMARY_COLUMNS]].notna().all().all()
    of_all = summary.set_index(["candidates", "class"]).loc["model's classes"]
    assert of_all.loc["liver", "blank images"] == 5 and of_all.loc["(seen classes)", "blank images"] == 25
    assert of_all.loc["liver", ["chance1", "embeddings"]].tolist() == [pytest.approx(1 / 6, abs=1e-4), 2]


def retrieve(model: Path, images: Path, out: Path) -> list[str]:
    return ["knowledge", "retrieve", "-m", str(model), "-i", str(images), "-o", str(out)]


@pytest.mark.parametrize("out", ["file", "file/out", "file/deep/out"])
def test_an_output_that_is_no_folder_is_refused_before_any_scan(
    out: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_late(*_: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("zept_nnunet.inference.embeddings.Embedder", too_late)
    (tmp_path / "file").touch()
    assert main(retrieve(model, tmp_path, tmp_path / out)) == 1
    assert f"-o {tmp_path / out}: {tmp_path / 'file'} is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("failure", [512, 8192, "plot"])  # a full disk at the first table and at the plot; a bug
def test_a_failure_leaves_the_folder_as_it_was(
    failure: int | str,
    is_there: bool,
    model: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "new" / "out"
    if is_there:
        out.mkdir(parents=True)
        for name in ("retrieval.csv", "summary.csv", "embeddings.png", "mine.txt"):
            (out / name).write_text("old")
    if isinstance(failure, int):
        with disk_of(failure):
            assert main(retrieve(model, images, out)) == 1
        error = capsys.readouterr().err
        assert f"File too large ({out}" in error and "nothing is left half-written" in error
    else:

        def fail(*_: object) -> None:
            raise ValueError("no plot")

        monkeypatch.setattr("zept_nnunet.evaluation.retrieval.plot_embeddings", fail)
        with pytest.raises(ValueError, match="no plot"):
            main(retrieve(model, images, out))
    if is_there:
        assert len(list(out.iterdir())) == 4 and {p.read_text() for p in out.iterdir()} == {"old"}
    else:
        assert list(tmp_path.iterdir()) == []


def test_a_second_run_replaces_what_the_first_wrote_and_nothing_else(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.txt").write_text("old")
    (tmp_path / "embeddings.png").write_text("old")  # this time too few classes are there to plot
    monkeypatch.setattr("zept_nnunet.evaluation.retrieval.plot_embeddings", lambda *_: None)
    assert main(retrieve(model, images, tmp_path)) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.txt", "retrieval.csv", "summary.csv"]


def test_what_cannot_be_embedded(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ZePTError, match="no images in"):
        next(Embedder(model).cases(tmp_path))
    with pytest.raises(ZePTError, match=r"fold 3 has no checkpoint_final\.pth"):
        Embedder(model, ("3",))
