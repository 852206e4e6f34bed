"""Trainers of the tests: the real ones, with 2 + 1 iterations, and one that stops where a test wants it to."""

from __future__ import annotations

import os

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from zept_nnunet.network.zept import ZePT
from zept_nnunet.plans_block import read_block
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
        torch.set_num_threads(1)
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
    """A few short epochs. Unseeded, 16 of them left the stomach out now and then: it is learned last."""

    epochs, iterations = 28, 25


class ZePTTrainerOracle(ZePTTrainerTest):
    """Its network's maps are read from intensities: 1 liver, 2 tumor, 3 a tumor that 2D does not know."""

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        block = read_block(plans_manager.plans)
        return Oracle(block, configuration_manager, num_input_channels, enable_deep_supervision)


class Oracle(ZePT):
    def _finest_maps(self, x: Tensor, features: list[Tensor]) -> tuple[Tensor, ...]:
        """In 3D all is right, with a logit of 5; 2D is surer, and finds the tumor that it knows beside its place."""
        liver, tumor, unknown = (x.round() == value for value in (1, 2, 3))
        if x.ndim == 4:
            found = torch.roll(tumor, 2, -1)
            liver, tumor, logit = (liver | tumor | unknown) & ~found, found, 20.0
        else:
            tumor, logit = tumor | unknown, 5.0
        maps = [torch.where(at, logit, -logit) for at in (liver, tumor)]
        return maps[0], maps[1], maps[0], maps[0], None
