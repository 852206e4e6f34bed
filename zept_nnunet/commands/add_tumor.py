"""`zept add-tumor` and `zept remove-tumor`: a trained model folder with, or again without, an unseen tumor."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zept_nnunet.errors import ZePTError

if TYPE_CHECKING:
    from zept_nnunet.inference.add_tumor import AddedTumors
    from zept_nnunet.knowledge import KnowledgeSource


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
    """`--host`, `--description`, `--like`, `--label`: belong to the `--name` before them."""

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
    """Add both subcommands."""
    parser = subparsers.add_parser(
        "add-tumor",
        help="add a tumor that the model has never seen to a trained model folder",
        description="Write a new model folder that also reports the named tumors, for nnUNetv2_predict and the other "
        "nnU-Net commands. The old folder stays as it is. --host, --description, --like, --label belong to the --name "
        "before.",
    )
    _add_shared(parser)
    parser.add_argument("--name", action=_StartTumor, help="name of the new class; may be given several times")
    parser.add_argument("--host", action=_ExtendTumor, help="organ that it grows in; may be given several times")
    parser.add_argument("--description", action=_ExtendTumor, help="what it looks like, in words")
    parser.add_argument("--like", action=_ExtendTumor, help="use this built-in description (zept knowledge list)")
    parser.add_argument("--label", action=_ExtendTumor, type=int, help="its label value (default: the next free one)")
    parser.add_argument("--declared", action="store_true", help="add all that dataset.json lists under zept.unseen")
    vectors = parser.add_mutually_exclusive_group()
    vectors.add_argument("--encoder", metavar="NAME", help="the model's text encoder: Hugging Face name or folder")
    vectors.add_argument("--vectors", metavar="FILE", type=Path, help="vectors that zept knowledge encode wrote")
    parser.add_argument(
        "--keep-vectors",
        action="store_true",
        help="add though the package describes classes of the model otherwise than when it was trained: those keep "
        "the vectors that they were trained with",
    )
    parser.set_defaults(func=run, tumors=[])

    parser = subparsers.add_parser(
        "remove-tumor",
        help="the inverse of add-tumor",
        description="Write a new model folder without the named tumors, which add-tumor had added. Without any added "
        "tumor, plans.json and dataset.json are those of training, byte by byte.",
    )
    _add_shared(parser)
    parser.add_argument("--name", action="append", default=[], help="an added tumor; may be given several times")
    parser.set_defaults(func=run_remove)


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model_folder",
        metavar="MODEL_FOLDER",
        type=Path,
        nargs="+",
        help="TRAINER__PLANS__CONFIGURATION, with all its folds; several of them; or an ensemble's folder "
        "(ensembles/ensemble___…): all or none are changed",
    )
    parser.add_argument(
        "-o",
        metavar="FOLDER",
        default=None,
        help="output folder; of several models, the folder to hold them (default: siblings of the models)",
    )
    parser.add_argument("--copy", action="store_true", help="copy the checkpoints instead of hard links")


def run(args: argparse.Namespace) -> int:
    """Add the tumors and say how to predict with them."""
    from zept_nnunet.inference.add_tumor import TumorRequest, add_tumors, declared_requests

    if args.declared == bool(args.tumors):
        raise ZePTError("add-tumor wants either --name NAME --host ORGAN … or --declared")
    named = [
        TumorRequest(t["name"], tuple(t["hosts"]) or None, t.get("description"), t.get("label"), t.get("like"))
        for t in args.tumors
    ]
    knowledge = _knowledge(args)

    def add(folder: Path) -> AddedTumors:
        requests = declared_requests(folder) if args.declared else named
        return add_tumors(folder, requests, _output(args, folder, "_plus"), args.copy, knowledge, args.keep_vectors)

    return _change(args, add, "added")


def run_remove(args: argparse.Namespace) -> int:
    """Remove the tumors and say which added ones are left."""
    from zept_nnunet.inference.remove_tumor import remove_tumors

    def remove(folder: Path) -> AddedTumors:
        return remove_tumors(folder, args.name, _output(args, folder, "_minus"), args.copy)

    return _change(args, remove, "left")


def _knowledge(args: argparse.Namespace) -> KnowledgeSource | None:
    """The source of vectors that the options name; None: the model's own."""
    from zept_nnunet.knowledge import KnowledgeSource
    from zept_nnunet.knowledge.encoders import HuggingFaceEncoder
    from zept_nnunet.knowledge.vectors import read_vectors

    if args.vectors is not None:
        return KnowledgeSource(read_vectors(args.vectors))
    return None if args.encoder is None else KnowledgeSource(encoder=lambda: HuggingFaceEncoder(args.encoder))


def _are_several(args: argparse.Namespace) -> bool:
    from zept_nnunet.inference.several_folders import is_ensemble

    return len(args.model_folder) > 1 or is_ensemble(args.model_folder[0])


def _output(args: argparse.Namespace, folder: Path, suffix: str) -> str | None:
    """Where a model's new folder goes; of several models, -o names the folder that holds them."""
    if args.o is None or not _are_several(args):
        return args.o
    parts = folder.resolve().name.split("__")
    if len(parts) != 3:
        raise ZePTError(f"{folder} is not named TRAINER__PLANS__CONFIGURATION: change it alone, with -o FOLDER")
    return str(Path(args.o) / f"{parts[0]}__{parts[1]}{suffix}__{parts[2]}")


def _change(args: argparse.Namespace, change: Callable[[Path], AddedTumors], done: str) -> int:
    from zept_nnunet.inference.several_folders import change_all, change_ensemble, is_ensemble

    folders: list[Path] = args.model_folder
    if len(folders) > 1 and any(map(is_ensemble, folders)):
        raise ZePTError("an ensemble's folder stands for all of its members: give it alone")
    parent = None if args.o is None else Path(args.o)
    if is_ensemble(folders[0]):
        changed, ensemble = change_ensemble(folders[0], change, parent)
    else:
        changed, ensemble = change_all(folders, change, parent if len(folders) > 1 else None), None
    for one in changed:
        for name, label, hosts in one.tumors:
            print(f"{done} {name!r}: label {label}, host {', '.join(hosts) if hosts else 'whole body'}")
        for note in one.notes:
            print(f"note: {note}")
        print(f"model folder: {one.folder}")
    for one in changed:
        parts = one.folder.name.split("__")
        if args.o is None and len(parts) == 3:
            dataset, probabilities = one.folder.parent.name, " --save_probabilities" if ensemble else ""
            print(
                f"next: nnUNetv2_predict -d {dataset} -tr {parts[0]} -p {parts[1]} -c {parts[2]} -i INPUT -o OUTPUT"
                f"{probabilities}"
            )
        else:
            print(f"next: nnUNetv2_predict_from_modelfolder -m {one.folder} -i INPUT -o OUTPUT")
    if ensemble is not None:
        print("then: nnUNetv2_ensemble -i OUTPUT_1 OUTPUT_2 -o OUTPUT")
        print(f"ensemble's folder: {ensemble}")
    return 0
