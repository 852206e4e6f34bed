"""`zept phantom`: the synthetic CT dataset on which unseen tumors are measured."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zept_nnunet.errors import ZePTError


def register(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "phantom",
        help="write the synthetic CT phantom: organs, lesions, healthy look-alikes, unseen types in the test set",
        description="Write a synthetic abdominal CT dataset in nnU-Net's raw format into nnUNet_raw. Synthetic images: "
        "research use, not a medical device.",
    )
    parser.add_argument("-d", metavar="ID", type=int, required=True, help="dataset ID, 1 to 999")
    parser.add_argument(
        "--size",
        default="small",
        choices=("tiny", "demo", "small", "full"),
        help="for tests, for zept demo, for a CPU, with real spacing (default: small)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random generator (default: 0)")
    parser.add_argument(
        "--supervised-id",
        metavar="ID",
        type=int,
        help="also write the ceiling's dataset under this ID: the same patients and test set, unseen types labeled",
    )
    parser.add_argument(
        "--unlabeled-unseen",
        action="store_true",
        help="some training cases hold a lesion of an unseen type without a label, as real data does",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier call left under this ID")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Write the dataset or both."""
    from nnunetv2.paths import nnUNet_raw

    from zept_nnunet.datasets.phantom import check_target, write_phantom_dataset

    if not nnUNet_raw.is_set():
        raise ZePTError("the environment variable nnUNet_raw is not set: export nnUNet_raw=FOLDER")
    if args.supervised_id == args.d:
        raise ZePTError(f"--supervised-id wants an ID of its own; {args.d} is the phantom's")
    raw = Path(str(nnUNet_raw))
    jobs = [(args.d, False)] + ([] if args.supervised_id is None else [(args.supervised_id, True)])
    for dataset_id, supervised in jobs:  # all checks before the first image
        check_target(raw, dataset_id, args.size, args.seed, supervised=supervised, overwrite=args.overwrite)
    for dataset_id, supervised in jobs:
        folder = write_phantom_dataset(
            raw,
            dataset_id,
            args.size,
            args.seed,
            supervised=supervised,
            unlabeled_unseen=args.unlabeled_unseen and not supervised,
            overwrite=args.overwrite,
        )
        print(folder)
    return 0
