"""`zept evaluate`: predictions against references, seen and unseen classes apart."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from zept_nnunet.commands.taxonomy import find_dataset_json
from zept_nnunet.errors import ZePTError

_FILES = (
    "metrics.csv",
    "curves.csv",
    "summary.json",
    "metrics_versus.csv",
    "curves_versus.csv",
    "summary_versus.json",
    "comparison.csv",
)


def register(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "evaluate",
        help="evaluate predictions: overlap, ranking, lesions, false positives; seen and unseen classes apart",
        description="Compare predictions with references, per case and per class, and write metrics.csv, "
        "summary.json and, with scores, curves.csv. Classes come from the dataset.json beside the predictions. Ranking "
        "metrics want CASE_scores.npz there (zept predict --save_scores). Exit status 1 where something is missing or "
        "wrong. Definitions: docs/evaluation.md",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("-r", metavar="FOLDER", type=Path, help="references, CASE + file ending")
    source.add_argument("-d", metavar="ID", help="dataset ID or name: references are its labelsTs in nnUNet_raw")
    parser.add_argument(
        "--dataset-json",
        type=Path,
        metavar="FILE",
        help="with -r: says what the references hold and label (default: the one beside the predictions)",
    )
    parser.add_argument(
        "-i", nargs="+", type=Path, required=True, metavar="FOLDER", help="predictions; several: seeds of one method"
    )
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER", help="output folder")
    parser.add_argument(
        "--versus", nargs="+", type=Path, default=[], metavar="FOLDER", help="another method's, for a paired comparison"
    )
    parser.add_argument(
        "--calibration",
        nargs="+",
        type=Path,
        default=[],
        metavar="FOLDER",
        help="predictions of validation cases with scores, one folder per -i: thresholds at a matched rate of false "
        "positives per healthy scan come from them",
    )
    parser.add_argument(
        "--versus-calibration", nargs="+", type=Path, default=[], metavar="FOLDER", help="the same, per --versus"
    )
    parser.add_argument(
        "--calibration-references", type=Path, metavar="FOLDER", help="their references (with -d: default labelsTr)"
    )
    parser.add_argument(
        "--fp-rate", nargs="+", type=float, default=[1.0], help="false positives per healthy scan to match (default: 1)"
    )
    parser.add_argument("--tolerance-mm", type=float, default=3.0, help="of NSD, and of a hit in FROC (default: 3)")
    parser.add_argument("--lesion-iou", type=float, default=0.1, help="overlap from which lesions match (default: 0.1)")
    parser.add_argument(
        "--unseen", nargs="+", default=[], metavar="NAME", help="further tumors that training never saw"
    )
    parser.add_argument(
        "--strata", type=Path, metavar="CSV", help="case,class,stratum: aggregates for each stratum too"
    )
    parser.add_argument("--bootstrap", type=int, default=1000, help="bootstrap samples (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    parser.add_argument("-np", type=int, default=1, help="worker processes, one case each (default: 1)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report")
    parser.add_argument("--disable_progress_bar", action="store_true")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Check, evaluate, write, print. 0: every result is complete."""
    _check(args)
    references, dataset_json = args.r, args.dataset_json
    calibration_references = args.calibration_references
    if args.d is not None:
        dataset_json = find_dataset_json(args.d)
        references = dataset_json.parent / "labelsTs"
        calibration_references = calibration_references or dataset_json.parent / "labelsTr"
    for folder in (references, *args.i, *args.versus, *args.calibration, *args.versus_calibration):
        if not folder.is_dir():
            raise ZePTError(f"{folder} is no folder")

    from zept_nnunet.evaluation import report
    from zept_nnunet.evaluation.aggregate import Draws
    from zept_nnunet.evaluation.case import Settings
    from zept_nnunet.evaluation.curves import curves_table
    from zept_nnunet.evaluation.run import MethodFolders, evaluate_method, read_strata

    settings = Settings(args.tolerance_mm, args.lesion_iou, tuple(dict.fromkeys(args.fp_rate)))
    methods = [MethodFolders(tuple(args.i), tuple(args.calibration))]
    if args.versus:
        methods.append(MethodFolders(tuple(args.versus), tuple(args.versus_calibration)))
    results, figures = [], []
    tables, summaries = {}, []
    for index, method in enumerate(methods):
        result = evaluate_method(
            references,
            method,
            settings,
            reference_dataset_json=dataset_json,
            unseen=args.unseen,
            calibration_references=calibration_references,
            processes=args.np,
            show_progress=not args.disable_progress_bar,
        )
        cases = [r.case for r in result.seeds[0]]
        strata = read_strata(args.strata, result.table, cases) if args.strata else None
        draws = Draws.make(args.bootstrap, len(result.seeds), len(cases), args.seed, index)
        results.append(result)
        figures.append(report.aggregates(result, settings, draws, strata))
        inputs = {"references": str(references), "predictions": [str(p) for p in method.predictions]}
        inputs |= {"calibration": [str(p) for p in method.calibration], "bootstrap_seed": args.seed}
        suffix = "_versus" if index else ""
        tables[f"metrics{suffix}.csv"] = report.metrics_table(result, figures[-1])
        if result.with_scores:
            tables[f"curves{suffix}.csv"] = curves_table(result, draws)
        summaries.append((f"summary{suffix}.json", report.summary(result, figures[-1], settings, inputs, draws)))
    if args.versus:
        tables["comparison.csv"] = report.comparison_table(*figures)
    for name in _FILES:
        if name not in tables and name not in dict(summaries):
            (args.o / name).unlink(missing_ok=True)  # of an earlier report
    report.write(args.o, tables, summaries)

    for method, result, estimates in zip(methods, results, figures, strict=True):
        title = ", ".join(map(str, method.predictions))
        print(f"\n{title}: {len(result.seeds[0])} cases\n\n{report.terminal_tables(estimates, settings)}\n")
        for note in report.notes(result):
            print(f"note: {note}")
    print(f"written: {', '.join(str(args.o / name) for name in [*tables, *dict(summaries)])}")
    problems = list(dict.fromkeys(problem for result in results for problem in result.problems))
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    if problems:
        print(f"zept evaluate: INCOMPLETE, {len(problems)} problems; those rows are NaN", file=sys.stderr)
    return 1 if problems else 0


def _check(args: argparse.Namespace) -> None:
    if not args.overwrite and any((args.o / name).exists() for name in _FILES):
        raise ZePTError(f"{args.o} holds a report already; replace it with --overwrite, or give another -o")
    if args.o.exists() and not args.o.is_dir():
        raise ZePTError(f"-o {args.o} is a file; give a folder")
    for flag, folders, of, wanted in (
        ("--calibration", args.calibration, "-i", args.i),
        ("--versus-calibration", args.versus_calibration, "--versus", args.versus),
    ):
        if folders and len(folders) != len(wanted):
            raise ZePTError(f"{flag} wants one folder for each of {of} ({len(wanted)}); got {len(folders)}")
    if args.dataset_json is not None and args.d is not None:
        raise ZePTError("--dataset-json goes with -r; -d has one of its own")
    if args.tolerance_mm < 0 or not 0 < args.lesion_iou <= 1 or min(args.fp_rate) < 0:
        raise ZePTError("--tolerance-mm and --fp-rate want 0 or more, --lesion-iou more than 0 and at most 1")
    if args.np < 1 or args.bootstrap < 1 or args.seed < 0:
        raise ZePTError("-np and --bootstrap want 1 or more, --seed 0 or more")
