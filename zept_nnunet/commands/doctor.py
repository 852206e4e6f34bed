"""`zept doctor`: what is wrong with an installation, and how to mend it."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pickle
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from zept_nnunet import check_nnunet_version
from zept_nnunet.commands.trainers_path import trainers_path
from zept_nnunet.errors import ZePTError

MINIMUM_PYTHON = (3, 10)
MINIMUM_TORCH = (2, 6)
MINIMUM_FREE_GB = 1.0
TRAINER = "ZePTTrainer"
_SET_TRAINERS = 'export nnUNet_extTrainer="$(zept trainers-path)"'


@dataclass(frozen=True)
class Finding:
    """One line of the report. `remedy` stands there where `is_ok` is False."""

    what: str
    is_ok: bool
    detail: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{'OK  ' if self.is_ok else 'FAIL'}  {self.what}: {self.detail}"
        return line if self.is_ok else f"{line}\n      mend it: {self.remedy}"


def register(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "doctor",
        help="check the installation and say how to mend it",
        description="Check versions, nnU-Net's variables and folders, discovery of the trainer, device and disk. "
        "Exit status 1 when something fails.",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print every finding; 1 when one of them fails."""
    num_failed = 0
    for finding in findings():
        print(finding, flush=True)
        num_failed += not finding.is_ok
    print(f"\n{num_failed} of the checks failed" if num_failed else "\neverything is in order")
    return int(num_failed > 0)


def findings() -> Iterator[Finding]:
    """Every check, in the order in which a user would mend things."""
    yield check_python()
    yield check_torch()
    yield check_nnunet()
    yield check_folder("nnUNet_raw", must_write=False)
    for variable in ("nnUNet_preprocessed", "nnUNet_results"):
        yield check_folder(variable, must_write=True)
        yield from check_disk(variable)
    yield check_trainers_variable()
    yield check_discovery()
    yield check_knowledge()
    yield check_device()


def check_python() -> Finding:
    """Python's version."""
    found = sys.version.split()[0]
    is_ok = sys.version_info[:2] >= MINIMUM_PYTHON
    return Finding("python", is_ok, found, f"use Python {_dotted(MINIMUM_PYTHON)} or later")


def check_torch() -> Finding:
    """PyTorch's version, from its metadata."""
    remedy = f'pip install "torch>={_dotted(MINIMUM_TORCH)}", as https://pytorch.org says for your GPU'
    try:
        found = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return Finding("torch", False, "not installed", remedy)
    return Finding("torch", tuple(map(int, re.findall(r"\d+", found)[:2])) >= MINIMUM_TORCH, found, remedy)


def check_nnunet() -> Finding:
    """nnunetv2's version, from its metadata."""
    try:
        return Finding("nnunetv2", True, check_nnunet_version())
    except ZePTError as error:
        detail, _, remedy = str(error).partition(". ")
        return Finding("nnunetv2", False, detail, remedy)


def check_knowledge() -> Finding:
    """The built-in vectors, and the encoder for other descriptions, which is optional."""
    from zept_nnunet.knowledge.source import built_in, english_encoder

    try:
        source = built_in()
        number = len(source.file.by_text) if source.file is not None else 0
    except ZePTError as error:
        return Finding("descriptions", False, str(error), "install zept-nnunet again")
    try:
        more = f"and any other text, by {english_encoder().name}"
    except ZePTError as error:
        more = f"built-in ones alone: {error}"
    return Finding("descriptions", True, f"{number} vectors; {more}")


def check_folder(variable: str, must_write: bool) -> Finding:
    """One of nnU-Net's three folders: set, there, readable, and writable where nnU-Net writes."""
    value = os.environ.get(variable)
    if not value:
        return Finding(variable, False, "not set", f"export {variable}=FOLDER")
    folder = Path(value)
    if not folder.is_dir():
        return Finding(variable, False, f"{folder} is no folder", f'mkdir -p "{folder}", or set {variable} to another')
    problem = _attempt(lambda: next(folder.iterdir(), None))
    if problem is None and must_write:
        problem = _attempt(lambda: tempfile.TemporaryFile(dir=folder).close())
    if problem is not None:
        verb = "write to" if must_write else "read"
        return Finding(
            variable, False, f"cannot {verb} {folder} ({problem})", f'chmod u+rwx "{folder}", or use another'
        )
    return Finding(variable, True, f"{folder} ({'writable' if must_write else 'readable'})")


def check_disk(variable: str) -> Iterator[Finding]:
    """Free space where nnU-Net writes; nothing where the folder is not there."""
    folder = os.environ.get(variable, "")
    if os.path.isdir(folder):
        free_gb = shutil.disk_usage(folder).free / 1e9
        remedy = (
            f"free {MINIMUM_FREE_GB:.0f} GB or more (a dataset of CT needs tens), or set {variable} to another disk"
        )
        yield Finding(f"{variable}, free disk", free_gb >= MINIMUM_FREE_GB, f"{free_gb:.1f} GB", remedy)


def check_trainers_variable() -> Finding:
    """nnUNet_extTrainer lists this package's folder, and every folder in it exists."""
    variable = "nnUNet_extTrainer"
    try:
        wanted = trainers_path()
    except ZePTError as error:
        return Finding(variable, False, str(error), "pip install zept-nnunet, or pip install -e . in a clone")
    entries = [entry for entry in os.environ.get(variable, "").split(os.pathsep) if entry.strip()]
    if not entries:
        return Finding(variable, False, "not set", _SET_TRAINERS)
    missing = [entry for entry in entries if not os.path.isdir(entry)]
    if missing:
        return Finding(variable, False, f"no such folder: {', '.join(missing)}", f"correct it, or {_SET_TRAINERS}")
    if not any(Path(entry).resolve() == wanted for entry in entries):
        detail = f"{os.pathsep.join(entries)} does not hold {wanted}"
        return Finding(variable, False, detail, f'export {variable}="$(zept trainers-path){os.pathsep}${variable}"')
    return Finding(variable, True, os.pathsep.join(entries))


def check_discovery() -> Finding:
    """nnU-Net finds the trainer by name; it is the installed package's class, and it pickles (DDP needs that)."""
    what = f"discovery of {TRAINER}"
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of upstream's imports
            from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

            from zept_nnunet.training import trainer

            found = recursive_find_trainer_class_by_name(TRAINER)
    except Exception as error:  # whatever a module in one of the folders raises: report it, and go on
        return Finding(
            what, False, f"{type(error).__name__}: {error}", f"{_SET_TRAINERS}; nnunetv2>=2.8,<3 must import"
        )
    if found is not getattr(trainer, TRAINER):
        detail = f"found another class of that name: {found.__module__} in {_file_of(found)}"
        return Finding(
            what, False, detail, f"remove the folder that holds it from nnUNet_extTrainer, or {_SET_TRAINERS}"
        )
    problem = _attempt(lambda: pickle.loads(pickle.dumps(found)))
    if problem is not None:
        return Finding(
            what, False, f"it does not pickle ({problem})", "pip install --force-reinstall --no-deps zept-nnunet"
        )
    return Finding(what, True, f"{found.__module__} in {_file_of(found)}")


def check_device() -> Finding:
    """What the network would run on. A CPU is no failure, only slow."""
    remedy = "install torch as https://pytorch.org says for your system"
    try:
        import torch

        if torch.cuda.is_available():
            memory_gb = torch.cuda.get_device_properties(0).total_memory / 1e9
            return Finding("device", True, f"cuda ({torch.cuda.get_device_name(0)}, {memory_gb:.0f} GB)")
        if torch.backends.mps.is_available():
            return Finding("device", True, "mps; pass -device mps to nnU-Net's commands")
    except (ImportError, OSError, RuntimeError) as error:
        return Finding("device", False, f"{type(error).__name__}: {error}", remedy)
    return Finding("device", True, "cpu, no GPU is visible; pass -device cpu. Training a real dataset wants a GPU")


def _attempt(action: Callable[[], object]) -> str | None:
    """None where the action works, else what went wrong."""
    try:
        action()
    except (OSError, pickle.PicklingError, AttributeError, ImportError) as error:
        return str(error)
    return None


def _file_of(cls: type) -> str:
    return str(getattr(sys.modules.get(cls.__module__), "__file__", "an unknown file"))


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
