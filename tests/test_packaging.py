"""setup.cfg lists what is on disk, and the versions agree."""

from __future__ import annotations

import configparser
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from tests.wheel import build_wheel

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def test_every_package_folder_is_listed(setup_cfg: configparser.ConfigParser) -> None:
    listed = sorted(setup_cfg["options"]["packages"].split())
    folders = {f.parent for f in (ROOT / "zept_nnunet").rglob("*.py")}
    on_disk = {".".join(f.relative_to(ROOT).parts) for f in folders}
    assert listed == sorted(on_disk | {"zept_nnunet.trainers", "zept_nnunet.plans"})
    for folder in folders | {ROOT / "trainers", ROOT / "plans"}:
        assert (folder / "__init__.py").is_file()


def test_installed_metadata_is_that_of_setup_cfg(setup_cfg: configparser.ConfigParser) -> None:
    installed = metadata.metadata("zept-nnunet")
    assert installed["Version"] == setup_cfg["metadata"]["version"]
    assert installed["Requires-Python"] == setup_cfg["options"]["python_requires"]


def test_constraints_pin_every_dependency_exactly(setup_cfg: configparser.ConfigParser) -> None:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pinned = {line.partition("==")[0].lower() for line in lines if line}
    assert all("==" in line for line in lines if line)
    wanted = [
        *setup_cfg["options"]["install_requires"].splitlines(),
        *setup_cfg["options.extras_require"]["dev"].splitlines(),
        *setup_cfg["options.extras_require"]["text"].splitlines(),
    ]
    wanted = [w for w in wanted if w.strip() and not w.startswith(("#", "zept-nnunet["))]
    names = {w.partition(">")[0].strip().lower() for w in wanted}
    assert names <= pinned


def test_the_wheel_holds_descriptions_vectors_and_the_page(tmp_path: Path) -> None:
    names = set(zipfile.ZipFile(build_wheel(tmp_path)).namelist())
    data = {
        f.relative_to(ROOT)
        for package in ("knowledge", "evaluation")
        for f in (ROOT / "zept_nnunet" / package).rglob("*")
        if f.suffix not in (".py", ".pyc")
    }
    assert {str(f) for f in data if (ROOT / f).is_file()} <= names and len(data) >= 9
