"""``zept demo``: the whole way from a raw dataset to a picture, through the commands that an nnU-Net user types.

Each command is printed before it runs, so that what scrolls by can be repeated on one's own dataset.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from zept_nnunet.datasets.demo_ct import SEEN_HOSTS, UNSEEN_TUMOR, write_demo_dataset
from zept_nnunet.errors import ZePTError

DATASET_ID = 900
CONFIGURATION = "3d_fullres"
ZEPT_TRAINER, STOCK_TRAINER = "ZePTTrainerDemo", "nnUNetTrainerDemo"
MARKER = "zept_demo.json"  # stands in every folder that this command made, and in no other
OWN_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "predictions")
PICTURE = "demo.png"


@dataclass(frozen=True)
class Step:
    """One command of the demo: what it is for, its arguments as a user would type them, and variables of its own."""

    purpose: str
    command: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class DemoPaths:
    """Where everything of one demo stands; nothing is written outside ``folder``."""

    folder: Path
    dataset: Path
    trained_model: Path
    model: Path  # the one that predicts: with the unseen tumor added, or the trained one for the stock trainer
    predictions: Path


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``zept demo`` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="make a small synthetic CT dataset, train on it, add an unseen tumor, predict, evaluate, draw",
        description="Runs the stock nnU-Net commands on a small synthetic CT dataset, each printed before it runs. "
        "About 10 minutes on two CPU cores. Synthetic images: this shows that everything works together, no accuracy.",
    )
    parser.add_argument("-o", "--output", default="zept_demo", help="folder for everything (default: ./zept_demo)")
    parser.add_argument(
        "-tr",
        "--trainer",
        default=ZEPT_TRAINER,
        choices=(ZEPT_TRAINER, STOCK_TRAINER),
        help="the second one is nnU-Net's own at the same budget, for comparison; nothing is added to it",
    )
    parser.add_argument("-device", default="cpu", choices=("cpu", "cuda", "mps"), help="as for nnU-Net (default: cpu)")
    parser.add_argument("--epochs", type=positive_int, help="train this many epochs")
    parser.add_argument("--iterations", type=positive_int, help="train this many iterations an epoch")
    parser.add_argument("--seed", type=int, default=0, help="of the dataset (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier demo left in the folder")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo.

    Raises:
        ZePTError: where the folder cannot be used, or a step fails.
    """
    started = time.monotonic()
    folder = Path(args.output).resolve()
    _prepare_folder(folder, overwrite=args.overwrite)
    variables = demo_environment(folder, args.epochs, args.iterations)
    print("Synthetic CT, for demonstration only: research use, not a medical device.\n")
    print("Variables that nnU-Net reads, as set for the commands below:")
    for name, value in variables.items():
        print(f"  export {name}={shlex.quote(value)}")

    print(
        f"\nThe dataset: 20 training and 4 test cases; {UNSEEN_TUMOR!r} stands in no training image or label.",
        flush=True,
    )
    write_demo_dataset(folder / "nnUNet_raw", DATASET_ID, seed=args.seed)
    paths = demo_paths(folder, args.trainer)
    steps = demo_steps(paths, args.trainer, args.device)
    environment = os.environ | variables | {"PYTHONUNBUFFERED": "1"}
    for number, step in enumerate(steps, start=1):
        run_step(step, f"[{number}/{len(steps)}]", environment, started)

    dataset_json = json.loads((paths.model / "dataset.json").read_text(encoding="utf-8"))
    trained = json.loads((paths.dataset / "dataset.json").read_text(encoding="utf-8"))["labels"]
    classes = {name: int(value) for name, value in dataset_json["labels"].items() if name != "background"}
    unseen = {name for name in classes if name not in trained}
    summary = json.loads((paths.predictions / "summary.json").read_text(encoding="utf-8"))
    print("\n" + dice_table(summary, classes, unseen))
    _draw(paths, classes, unseen)
    minutes = (time.monotonic() - started) / 60
    print(f"\nPicture: {folder / PICTURE}\nModel:   {paths.model}\nDone in {minutes:.1f} minutes.")
    return 0


def demo_environment(folder: Path, epochs: int | None = None, iterations: int | None = None) -> dict[str, str]:
    """Environment variables that the demo sets for its commands, all paths inside ``folder``.

    One worker each: on two cores a second one only takes time from the network. ``OMP_NUM_THREADS`` holds for the
    workers; with ``-device cpu`` nnU-Net gives all cores to the network by itself. Threads that wait sleep instead of
    spinning, or they take the cores from whatever else runs on the machine.
    """
    package = Path(__file__).resolve().parent.parent
    variables = {name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    variables["nnUNet_extTrainer"] = str(package / "datasets" / "demo_trainers")
    variables |= {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1"}
    variables |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    if epochs is not None:
        variables["ZEPT_DEMO_EPOCHS"] = str(epochs)
    if iterations is not None:
        variables["ZEPT_DEMO_ITERATIONS"] = str(iterations)
    return variables


def demo_paths(folder: Path, trainer: str) -> DemoPaths:
    """Where nnU-Net and ``zept add-tumor`` put what the demo makes."""
    name = f"Dataset{DATASET_ID:03d}_ZePTDemo"
    results = folder / "nnUNet_results" / name
    trained = results / f"{trainer}__nnUNetPlans__{CONFIGURATION}"
    plus = results / f"{trainer}__nnUNetPlans_plus__{CONFIGURATION}"
    model = plus if trainer == ZEPT_TRAINER else trained
    return DemoPaths(folder, folder / "nnUNet_raw" / name, trained, model, folder / "predictions")


def demo_steps(paths: DemoPaths, trainer: str, device: str) -> list[Step]:
    """The commands, in order; ``zept add-tumor`` only where the trainer is ours."""
    dataset, plans = str(DATASET_ID), paths.model.name.split("__")[1]
    references, predictions = str(paths.dataset / "labelsTs"), str(paths.predictions)
    plan = ("nnUNetv2_plan_and_preprocess", "-d", dataset, "-c", CONFIGURATION, "-np", "1", "-npfp", "1")
    train = ("nnUNetv2_train", dataset, CONFIGURATION, "0", "-tr", trainer, "-device", device)
    # A batch takes milliseconds to augment, and workers would take the cores from the network. Planning needs one.
    augment_in_process = (("nnUNet_n_proc_DA", "0"),)
    add = ("zept", "add-tumor", str(paths.trained_model), "--declared")
    which = ("-d", dataset, "-c", CONFIGURATION, "-tr", trainer, "-p", plans, "-f", "0")
    where = ("-i", str(paths.dataset / "imagesTs"), "-o", predictions)
    how = ("--disable_tta", "-device", device, "-npp", "1", "-nps", "1")
    classes = ("-djfile", str(paths.model / "dataset.json"), "-pfile", str(paths.model / "plans.json"))
    steps = [
        Step("plan and preprocess", (*plan, "--verify_dataset_integrity")),
        Step("train one fold (the long step)", train, augment_in_process),
        Step(f"add the tumor that training never saw ({UNSEEN_TUMOR})", add),
        Step("predict the test images", ("nnUNetv2_predict", *which, *where, *how)),
        Step(
            "compare with the references",
            ("nnUNetv2_evaluate_folder", references, predictions, *classes, "-np", "1"),
        ),
    ]
    return [step for step in steps if trainer == ZEPT_TRAINER or step.command != add]


def dice_table(summary: Mapping[str, object], classes: Mapping[str, int], unseen: Collection[str]) -> str:
    """Mean Dice per class from nnU-Net's ``summary.json``, unseen classes marked; '-' where no case gives one."""
    mean = summary["mean"]
    if not isinstance(mean, Mapping):
        raise ZePTError("Wanted per-class means under 'mean' in summary.json. Write it with nnUNetv2_evaluate_folder.")
    width = max(len(name) for name in classes)
    lines = [f"{'class':<{width}}  {'in training':<11}  Dice", f"{'-' * width}  {'-' * 11}  -----"]
    for name, value in classes.items():
        dice = float(mean[str(value)]["Dice"])
        shown = "-" if math.isnan(dice) else f"{dice:.3f}"
        lines.append(f"{name:<{width}}  {'UNSEEN' if name in unseen else 'seen':<11}  {shown}")
    return "\n".join(lines)


def _draw(paths: DemoPaths, classes: Mapping[str, int], unseen: Collection[str]) -> None:
    from zept_nnunet.evaluation.picture import draw_picture, largest_tumor_slices  # matplotlib takes a second to import

    tumors = {name: value for name, value in classes.items() if name in SEEN_HOSTS or name in unseen}
    rows = largest_tumor_slices(paths.dataset / "imagesTs", paths.dataset / "labelsTs", paths.predictions, tumors)
    title = f"Synthetic CT, held-out cases, {paths.model.name.split('__')[0]}"
    draw_picture(rows, classes, unseen, paths.folder / PICTURE, title=title)


def run_step(step: Step, counter: str, environment: Mapping[str, str], started: float) -> None:
    elapsed = time.monotonic() - started
    shown = " ".join([*(f"{name}={value}" for name, value in step.variables), shlex.join(step.command)])
    print(f"\n=== {counter} {step.purpose} ({elapsed:.0f} s since the start)\n$ {shown}\n", flush=True)
    command = [_executable(step.command[0]), *step.command[1:]]
    try:
        code = subprocess.run(command, env={**environment, **dict(step.variables)}).returncode
    except OSError as error:
        raise ZePTError(f"Step {counter} ({step.purpose}) could not start: {error}. See `zept doctor`.") from error
    if code != 0:
        raise ZePTError(
            f"Step {counter} ({step.purpose}) ended with exit code {code}; its message stands above. "
            f"The command was: {shown}"
        )


def _executable(name: str) -> str:
    """The command of this very environment, else whatever PATH finds."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise ZePTError(f"Wanted the command {name} beside {sys.executable} or on PATH. Install zept-nnunet with pip.")
    return found


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
        (folder / PICTURE).unlink(missing_ok=True)
    for name in OWN_FOLDERS[:3]:
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text(json.dumps({"made_by": "zept demo"}) + "\n", encoding="utf-8")


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"wanted a whole number of at least 1, got {text}")
    return value
