"""``zept prepare``: the official download of a public dataset as a raw dataset of nnU-Net."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from zept_nnunet.commands.merge import folder_of
from zept_nnunet.errors import ZePTError


def register(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "prepare",
        help="a public dataset's official download as a raw dataset",
        description="Turn the official download of a dataset into DatasetXXX_NAME in nnUNet_raw. Images that nnU-Net "
        "can read are referred to where they are; labels are checked. Without arguments: which recipes there are.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="a recipe; alone: what it is and its pitfalls")
    parser.add_argument("source", nargs="?", type=Path, metavar="SOURCE_FOLDER", help="the unpacked download")
    parser.add_argument("-d", metavar="ID", help="ID of the new dataset, or its name DatasetXXX_NAME")
    parser.add_argument("--partial", action="store_true", help="a part of the download will do")
    parser.add_argument("--tumor", metavar="NAME", help='of one-tumor: what its class is called, "colon tumor"')
    parser.add_argument("--host", metavar="ORGAN", help="of one-tumor: where it sits; a part of its class's name")
    parser.add_argument("-np", type=int, default=2, help="worker processes of nnU-Net's MSD converter (default: 2)")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """List, describe, or prepare."""
    from zept_nnunet.datasets.prepare import about, prepare, recipes
    from zept_nnunet.datasets.prepare_msd import prepare_msd

    if args.name is None:
        print("\n".join(f"{name:<18} {recipes()[name]['title']}" for name in recipes()))
        return 0
    by_key = {name.lower(): name for name in recipes()}
    name = by_key.get(args.name.lower())
    if name is None:
        raise ZePTError(f"there is no recipe {args.name!r}; there are {', '.join(recipes())}")
    print(about(name))
    if args.source is None and args.d is None:
        return 0
    if args.source is None or args.d is None:
        raise ZePTError("wanted both: SOURCE_FOLDER, the unpacked download, and -d ID, of the new dataset")
    if not args.source.is_dir():
        raise ZePTError(f"{args.source} is no folder")
    if (args.tumor is not None or args.host is not None) and name != "one-tumor":
        raise ZePTError(f"--tumor and --host are for one-tumor; {name} names its classes itself")
    raw = folder_of("nnUNet_raw")
    title = re.sub(r"\W", "", name)
    number = args.d.isascii() and args.d.isdigit()
    target = args.d if args.d.startswith("Dataset") else f"Dataset{int(args.d):03d}_{title}" if number else ""
    if not re.fullmatch(r"Dataset(?!000)[0-9]{3}_\w[\w-]*", target):
        raise ZePTError(f"-d wants an ID from 1 to 999 or a name such as Dataset101_LiTS, got {args.d!r}")
    # nnU-Net looks for an ID in all three, and stops where it has two names
    folders = [raw, *(Path(os.environ[v]) for v in ("nnUNet_preprocessed", "nnUNet_results") if os.environ.get(v))]
    taken = sorted(p for folder in folders for p in folder.glob(f"{target[:10]}_*"))
    if taken:
        raise ZePTError(f"the ID {target[7:10]} belongs to {taken[0]}; choose a free one")
    if recipes()[name]["kind"] == "msd":
        cases = prepare_msd(name, args.source, raw / target, args.np, args.partial)
    else:
        cases = prepare(name, args.source, raw / target, args.tumor, args.partial, args.host)
    print(f"{raw / target}: {cases} training cases\nnext: zept taxonomy -d {int(target[7:10])}")
    return 0
