"""Variants of ZePTTrainer. Each is a real subclass: nnU-Net writes the class's name into folders and checkpoints."""

from __future__ import annotations

import os

import torch
from torch import nn

from zept_nnunet.errors import ZePTError
from zept_nnunet.network.zept import LEARNED_QUERIES
from zept_nnunet.training.trainer import ZePTTrainer


class ZePTTrainerPaper(ZePTTrainer):
    """Each part as the authors compute it: learned queries, one min–max normalized score, finest maps supervised."""

    variant = "paper"


class ZePTTrainerStageI(ZePTTrainer):
    """Organs alone; its tumor channels stay empty. Go on with ZePTTrainerStageII."""

    fixed_stage = 1


class ZePTTrainerStageII(ZePTTrainer):
    """Organs and tumors from the start, on weights of a ZePTTrainerStageI, given by -pretrained_weights.

    Not with learned queries: nnU-Net leaves out their table, whose size depends on the classes, and names no file.
    """

    fixed_stage = 2

    def initialize(self) -> None:
        """nnU-Net's; remembers the random weights."""
        super().initialize()
        self._random_weights = [p.detach().clone() for p in self._weights_of_stage_one()]

    def _weights_of_stage_one(self) -> list[nn.Parameter]:
        """One of those that -pretrained_weights loads, and the learned queries, if any."""
        network = self._zept()
        table = [network.get_parameter(LEARNED_QUERIES)] if network.is_learned else []
        return [next(network.parameters()), *table]

    def on_train_start(self) -> None:
        """nnU-Net's.

        Raises:
            ZePTError: no weights were loaded, or not those of the organs' queries.
        """
        if not self.was_initialized:
            self.initialize()
        pairs = zip(self._random_weights, self._weights_of_stage_one(), strict=True)
        is_random = [torch.equal(random, now.detach()) for random, now in pairs]
        if is_random[0]:
            self._remove_own_log()
            raise ZePTError(
                "ZePTTrainerStageII goes on from stage I: give -pretrained_weights CHECKPOINT of a ZePTTrainerStageI "
                "(fold_X/checkpoint_final.pth), or train both stages in one run with -tr ZePTTrainer"
            )
        if any(is_random):
            self._remove_own_log()
            raise ZePTError(
                "ZePTTrainerStageII goes on from the organs' queries of stage I, and -pretrained_weights does not load "
                "them where the decoder setting queries is 'learned': they would start at random. Train both stages in "
                "one run with -tr ZePTTrainer, or set it to 'generated' in the plans of both"
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
