"""Variants of ZePTTrainer. Each is a real subclass: nnU-Net writes the class's name into folders and checkpoints."""

from __future__ import annotations

import os

import torch

from zept_nnunet.errors import ZePTError
from zept_nnunet.training.trainer import ZePTTrainer


class ZePTTrainerPaper(ZePTTrainer):
    """Each part as the authors compute it: learned queries, one min–max normalized score, finest maps supervised."""

    variant = "paper"


class ZePTTrainerStageI(ZePTTrainer):
    """Organs alone; its tumor channels stay empty. Go on with ZePTTrainerStageII."""

    fixed_stage = 1


class ZePTTrainerStageII(ZePTTrainer):
    """Organs and tumors from the start, on weights of a ZePTTrainerStageI, given by -pretrained_weights."""

    fixed_stage = 2

    def initialize(self) -> None:
        """nnU-Net's; remembers the random weights."""
        super().initialize()
        self._random_weights = next(self._zept().parameters()).detach().clone()

    def on_train_start(self) -> None:
        """nnU-Net's.

        Raises:
            ZePTError: no weights were loaded.
        """
        if not self.was_initialized:
            self.initialize()
        if torch.equal(self._random_weights, next(self._zept().parameters()).detach()):
            self._remove_own_log()
            raise ZePTError(
                "ZePTTrainerStageII goes on from stage I: give -pretrained_weights CHECKPOINT of a ZePTTrainerStageI "
                "(fold_X/checkpoint_final.pth), or train both stages in one run with -tr ZePTTrainer"
            )
        super().on_train_start()

    def _remove_own_log(self) -> None:
        """Leave no half-written results: the parent's __init__ made the folder and a log."""
        if os.path.isfile(self.log_file):
            os.remove(self.log_file)
        for folder in (self.output_folder, self.output_folder_base):
            if os.path.isdir(folder) and not os.listdir(folder):
                os.rmdir(folder)


class _Short(ZePTTrainer):
    epochs = 1

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = self.epochs
        self.save_every = 1  # --c before the first periodic checkpoint would fall back to the best one


class ZePTTrainer_1epoch(_Short):
    """One epoch; the stages change within it."""


class ZePTTrainer_5epochs(_Short):
    """Five epochs."""

    epochs = 5


class ZePTTrainer_50epochs(_Short):
    """50 epochs."""

    epochs = 50


class ZePTTrainer_250epochs(_Short):
    """250 epochs."""

    epochs = 250
