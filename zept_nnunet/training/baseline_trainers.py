"""nnU-Net's own trainer as a practitioner would use it, for comparison: what ZePT is given, these are given too.

The same budget (`budget.py`), the same kind of optimizer unless ZEPT_OPTIMIZER=sgd asks for nnU-Net's, the same share
of tumors among the sampled patches, no mirroring that swaps left and right. Each is a real subclass: nnU-Net writes the
class's name into folders and checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from zept_nnunet.datasets.derived import ANY_TUMOR, KEY
from zept_nnunet.errors import ZePTError
from zept_nnunet.network.any_tumor_rel import AnyTumorRelative
from zept_nnunet.network.backbone import check_wrappable
from zept_nnunet.taxonomy import Taxonomy
from zept_nnunet.training.anomalies import InsertAnomalies, with_anomalies
from zept_nnunet.training.budget import Budgeted
from zept_nnunet.training.intensity import intensity_scales, noise_floors
from zept_nnunet.training.orientation import KeepsSides
from zept_nnunet.training.sampling import ForegroundDataset
from zept_nnunet.training.trainer import BETAS, WEIGHT_DECAY, seed_everything

_CUDA = torch.device("cuda")  # nnU-Net's default
# The U-Net with nnU-Net's softmax loss learns about twice as fast with this as with ZePTTrainer's 1e-3: training loss
# of the supervised one 0.02 after 500 iterations, against 0.63 then and -0.05 after 1000 (phantom, small; one seed).
_LEARNING_RATE = 4e-3


class _Comparable(KeepsSides):
    """nnU-Net's trainer with ZePTTrainer's seed, kind of optimizer, sampling and mirroring."""

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = _CUDA,
    ):
        self.taxonomy = Taxonomy.from_dataset_json(dataset_json, f"dataset.json of {plans['dataset_name']}")
        seed_everything()
        super().__init__(plans, configuration, fold, dataset_json, device)

    def configure_optimizers(self) -> tuple[Any, Any]:
        """AdamW at the rate that serves this loss best, no weight decay on norms and biases; or nnU-Net's SGD."""
        if self.budget.optimizer == "sgd":
            return super().configure_optimizers()
        self.initial_lr, self.weight_decay = _LEARNING_RATE, WEIGHT_DECAY
        parameters = list(self.network.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            groups, lr=self.initial_lr, betas=BETAS, fused=parameters[0].device.type in ("cpu", "cuda")
        )
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        """nnU-Net's split; training cases favor tumors among their foreground, as in ZePTTrainer."""
        training, validation = super().get_tr_and_val_datasets()
        return ForegroundDataset(training, [t.label for t in self.taxonomy.tumors]), validation


class nnUNetTrainerBaseline(Budgeted, _Comparable):
    """nnU-Net's trainer, made comparable: for the any-tumor, the organ-only and the supervised baseline."""


class nnUNetTrainerAnyTumorPlus(nnUNetTrainerBaseline):
    """With ZePTTrainer's synthetic anomalies, labeled "any tumor", in organs whose tumors nobody labeled."""

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = _CUDA,
    ):
        derived = dataset_json.get(KEY) or {}
        if derived.get("kind") != "any_tumor":
            raise ZePTError(
                f"{type(self).__name__} trains on an any-tumor dataset; {plans['dataset_name']} is none. "
                "Use zept baseline any_tumor_plus, which makes one"
            )
        super().__init__(plans, configuration, fold, dataset_json, device)
        labels = dataset_json["labels"]
        self.any_tumor_label = int(labels[ANY_TUMOR])
        self.anomaly_label = {int(labels[host]): self.any_tumor_label for host in derived["unlabeled_hosts"]}

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> Any:
        """nnU-Net's, with the anomalies after the spatial one."""
        transforms = super().get_training_transforms(*args, **kwargs)
        if not self.anomaly_label:
            self.print_to_log_file("every organ hosts a labeled tumor: no synthetic anomalies are inserted")
            return transforms
        insert = InsertAnomalies(
            self.anomaly_label,
            [self.any_tumor_label],
            self.configuration_manager.spacing,
            intensity_scales(self.plans_manager, self.configuration_manager),
        )
        return with_anomalies(transforms, insert)


class nnUNetTrainerAnyTumorRel(nnUNetTrainerAnyTumorPlus):
    """With the synthetic anomalies and the host-relative features that ZePTTrainer gets."""

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The plans' U-Net with the relative head on top; its last channel is the any-tumor class.

        Raises:
            ZePTError: the plans' network has no encoder and decoder that can be taken apart.
        """
        check_wrappable(configuration_manager, source=f"{plans_manager.plans_name}.json")
        unet = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        noise = noise_floors(plans_manager, configuration_manager, num_input_channels)
        return AnyTumorRelative(unet, configuration_manager.spacing, num_input_channels, noise)
