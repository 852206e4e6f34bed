"""`zept …`: arguments and printing only. Each subcommand is a module in `zept_nnunet.commands`."""

from __future__ import annotations

import argparse
import errno
import importlib
import sys
from collections.abc import Sequence

from zept_nnunet import check_nnunet_version
from zept_nnunet.errors import ZePTError

COMMANDS = (
    "trainers_path",
    "doctor",
    "taxonomy",
    "knowledge",
    "prepare",
    "merge",
    "plan",
    "add_tumor",
    "calibrate",
    "predict",
    "demo",
    "baseline",
    "phantom",
    "insert_lesions",
    "evaluate",
    "benchmark",
    "report",
)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_THERE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)
_RUN_WITH_ANY_NNUNET = ("doctor", "trainers-path")  # doctor reports the version with everything else


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand; each sets `func`, which takes the arguments and returns an exit status."""
    parser = argparse.ArgumentParser(
        prog="zept", description="ZePT for nnU-Net v2. Research use only: not a medical device."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"zept_nnunet.commands.{name}").register(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Bad input is one message on stderr and exit status 1."""
    args = build_parser().parse_args(argv)
    try:
        if args.command not in _RUN_WITH_ANY_NNUNET:
            check_nnunet_version()
        return int(args.func(args))
    except ZePTError as error:
        print(f"zept {args.command}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in (*_NO_SPACE, *_NOT_THERE):
            raise
        file = error.filename2 or error.filename  # of two it is the second that could not be written
        where = f" ({file})" if file else ""
        remedy = "Free some space, or choose another" if error.errno in _NO_SPACE else "Choose another"
        print(
            f"zept {args.command}: {error.strerror}{where}; nothing is left half-written. {remedy} output folder",
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
