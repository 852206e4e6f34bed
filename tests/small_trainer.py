"""Trainers on small plans, initialized as nnU-Net does it, and batches for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as nnunet_module
from torch.nn.parallel import DistributedDataParallel

from tests.network.narrow import TWO_KIDNEYS, narrow_block, randomize
from tests.nnunet_folders import make_nnunet_folders
from tests.small_plans import DATASET_JSON, make_plans
from zept_nnunet.training.trainer import ZePTTrainer

CPU = torch.device("cpu")


def make_trainer(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    dimensions: int = 2,
    block: dict[str, Any] | None = None,
    labels: dict[str, int] | None = None,
    trainer: type[ZePTTrainer] = ZePTTrainer,
    device: torch.device = CPU,
) -> ZePTTrainer:
    """A trainer whose query path has left its starting point, with the same weights each time.

    In a process of a DDP training it is one of these, but on the CPU.

    Args:
        block: the plans' `zept` block; a narrow one of these labels by default.
        labels: of the dataset; two kidneys among them by default.
    """
    make_nnunet_folders(folder, monkeypatch)
    labels = labels or TWO_KIDNEYS
    plans = {**make_plans(dimensions), "zept": block or narrow_block(labels), "continue_training": False}
    preprocessed = folder / "nnUNet_preprocessed" / plans["dataset_name"] / "nnUNetPlans_x"
    preprocessed.mkdir(parents=True, exist_ok=True)
    (preprocessed / "a.b2nd").touch()  # nnU-Net tells the file format by the names
    configuration = next(iter(plans["configurations"]))
    made = trainer(plans, configuration, 0, {**DATASET_JSON, "labels": labels}, device)
    if made.is_ddp:  # nnU-Net takes CUDA for granted here
        made.device, made.grad_scaler = CPU, None
        monkeypatch.setattr(nnunet_module, "DDP", lambda network, device_ids: DistributedDataParallel(network))
    torch.manual_seed(0)
    made.initialize()
    randomize(made._zept())
    return made


def make_batch(trainer: ZePTTrainer, label: int | None = None, value: float | None = None) -> dict[str, Any]:
    """Two cases; random where nothing else is wanted.

    Args:
        label: that fills the label maps.
        value: that fills the image.
    """
    generator = torch.Generator().manual_seed(0)
    classes = [*(c.label for c in trainer.taxonomy.classes), *trainer.anomaly_labels.values()]
    values = torch.tensor([0, *classes]) if label is None else torch.tensor([label])
    patch = trainer.configuration_manager.patch_size
    sizes = [[axis // step for axis in patch] for step in (1, 2, 4)]
    maps = [values[torch.randint(0, len(values), (2, 1, *size), generator=generator)] for size in sizes]
    image = torch.randn(2, 1, *patch, generator=generator)
    return {"data": image if value is None else torch.full_like(image, value), "target": maps, "keys": ["a", "b"]}


def enter_stage(trainer: ZePTTrainer, stage: int) -> ZePTTrainer:
    """The trainer in the first epoch, or in the last one."""
    trainer.current_epoch = 0 if stage == 1 else trainer.num_epochs - 1
    trainer.network.train()
    return trainer
