"""Patches with nothing in them: air, no class, no label that counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.network.narrow import TWO_KIDNEYS, narrow_block
from tests.small_plans import DATASET_JSON
from tests.small_trainer import enter_stage, make_batch, make_trainer
from zept_nnunet.losses import TERMS
from zept_nnunet.plans_block import build_block
from zept_nnunet.training.trainer import ZePTTrainer
from zept_nnunet.training.variants import ZePTTrainerPaper

AIR = -3.0  # of CT clipped at the foreground's percentiles, normalized
BACKGROUND, IGNORE = 0, 7
LABELS = {**TWO_KIDNEYS, "ignore": IGNORE}
ALIGNMENT = {"query_to_knowledge", "query_to_query"}


def assert_finite_step(trainer: ZePTTrainer, label: int) -> dict[str, float]:
    """A training step on air with one label everywhere; returns the terms of the loss."""
    result = trainer.train_step(make_batch(trainer, label, AIR))
    terms = {name: float(value) for name, value in result.items()}
    assert all(np.isfinite(v) for v in terms.values()), terms
    for name, p in trainer._zept().named_parameters():
        assert p.isfinite().all() and (p.grad is None or p.grad.isfinite().all()), name
    return terms


@pytest.mark.parametrize("dimensions", [3, 2])
@pytest.mark.parametrize("trainer", [ZePTTrainer, ZePTTrainerPaper])
@pytest.mark.parametrize("stage", [1, 2])
def test_air_without_any_class_teaches_that_nothing_is_there(
    stage: int, trainer: type[ZePTTrainer], dimensions: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    block = narrow_block(LABELS, trainer.variant)
    made = enter_stage(make_trainer(tmp_path, monkeypatch, dimensions, block, LABELS, trainer), stage)
    terms = assert_finite_step(made, BACKGROUND)
    wanted = {"organ_support"} if trainer is ZePTTrainerPaper else {"organ_support", "organ_healthy"}
    if stage == 2:
        wanted |= {"tumor"} if trainer is ZePTTrainerPaper else {"tumor", "anomaly", "deviation"}
    assert {n for n in TERMS if terms[n] > 0} - ALIGNMENT == wanted
    first = terms["organ_support"]
    for _ in range(3):
        terms = assert_finite_step(made, BACKGROUND)
    assert terms["organ_support"] < first


@pytest.mark.parametrize("dimensions", [3, 2])
@pytest.mark.parametrize("unlabeled_host_weight", [1.0, 0.0])
@pytest.mark.parametrize("stage", [1, 2])
def test_ignored_voxels_alone_teach_nothing(
    stage: int, unlabeled_host_weight: float, dimensions: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = {"unlabeled_host_weight": unlabeled_host_weight, "width": 16, "heads": 4}
    block = build_block({**DATASET_JSON, "labels": LABELS}, settings=settings)
    trainer = enter_stage(make_trainer(tmp_path, monkeypatch, dimensions, block, LABELS), stage)
    terms = assert_finite_step(trainer, IGNORE)
    assert not any(terms.values())
    heads = [trainer._zept().support_heads, trainer._zept().tumor_heads]
    gradients = [p.grad for head in heads for p in head.parameters() if p.grad is not None]
    assert gradients and not any(g.count_nonzero() for g in gradients)


@pytest.mark.parametrize("label", [BACKGROUND, IGNORE])
@pytest.mark.parametrize("stage", [1, 2])
def test_validation_without_a_voxel_of_any_class_is_a_number(
    stage: int, label: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trainer = enter_stage(make_trainer(tmp_path, monkeypatch, 2, narrow_block(LABELS), LABELS), stage)
    trainer.current_epoch, trainer.fixed_stage = 0, stage
    trainer._enter_stage()
    trainer.network.eval()
    with torch.no_grad():
        result = trainer.validation_step(make_batch(trainer, label, AIR))
    assert np.isfinite(result["loss"]) and not result["tp_hard"].any() and not result["fn_hard"].any()
    assert label == BACKGROUND or not result["fp_hard"].any()
    trainer.on_validation_epoch_end([result])
    logged = trainer.logger.local_logger.my_fantastic_logging
    assert logged["mean_fg_dice"] == [0.0] and np.isfinite(logged["val_losses"]).all()
