"""`zept trainers-path`: the folder for nnUNet_extTrainer."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from zept_nnunet.errors import ZePTError


def register(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "trainers-path",
        help="print the folder in which nnU-Net finds ZePTTrainer",
        description='Print the folder of the trainers, for: export nnUNet_extTrainer="$(zept trainers-path)"',
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the folder."""
    print(trainers_path())
    return 0


def trainers_path() -> Path:
    """The folder of `zept_nnunet.trainers`, wherever the installation put it. Imports no trainer.

    Raises:
        ZePTError: the package is not installed (a source folder on sys.path does not map trainers/).
    """
    spec = importlib.util.find_spec("zept_nnunet.trainers")
    if spec is None or not spec.submodule_search_locations:
        raise ZePTError("zept_nnunet.trainers is not found: install the package (pip install . or pip install -e .)")
    return Path(spec.submodule_search_locations[0]).resolve()
