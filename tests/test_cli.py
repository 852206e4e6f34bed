"""`zept` itself, and its commands trainers-path, taxonomy and doctor."""

from __future__ import annotations

import errno
import importlib
import json
import os
import pkgutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import zept_nnunet
from zept_nnunet import ZePTError, check_nnunet_version, cli, commands
from zept_nnunet.commands import doctor
from zept_nnunet.commands.trainers_path import trainers_path

LABELS = {"background": 0, "liver": 1, "left kidney": 2, "right kidney": 3, "liver_tumor": 4, "kidney cyst": 5}
ZEPT = {"unseen": {"liver cyst": {"label": 6}, "renal tumor": {}}, "annotated": {"a_*": ["liver"]}}


def zept(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zept_nnunet.cli", *arguments],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("nnUNet_")} | environment,
        check=False,
    )


@pytest.fixture
def healthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnU-Net's variables, all in order, in this process."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_path()))
    return tmp_path


# --- zept ---


def test_every_command_module_is_registered() -> None:
    assert sorted(m.name for m in pkgutil.iter_modules(commands.__path__)) == sorted(cli.COMMANDS)


def test_starting_the_command_line_imports_no_torch() -> None:
    code = "import sys; from zept_nnunet.cli import build_parser; build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_and_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert name.replace("_", "-") in shown
    for arguments in ([], ["no-such-command"], ["taxonomy"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 2


def test_a_command_that_does_not_import_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "COMMANDS", ("no_such_module",))
    with pytest.raises(ModuleNotFoundError):
        cli.build_parser()


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        ("ENOSPC", "Free some space, or choose another"),
        ("EACCES", "Choose another"),
        ("ENOTDIR", "Choose another"),
        ("EEXIST", "Choose another"),
        ("ENAMETOOLONG", "Choose another"),
    ],
)
def test_a_file_that_cannot_be_written_is_named(
    number: str, remedy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = getattr(errno, number)

    def fail(_: object) -> int:
        raise OSError(code, os.strerror(code), "out/file")

    monkeypatch.setattr(importlib.import_module("zept_nnunet.commands.taxonomy"), "run", fail)
    assert cli.main(["taxonomy", "-d", "7"]) == 1
    wanted = f"zept taxonomy: {os.strerror(code)} (out/file); nothing is left half-written. {remedy} output folder\n"
    assert capsys.readouterr().err == wanted


def test_an_error_of_the_system_that_is_no_matter_of_writing_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(importlib.import_module("zept_nnunet.commands.taxonomy"), "run", fail)
    with pytest.raises(OSError, match="Input/output"):
        cli.main(["taxonomy", "-d", "7"])


def test_the_entry_point_is_this_function() -> None:
    (entry,) = metadata.distribution("zept-nnunet").entry_points.select(group="console_scripts", name="zept")
    assert entry.load() is cli.main


# --- versions ---


@pytest.mark.parametrize("version", ["2.7.9", "2.5", "1.7.0", "3.0.0"])
def test_another_nnunet_is_refused(
    version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    with pytest.raises(ZePTError, match=rf"nnunetv2 {version} is installed.*>=2\.8,<3.*pip install"):
        check_nnunet_version()
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": LABELS}))
    assert cli.main(["taxonomy", "--json", str(tmp_path / "dataset.json")]) == 1
    assert f"nnunetv2 {version} is installed" in capsys.readouterr().err
    assert not doctor.check_nnunet().is_ok


@pytest.mark.parametrize("version", ["2.8.0", "2.8.1", "2.10", "2.9rc1"])
def test_nnunet_2_8_and_later_is_accepted(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    assert check_nnunet_version() == version


def test_no_nnunet(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ZePTError, match=r"not installed.*pip install"):
        check_nnunet_version()
    assert not doctor.check_torch().is_ok


# --- trainers-path ---


def test_trainers_path_is_the_folder_that_nnunet_scans() -> None:
    printed = zept("trainers-path")
    assert printed.returncode == 0
    folder = Path(printed.stdout.strip())
    assert folder == trainers_path()
    assert printed.stdout.count("\n") == 1
    assert [m.name for m in pkgutil.iter_modules([str(folder)])] == ["zept_trainers"]


def test_trainers_path_without_installation(tmp_path: Path) -> None:
    """A copy of the source on sys.path, as if nothing were installed."""
    (tmp_path / "zept_nnunet").symlink_to(Path(zept_nnunet.__file__).parent)
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
        f"sys.path.insert(0, {str(tmp_path)!r}); from zept_nnunet.cli import main; sys.exit(main(['trainers-path']))"
    )
    if "site-packages" in str(trainers_path()):
        pytest.skip("a wheel holds trainers/ inside the package")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 1
    assert "pip install" in result.stderr


# --- taxonomy ---


def test_taxonomy_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"labels": LABELS, "zept": ZEPT}))
    assert cli.main(["taxonomy", "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    assert str(path) in shown
    assert ["5", "kidney", "cyst", "tumor", "left", "kidney,", "right", "kidney", "5", "inferred"] in [
        line.split() for line in shown.splitlines()
    ]
    assert "unseen: liver cyst (label 6; hosts: liver)" in shown
    assert "unseen: renal tumor (next free label; hosts: left kidney, right kidney)" in shown
    assert "cases a_*: only liver annotated" in shown
    assert "mirroring between them is off" in shown


@pytest.mark.parametrize("dataset", ["7", "007", "Dataset007_Test"])
@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed"])
def test_taxonomy_of_a_dataset(dataset: str, variable: str, healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = healthy / variable / "Dataset007_Test"
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps({"labels": LABELS}))
    assert cli.main(["taxonomy", "-d", dataset]) == 0
    assert str(folder / "dataset.json") in capsys.readouterr().out


def test_taxonomy_of_what_is_not_there(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def message(*arguments: str) -> str:
        assert cli.main(["taxonomy", *arguments]) == 1
        return capsys.readouterr().err

    assert "dataset with the ID 8" in message("-d", "8")
    assert "-d x" in message("-d", "x")
    assert "Dataset009_X/dataset.json" in message("-d", "Dataset009_X")
    path = healthy / "broken.json"
    assert f"cannot read {path}" in message("--json", str(path))
    path.write_text("{")
    assert f"{path} is no valid JSON" in message("--json", str(path))
    path.write_text("[]")
    assert f"{path} holds a list" in message("--json", str(path))
    path.write_text(json.dumps({"labels": {"background": 0, "liver": 1, "spleen": 2, "tumor": 3}}))
    assert f"zept taxonomy: {path}: which organ hosts 'tumor'" in message("--json", str(path))
    for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.delenv(variable)
    assert "export nnUNet_raw=FOLDER" in message("-d", "8")


# --- doctor ---


def test_doctor_in_an_empty_environment() -> None:
    result = zept("doctor")
    assert result.returncode == 1
    assert result.stderr == ""
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    assert [line.split()[1].rstrip(":") for line in failed] == [
        "nnUNet_raw",
        "nnUNet_preprocessed",
        "nnUNet_results",
        "nnUNet_extTrainer",
        "discovery",
    ]
    assert result.stdout.count("mend it:") == len(failed)
    assert 'export nnUNet_extTrainer="$(zept trainers-path)"' in result.stdout
    assert result.stdout.rstrip().endswith("5 of the checks failed")


def test_doctor_where_everything_is_in_order(healthy: Path) -> None:
    result = zept("doctor", **{k: os.environ[k] for k in os.environ if k.startswith("nnUNet_")})
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAIL" not in result.stdout
    assert "discovery of ZePTTrainer: zept_nnunet.training.trainer in " in result.stdout
    assert result.stdout.rstrip().endswith("everything is in order")


def test_doctor_folders(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_folder("nnUNet_raw", must_write=False).is_ok
    assert doctor.check_folder("nnUNet_results", must_write=True).is_ok
    assert list((healthy / "nnUNet_results").iterdir()) == []  # the probe leaves nothing
    (healthy / "file").touch()
    for value in (str(healthy / "absent"), str(healthy / "file")):
        monkeypatch.setenv("nnUNet_results", value)
        finding = doctor.check_folder("nnUNet_results", must_write=True)
        assert not finding.is_ok
        assert f'mkdir -p "{value}"' in str(finding)
    assert list(doctor.check_disk("nnUNet_results")) == []


def test_doctor_reports_a_folder_that_refuses(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    assert doctor.check_folder("nnUNet_raw", must_write=False).is_ok
    finding = doctor.check_folder("nnUNet_results", must_write=True)
    assert not finding.is_ok
    assert "cannot write to" in finding.detail
    assert "Permission denied" in finding.detail


def test_doctor_full_disk(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = doctor.check_disk("nnUNet_results")
    assert finding.is_ok == (doctor.shutil.disk_usage(healthy).free >= 1e9)
    monkeypatch.setattr(doctor, "MINIMUM_FREE_GB", 1e12)
    (finding,) = doctor.check_disk("nnUNet_results")
    assert not finding.is_ok


def test_doctor_trainers_variable(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_trainers_variable().is_ok
    other = healthy / "other"
    monkeypatch.setenv("nnUNet_extTrainer", str(other))
    assert "no such folder" in doctor.check_trainers_variable().detail
    other.mkdir()
    assert "does not hold" in doctor.check_trainers_variable().detail
    monkeypatch.setenv("nnUNet_extTrainer", f"{other}{os.pathsep}{trainers_path()}")
    assert doctor.check_trainers_variable().is_ok


def test_doctor_discovery(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_discovery().is_ok
    other = healthy / "other"
    other.mkdir()
    (other / "zept_impostor.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class ZePTTrainer(nnUNetTrainer):\n    pass\n"
    )
    monkeypatch.setenv("nnUNet_extTrainer", f"{other}{os.pathsep}{trainers_path()}")
    finding = doctor.check_discovery()
    assert not finding.is_ok
    assert "zept_impostor" in finding.detail
    (other / "zept_impostor.py").write_text("import a_package_that_is_not_there\n")
    finding = doctor.check_discovery()
    assert not finding.is_ok
    assert "a_package_that_is_not_there" in finding.detail


def test_every_trainer_that_the_folder_exports_is_found() -> None:
    names = importlib.import_module("zept_nnunet.trainers.zept_trainers").__all__
    zept = importlib.import_module("zept_nnunet.training.trainer").ZePTTrainer
    stock = importlib.import_module("nnunetv2.training.nnUNetTrainer.nnUNetTrainer").nnUNetTrainer
    assert "ZePTTrainer" in names
    for name in names:
        found = getattr(importlib.import_module("zept_nnunet.trainers.zept_trainers"), name)
        assert found.__name__ == name  # nnU-Net writes __name__ into folders and checkpoints
        assert issubclass(found, zept if name.startswith("ZePT") else stock)  # the others are for comparison
