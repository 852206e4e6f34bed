"""`zept report`: one self-contained page that compares methods."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from zept_nnunet.commands.baseline import RECIPES
from zept_nnunet.commands.taxonomy import find_dataset_json
from zept_nnunet.errors import ZePTError
from zept_nnunet.files import write_whole


def register(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "report",
        help="one page that compares methods: figures with intervals, curves, cases, a volume viewer",
        description="Make one HTML file from what zept evaluate has written for each method. It opens without a "
        "network. With references, images and folders of predictions it shows cases, too, and with the package "
        "ipyniivue a viewer of whole volumes. What it shows: docs/evaluation.md",
    )
    parser.add_argument("-o", type=Path, required=True, metavar="FILE", help="the page, such as report.html")
    parser.add_argument(
        "--method",
        action="append",
        required=True,
        metavar="NAME=EVALUATION[:PREDICTIONS]",
        help="a method: its name, the folder that zept evaluate -o wrote, and the folder of its predictions; several",
    )
    parser.add_argument(
        "--results",
        nargs="+",
        type=Path,
        default=[],
        metavar="CSV",
        help="tables of benchmarks/zero_shot.py: more rows",
    )
    parser.add_argument(
        "--retrieval",
        nargs="+",
        type=Path,
        default=[],
        metavar="FOLDER",
        help="what zept knowledge retrieve wrote: its table and its plot",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("-d", metavar="ID", help="dataset ID or name: its labelsTs and imagesTs in nnUNet_raw")
    source.add_argument("-r", type=Path, metavar="FOLDER", help="references; with --images")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="their images, CASE_0000 + file ending")
    parser.add_argument(
        "--cases", nargs="+", metavar="CASE", help="cases to show (default: the best, the worst, a healthy one)"
    )
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="tumors to show (default: all)")
    parser.add_argument("--title", default="Zero-shot tumor segmentation: methods compared", help="of the page")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier page")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Check, read, write."""
    if args.o.is_dir():
        raise ZePTError(f"-o {args.o} is a folder; give the name of the page, such as {args.o / 'report.html'}")
    if args.o.exists() and not args.overwrite:
        raise ZePTError(f"{args.o} exists; replace it with --overwrite, or give another -o")
    if (args.r is None) != (args.images is None):
        raise ZePTError("-r and --images belong together: give both, or -d, or neither (no cases are shown then)")
    if args.cases is not None and args.r is None and args.d is None:
        raise ZePTError("--cases wants the references and images: -d ID, or -r FOLDER --images FOLDER")

    from zept_nnunet.evaluation import html_methods, html_report
    from zept_nnunet.evaluation.html_cases import Folders
    from zept_nnunet.evaluation.html_retrieval import read_retrieval

    specs = [html_methods.parse_method(text) for text in args.method]
    purposes = {name: recipe.purpose for name, recipe in RECIPES.items()}
    methods = [html_methods.read_method(n, folder, p, purposes.get(n, "")) for n, folder, p in specs]
    html_methods.check_methods(methods)
    committed = [m for path in args.results for m in html_methods.read_results(path, purposes)]
    retrievals = [read_retrieval(folder) for folder in args.retrieval]
    source = find_dataset_json(args.d) if args.d is not None else None
    with_predictions = [m.predictions for m in methods if m.predictions is not None]
    if source is None and with_predictions:
        source = with_predictions[0] / "dataset.json"
    dataset_json = _read_json(source) if source is not None else {}
    if args.cases is not None and not with_predictions:
        raise ZePTError("--cases wants predictions to show: --method NAME=EVALUATION:PREDICTIONS")
    folders = None
    if args.d is not None and source is not None:
        folders = Folders.find(source.parent / "labelsTs", source.parent / "imagesTs", dataset_json)
    elif args.r is not None:
        folders = Folders.find(args.r, args.images, dataset_json)
    page = html_report.Page(args.title, methods, committed, dataset_json, folders, args.classes, args.cases, retrievals)
    text = html_report.render(page)
    write_whole(args.o, text)
    print(f"written: {args.o} ({len(text.encode('utf-8')) / 1e6:.1f} MB)")
    if folders is None or not with_predictions:
        print("note: no cases are shown; they want -d or -r with --images, and --method NAME=EVALUATION:PREDICTIONS")
    without = [m.name for m in methods if m.curves is None]
    if without:
        print(f"note: no curves.csv, so no curves of {', '.join(without)}: evaluate with scores, by this version")
    return 0


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ZePTError(f"{path} is no valid JSON ({error}); restore the file") from error
    if not isinstance(content, dict):
        raise ZePTError(f"{path} holds no JSON object; restore the file")
    return content
