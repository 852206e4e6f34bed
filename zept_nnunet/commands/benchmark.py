"""``zept benchmark``: models on datasets by their IDs, in one table; here or as jobs of a cluster."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zept_nnunet.commands.merge import dataset_of, folder_of, merged_name
from zept_nnunet.errors import ZePTError

if TYPE_CHECKING:
    from zept_nnunet.jobs import Job


def register(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "benchmark",
        help="models on datasets by their IDs, in one table",
        description="Predict and evaluate every model on every dataset and put the figures in one table "
        "(benchmark.csv, .md and .html). Classes are matched by name and synonym; a dataset is judged on the classes "
        "that it labels. With --suite: merge, plan and train first, and put the published figures beside ours. What is "
        "done is skipped, so a killed run goes on.",
    )
    parser.add_argument("-o", required=True, type=Path, metavar="FOLDER", help="output folder")
    parser.add_argument("-m", nargs="+", default=[], metavar="[NAME=]MODEL_FOLDER", help="models")
    parser.add_argument("-d", nargs="+", default=[], metavar="ID", help="datasets: IDs or names")
    parser.add_argument("--suite", metavar="NAME", help="a published table (zept-cvpr24), or a YAML file of that form")
    parser.add_argument("--ids", nargs="+", default=[], metavar="NAME=ID", help="--suite: your datasets by its names")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="--suite: datasets to leave out")
    parser.add_argument(
        "--allow-overlap", nargs="+", default=[], metavar="NAME",
        help="--suite: datasets whose test scans may be among training; the table says so",
    )  # fmt: skip
    parser.add_argument("--merged", metavar="ID", help="--suite: ID of the merged training dataset, or its name")
    parser.add_argument("-tr", nargs="+", default=["ZePTTrainer"], help="--suite: trainers (default: ZePTTrainer)")
    parser.add_argument("-c", default="3d_fullres", help="--suite: configuration (default: 3d_fullres)")
    parser.add_argument("-pl", default="ZePTPlanner", help="--suite: planner (default: ZePTPlanner)")
    parser.add_argument("--split", default="auto", choices=("auto", "test", "training"),
                        help="which cases (default: labelsTs where it is there, else the training cases)")  # fmt: skip
    parser.add_argument(
        "-f", nargs="+", default=None, metavar="FOLD", help="folds (default: those of zept predict; --suite: 0 to 4)"
    )
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
    from zept_nnunet.jobs import is_held, read_status, status_table

    parameters_of(args.parameter)

    if args.status:
        entries = read_status(args.o)
        print(status_table(entries))
        if any(e["state"] in ("waiting", "running") for e in entries.values()) and not is_held(args.o):
            print(f"no zept benchmark runs with -o {args.o}: nothing more is handed over until it is started again")
        return 0
    for flag, value, least in (("--jobs", args.jobs, 1), ("--retries", args.retries, 0)):
        if value < least:
            raise ZePTError(f"{flag} wants {least} or more; got {value}")
    if args.suite and args.split != "auto":
        raise ZePTError(f"--split {args.split} is for -m and -d: a suite says which cases each of its tests is on")
    if bool(args.suite) == bool(args.m or args.d):
        raise ZePTError("wanted models, -m MODEL_FOLDER …, and datasets, -d ID …; or --suite NAME without both")
    raw = folder_of("nnUNet_raw")
    return run_suite(args, raw) if args.suite else run_models(args, raw)


def run_models(args: argparse.Namespace, raw: Path) -> int:
    """Models that are trained, on datasets."""
    if not args.m or not args.d:
        raise ZePTError("wanted models, -m MODEL_FOLDER …, and datasets, -d ID …")
    from zept_nnunet.evaluation import benchmark
    from zept_nnunet.jobs import only_one

    models = [benchmark.Model.read(m) for m in args.m]
    if len({m.name for m in models}) < len(models):
        raise ZePTError("two models have one name; give them names: -m NAME=FOLDER")
    tests = [benchmark.LabeledCases.read(dataset_of(d, raw), args.split) for d in args.d]
    for model in models:
        for test in tests:
            benchmark.matched(model, test)
    out = args.o.resolve()
    jobs = benchmark.jobs_of({m.name: m.folder for m in models}, tests, out, *flags_of(args))
    if args.dry_run:
        print(commands_of(jobs))
        return 0
    with only_one(out):
        for model in models:
            for test in tests:
                benchmark.write_references(model, test, out / "data" / model.name / test.name)
        failure = execute(jobs, args)
        table = benchmark.table_of(models, tests, out, partly=failure is not None)
        if failure is None or len(table):
            _finish(args, table)
    if failure is not None:
        raise failure
    return 0


def run_suite(args: argparse.Namespace, raw: Path) -> int:
    """Train what a published table asks for, then as `run_models`, and its figures beside ours."""
    from zept_nnunet.evaluation import benchmark
    from zept_nnunet.evaluation.suite import Suite, SuiteRun, Training, find_datasets
    from zept_nnunet.jobs import only_one

    suite = Suite.read(args.suite).without(args.without)
    ids = {}
    for entry in args.ids:
        name, sign, dataset = entry.rpartition("=")
        if not sign:
            raise ZePTError(f"--ids wants NAME=ID, got {entry!r}")
        ids[name] = dataset_of(dataset, raw)
    datasets = find_datasets(suite, raw, ids)
    training = [datasets[n] for n in suite.training]
    if len(training) > 1 and not args.merged:
        raise ZePTError(f"--suite merges {len(training)} datasets: give the merged one an ID, --merged ID")
    target = raw / merged_name(args.merged, training, raw) if len(training) > 1 else training[0]
    how = Training(tuple(args.tr), args.c, tuple(args.f or "01234"), args.pl, args.device)
    plan = SuiteRun(suite, datasets, target, how, folder_of("nnUNet_results"), tuple(args.allow_overlap))
    unknown = [n for n in args.allow_overlap if n not in suite.datasets]
    if unknown:
        raise ZePTError(f"--allow-overlap {unknown[0]}: the suite has {suite.datasets}")
    out = args.o.resolve()
    jobs, later = plan.training_jobs(out), plan.announced(out, *flags_of(args))
    plan.check_tests()
    if args.dry_run:
        print(commands_of([*jobs, *later]))
        return 0
    with only_one(out):
        if plan.labels():
            plan.write_map(out)
        untrained = execute(jobs, args, later)
        trained = plan.trained(jobs)
        if untrained is not None and not trained:
            raise untrained
        plan = replace(plan, training=replace(how, trainers=tuple(trained)))
        tests = {test.name: plan.cases_of(test) for test in suite.tests}
        different = list({cases.name: cases for cases in tests.values()}.values())
        for trainer in trained:
            for cases in different:
                benchmark.write_references(plan.model(trainer, cases), cases, out / "data" / trainer / cases.name)
                if cases.is_predicted:
                    plan.link_validation(trainer, cases, out / "predictions" / trainer / cases.name)
        unpredicted = execute(benchmark.jobs_of(plan.models(), different, out, *flags_of(args)), args)
        table = plan.table({name: cases.name for name, cases in tests.items()}, out, partly=unpredicted is not None)
        notes = [f"Trained on {', '.join(suite.training)}; {args.c}, folds {', '.join(how.folds)}."]
        notes += [f"Left out: {', '.join(args.without)}."] if args.without else []
        lacking = [t for t in how.trainers if t not in trained]
        notes += [f"Not trained to the end, and left out: {', '.join(lacking)}."] if lacking else []
        _finish(args, table, suite.title, [suite.source, *suite.notes, *notes])
    failure = untrained or unpredicted
    if failure is not None:
        raise failure
    return 0


def flags_of(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Of `zept predict` and of `zept evaluate`."""
    predict = ["-device", args.device, *(["--disable_tta"] if args.disable_tta else [])]
    predict += ["-f", *args.f] if args.f else []
    return predict, ["--bootstrap", str(args.bootstrap), "-np", str(args.np), "--disable_progress_bar"]


def commands_of(jobs: Sequence[Job]) -> str:
    """As one would type them."""
    return "\n".join(shlex.join(job.command) for job in jobs)


def execute(jobs: list[Job], args: argparse.Namespace, later: Sequence[Job] = ()) -> ZePTError | None:
    """Run the jobs here, or on a cluster; the error, where some failed: what the others left is still worth a table."""
    from zept_nnunet.evaluation import benchmark
    from zept_nnunet.jobs import run_here, run_on_cluster

    environment = benchmark.environment()
    try:
        if args.cluster:
            parameters = parameters_of(args.parameter)
            run_on_cluster(jobs, args.o, environment, args.cluster, parameters, args.retries, args.jobs, later=later)
        else:
            run_here(jobs, args.o, environment, later)
    except ZePTError as error:
        return error
    return None


def _finish(args: argparse.Namespace, table: Any, *words: Any) -> None:
    """Write and print the table."""
    from zept_nnunet.evaluation import benchmark

    paths = benchmark.write_table(table, args.o, *words)
    print(table.to_string(index=False))
    print(f"\nwritten: {', '.join(map(str, paths))}")


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
