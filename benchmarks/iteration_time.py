"""Time of a training step of ZePT, in each of its stages, as a ratio to nnU-Net's on the same images.

    python benchmarks/iteration_time.py --size small --rounds 5 --steps 10

Steps of nnU-Net's trainer (that of the any-tumor baseline) and of ZePT's two stages take turns in one process, on
batches that each drew and augmented before the clock starts; the time of drawing one stands beside. Both train on the
plans, labels and split of zero_shot.py's phantom, on random weights. A round's seconds are the mean over its steps, and
the table shows mean ± standard deviation over the rounds. "zept": what a step takes on average over a training with the
default share of stage I. Each round is appended to results/iteration_time.csv. On a CPU, run it alone.

The small plans are those of zero_shot.py's runs on a CPU: half of nnU-Net's channels and patches of some 30,000 voxels,
where ZePT's part weighs most. Those that a user gets by default:

    python benchmarks/iteration_time.py --size full --planner ZePTPlanner --rounds 3 --steps 1
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import pandas as pd
from tqdm import tqdm
from zero_shot import PLANNER, ZEPT_TRAINER, Workspace, append_rows, arguments, matches, parse, phantom_of

RESULTS = Path(__file__).parent / "results" / "iteration_time.csv"
BASELINE = "nnUNetTrainerBaseline"
STEPS = {"nnU-Net": (BASELINE, 0.0), "zept, stage I": (ZEPT_TRAINER, 0.0), "zept, stage II": (ZEPT_TRAINER, 1.0)}
"""Name → trainer, and how much of its training is done."""
BATCHES, WARM_UP = 4, 2


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="of each kind in a round")
    parser.add_argument("--planner", default=PLANNER, choices=(PLANNER, "ZePTPlanner"))
    args = parse(parser)
    workspace = Planned((args.workspace / args.size).resolve(), args)
    environment = workspace.environment(0)
    in_a_new_process(environment)
    dataset = workspace.prepare()
    with tempfile.TemporaryDirectory() as results:
        os.environ.update(environment | {"nnUNet_results": results, "nnUNet_n_proc_DA": "0"})
        rows = pd.DataFrame(measure(args, dataset.name, workspace.plans_name))
    import torch

    key = {"phantom": phantom_of(dataset)["version"], "size": args.size, "configuration": args.configuration}
    key |= {"plans": workspace.plans_name, "device": args.device, "threads": torch.get_num_threads()}
    append_rows(rows.assign(**key), RESULTS)
    table = pd.read_csv(RESULTS)
    print(summary(table[matches(table, key)]).to_string())


class Planned(Workspace):
    """zero_shot.py's workspace with the planner of --planner."""

    @property
    def planner(self) -> str:
        return str(self.args.planner)


def in_a_new_process(environment: dict[str, str]) -> None:
    """Begin again with `environment`, unless this process has it: malloc reads its settings once."""
    if any(os.environ.get(name) != value for name, value in environment.items() if name.startswith("MALLOC_")):
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def measure(args: argparse.Namespace, dataset: str, plans_name: str) -> Iterator[dict[str, Any]]:
    """A row for each round and kind of step: its seconds, and those that drawing a batch took."""
    import torch
    from nnunetv2.paths import nnUNet_preprocessed

    from zept_nnunet.trainers import zept_trainers

    preprocessed = Path(str(nnUNet_preprocessed)) / dataset
    plans = json.loads((preprocessed / f"{plans_name}.json").read_text())
    content = json.loads((preprocessed / "dataset.json").read_text())
    trainers, batches, drawing = {}, {}, {}
    for name in {trainer for trainer, _ in STEPS.values()}:
        given = {**plans, "continue_training": False}, args.configuration, 0, content, torch.device(args.device)
        trainer = getattr(zept_trainers, name)(*given)
        trainer.initialize()
        trainer.network.train()
        loader, _ = trainer.get_dataloaders()
        next(loader)
        began = perf_counter()
        batches[name] = [next(loader) for _ in range(BATCHES)]
        drawing[name] = (perf_counter() - began) / BATCHES
        trainers[name] = trainer

    def seconds(kind: str, steps: int) -> float:
        name, share = STEPS[kind]
        trainer = trainers[name]
        trainer.current_epoch = int(share * (trainer.num_epochs - 1))
        began = perf_counter()
        for step in range(steps):
            trainer.train_step(batches[name][step % BATCHES])
        return (perf_counter() - began) / steps  # a step returns its loss, so the device has finished it

    for kind in STEPS:
        seconds(kind, WARM_UP)
    share = trainers[ZEPT_TRAINER].settings["stage_one_share"]
    for number in tqdm(range(args.rounds), desc="rounds", unit="round"):
        taken = {kind: seconds(kind, args.steps) for kind in STEPS}
        taken["zept"] = share * taken["zept, stage I"] + (1 - share) * taken["zept, stage II"]
        for kind, value in taken.items():
            draw = drawing[STEPS.get(kind, (ZEPT_TRAINER,))[0]]
            yield {"step": kind, "round": number, "seconds": value, "seconds_to_draw": draw}


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean ± standard deviation over the rounds: seconds, and their ratio to nnU-Net's in the same round."""
    rows = rows.assign(run=(rows["round"] == 0).groupby(rows["step"]).cumsum())  # the script ran more than once
    base = rows[rows["step"] == "nnU-Net"].set_index(["run", "round"])["seconds"]
    rows = rows.set_index(["run", "round"])
    rows["ratio"] = rows["seconds"] / base.reindex(rows.index).to_numpy()
    by_step = rows.groupby("step", sort=False)[["seconds", "ratio", "seconds_to_draw"]]
    mean, spread = by_step.mean(), by_step.std().fillna(0)
    return mean.map("{:.3f}".format) + " ± " + spread.map("{:.3f}".format)


if __name__ == "__main__":
    main()
