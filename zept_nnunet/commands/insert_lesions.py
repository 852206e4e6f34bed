"""`zept insert-lesions`: synthetic lesions in a CT dataset with organ labels."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zept_nnunet.errors import ZePTError


def register(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "insert-lesions",
        help="paint synthetic lesions into a CT dataset that has organ labels",
        description="Write a new raw dataset with synthetic lesions in the organs of an existing one. Dataset, "
        "cases and headers say that they are synthetic. Research use, not a medical device.",
    )
    parser.add_argument("-d", metavar="IN", required=True, help="dataset ID, name or folder in nnU-Net's raw format")
    parser.add_argument(
        "-o", metavar="OUT", required=True, help="new dataset ID, or name DatasetXXX_Name, in nnUNet_raw"
    )
    parser.add_argument("--types", nargs="+", metavar="TYPE", required=True, help='such as "spleen tumor"')
    parser.add_argument("--per-case", type=int, default=1, help="lesions of each type a case (default: 1)")
    parser.add_argument(
        "--phase",
        default="auto",
        choices=("auto", "non-contrast", "arterial", "portal", "delayed"),
        help="contrast phase of the images; auto judges by the host's attenuation (default)",
    )
    parser.add_argument(
        "--test-only", action="store_true", help="lesions in the test cases alone; new types are declared as unseen"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random generator (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output dataset")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Insert them and say how many."""
    from nnunetv2.paths import nnUNet_raw

    from zept_nnunet.datasets.insert_lesions import insert_lesions, target_name

    if not nnUNet_raw.is_set():
        raise ZePTError("the environment variable nnUNet_raw is not set: export nnUNet_raw=FOLDER")
    raw = Path(str(nnUNet_raw))
    source = _source(args.d, raw)
    folder = insert_lesions(
        source,
        raw / target_name(args.o, source.name),
        args.types,
        seed=args.seed,
        per_case=args.per_case,
        phase=args.phase,
        test_only=args.test_only,
        overwrite=args.overwrite,
    )
    print(folder)
    return 0


def _source(given: str, raw: Path) -> Path:
    if (Path(given) / "dataset.json").is_file():
        return Path(given)
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    try:
        return raw / str(maybe_convert_to_dataset_name(int(given) if given.isdigit() else given))
    except (RuntimeError, ValueError) as error:
        raise ZePTError(f"-d {given}: {error}") from error
