"""Trainers with the demo's small budget, found through nnUNet_extTrainer like any other.

nnU-Net's short variants keep 250 + 50 iterations an epoch, which takes minutes without a GPU. These shorten the epoch,
and nothing else. ``nnUNetTrainerDemo`` is the stock network at the same budget, to compare with. The variables
ZEPT_DEMO_EPOCHS and ZEPT_DEMO_ITERATIONS, which ``zept demo`` sets, give another budget.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from zept_nnunet.training.trainer import ZePTTrainer, seed_everything

DEFAULT_DEVICE = torch.device("cuda")  # as in the parent
NUM_EPOCHS = 12
NUM_ITERATIONS = 50
NUM_VALIDATION_ITERATIONS = 4


class ZePTTrainerDemo(ZePTTrainer):
    """``ZePTTrainer`` with the demo's budget."""

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = DEFAULT_DEVICE,
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        _shorten(self)


class nnUNetTrainerDemo(nnUNetTrainer):
    """nnU-Net's own trainer with the demo's budget."""

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = DEFAULT_DEVICE,
    ) -> None:
        seed_everything()
        super().__init__(plans, configuration, fold, dataset_json, device)
        _shorten(self)


def _shorten(trainer: nnUNetTrainer) -> None:
    trainer.num_epochs = int(os.environ.get("ZEPT_DEMO_EPOCHS", NUM_EPOCHS))
    trainer.num_iterations_per_epoch = int(os.environ.get("ZEPT_DEMO_ITERATIONS", NUM_ITERATIONS))
    trainer.num_val_iterations_per_epoch = NUM_VALIDATION_ITERATIONS
    trainer.save_every = 1
