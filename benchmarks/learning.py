"""ZePTTrainer beside stock nnUNetTrainer at the demo's budget: test Dice of organs and of seen tumors, per seed.

    python benchmarks/learning.py --seeds 0 1 2

Each run is one `zept demo` (its own dataset and training per seed) and appends its rows to results/learning.csv; a run
whose rows are there is skipped. Then the comparison is printed. `minutes` is wall-clock as the machine was: compare it
only between runs that had the machine to themselves (the committed rows shared one core with other work).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from zept_nnunet.commands.demo import STOCK_TRAINER, ZEPT_TRAINER
from zept_nnunet.datasets.demo_ct import LABELS

EPOCHS = 16  # more than the demo has: stock nnU-Net reaches organ Dice of 0.90
RESULTS = Path(__file__).parent / "results" / "learning.csv"
TUMORS = ("liver tumor", "kidney tumor")


def run(trainer: str, seed: int, variant: str, extra: list[str]) -> pd.DataFrame:
    """One demo; its Dice per class on the test images, mean over the cases that hold the class."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        command = [sys.executable, "-m", "zept_nnunet.cli", "demo", "-o", folder + "/demo", "-tr", trainer]
        command += ["--epochs", str(EPOCHS), "--seed", str(seed)]
        environment = os.environ | {"ZEPT_SEED": str(seed)}
        subprocess.run([*command, *extra], check=True, env=environment)
        minutes = (time.monotonic() - started) / 60
        summary = json.loads(Path(folder, "demo/predictions/summary.json").read_text())
    rows = [
        {
            "variant": variant,
            "trainer": trainer,
            "seed": seed,
            "class": name,
            "dice": metrics["Dice"],
            "minutes": minutes,
        }
        for name, value in LABELS.items()
        if (metrics := summary["mean"].get(str(value))) is not None
    ]
    return pd.DataFrame(rows)


def compare(table: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice of organs and of seen tumors, and minutes, per variant, trainer and seed."""
    table = table.assign(kind=table["class"].map(lambda c: "seen tumors" if c in TUMORS else "organs"))
    dice = table.pivot_table(index=["variant", "trainer", "seed"], columns="kind", values="dice")
    return dice.join(table.groupby(["variant", "trainer", "seed"])["minutes"].first())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trainers", nargs="+", default=[STOCK_TRAINER, ZEPT_TRAINER])
    parser.add_argument("--variant", default="default", help="a name for what is tried, in the table's first column")
    args, extra = parser.parse_known_args()
    for seed in args.seeds:
        for trainer in args.trainers:
            done = pd.read_csv(RESULTS) if RESULTS.is_file() else pd.DataFrame(columns=["variant", "trainer", "seed"])
            if ((done["variant"] == args.variant) & (done["trainer"] == trainer) & (done["seed"] == seed)).any():
                continue
            rows = run(trainer, seed, args.variant, extra)
            RESULTS.parent.mkdir(exist_ok=True)
            rows.to_csv(RESULTS, mode="a", header=not RESULTS.is_file(), index=False, float_format="%.4f")
    runs = compare(pd.read_csv(RESULTS))
    print(runs.round(3).to_string())
    print(runs.groupby(["variant", "trainer"]).agg(["mean", "std"]).round(3).to_string())


if __name__ == "__main__":
    main()
