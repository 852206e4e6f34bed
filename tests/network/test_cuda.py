"""What only a GPU runs: float16 with a gradient scaler, organs in chunks, nnU-Net's compiler, the fused optimizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.network.narrow import narrow_block, randomize
from tests.network.test_numerics import flat
from tests.small_plans import make_network
from tests.small_trainer import enter_stage, make_batch, make_trainer
from zept_nnunet.training.trainer import ZePTTrainer

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_training_learns_in_both_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dimensions: int, compiles: bool
) -> None:
    """As nnU-Net runs it: float16 where it pays, loss and gradients finite, and the loss of one batch falls."""
    monkeypatch.setattr(ZePTTrainer, "_do_i_compile", lambda self: compiles)
    trainer = make_trainer(tmp_path, monkeypatch, dimensions, device=DEVICE)
    batch = make_batch(trainer)
    for stage in (1, 2):
        enter_stage(trainer, stage)
        losses = [float(trainer.train_step(batch)["loss"]) for _ in range(12)]
        assert torch.isfinite(torch.tensor(losses)).all() and losses[-1] < losses[0] - 0.1
    assert all(torch.isfinite(p).all() for p in trainer.network.parameters())


@pytest.mark.parametrize("dimensions", [2, 3])
@torch.no_grad()
def test_maps_are_those_of_a_cpu(dimensions: int) -> None:
    """In float32 to rounding; in float16 to a share of their spread."""
    network = randomize(make_network(dimensions, block=narrow_block())).eval()
    image = torch.randn(2, 1, *[32] * dimensions, generator=torch.Generator().manual_seed(0))
    wanted = flat(network(image))
    network, image = network.to(DEVICE), image.to(DEVICE)
    exact = flat(network(image))
    with torch.autocast(DEVICE.type, dtype=torch.float16):
        half = flat(network(image))
    for name, tensor in wanted.items():
        torch.testing.assert_close(exact[name].cpu(), tensor, rtol=1e-3, atol=1e-2, msg=name)
        spread = tensor.flatten().float().std(correction=0) + 0.1
        assert ((half[name].cpu().float() - tensor).abs().median() < 0.05 * spread).item(), name


def test_a_patch_of_nnunets_size_with_many_classes_fits() -> None:
    """128³, 104 organs, 30 tumors, forward and backward: below 24 GB."""
    organs = {f"organ {i}": i for i in range(1, 105)}
    tumors = {f"tumor {k}": 104 + k for k in range(1, 31)}
    hosts = {name: {"hosts": [f"organ {i}"]} for i, name in enumerate(tumors, 1)}
    block = narrow_block({"background": 0, **organs, **tumors}, width=128, tumors=hosts)
    network = make_network(3, block=block).to(DEVICE).train()
    image = torch.randn(1, 1, 128, 128, 128, device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast(DEVICE.type, dtype=torch.float16):
        output = network(image)
        tensors = [t for t in flat(output).values() if t.requires_grad]
        total = torch.stack([t.float().square().mean() for t in tensors]).sum()
    total.backward()
    assert torch.isfinite(total) and torch.cuda.max_memory_allocated() < 24e9
