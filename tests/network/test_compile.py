"""The compiled network is the network: outputs, gradients, stages, checkpoints; nnU-Net compiles it on CUDA by default.

Compiled, the relative head takes organs in chunks, as on a GPU, where on a CPU it crops each of them. So the graphs
here are the ones that a GPU runs, but for the kernels.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo import OptimizedModule
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from tests.network.narrow import TWO_KIDNEYS, narrow_block, randomize
from tests.network.test_numerics import flat, targets_for
from tests.small_plans import make_network
from tests.small_trainer import enter_stage, make_batch, make_trainer
from zept_nnunet.losses import ZePTLoss
from zept_nnunet.network.zept import ZePT, ZePTOutput
from zept_nnunet.training.targets import anomaly_labels
from zept_nnunet.training.trainer import ZePTTrainer

ELEVEN_ORGANS = {"background": 0, **{f"organ {i}": i for i in range(1, 12)}, "tumor 1": 12, "tumor 2": 13}
"""Two chunks of the relative head, the second not full."""
HOSTS = {"tumor 1": {"hosts": ["organ 1", "organ 9"]}, "tumor 2": {"hosts": ["organ 11"]}}
NINE_ORGANS = {
    **TWO_KIDNEYS,
    **{name: i for i, name in enumerate(("pancreas", "stomach", "aorta", "colon", "bladder"), 7)},
}
"""As many chunks, of names that are known."""
BREAKS: dict[str, int] = {}
"""Graph breaks of a training: reason → number. There is none."""


@pytest.fixture(autouse=True)
def forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def small_block(variant: str = "zept", layers: int = 2, **kwargs: Any) -> dict[str, Any]:
    """Of as few layers as reach all scales; one layer reaches one."""
    block = narrow_block(variant=variant, **kwargs)
    return {**block, "decoder": {**block["decoder"], "advanced_layers": layers, "grouping_scales": layers}}


def make(dimensions: int, block: dict[str, Any]) -> ZePT:
    return randomize(make_network(dimensions, block=block))


def same(got: Any, wanted: Any) -> None:
    """All tensors of a network's output."""
    found, expected = flat(got), flat(wanted)
    assert found.keys() == expected.keys() and expected
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4, msg=partial("{}: {}".format, name))


def train(network: Any, of: ZePT, image: torch.Tensor) -> tuple[ZePTOutput, dict[str, torch.Tensor | None]]:
    """Output and gradients of one training step, the same noise each time."""
    of.train()
    of.zero_grad()
    anomalies = anomaly_labels(of.taxonomy, [of.taxonomy.organs[i].name for (i,) in of.anomaly_hosts])
    values = torch.tensor([0, *(c.label for c in of.taxonomy.classes), *anomalies.values()])
    torch.manual_seed(1)
    label_map = values[torch.randint(0, len(values), (len(image), 1, *image.shape[2:]))]
    output: ZePTOutput = network(image)
    is_annotated = torch.ones(len(image), of.num_organs + of.num_tumors, dtype=torch.bool)
    total, _ = ZePTLoss(of, batch_dice=True)(output, targets_for(of, output, label_map, anomalies), is_annotated)
    total.backward()
    return output, {n: p.grad for n, p in of.named_parameters()}


def assert_trains_alike(network: ZePT, compiled: Any, image: torch.Tensor) -> None:
    output, gradients = train(compiled, network, image)
    wanted, expected = train(network, network, image)
    same(output, wanted)
    assert not any(g is None for g in expected.values())
    same(gradients, expected)


@pytest.mark.parametrize("variant", ["zept", "paper"])
def test_all_outputs_in_both_stages_and_the_prediction(variant: str) -> None:
    network = make(2, small_block(variant)).eval()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    x = torch.randn(2, 1, 16, 24)
    for network.stage in (1, 2):
        output = compiled(x)
        assert bool(output.tumor) == (network.stage == 2)
        same(output, network(x))
    network.decoder.deep_supervision = False
    same(compiled(x[:1]), network(x[:1]))


@pytest.mark.parametrize("variant", ["zept", "paper"])
def test_gradients_of_the_loss_in_3d(variant: str) -> None:
    """With the noise of the grouping."""
    network = make(3, small_block(variant))
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert_trains_alike(network, compiled, torch.randn(2, 1, 16, 24, 16))


def test_gradients_of_more_organs_than_go_through_at_once() -> None:
    """Their activations are computed again in a backward graph that is traced ahead of time."""
    few = {"abnormal organ 2": "organ 2"}
    network = make(2, {**small_block(layers=1, labels=ELEVEN_ORGANS, tumors=HOSTS), "anomalies": few})
    assert network.relative is not None and network.num_organs > network.relative.organs_per_chunk
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    assert_trains_alike(network, compiled, torch.randn(2, 1, 16, 24))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ for a CPU")
def test_the_compiler_that_nnunet_uses() -> None:
    network = make(2, small_block(layers=1))
    # eager mode's random numbers; C++ that is not vectorized compiles in two thirds of the time
    with torch._inductor.config.patch({"fallback_random": True, "cpp.simdlen": 1}):
        assert_trains_alike(network, torch.compile(network), torch.randn(2, 1, 16, 24))


# ---------------------------------------------------------------------------------------------------- the trainer
def compiled_trainer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, backend: Any = "eager", **kwargs: Any
) -> ZePTTrainer:
    """As nnU-Net makes it on CUDA, by its own `initialize`."""
    with monkeypatch.context() as patch:
        patch.setattr(ZePTTrainer, "_do_i_compile", lambda self: True)
        patch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        trainer = make_trainer(folder, monkeypatch, **{"block": small_block(), **kwargs})
    network = trainer.network.module if trainer.is_ddp else trainer.network
    assert isinstance(network, OptimizedModule) and isinstance(trainer._zept(), ZePT)
    return trainer


def step(trainer: ZePTTrainer, stage: int) -> tuple[dict[str, Any], dict[str, torch.Tensor | None]]:
    torch.manual_seed(2)
    result = enter_stage(trainer, stage).train_step(make_batch(trainer))
    return result, {n: p.grad for n, p in trainer._zept().named_parameters()}


def assert_steps_alike(compiled: ZePTTrainer, plain: ZePTTrainer, stage: int) -> None:
    """Loss terms and gradients, and which parameters have one."""
    result, gradients = step(compiled, stage)
    wanted, expected = step(plain, stage)
    assert {k: float(v) for k, v in result.items()} == pytest.approx({k: float(v) for k, v in wanted.items()}, 1e-4)
    network = compiled._zept()
    advanced = {n for n, p in network.named_parameters() if any(p is q for q in network.stage_two_parameters())}
    assert {n for n, g in gradients.items() if g is None} == (advanced if stage == 1 else set())
    same(gradients, expected)


def test_a_trainer_of_a_compiled_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled = compiled_trainer(tmp_path / "compiled", monkeypatch)
    plain = make_trainer(tmp_path / "plain", monkeypatch, block=small_block())
    network, other = compiled._zept(), plain._zept()
    graphs = []
    for stage in (1, 1, 2, 2):
        network.load_state_dict(other.state_dict())
        assert_steps_alike(compiled, plain, stage)
        assert network.stage == compiled.network.stage == stage
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 1, 2, 2]  # one a stage, and none anew for the next step

    network.load_state_dict(other.state_dict())
    counts = []
    for trainer in (compiled, plain):
        trainer.network.eval()
        with torch.no_grad():
            counts.append(trainer.validation_step(make_batch(trainer)))
    assert all((counts[0][k] == counts[1][k]).all() for k in ("tp_hard", "fp_hard", "fn_hard"))
    assert float(counts[0]["loss"]) == pytest.approx(float(counts[1]["loss"]), rel=1e-4)

    file = tmp_path / "checkpoint.pth"
    compiled.save_checkpoint(str(file))
    saved = torch.load(file, weights_only=False)["network_weights"]
    assert saved.keys() == other.state_dict().keys()
    image = make_batch(plain)["data"][:1]
    with torch.no_grad():
        for trainer in (compiled, plain):
            torch.nn.init.zeros_(next(trainer._zept().parameters()))
            trainer.load_checkpoint(str(file))
            trainer.set_deep_supervision_enabled(False)
            assert isinstance(trainer.network(image), torch.Tensor)
        same(compiled.network(image), plain.network(image))
        same(compiled.network(image), network.forward_scores(image)["logits"])
    compiled.set_deep_supervision_enabled(True)
    assert network.decoder.deep_supervision and compiled.network.decoder.deep_supervision
    assert counters["stats"]["unique_graphs"] == 4  # validation and prediction have their own
    reasons = {key[0] if isinstance(key, tuple) else key: n for key, n in counters["graph_break"].items()}
    assert reasons == BREAKS


# ---------------------------------------------------------------------------------------------------- several GPUs
@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """Of one process."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled")  # nnU-Net's, which takes CUDA for granted here
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_steps_beneath_both_wrappers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backend: str) -> None:
    """Compiled, then DDP: nnU-Net's order on several GPUs. torch cuts the graph where DDP's first megabyte is full."""
    counter = CompileCounterWithBackend(backend)
    block = small_block(layers=1, width=128, labels=NINE_ORGANS)
    compiled = compiled_trainer(tmp_path / "compiled", monkeypatch, counter, block=block, labels=NINE_ORGANS)
    network = compiled._zept()
    assert isinstance(compiled.network, DistributedDataParallel) and compiled.network.module._orig_mod is network
    assert network.relative is not None and network.num_organs > network.relative.organs_per_chunk
    plain = make_trainer(tmp_path / "plain", monkeypatch, block=block, labels=NINE_ORGANS)
    graphs = []
    for stage in (1, 2, 2):
        network.load_state_dict(plain._zept().state_dict())
        assert_steps_alike(compiled, plain, stage)
        graphs.append(counter.frame_count)
    assert graphs == [2, 4, 4]
    compiled.set_deep_supervision_enabled(False)
    assert not network.decoder.deep_supervision
