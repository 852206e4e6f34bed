"""``zept demo``: the whole way from a raw dataset to a page that compares two methods, by commands that a user types.

Each command is printed before it runs, so that what scrolls by can be repeated on one's own dataset.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from zept_nnunet.commands.trainers_path import trainers_path
from zept_nnunet.errors import ZePTError
from zept_nnunet.jobs import executable
from zept_nnunet.threads import KEEP_MEMORY

DATASET_ID = 900
CONFIGURATION, FOLD = "3d_fullres", "0"
PLANNER, PLANS = "ZePTSmallPlanner", "ZePTSmallPlans"
TRAINER = "ZePTTrainerBudget"
BASELINE = "any_tumor_plus"
EPOCHS, ITERATIONS = 10, 100
FP_RATE = "1"  # per healthy scan: as in the columns of the table that match it
SIZES = ("tiny", "demo", "small")
TUMORS = ("liver tumor", "kidney tumor", "spleen tumor")
"""Shown in the page: the seen types and the development-unseen one. Others stay closed until the method is final."""
MARKER = "zept_demo.json"  # stands in every folder that this command made, and in no other
OWN_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "predictions", "evaluation")
REPORT = "report.html"


@dataclass(frozen=True)
class Step:
    """One command of the demo: what it is for, its arguments as a user would type them, and variables of its own."""

    purpose: str
    command: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``zept demo`` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="make a synthetic CT dataset, train, add an unseen tumor, predict, compare with a baseline: report.html",
        description="Runs nnU-Net's and this package's commands on a small CT phantom, each printed before it runs: "
        "ZePT and any-tumor nnU-Net with the same synthetic anomalies, side by side. About 15 minutes on two cores. "
        "Synthetic images and a short training: how it works, not how accurate it is on patients.",
    )
    parser.add_argument("-o", "--output", default="zept_demo", help="folder for everything (default: ./zept_demo)")
    parser.add_argument("-device", default="cpu", choices=("cpu", "cuda", "mps"), help="as for nnU-Net (default: cpu)")
    parser.add_argument("--size", default="demo", choices=SIZES, help="of the phantom (default: demo)")
    parser.add_argument("--epochs", type=positive_int, default=EPOCHS, help=f"of each training (default: {EPOCHS})")
    parser.add_argument("--iterations", type=positive_int, default=ITERATIONS, help=f"an epoch (default: {ITERATIONS})")
    parser.add_argument("--seed", type=int, default=0, help="of the dataset and the trainings (default: 0)")
    parser.add_argument(
        "--results", nargs="+", default=[], metavar="CSV", help="tables of benchmarks/zero_shot.py: more rows"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier demo left in the folder")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo.

    Raises:
        ZePTError: where the folder cannot be used, or a step fails.
    """
    started = time.monotonic()
    missing = [path for path in args.results if not Path(path).is_file()]
    if missing:
        raise ZePTError(f"--results {missing[0]} is no file; give a table that benchmarks/zero_shot.py has written")
    folder = Path(args.output).resolve()
    _prepare_folder(folder, overwrite=args.overwrite)
    variables = demo_environment(folder, args.epochs, args.iterations, args.seed)
    print("Synthetic CT, for demonstration only: research use, not a medical device.\n")
    print("Variables that nnU-Net and its trainers read, as set for the commands below:")
    for name, value in variables.items():
        print(f"  export {name}={shlex.quote(value)}")
    steps = demo_steps(folder, args.size, args.seed, args.device, [str(Path(path).resolve()) for path in args.results])
    environment = os.environ | variables | {"PYTHONUNBUFFERED": "1"}
    for number, step in enumerate(steps, start=1):
        run_step(step, f"[{number}/{len(steps)}]", environment, started)
    minutes = (time.monotonic() - started) / 60
    print(f"\nPage:  {folder / REPORT}\nModel: {model_folder(folder, added=True)}\nDone in {minutes:.1f} minutes.")
    return 0


def demo_environment(folder: Path, epochs: int, iterations: int, seed: int) -> dict[str, str]:
    """Environment variables that the demo sets for its commands, all paths inside ``folder``.

    One worker each: on two cores a second one only takes time from the network. ``OMP_NUM_THREADS`` holds for the
    workers; with ``-device cpu`` nnU-Net gives all cores to the network by itself. Memory is kept between steps:
    giving it back to the system costs page faults (glibc's variables; others ignore them).
    """
    variables = {name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    variables["nnUNet_extTrainer"] = str(trainers_path())
    variables |= {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1"} | KEEP_MEMORY
    return variables | {"ZEPT_EPOCHS": str(epochs), "ZEPT_ITERATIONS": str(iterations), "ZEPT_SEED": str(seed)}


def model_folder(folder: Path, added: bool) -> Path:
    """Where nnU-Net puts the trained model, and ``zept add-tumor`` the one with the unseen tumors."""
    name = f"{TRAINER}__{PLANS}{'_plus' if added else ''}__{CONFIGURATION}"
    return folder / "nnUNet_results" / f"Dataset{DATASET_ID:03d}_ZePTPhantom" / name


def demo_steps(folder: Path, size: str, seed: int, device: str, results: list[str]) -> list[Step]:
    """The commands, in order."""
    dataset, model = str(DATASET_ID), str(model_folder(folder, added=True))
    images = str(folder / "nnUNet_raw" / f"Dataset{DATASET_ID:03d}_ZePTPhantom" / "imagesTs")
    predictions, evaluation = folder / "predictions", folder / "evaluation"
    fast = ("--disable_tta", "-device", device)
    workers = ("-npp", "1", "-nps", "1")
    steps = [
        Step(
            "make the dataset; tumors of spleen, pancreas and stomach stand in no training image or label",
            ("zept", "phantom", "-d", dataset, "--size", size, "--seed", str(seed)),
        ),
        Step(
            "plan and preprocess, with a preset for CPUs",
            ("zept", "plan", "-d", dataset, "-pl", PLANNER, "-c", CONFIGURATION, "-np", "1", "-npfp", "1",
             "--verify_dataset_integrity"),
        ),
        Step(
            "train one fold (a long step)",
            ("nnUNetv2_train", dataset, CONFIGURATION, FOLD, "-tr", TRAINER, "-p", PLANS, "-device", device),
        ),
        Step("add the tumors that training never saw", ("zept", "add-tumor", str(model_folder(folder, False)),
                                                        "--declared")),
        Step(
            "choose each tumor's threshold on the cases that the fold held out",
            ("zept", "calibrate", model, "-f", FOLD, "--rate", FP_RATE, *fast, *workers),
        ),
        Step(
            "predict the test images",
            ("zept", "predict", "-m", model, "-f", FOLD, "-i", images, "-o", str(predictions / "zept"),
             "--save_scores", "--save_anomaly_maps", *fast, *workers),
        ),
        Step(
            "the same for any-tumor nnU-Net, given the same synthetic anomalies (a long step)",
            ("zept", "baseline", BASELINE, "-d", dataset, "-i", images, "-o", str(predictions / BASELINE), "-c",
             CONFIGURATION, "-p", PLANS, "-np", "1", *fast),
        ),
    ]  # fmt: skip
    for name in ("zept", BASELINE):
        where = ("-i", str(predictions / name), "-o", str(evaluation / name))
        steps.append(
            Step(
                f"compare {name} with the references", ("zept", "evaluate", "-d", dataset, *where, "--bootstrap", "200")
            )
        )
    methods = [f"{name}={evaluation / name}:{predictions / name}" for name in ("zept", BASELINE)]
    flags = [word for method in methods for word in ("--method", method)]
    flags += ["--results", *results] if results else []
    steps.append(
        Step(
            "make the page",
            ("zept", "report", "-d", dataset, "-o", str(folder / REPORT), *flags, "--classes", *TUMORS),
        )
    )
    return steps


def run_step(step: Step, counter: str, environment: Mapping[str, str], started: float) -> None:
    """Print the command, run it.

    Raises:
        ZePTError: it cannot start, or ends with an error.
    """
    elapsed = time.monotonic() - started
    shown = " ".join([*(f"{name}={value}" for name, value in step.variables), shlex.join(step.command)])
    print(f"\n=== {counter} {step.purpose} ({elapsed:.0f} s since the start)\n$ {shown}\n", flush=True)
    command = [executable(step.command[0]), *step.command[1:]]
    try:
        code = subprocess.run(command, env={**environment, **dict(step.variables)}).returncode
    except OSError as error:
        raise ZePTError(f"Step {counter} ({step.purpose}) could not start: {error}. See `zept doctor`.") from error
    if code != 0:
        raise ZePTError(
            f"Step {counter} ({step.purpose}) ended with exit code {code}; its message stands above. "
            f"The command was: {shown}"
        )


def _prepare_folder(folder: Path, *, overwrite: bool) -> None:
    """Make the folder with nnU-Net's three in it; with ``overwrite`` remove what an earlier demo made, nothing else."""
    if folder.exists() and not folder.is_dir():
        raise ZePTError(f"Wanted a folder for the demo; {folder} is a file. Choose another with -o.")
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            raise ZePTError(f"{folder} is not empty, and no demo made it. Choose another folder with -o.")
        if not overwrite:
            raise ZePTError(f"{folder} holds an earlier demo. Replace it with --overwrite, or choose another with -o.")
        for name in OWN_FOLDERS:
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / REPORT).unlink(missing_ok=True)
    for name in OWN_FOLDERS[:3]:
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text(json.dumps({"made_by": "zept demo"}) + "\n", encoding="utf-8")


def positive_int(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"wanted a whole number of at least 1, got {text}")
    return value
