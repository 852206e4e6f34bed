"""A loss scale, as on CUDA: it changes no step, clipping sees true gradients, and an overflow moves nothing."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch

from tests.small_trainer import enter_stage, make_batch, make_trainer
from zept_nnunet.training.trainer import ZePTTrainer

OVERFLOWS = 2.0**127  # times a loss above 2 is more than float32 holds


def scaled(trainer: ZePTTrainer, scale: float) -> ZePTTrainer:
    """The trainer with nnU-Net's scaler, which it only makes on CUDA."""
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return trainer


def gradients(trainer: ZePTTrainer) -> dict[str, torch.Tensor | None]:
    return {n: p.grad for n, p in trainer._zept().named_parameters()}


@pytest.mark.parametrize("dimensions", [3, 2])
@pytest.mark.parametrize("norm", [12.0, 1e-2])
def test_a_step_is_the_one_without_a_scaler(
    norm: float, dimensions: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain, other = (make_trainer(tmp_path / name, monkeypatch, dimensions) for name in ("plain", "scaled"))
    scaled(other, 2.0**16)
    for stage in (1, 2):
        losses = []
        for trainer in (plain, other):
            trainer.settings["gradient_norm"] = norm
            torch.manual_seed(0)  # Gumbel noise
            losses.append(enter_stage(trainer, stage).train_step(make_batch(trainer))["loss"])
        assert losses[0] == losses[1]
        found, wanted = gradients(other), gradients(plain)
        assert {n for n, g in found.items() if g is None} == {n for n, g in wanted.items() if g is None}
        norms = [g.norm() for g in found.values() if g is not None]
        assert torch.stack(norms).norm() <= norm * 1.001
        if norm < 1:
            assert torch.stack(norms).norm() == pytest.approx(norm, rel=1e-3)
        for name, gradient in wanted.items():
            if gradient is not None:
                torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-9, msg=name)
        for a, b in zip(plain._zept().parameters(), other._zept().parameters(), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
        other._zept().load_state_dict(plain._zept().state_dict())


@pytest.mark.parametrize("stage", [1, 2])
def test_an_overflow_moves_nothing_and_the_next_step_is_the_one_of_a_smaller_scale(
    stage: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trainer = scaled(make_trainer(tmp_path, monkeypatch), OVERFLOWS)
    batch = make_batch(trainer)
    assert enter_stage(trainer, stage).train_step(batch)["loss"] > 2
    assert not all(g.isfinite().all() for g in gradients(trainer).values() if g is not None)
    assert trainer.grad_scaler.get_scale() == OVERFLOWS / 2
    trainer.grad_scaler.update(2.0**10)
    before = deepcopy(trainer._zept().state_dict())
    trainer.train_step(batch)  # moments exist now
    after = deepcopy(trainer._zept().state_dict())
    assert any(not torch.equal(v, before[n]) for n, v in after.items())
    moments = deepcopy(trainer.optimizer.state_dict()["state"])

    trainer.grad_scaler.update(OVERFLOWS)
    assert trainer.train_step(batch)["loss"] > 2
    assert trainer.grad_scaler.get_scale() == OVERFLOWS / 2
    assert all(torch.equal(v, after[n]) for n, v in trainer._zept().state_dict().items())
    found = trainer.optimizer.state_dict()["state"]
    assert found.keys() == moments.keys()
    for key, state in moments.items():
        assert all(torch.equal(found[key][name], value) for name, value in state.items())


def test_the_first_overflow_leaves_weights_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trainer = scaled(make_trainer(tmp_path, monkeypatch), OVERFLOWS)
    before = deepcopy(trainer._zept().state_dict())
    enter_stage(trainer, 2).train_step(make_batch(trainer))
    assert all(torch.equal(v, before[n]) for n, v in trainer._zept().state_dict().items())


def test_one_infinite_gradient_is_enough_to_skip_the_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Clipping alone would turn it into NaN in every parameter."""
    trainer = scaled(make_trainer(tmp_path, monkeypatch), 2.0)
    network = trainer._zept()
    last = next(reversed(list(network.tumor_heads.parameters())))
    handle = last.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    before = deepcopy(network.state_dict())
    enter_stage(trainer, 2).train_step(make_batch(trainer))
    assert all(torch.equal(v, before[n]) for n, v in network.state_dict().items())
    assert trainer.grad_scaler.get_scale() == 1.0
    handle.remove()
    trainer.train_step(make_batch(trainer))
    moved = [n for n, v in network.state_dict().items() if not torch.equal(v, before[n])]
    assert len(moved) > 100 and all(v.isfinite().all() for v in network.state_dict().values())
