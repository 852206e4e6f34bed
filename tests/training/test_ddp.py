"""Two processes train one network by nnU-Net's own loop, with data of their own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as nnunet_module

from tests.network.narrow import TWO_KIDNEYS
from tests.small_plans import DATASET_JSON
from tests.small_trainer import make_batch, make_trainer
from tests.two_processes import in_two_processes
from zept_nnunet.plans_block import build_block
from zept_nnunet.training.budget import ZePTTrainerBudget
from zept_nnunet.training.trainer import ZePTTrainer

pytestmark = pytest.mark.slow

ITERATIONS = 4
LAST_ORGAN = TWO_KIDNEYS["spleen"]


class _OnTwoBatches:
    """Put before a trainer: short epochs, on the same two batches in place of data that nnU-Net would read."""

    seconds: float
    """That an epoch takes by this process's clock."""

    def on_train_start(self: Any) -> None:
        self.hidden, self.counts, self.clock = [], [], 0.0
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = ITERATIONS, 2
        self.dataloader_train, self.dataloader_val = own_batches(self), own_batches(self)

    def hidden_tumor(self, epoch: int, iteration: int) -> int | None:
        hidden: int | None = super().hidden_tumor(epoch, iteration)  # type: ignore[misc]
        self.hidden.append(hidden)  # type: ignore[attr-defined]
        return hidden

    def validation_step(self, batch: dict) -> dict:
        counts: dict = super().validation_step(batch)  # type: ignore[misc]
        self.counts.append(counts)  # type: ignore[attr-defined]
        return counts

    def on_epoch_end(self: Any) -> None:
        self.clock += self.seconds
        super().on_epoch_end()  # type: ignore[misc]


class TwoEpochs(_OnTwoBatches, ZePTTrainer):
    def on_train_start(self) -> None:
        super().on_train_start()
        self.num_epochs = 2


class OneMinute(_OnTwoBatches, ZePTTrainerBudget):
    pass


def own_batches(trainer: ZePTTrainer) -> Iterator[dict[str, Any]]:
    """Of one case; the second process's shows no tumor, nor what stands for abnormal tissue."""
    batch, rank = make_batch(trainer), trainer.local_rank
    maps = [m[rank : rank + 1].clamp_max(LAST_ORGAN if rank else 99) for m in batch["target"]]
    return repeat({"data": batch["data"][rank : rank + 1], "target": maps, "keys": batch["keys"][rank : rank + 1]})


def train(rank: int, folder: str, of: type[_OnTwoBatches], seconds: tuple[float, float]) -> dict[str, Any]:
    """A whole training; returns what it leaves in this process."""
    narrow = {"width": 16, "heads": 4, "advanced_layers": 2, "grouping_scales": 2}
    settings = {"hiding_probability": 0.5, "stage_one_share": 0.5}
    block = build_block({**DATASET_JSON, "labels": TWO_KIDNEYS}, settings={**narrow, **settings})
    with pytest.MonkeyPatch.context() as patch:
        trainer: Any = make_trainer(Path(folder), patch, block=block, trainer=of)  # type: ignore[arg-type]
        assert trainer.is_ddp and trainer.configuration_manager.batch_dice
        trainer.seconds = seconds[rank]
        patch.setattr(nnunet_module, "time", lambda: trainer.clock)
        torch.manual_seed(rank)
        trainer.run_training()
    return {
        "weights": trainer._zept().state_dict(),
        "log": trainer.logger.local_logger.my_fantastic_logging,
        "hidden": trainer.hidden,
        "counts": trainer.counts,
        "best": trainer._best_ema,
    }


def predict(rank: int, folder: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits of patches, by the bare network and by that of a training that is only validated (`--val`)."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        trainer = make_trainer(Path(folder), patch)
        trainer.network.eval()
        trainer.set_deep_supervision_enabled(False)
        network = trainer._zept()
        annotated = [True] * (network.num_organs + network.num_tumors)
        annotated[rank] = False  # as validation says it of each case
        network.restrict_to(annotated)
        patches = torch.randn(1 + rank, 1, 1, *trainer.configuration_manager.patch_size)
        return [network(x) for x in patches], [trainer.network(x) for x in patches]


def assert_agree(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Weights, and all that is logged."""
    assert [n for n, value in first["weights"].items() if not torch.equal(value, second["weights"][n])] == []
    assert first["log"].keys() == second["log"].keys()
    for key in first["log"]:
        np.testing.assert_array_equal(first["log"][key], second["log"][key], key)
    assert first["hidden"] == second["hidden"] and first["best"] == second["best"]


def test_both_stages_hiding_and_validation(tmp_path: Path) -> None:
    first, second = in_two_processes(train, tmp_path, str(tmp_path), TwoEpochs, (1.0, 1.0))
    assert_agree(first, second)
    log = first["log"]
    assert log["stage"] == [1, 2]
    assert len(first["hidden"]) == ITERATIONS and {None} < set(first["hidden"])  # of stage II alone
    for epoch in range(2):
        steps = [s for process in (first, second) for s in process["counts"][2 * epoch : 2 * epoch + 2]]
        tp, fp, fn = (np.sum([s[name] for s in steps], 0) for name in ("tp_hard", "fp_hard", "fn_hard"))
        dice = 2 * tp / (2 * tp + fp + fn)
        np.testing.assert_allclose(log["dice_per_class_or_region"][epoch], dice)
        learned = dice if log["stage"][epoch] == 2 else dice[:LAST_ORGAN]
        assert log["mean_fg_dice"][epoch] == pytest.approx(learned.mean())
        assert log["val_losses"][epoch] == pytest.approx(np.mean([s["loss"] for s in steps]))
    assert any((a["tp_hard"] != b["tp_hard"]).any() for a, b in zip(first["counts"], second["counts"], strict=True))


def test_a_budget_of_time_by_clocks_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute is three epochs of the first process, and two of the second."""
    monkeypatch.setenv("ZEPT_MINUTES", "1")
    first, second = in_two_processes(train, tmp_path, str(tmp_path), OneMinute, (20.0, 30.0))
    assert_agree(first, second)
    assert first["log"]["stage"] == [1, 1, 2] and len(first["log"]["train_losses"]) == 3


def test_the_final_validation_of_a_process_is_its_own(tmp_path: Path) -> None:
    """Its cases differ from those of the other in size and in what they label."""
    for alone, together in in_two_processes(predict, tmp_path, str(tmp_path)):
        assert [torch.equal(a, b) for a, b in zip(alone, together, strict=True)] == [True] * len(alone)
