"""Trainers of the tests: the real ones, with 2 + 1 iterations, and one that stops where a test wants it to."""

from __future__ import annotations

import os

import torch

from zept_nnunet.training.trainer import ZePTTrainer
from zept_nnunet.training.variants import ZePTTrainerPaper, ZePTTrainerStageI, ZePTTrainerStageII

CUDA = torch.device("cuda")  # nnU-Net's default


def _shorten(trainer: ZePTTrainer, epochs: int = 1, iterations: int = 2) -> None:
    trainer.num_epochs, trainer.save_every = epochs, 1
    trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = iterations, 1


class ZePTTrainerTest(ZePTTrainer):
    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = CUDA,
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        _shorten(self)


class ZePTTrainerPaperTest(ZePTTrainerPaper):
    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = CUDA,
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        _shorten(self)


class ZePTTrainerStageITest(ZePTTrainerStageI):
    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = CUDA,
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        _shorten(self)


class ZePTTrainerStageIITest(ZePTTrainerStageII):
    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = CUDA,
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        _shorten(self)


class ZePTTrainerStops(ZePTTrainer):
    """Four epochs of two iterations; dies before the epoch that ZEPT_TEST_STOP names, as a preempted job would."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = CUDA,
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        _shorten(self, epochs=4)

    def on_epoch_start(self) -> None:
        if str(self.current_epoch) == os.environ.get("ZEPT_TEST_STOP"):
            raise KeyboardInterrupt(f"stopped before epoch {self.current_epoch}")
        if self.current_epoch:
            momentum = [s["momentum_buffer"].norm().item() for s in self.optimizer.state_dict()["state"].values()]
            self.print_to_log_file(f"TEST momentum buffers {len(momentum)} sum {sum(momentum):.6f}")
        super().on_epoch_start()


class ZePTTrainerRealCT(ZePTTrainer):
    """A few short epochs."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = CUDA,
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        _shorten(self, epochs=10, iterations=25)
