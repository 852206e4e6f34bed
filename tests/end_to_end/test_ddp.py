"""Two processes with gloo on the CPU, through the trainer's own train_step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import Workspace
from tests.two_processes import in_two_processes

pytestmark = pytest.mark.slow


def _train(rank: int, preprocessed: str, stage: int) -> dict[str, Any]:
    from tests.trainers.zept_test_trainers import ZePTTrainerTest

    plans = json.loads(Path(preprocessed, "nnUNetPlans.json").read_text()) | {"continue_training": False}
    dataset_json = json.loads(Path(preprocessed, "dataset.json").read_text())
    trainer = ZePTTrainerTest(plans, "3d_fullres", 0, dataset_json, torch.device("cpu"))
    trainer.device, trainer.grad_scaler = torch.device("cpu"), None  # nnU-Net's __init__ takes CUDA for granted here
    trainer.fixed_stage = stage
    torch.manual_seed(rank)  # DDP hands out the weights of rank 0
    manager, configuration = trainer.plans_manager, trainer.configuration_manager
    network = trainer.build_network_architecture(
        manager, configuration, 1, trainer.label_manager.num_segmentation_heads, True
    )
    trainer.network = network
    trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
    trainer.network = torch.nn.parallel.DistributedDataParallel(network)
    trainer.loss = trainer._build_loss()
    shape = tuple(configuration.patch_size)
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    for _ in range(2):  # an unused parameter would stop the second forward
        scales = [
            tuple(round(n * f) for n, f in zip(shape, s, strict=True)) for s in trainer._get_deep_supervision_scales()
        ]
        top = 1 + max(t.label for t in trainer.taxonomy.tumors)
        batch = {
            "data": torch.randn(1, 1, *shape),
            "target": [torch.randint(0, top, (1, 1, *s)) for s in scales],
            "keys": [f"case_{rank}"],
        }
        assert torch.isfinite(torch.as_tensor(trainer.train_step(batch)["loss"]))
    advanced = {id(p) for p in network.stage_two_parameters()}
    moved = {n for n, p in network.named_parameters() if not torch.equal(p, before[n])}
    frozen = {n for n, p in network.named_parameters() if id(p) in advanced}
    return {"state": network.state_dict(), "moved": moved, "frozen": frozen}


@pytest.mark.parametrize("stage", [1, 2])
def test_two_processes_take_steps_and_agree(
    workspace: Workspace, planned: Path, stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in workspace.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    a, b = in_two_processes(_train, tmp_path, str(workspace.preprocessed / planned.name), stage)
    for key, value in a["state"].items():
        assert torch.equal(value, b["state"][key]), key
    assert a["moved"]
    if stage == 1:
        assert not a["moved"] & a["frozen"], "stage I moved a parameter of stage II"
    else:
        assert a["moved"] & a["frozen"]
