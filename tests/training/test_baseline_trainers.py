"""The comparison trainers: anomalies in the right place, ZePT's optimizer, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

from tests.small_plans import make_plans_manager
from zept_nnunet.datasets.derived import ANY_TUMOR, KEY
from zept_nnunet.errors import ZePTError
from zept_nnunet.training.anomalies import InsertAnomalies
from zept_nnunet.training.baseline_trainers import nnUNetTrainerAnyTumorPlus, nnUNetTrainerBaseline
from zept_nnunet.training.budget import Budget
from zept_nnunet.training.trainer import ZePTTrainer

DERIVED: dict[str, Any] = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": 1, "spleen": 2, "pancreas": 3, ANY_TUMOR: 4},
    "zept": {"tumors": {ANY_TUMOR: {"hosts": ["liver"]}}},
    KEY: {"kind": "any_tumor", "unlabeled_hosts": ["spleen", "pancreas"]},
}


def make_plus(unlabeled: dict[int, int]) -> Any:
    trainer = object.__new__(nnUNetTrainerAnyTumorPlus)
    manager, name = make_plans_manager()
    manager.plans["foreground_intensity_properties_per_channel"] = {
        "0": {"mean": 50.0, "std": 40.0, "percentile_00_5": -150.0, "percentile_99_5": 250.0}
    }
    trainer.plans_manager, trainer.configuration_manager = manager, manager.get_configuration(name)
    trainer.any_tumor_label, trainer.anomaly_label = 4, unlabeled
    trainer.print_to_log_file = lambda *_: None
    return trainer


def transforms(trainer: Any) -> list[Any]:
    return list(trainer.get_training_transforms((16, 24, 16), (-0.1, 0.1), [[1, 1, 1]], (0,), False).transforms)


def test_anomalies_follow_the_spatial_transform_and_are_labeled_any_tumor() -> None:
    found = transforms(make_plus({2: 4, 3: 4}))
    (position,) = [i for i, t in enumerate(found) if isinstance(t, InsertAnomalies)]
    assert isinstance(found[position - 1], SpatialTransform)
    assert found[position].anomaly_label == {2: 4, 3: 4}
    assert found[position].tumor_labels == (4,)
    assert [s.hu_per_unit for s in found[position].scales] == [40.0]
    assert not [t for t in transforms(make_plus({})) if isinstance(t, InsertAnomalies)]


def test_anomalies_want_an_any_tumor_dataset() -> None:
    with pytest.raises(ZePTError, match="Dataset001_X is none"):
        nnUNetTrainerAnyTumorPlus({"dataset_name": "Dataset001_X"}, "3d_fullres", 0, {"labels": {}})


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_optimizer_is_zepts_or_nnunets(name: str) -> None:
    trainer: Any = object.__new__(nnUNetTrainerBaseline)
    trainer.budget, trainer.num_epochs = Budget(optimizer=name), 10
    trainer.initial_lr, trainer.weight_decay = 1e-2, 3e-5
    trainer.network = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3), torch.nn.InstanceNorm3d(2, affine=True))
    optimizer, _ = trainer.configure_optimizers()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(parameters) == len(list(trainer.network.parameters()))
    if name == "sgd":
        assert isinstance(optimizer, torch.optim.SGD) and optimizer.param_groups[0]["momentum"] == 0.99
        return
    theirs = object.__new__(ZePTTrainer)
    theirs.initial_lr, theirs.weight_decay, theirs.num_epochs = 1e-3, 1e-2, 10
    network = trainer.network
    network.stage_two_parameters = lambda: []
    theirs._zept = lambda: network  # type: ignore[method-assign]
    reference, _ = ZePTTrainer.configure_optimizers(theirs)
    assert type(optimizer) is type(reference)
    wanted = {id(p): g["weight_decay"] for g in reference.param_groups for p in g["params"]}
    assert {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]} == wanted
    for key in ("betas", "eps"):
        assert optimizer.defaults[key] == reference.defaults[key]
    assert optimizer.defaults["lr"] == 4e-3  # what serves this loss best


def test_a_derived_dataset_names_hosts_and_the_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nnUNetTrainerBaseline, "__init__", lambda *_: None)
    trainer = nnUNetTrainerAnyTumorPlus({"dataset_name": "Dataset001_X"}, "3d_fullres", 0, DERIVED)
    assert (trainer.any_tumor_label, trainer.anomaly_label) == (4, {2: 4, 3: 4})
