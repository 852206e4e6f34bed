"""Trainers of the tests: the real ones, with 2 + 1 iterations, and one that stops where a test wants it to."""

from __future__ import annotations

import os

import torch

from zept_nnunet.training.trainer import ZePTTrainer
from zept_nnunet.training.variants import ZePTTrainerPaper, ZePTTrainerStageI, ZePTTrainerStageII

CUDA = torch.device("cuda")  # nnU-Net's default


class _Short:
    """Put before a trainer: nnU-Net reads the parameters' names, so they stay the parent's."""

    epochs, iterations = 1, 2

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = CUDA,
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)  # type: ignore[call-arg]
        self.num_epochs, self.save_every = self.epochs, 1
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = self.iterations, 1


class ZePTTrainerTest(_Short, ZePTTrainer):
    pass


class ZePTTrainerPaperTest(_Short, ZePTTrainerPaper):
    pass


class ZePTTrainerStageITest(_Short, ZePTTrainerStageI):
    pass


class ZePTTrainerStageIITest(_Short, ZePTTrainerStageII):
    pass


class ZePTTrainerStops(_Short, ZePTTrainer):
    """Four epochs of two iterations; dies before the epoch that ZEPT_TEST_STOP names, as a preempted job would."""

    epochs = 4

    def on_epoch_start(self) -> None:
        if str(self.current_epoch) == os.environ.get("ZEPT_TEST_STOP"):
            raise KeyboardInterrupt(f"stopped before epoch {self.current_epoch}")
        if self.current_epoch:
            moments = [s["exp_avg"].norm().item() for s in self.optimizer.state_dict()["state"].values()]
            self.print_to_log_file(f"TEST moments {len(moments)} sum {sum(moments):.6f}")
        super().on_epoch_start()


class ZePTTrainerRealCT(_Short, ZePTTrainer):
    """A few short epochs."""

    epochs, iterations = 16, 25
