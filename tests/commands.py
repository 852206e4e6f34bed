"""Run the stock commands as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import zept_nnunet.trainers

TEST_TRAINERS = Path(__file__).parent / "trainers"
TIMEOUT_S = 1800


@dataclass
class Workspace:
    """Folders of one nnU-Net installation, and commands that run in it."""

    root: Path

    def __post_init__(self) -> None:
        for folder in (self.raw, self.preprocessed, self.results):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def raw(self) -> Path:
        return self.root / "raw"

    @property
    def preprocessed(self) -> Path:
        return self.root / "preprocessed"

    @property
    def results(self) -> Path:
        return self.root / "results"

    @property
    def environment(self) -> dict[str, str]:
        trainers = os.pathsep.join((str(Path(zept_nnunet.trainers.__path__[0])), str(TEST_TRAINERS)))
        return os.environ | {
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(self.results),
            "nnUNet_extTrainer": trainers,
            "nnUNet_n_proc_DA": "1",
            "nnUNet_def_n_proc": "1",
            "nnUNet_npp": "1",
            "nnUNet_nps": "1",
            "OMP_NUM_THREADS": "1",
            # nnU-Net gives every core to each command; tests run side by side, and threads that spin take the others'
            "OMP_WAIT_POLICY": "PASSIVE",
            "ZEPT_THREADS": "1",
        }

    def program(self, name: str) -> list[str]:
        """How a command is started."""
        return [str(Path(sys.executable).parent / name)]

    def run(self, *command: str | Path, fails: bool = False, **environment: str) -> str:
        """Run a command of this Python's environment; returns what it printed."""
        result = subprocess.run(
            [*self.program(str(command[0])), *map(str, command[1:])],
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
            cwd=self.root,
        )
        assert (result.returncode != 0) == fails, f"{command} exited {result.returncode}:\n{result.stdout[-6000:]}"
        return result.stdout

    def plan(self, dataset: int, *flags: str) -> str:
        return self.run(
            "nnUNetv2_plan_and_preprocess", "-d", str(dataset), "-np", "1", "-npfp", "1", "--no_pbar", *flags
        )

    def train(
        self,
        dataset: int,
        configuration: str,
        fold: str = "0",
        trainer: str = "ZePTTrainerTest",
        *flags: str | Path,
        **kwargs: object,
    ) -> str:
        return self.run(
            "nnUNetv2_train", str(dataset), configuration, fold, "-tr", trainer, "-device", "cpu", *flags, **kwargs
        )  # type: ignore[arg-type]

    def model(
        self, dataset: str, configuration: str, trainer: str = "ZePTTrainerTest", plans: str = "nnUNetPlans"
    ) -> Path:
        return self.results / dataset / f"{trainer}__{plans}__{configuration}"
