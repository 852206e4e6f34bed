"""The budget from the environment: what is read, what is refused, and training until the time is up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from tests.two_processes import in_two_processes
from zept_nnunet.errors import ZePTError
from zept_nnunet.training import budget as module
from zept_nnunet.training.budget import Budget, Budgeted, ZePTTrainerBudget, ZePTTrainerPaperBudget


def test_the_environment_is_read_and_written_back() -> None:
    variables = {"ZEPT_EPOCHS": "3", "ZEPT_ITERATIONS": "7", "ZEPT_OPTIMIZER": "sgd", "ZEPT_SEED": "5"}
    budget = Budget.from_environment(variables)
    assert budget == Budget(3, 7, None, "sgd", 5)
    assert budget.to_environment() == variables
    assert Budget.from_environment({}) == Budget(None, None, None, "adamw", None)
    assert Budget.from_environment({"ZEPT_MINUTES": "0.5"}).minutes == 0.5


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ZEPT_EPOCHS": "0"}, "ZEPT_EPOCHS must be a positive number, got '0'"),
        ({"ZEPT_ITERATIONS": "many"}, "ZEPT_ITERATIONS must be a positive number"),
        ({"ZEPT_MINUTES": "nan"}, "ZEPT_MINUTES must be"),
        ({"ZEPT_EPOCHS": "1", "ZEPT_MINUTES": "1"}, "both set"),
        ({"ZEPT_OPTIMIZER": "lion"}, "adamw, sgd"),
    ],
)
def test_a_wrong_budget_is_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ZePTError, match=message):
        Budget.from_environment(variables)


SECONDS = 12.0  # of every epoch


class _Trainer(Budgeted):
    """A budgeted trainer without data and network."""

    def __init__(self, budget: Budget, done: int = 0, seconds: float = SECONDS) -> None:
        log: dict[str, list[Any]] = {
            "epoch_start_timestamps": [100.0 * e for e in range(done)],
            "epoch_end_timestamps": [100.0 * e + SECONDS for e in range(done)],
        }
        self.seconds, self.is_ddp = seconds, torch.distributed.is_initialized()
        self.logger = SimpleNamespace(local_logger=SimpleNamespace(my_fantastic_logging=log))
        self.budget, self.current_epoch, self.num_epochs = budget, done, budget.epochs or module._ENDLESS
        self.rates: list[float] = []
        self.shares: list[float] = []
        self.endings = 0
        parameter = torch.nn.Parameter(torch.zeros(1))
        self.optimizer = torch.optim.SGD([parameter], 1.0)


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_loop(monkeypatch)


def replace_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's loop, as far as a budget meets it."""

    def configure_optimizers(self: Any) -> tuple[Any, Any]:
        return self.optimizer, PolyLRScheduler(self.optimizer, 1.0, self.num_epochs)

    def run_training(self: Any) -> None:
        log = self.logger.local_logger.my_fantastic_logging
        _, scheduler = self.configure_optimizers()
        for epoch in range(self.current_epoch, self.num_epochs):
            log["epoch_start_timestamps"].append(100.0 * epoch)
            scheduler.step(epoch)
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            self.shares.append(self.progress())
            log["epoch_end_timestamps"].append(100.0 * epoch + self.seconds)
            self.on_epoch_end()
        self.on_train_end()

    def on_epoch_end(self: Any) -> None:
        self.current_epoch += 1

    def on_train_end(self: Any) -> None:
        self.endings += 1

    for function in (configure_optimizers, run_training, on_epoch_end, on_train_end):
        monkeypatch.setattr(nnUNetTrainer, function.__name__, function)


@pytest.mark.usefixtures("stock")
def test_a_time_limit_ends_the_training_and_stretches_the_schedule_over_it() -> None:
    trainer = _Trainer(Budget(minutes=1))
    trainer.run_training()
    assert (trainer.current_epoch, trainer.num_epochs, trainer.endings) == (5, 5, 1)
    assert trainer.rates == pytest.approx([(1 - e / 5) ** 0.9 for e in range(5)])
    nearest = _Trainer(Budget(minutes=0.91))  # 54.6 s: 60 s are nearer than 48 s
    nearest.run_training()
    assert nearest.current_epoch == 5


@pytest.mark.usefixtures("stock")
def test_a_resumed_training_counts_the_time_before() -> None:
    trainer = _Trainer(Budget(minutes=1), done=3)
    trainer.run_training()
    assert trainer.rates == pytest.approx([0.4**0.9, 0.2**0.9])
    assert trainer.current_epoch == 5


def train_in_a_process(rank: int) -> tuple[list[float], list[float], int]:
    """Rates and shares of the time by epoch, and their number; epochs of the second process take longer."""
    trainer = _Trainer(Budget(minutes=1), seconds=(SECONDS, 2.1 * SECONDS)[rank])
    with pytest.MonkeyPatch.context() as patch:
        replace_loop(patch)
        trainer.run_training()
    return trainer.rates, trainer.shares, trainer.current_epoch


def test_the_time_of_the_first_process_is_that_of_all(tmp_path: Path) -> None:
    """Where each went by its own clock they would part: in rate, in stage, and in when they stop."""
    first, second = in_two_processes(train_in_a_process, tmp_path)
    assert first == second
    rates, shares, epochs = first
    assert rates == pytest.approx([(1 - e / 5) ** 0.9 for e in range(5)])
    assert shares == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])  # which the stage goes by
    assert epochs == 5


@pytest.mark.usefixtures("stock")
def test_epochs_keep_nnunets_schedule() -> None:
    trainer = _Trainer(Budget(epochs=4))
    trainer.run_training()
    assert trainer.rates == pytest.approx([(1 - e / 4) ** 0.9 for e in range(4)])
    assert trainer.endings == 1


def test_stages_share_the_time() -> None:
    trainer = _Trainer(Budget(minutes=1), done=2)
    trainer.logger.local_logger.my_fantastic_logging["stage"] = [1, 1]
    trainer.fixed_stage, trainer.taxonomy = None, SimpleNamespace(organs=(1,))
    trainer.settings = {"stage_one_share": 0.5}
    stage_at = ZePTTrainerBudget.stage_at
    assert [stage_at(trainer, e, 0) for e in (0, 1, 2)] == [1, 1, 1]  # type: ignore[arg-type]
    later = _Trainer(Budget(minutes=1), done=3)
    later.logger.local_logger.my_fantastic_logging["stage"] = [1, 1, 1]
    later.fixed_stage, later.taxonomy = None, SimpleNamespace(organs=(1,))
    later.settings = trainer.settings
    assert [stage_at(later, e, 0) for e in (2, 3)] == [1, 2]  # type: ignore[arg-type]


def test_class_names_and_order_of_the_parents() -> None:
    names = [c.__name__ for c in ZePTTrainerPaperBudget.__mro__]
    assert names.index("Budgeted") < names.index("ZePTTrainerPaper") < names.index("ZePTTrainer")
    assert ZePTTrainerPaperBudget.variant == "paper" and ZePTTrainerBudget.variant == "zept"


def test_the_final_validation_can_be_left_out_and_runs_without_mirroring(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def validate(self: nnUNetTrainer, save_probabilities: bool = False) -> None:
        seen.append((self.inference_allowed_mirroring_axes, save_probabilities))

    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", validate)
    trainer = object.__new__(Budgeted)
    trainer.inference_allowed_mirroring_axes = (0, 1)
    monkeypatch.setattr(Budgeted, "print_to_log_file", lambda self, *words: None)
    trainer.perform_actual_validation(True)
    assert seen == [(None, True)] and trainer.inference_allowed_mirroring_axes == (0, 1)
    monkeypatch.setenv("ZEPT_VALIDATE", "0")
    trainer.perform_actual_validation()
    assert len(seen) == 1
