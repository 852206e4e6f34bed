"""A trainer of stage II goes on from the weights of one of stage I, by nnU-Net's -pretrained_weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from tests.network.narrow import TWO_KIDNEYS
from tests.small_plans import DATASET_JSON
from tests.small_trainer import make_trainer
from zept_nnunet.errors import ZePTError
from zept_nnunet.network.zept import LEARNED_QUERIES
from zept_nnunet.plans_block import build_block
from zept_nnunet.training.variants import ZePTTrainerStageI, ZePTTrainerStageII


def stage_two(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[ZePTTrainerStageI, ZePTTrainerStageII]:
    """The trainer with the weights of stage I as nnU-Net gives them to it, and that of stage I."""
    block = build_block({**DATASET_JSON, "labels": TWO_KIDNEYS}, settings={"width": 16, "heads": 4, **settings})
    first = make_trainer(folder, monkeypatch, block=block, trainer=ZePTTrainerStageI)
    file = folder / "checkpoint_final.pth"
    first.save_checkpoint(str(file))
    second = make_trainer(folder, monkeypatch, block=block, trainer=ZePTTrainerStageII)
    second.was_initialized = False  # nor are its weights those of a test
    maybe_load_checkpoint(second, False, False, str(file))
    return first, second  # type: ignore[return-value]


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[nnUNetTrainer]:
    """Trainers that go on to nnU-Net's own start, which reads data."""
    started: list[nnUNetTrainer] = []
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: started.append(self))
    return started


def test_generated_queries_are_those_of_stage_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, starts: list[nnUNetTrainer]
) -> None:
    first, second = stage_two(tmp_path, monkeypatch)
    second.on_train_start()
    assert starts == [second]
    with torch.no_grad():
        mine, theirs = (t._zept()._given_queries(())[0] for t in (first, second))
    assert torch.equal(mine, theirs)


def test_learned_queries_that_nnunet_leaves_out_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, starts: list[nnUNetTrainer]
) -> None:
    first, second = stage_two(tmp_path, monkeypatch, queries="learned")
    with pytest.raises(ZePTError, match=r"'learned'.*at random.*-tr ZePTTrainer"):
        second.on_train_start()
    assert not starts and not Path(second.output_folder_base).exists()
    with torch.no_grad():  # as a checkpoint of its own leaves it, after a resume
        second._zept().get_parameter(LEARNED_QUERIES).copy_(first._zept().get_parameter(LEARNED_QUERIES))
    second.on_train_start()
    assert starts == [second]
