from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch

import zept_nnunet.trainers
from tests.inference.model_folder import make_model_folder
from tests.small_plans import make_network
from zept_nnunet.cli import main
from zept_nnunet.errors import ZePTError
from zept_nnunet.inference.add_tumor import TumorRequest, add_tumors
from zept_nnunet.inference.embeddings import embed_cases

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
    torch.testing.assert_close(voxels[:, :3], output.support[0].sigmoid().flatten(2).sum(2))
    assert torch.equal(voxels[:, 3], voxels[:, 0])  # the liver tumor's host is the liver


def test_embeddings_of_scans(model: Path, images: Path) -> None:
    found = {(c.case, c.fold): c for c in embed_cases(model, images, ("0", "1"))}
    assert set(found) == {("small", "0"), ("small", "1"), ("large", "0"), ("large", "1")}
    small = found["small", "0"]
    assert small.names == ("liver", "spleen", "pancreas", "liver_tumor", "spleen_tumor", "pancreas tumor")
    assert small.embeddings.shape == (6, 384) and np.isfinite(small.embeddings).all()
    assert not np.allclose(small.embeddings, found["small", "1"].embeddings, atol=1e-3)
    assert not np.allclose(small.embeddings, found["large", "0"].embeddings, atol=1e-6)


def test_command(model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["knowledge", "retrieve", "-m", str(model), "-i", str(images), "-o", str(tmp_path / "out")]
    assert main(argv) == 0
    assert "(unseen classes)" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "out" / "retrieval.csv")
    assert len(table) == 2 * 2 * 6 and set(table[~table["seen"]]["class"]) == {"pancreas tumor"}
    assert set(table["number"]) == {6, 308} and table["rank"].between(1, 308).all()
    assert (tmp_path / "out" / "embeddings.png").is_file() and (tmp_path / "out" / "summary.csv").is_file()


def test_what_cannot_be_embedded(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ZePTError, match="no images in"):
        next(embed_cases(model, tmp_path))
    with pytest.raises(ZePTError, match=r"fold 3 has no checkpoint_final\.pth"):
        next(embed_cases(model, tmp_path, ("3",)))
