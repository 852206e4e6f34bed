"""`zept taxonomy`: the classes of a dataset as a table, for a person to check before training."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from zept_nnunet.errors import ZePTError
from zept_nnunet.taxonomy import Taxonomy, annotated_patterns, declared_unseen


def register(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "taxonomy",
        help="print which labels are organs, which are tumors, and each tumor's hosts",
        description="Print the classes of a dataset as this package understands them. What is inferred from a name can "
        "be overridden in dataset.json's 'zept' block.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("-d", metavar="ID", help="dataset ID or name; read from nnUNet_raw, else nnUNet_preprocessed")
    source.add_argument("--json", metavar="FILE", type=Path, help="a dataset.json")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    path = args.json if args.json is not None else find_dataset_json(args.d)
    dataset_json = read_dataset_json(path)
    taxonomy = Taxonomy.from_dataset_json(dataset_json, str(path))
    print(f"{path}\n\n{taxonomy.table()}")
    for unseen in declared_unseen(dataset_json, str(path)):
        label = "next free label" if unseen.label is None else f"label {unseen.label}"
        print(f"\nunseen: {unseen.name} ({label}; hosts: {', '.join(unseen.hosts) or 'whole body'}); zept add-tumor")
    for pattern, names in annotated_patterns(dataset_json, str(path)).items():
        print(f"\ncases {pattern}: only {', '.join(names) or 'nothing'} annotated")
    if taxonomy.is_lateral:
        print("\nleft and right are told apart: mirroring between them is off")
    return 0


def find_dataset_json(dataset: str) -> Path:
    """The dataset.json of a dataset ID or name, in nnUNet_raw or else nnUNet_preprocessed.

    Raises:
        ZePTError: neither variable is set, or nothing or more than one thing is found.
    """
    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    folders = [Path(str(folder)) for folder in (nnUNet_raw, nnUNet_preprocessed) if folder.is_set()]
    if not folders:
        raise ZePTError(f"-d {dataset} is looked up in nnUNet_raw, which is not set: export nnUNet_raw=FOLDER")
    try:
        name = str(maybe_convert_to_dataset_name(dataset))
    except (RuntimeError, ValueError) as error:
        raise ZePTError(f"-d {dataset}: {error}") from error
    candidates = [folder / name / "dataset.json" for folder in folders]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise ZePTError(f"-d {dataset}: no dataset.json; looked for {', '.join(map(str, candidates))}")
    return found


def read_dataset_json(path: Path) -> dict[str, Any]:
    """A dataset.json.

    Raises:
        ZePTError: it is missing, or no JSON dictionary.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ZePTError(f"cannot read {path} ({error.strerror}); give a dataset.json") from error
    except json.JSONDecodeError as error:
        raise ZePTError(f"{path} is no valid JSON ({error}); correct it") from error
    if not isinstance(content, dict):
        raise ZePTError(f"{path} holds a {type(content).__name__}, not a dictionary; give a dataset.json")
    return content
