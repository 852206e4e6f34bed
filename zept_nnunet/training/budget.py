"""A trainer's budget from the environment, so that methods can be compared at the same one.

    ZEPT_EPOCHS, ZEPT_ITERATIONS    how many epochs, and iterations an epoch
    ZEPT_MINUTES                    instead of epochs: train for this wall-clock time, the schedule laid over it
    ZEPT_OPTIMIZER                  of the comparison trainers: adamw (at their own rate) or sgd (nnU-Net's)
    ZEPT_THREADS                    of the network on a CPU, where several trainings share its cores
    ZEPT_VALIDATE                   0: no final validation (nnU-Net's prediction of the fold's validation cases)

What is unset stays the trainer's own. The budget is written into the fold's folder (`BUDGET_FILE`), so that a run with
another one is not mistaken for this one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from zept_nnunet.errors import ZePTError
from zept_nnunet.threads import VARIABLE, cpu_threads
from zept_nnunet.training.trainer import ZePTTrainer
from zept_nnunet.training.variants import ZePTTrainerPaper

BUDGET_FILE = "zept_budget.json"
OPTIMIZERS = ("adamw", "sgd")
_CUDA = torch.device("cuda")  # nnU-Net's default
_TRAINING_PER_VALIDATION = 10  # iterations; nnU-Net's ratio is 5, but those of short trainings cost too much
_ENDLESS = 1_000_000  # epochs, where the time ends the training


@dataclass(frozen=True)
class Budget:
    """What is unset is None."""

    epochs: int | None = None
    iterations: int | None = None
    minutes: float | None = None
    optimizer: str = OPTIMIZERS[0]
    seed: int | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Budget:
        """Read the variables.

        Raises:
            ZePTError: one is no positive number, or epochs and minutes are both given, or the optimizer is unknown.
        """
        budget = cls(
            epochs=_positive(environment, "ZEPT_EPOCHS", int),
            iterations=_positive(environment, "ZEPT_ITERATIONS", int),
            minutes=_positive(environment, "ZEPT_MINUTES", float),
            optimizer=environment.get("ZEPT_OPTIMIZER", OPTIMIZERS[0]),
            seed=int(seed) if (seed := environment.get("ZEPT_SEED", "")).isdigit() else None,
        )
        if budget.epochs is not None and budget.minutes is not None:
            raise ZePTError("ZEPT_EPOCHS and ZEPT_MINUTES are both set: the length of a training is one or the other")
        if budget.optimizer not in OPTIMIZERS:
            raise ZePTError(f"ZEPT_OPTIMIZER must be one of {', '.join(OPTIMIZERS)}; got {budget.optimizer!r}")
        return budget

    def to_environment(self) -> dict[str, str]:
        """Inverse of `from_environment`."""
        names = {"epochs": self.epochs, "iterations": self.iterations, "minutes": self.minutes, "seed": self.seed}
        given = {f"ZEPT_{name.upper()}": str(value) for name, value in names.items() if value is not None}
        return {**given, "ZEPT_OPTIMIZER": self.optimizer}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def _positive(environment: Mapping[str, str], name: str, kind: Callable[[str], Any]) -> Any:
    text = environment.get(name)
    if text is None:
        return None
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value < _ENDLESS:
        raise ZePTError(f"{name} must be a positive number, got {text!r}")
    return value


def training_minutes(log: Mapping[str, Sequence[float]]) -> float:
    """Wall-clock time of the finished epochs in nnU-Net's log, also of those before a resume."""
    pairs = zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=False)
    return float(sum(end - start for start, end in pairs) / 60)


class _TimeIsUp(Exception):
    pass


class Budgeted(nnUNetTrainer):
    """Put before a trainer. nnU-Net reads the parameters' names, so they stay the parent's."""

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = _CUDA,
    ):
        budget = Budget.from_environment()  # before the parent makes the results folder
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.budget = budget
        if self.device.type == "cpu" and VARIABLE in os.environ:
            torch.set_num_threads(cpu_threads())
        self.save_every = 1  # --c before the first periodic checkpoint would fall back to the best one
        if budget.epochs is not None:
            self.num_epochs = budget.epochs
        if budget.iterations is not None:
            self.num_iterations_per_epoch = budget.iterations
            self.num_val_iterations_per_epoch = max(1, budget.iterations // _TRAINING_PER_VALIDATION)
        if budget.minutes is not None:
            self.num_epochs = _ENDLESS

    def elapsed_minutes(self) -> float:
        """Wall-clock time of the finished epochs."""
        return training_minutes(self.logger.local_logger.my_fantastic_logging)

    def progress(self) -> float:
        """Share of the training that is done, 0 to 1, by time or by epochs."""
        if self.budget.minutes is None:
            return float(self.current_epoch / self.num_epochs)
        return min(self.elapsed_minutes() / self.budget.minutes, 1.0)

    def configure_optimizers(self) -> tuple[Any, Any]:
        """The trainer's; with a time limit, its polynomial schedule runs over the elapsed share of the time."""
        optimizer, scheduler = super().configure_optimizers()
        if self.budget.minutes is None:
            return optimizer, scheduler
        return optimizer, _ScheduleOverTime(scheduler, self.progress)

    def on_train_start(self) -> None:
        """nnU-Net's; records the budget."""
        super().on_train_start()
        if self.local_rank == 0:
            path = Path(self.output_folder) / BUDGET_FILE
            path.write_text(json.dumps(self.budget.to_dict()) + "\n", encoding="utf-8")

    def on_epoch_end(self) -> None:
        """nnU-Net's; ends the training at the end of the epoch that lies nearest to the time limit."""
        super().on_epoch_end()
        if self.budget.minutes is None:
            return
        if self.is_ddp:
            self._share_time()
        elapsed = self.elapsed_minutes()
        if elapsed + elapsed / self.current_epoch / 2 >= self.budget.minutes:
            raise _TimeIsUp

    def _share_time(self) -> None:
        """Take the last epoch's time from the first process, whose log a checkpoint holds.

        Rate, stage and end follow from these times. By clocks of their own the processes of a DDP training would part.
        """
        log = self.logger.local_logger.my_fantastic_logging
        keys = ("epoch_start_timestamps", "epoch_end_timestamps")
        times = [log[key][-1] for key in keys]
        dist.broadcast_object_list(times, src=0)
        for key, time in zip(keys, times, strict=True):
            log[key][-1] = time

    def run_training(self) -> None:
        """nnU-Net's, until the time is up."""
        try:
            super().run_training()
        except _TimeIsUp:
            self.num_epochs = self.current_epoch
            self.on_train_end()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's, without mirroring: no comparison reads it, and eight passes a patch take minutes on a CPU.

        Nothing with ZEPT_VALIDATE=0.
        """
        if os.environ.get("ZEPT_VALIDATE") == "0":
            self.print_to_log_file("ZEPT_VALIDATE=0: the validation cases are not predicted")
            return
        name = "inference_allowed_mirroring_axes"  # nnU-Net declares no type
        axes = getattr(self, name)
        setattr(self, name, None)
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            setattr(self, name, axes)


class _ScheduleOverTime:
    """nnU-Net's schedule, asked for the elapsed share of the training instead of the epoch."""

    def __init__(self, scheduler: Any, progress: Callable[[], float]):
        self.scheduler, self.progress = scheduler, progress

    def step(self, epoch: int | None = None) -> None:
        """Set the learning rate; which epoch it is does not matter."""
        self.scheduler.step(self.progress() * self.scheduler.max_steps)


class _BudgetedZePT(Budgeted, ZePTTrainer):
    """Both stages share the time as they share the epochs."""

    def stage_at(self, epoch: int, iteration: int) -> int:
        """By time where the budget is a time: 1 in epochs that begin before `stage_one_share` of it."""
        if self.budget.minutes is None or self.fixed_stage is not None or not self.taxonomy.organs:
            return super().stage_at(epoch, iteration)
        if epoch < self.current_epoch:
            return int(self.logger.local_logger.my_fantastic_logging["stage"][epoch])
        return 1 if self.progress() < self.settings["stage_one_share"] else 2


class ZePTTrainerBudget(_BudgetedZePT):
    """ZePTTrainer at the budget that the environment names."""


class ZePTTrainerPaperBudget(_BudgetedZePT, ZePTTrainerPaper):
    """ZePTTrainerPaper at the budget that the environment names."""
