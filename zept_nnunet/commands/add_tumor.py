"""`zept add-tumor`: a trained model folder becomes one that also reports an unseen tumor."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from zept_nnunet.errors import ZePTError


class _StartTumor(argparse.Action):
    """`--name`: begins a tumor."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        namespace.tumors = [*namespace.tumors, {"name": values, "hosts": []}]


class _ExtendTumor(argparse.Action):
    """`--host`, `--description`, `--label`: belong to the `--name` before them."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if not namespace.tumors:
            parser.error(f"{option_string} {values} belongs to a tumor: write --name NAME before it")
        tumor = namespace.tumors[-1]
        if self.dest == "host":
            tumor["hosts"].append(values)
        elif self.dest in tumor:
            parser.error(f"{option_string} is given twice for {tumor['name']!r}")
        else:
            tumor[self.dest] = values


def register(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "add-tumor",
        help="add a tumor that the model has never seen to a trained model folder",
        description="Write a new model folder that also reports the named tumors, for nnUNetv2_predict and the other "
        "nnU-Net commands. The old folder stays as it is. --host, --description, --label belong to the --name before.",
    )
    parser.add_argument("model_folder", metavar="MODEL_FOLDER", help="TRAINER__PLANS__CONFIGURATION")
    parser.add_argument("--name", action=_StartTumor, help="name of the new class; may be given several times")
    parser.add_argument("--host", action=_ExtendTumor, help="organ that it grows in; may be given several times")
    parser.add_argument("--description", action=_ExtendTumor, help="what it looks like, in words")
    parser.add_argument("--label", action=_ExtendTumor, type=int, help="its label value (default: the next free one)")
    parser.add_argument("--declared", action="store_true", help="add all that dataset.json lists under zept.unseen")
    parser.add_argument("-o", metavar="FOLDER", default=None, help="output folder (default: sibling ..._plus__...)")
    parser.add_argument("--copy", action="store_true", help="copy the checkpoints instead of hard links")
    parser.set_defaults(func=run, tumors=[])


def run(args: argparse.Namespace) -> int:
    """Add the tumors and say how to predict with them."""
    from zept_nnunet.inference.add_tumor import TumorRequest, add_tumors, declared_requests

    if args.declared == bool(args.tumors):
        raise ZePTError("add-tumor wants either --name NAME --host ORGAN … or --declared")
    if args.declared:
        requests = declared_requests(args.model_folder)
    else:
        requests = [
            TumorRequest(t["name"], tuple(t["hosts"]) or None, t.get("description"), t.get("label"))
            for t in args.tumors
        ]
    added = add_tumors(args.model_folder, requests, args.o, copy_checkpoints=args.copy)
    for name, label, hosts in added.tumors:
        print(f"added {name!r}: label {label}, host {', '.join(hosts) if hosts else 'whole body'}")
    for note in added.notes:
        print(f"note: {note}")
    print(f"model folder: {added.folder}")
    parts = added.folder.name.split("__")
    if args.o is None and len(parts) == 3:
        dataset = added.folder.parent.name
        print(f"next: nnUNetv2_predict -d {dataset} -tr {parts[0]} -p {parts[1]} -c {parts[2]} -i INPUT -o OUTPUT")
    else:
        print(f"next: nnUNetv2_predict_from_modelfolder -m {added.folder} -i INPUT -o OUTPUT")
    return 0
