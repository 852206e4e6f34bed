"""``zept benchmark``: models on datasets by their IDs, in one table; here or as jobs of a cluster."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zept_nnunet.commands.merge import dataset_of, folder_of
from zept_nnunet.errors import ZePTError


def register(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "benchmark",
        help="models on datasets by their IDs, in one table",
        description="Predict and evaluate every model on every dataset and put the figures in one table "
        "(benchmark.csv, benchmark.md). Classes are matched by name and synonym; a dataset is judged on the classes "
        "that it labels. What is done is skipped, so a killed run goes on.",
    )
    parser.add_argument("-o", required=True, type=Path, metavar="FOLDER", help="output folder")
    parser.add_argument("-m", nargs="+", default=[], metavar="[NAME=]MODEL_FOLDER", help="models")
    parser.add_argument("-d", nargs="+", default=[], metavar="ID", help="datasets: IDs or names")
    parser.add_argument("--split", default="auto", choices=("auto", "test", "training"),
                        help="which cases (default: labelsTs where it is there, else the training cases)")  # fmt: skip
    parser.add_argument("-f", nargs="+", default=None, metavar="FOLD", help="folds (default: those of zept predict)")
    parser.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="default: cuda")
    parser.add_argument("--disable_tta", action="store_true", help="no mirroring at test time")
    parser.add_argument("--bootstrap", type=int, default=1000, help="bootstrap samples (default: 1000)")
    parser.add_argument("-np", type=int, default=1, help="worker processes of the evaluation (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--status", action="store_true", help="how far the benchmark in -o is; nothing else")
    parser.add_argument("--cluster", choices=("local", "slurm"), help="hand the commands to submitit, as jobs")
    parser.add_argument("--retries", type=int, default=2, help="of a lost job (default: 2)")
    parser.add_argument("--jobs", type=int, default=16, help="jobs side by side (default: 16)")
    parser.add_argument(
        "--parameter", action="append", default=[], metavar="KEY=VALUE",
        help="of submitit's executor: timeout_min=240, gpus_per_node=1, slurm_partition=gpu …",
    )  # fmt: skip
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Check, write references, run the jobs, write the table."""
    import shlex

    from zept_nnunet.jobs import read_status, run_here, run_on_cluster, status_table

    if args.status:
        print(status_table(read_status(args.o)))
        return 0
    if not args.m or not args.d:
        raise ZePTError("wanted models, -m MODEL_FOLDER …, and datasets, -d ID …")
    raw = folder_of("nnUNet_raw")
    parameters = parameters_of(args.parameter)

    from zept_nnunet.evaluation import benchmark

    models = [benchmark.Model.read(m) for m in args.m]
    if len({m.name for m in models}) < len(models):
        raise ZePTError("two models have one name; give them names: -m NAME=FOLDER")
    tests = [benchmark.LabeledCases.read(dataset_of(d, raw), args.split) for d in args.d]
    for model in models:
        for test in tests:
            benchmark.matched(model, test)
    predict = ["-device", args.device, *(["--disable_tta"] if args.disable_tta else [])]
    predict += ["-f", *args.f] if args.f else []
    evaluate = ["--bootstrap", str(args.bootstrap), "-np", str(args.np), "--disable_progress_bar"]
    jobs = benchmark.jobs_of(models, tests, args.o.resolve(), predict, evaluate)
    if args.dry_run:
        print("\n".join(shlex.join(job.command) for job in jobs))
        return 0
    for model in models:
        for test in tests:
            benchmark.write_references(model, test, args.o.resolve() / "data" / model.name / test.folder.name)
    if args.cluster:
        run_on_cluster(jobs, args.o, benchmark.environment(), args.cluster, parameters, args.retries, args.jobs)
    else:
        run_here(jobs, args.o, benchmark.environment())
    table = benchmark.table_of(models, tests, args.o.resolve())
    paths = benchmark.write_table(table, args.o)
    print(table.to_string(index=False))
    print(f"\nwritten: {', '.join(map(str, paths))}")
    return 0


def parameters_of(given: list[str]) -> dict[str, Any]:
    """KEY=VALUE of submitit's executor; whole numbers as such.

    Raises:
        ZePTError: one is not of that form.
    """
    found: dict[str, Any] = {"timeout_min": 24 * 60}
    for entry in given:
        key, sign, value = entry.partition("=")
        if not sign or not key.isidentifier():
            raise ZePTError(f"--parameter wants KEY=VALUE, got {entry!r}")
        found[key] = int(value) if value.isdigit() else value
    return found
