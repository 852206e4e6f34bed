"""Bad input is refused before nnU-Net makes a results folder; stages and schedules by number."""

from __future__ import annotations

import json
import math
import random
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from tests.network.compare import differing
from tests.nnunet_folders import make_nnunet_folders
from tests.small_plans import DATASET_JSON, make_network, make_plans
from zept_nnunet.errors import ZePTError
from zept_nnunet.losses import TERMS
from zept_nnunet.losses.alignment import TEMPERATURE_BOUNDS
from zept_nnunet.network.zept import ZePTOutput
from zept_nnunet.plans_block import DECODER_SETTINGS, TRAINING_SETTINGS, build_block
from zept_nnunet.training.anomalies import InsertAnomalies
from zept_nnunet.training.targets import Targets, make_targets
from zept_nnunet.training.trainer import ZePTTrainer, seed_everything
from zept_nnunet.training.variants import (
    ZePTTrainer_1epoch,
    ZePTTrainer_5epochs,
    ZePTTrainerPaper,
    ZePTTrainerStageI,
    ZePTTrainerStageII,
)

CPU = torch.device("cpu")


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_nnunet_folders(tmp_path, monkeypatch)
    return tmp_path / "nnUNet_results"


def make_trainer(
    trainer: type[ZePTTrainer] = ZePTTrainer, plans: dict | None = None, dataset_json: dict | None = None
) -> ZePTTrainer:
    plans = plans if plans is not None else make_plans()
    return trainer(plans | {"continue_training": False}, "3d_fullres", 0, deepcopy(dataset_json or DATASET_JSON), CPU)


def with_zept(**block: Any) -> dict[str, Any]:
    return deepcopy(DATASET_JSON) | {"zept": block}


BAD_DATASETS = {
    "host not determined": (
        DATASET_JSON | {"labels": {"background": 0, "liver": 1, "spleen": 2, "brain tumor": 3}},
        "host",
    ),
    "host is no label": (with_zept(tumors={"liver tumor": {"hosts": ["colon"]}}), "colon"),
    "unseen is a label": (with_zept(unseen={"liver tumor": {"hosts": ["liver"]}}), "liver"),
    "unknown key": (with_zept(tumours={}), "tumours"),
    "unknown class": (with_zept(tumors={"brain tumor": {"hosts": ["liver"]}}), "brain"),
}


@pytest.mark.parametrize("name", BAD_DATASETS)
def test_bad_datasets_are_refused_and_nothing_is_written(results: Path, name: str) -> None:
    dataset_json, word = BAD_DATASETS[name]
    with pytest.raises(ZePTError, match=word) as error:
        make_trainer(dataset_json=dataset_json)
    assert "dataset.json" in str(error.value)
    assert not list(results.iterdir())


def test_a_network_that_cannot_be_wrapped_is_refused(results: Path) -> None:
    plans = make_plans()
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = "tests.training.test_trainer.NotAUNet"
    architecture["arch_kwargs"], architecture["_kw_requires_import"] = {}, []
    with pytest.raises(ZePTError, match=r"NotAUNet.*cannot be wrapped"):
        make_trainer(plans=plans)
    assert not list(results.iterdir())


class NotAUNet(torch.nn.Module):
    def __init__(self, input_channels: int, num_classes: int, deep_supervision: bool):
        super().__init__()


def test_another_folds_taxonomy_or_knowledge_is_refused(results: Path) -> None:
    model = results / "Dataset999_Small" / "ZePTTrainer__nnUNetPlans__3d_fullres"
    model.mkdir(parents=True)
    other = build_block(with_zept(knowledge={"liver": "a large organ"}))
    (model / "plans.json").write_text(json.dumps(make_plans() | {"zept": other}))
    with pytest.raises(ZePTError, match="knowledge") as error:
        make_trainer()
    assert str(model / "plans.json") in str(error.value)
    assert [p.name for p in model.iterdir()] == ["plans.json"]
    (model / "plans.json").write_text(json.dumps(make_plans() | {"zept": build_block(deepcopy(DATASET_JSON))}))
    make_trainer()


def test_a_checkpoint_of_other_knowledge_is_refused_by_name(results: Path, tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.network = make_network(dataset_json=with_zept(knowledge={"liver": "a large organ"}))
    trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
    file = tmp_path / "checkpoint_final.pth"
    trainer.save_checkpoint(str(file))
    trainer.network, trainer.was_initialized = make_network(), True
    with pytest.raises(ZePTError, match=r"checkpoint_final.pth.*knowledge"):
        trainer.load_checkpoint(str(file))


def test_channels_of_another_dataset_json_are_refused(results: Path) -> None:
    trainer = make_trainer()
    with pytest.raises(ZePTError, match="9 output channels"):
        trainer.build_network_architecture(trainer.plans_manager, trainer.configuration_manager, 1, 9, False)


@pytest.mark.parametrize(
    ("trainer", "stages"),
    [
        (ZePTTrainer_5epochs, [1, 2, 2, 2, 2]),
        (ZePTTrainerStageI, [1, 1, 1, 1, 1]),
        (ZePTTrainerStageII, [2, 2, 2, 2, 2]),
    ],
)
def test_stages_switch_after_a_fifth_of_the_run(results: Path, trainer: type[ZePTTrainer], stages: list[int]) -> None:
    assert [make_trainer(trainer).stage_at(e, 0) for e in range(5)] == stages


def test_one_epoch_switches_after_a_fifth_of_its_iterations(results: Path) -> None:
    trainer = make_trainer(ZePTTrainer_1epoch)
    assert [trainer.stage_at(0, i) for i in (0, 49, 50, 249)] == [1, 1, 2, 2]


def with_settings(trainer: type[ZePTTrainer] = ZePTTrainer, **settings: Any) -> ZePTTrainer:
    plans = make_plans()
    plans["zept"] = build_block(deepcopy(DATASET_JSON), settings=settings)
    return make_trainer(trainer, plans)


def test_share_of_stage_one(results: Path) -> None:
    trainer = with_settings(ZePTTrainer_5epochs, stage_one_share=0.5)
    assert [trainer.stage_at(e, 0) for e in range(5)] == [1, 1, 2, 2, 2]
    assert with_settings(ZePTTrainer_5epochs, stage_one_share=0).stage_at(0, 0) == 2
    assert [with_settings(ZePTTrainer_5epochs, stage_one_share=0.1).stage_at(e, 0) for e in (0, 1)] == [1, 2]


def test_the_learning_rate_warms_up_over_iterations_and_follows_the_schedule_after_it(results: Path) -> None:
    trainer = with_settings(ZePTTrainer_5epochs, warmup_iterations=6, learning_rate=0.5, stage_one_share=0.2)
    trainer.network, trainer.num_iterations_per_epoch = make_network(), 4
    trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
    rates: list[float] = []
    frozen: list[float] = []
    for trainer.current_epoch in range(3):
        trainer.on_train_epoch_start()
        for trainer._iteration in range(4):
            trainer._enter_stage()
            groups = trainer.optimizer.param_groups
            rates.append(groups[0]["lr"])
            frozen += [g["lr"] for g in groups if g["is_advanced"]][:1]
    schedule = [0.5 * (1 - e / 5) ** 0.9 for e in range(3) for _ in range(4)]
    assert rates == pytest.approx([s * min(1, (i + 1) / 6) for i, s in enumerate(schedule)])
    assert frozen == pytest.approx([0.0] * 4 + rates[4:])


@pytest.mark.parametrize("trainer", [ZePTTrainer, ZePTTrainerPaper])
def test_no_weight_decay_on_norms_biases_and_tokens(results: Path, trainer: type[ZePTTrainer]) -> None:
    built = make_trainer(trainer)
    build(built)
    built.optimizer, _ = built.configure_optimizers()
    names = {id(p): n for n, p in built.network.named_parameters()}
    groups = built.optimizer.param_groups
    assert sorted(n for g in groups for n in (names[id(p)] for p in g["params"])) == sorted(names.values())
    layers = (torch.nn.Linear, torch.nn.Conv3d, torch.nn.ConvTranspose3d)
    weights = {id(m.weight) for m in built.network.modules() if isinstance(m, layers)}
    assert any(names[w].startswith("encoder.") for w in weights)
    for group in groups:
        for p in group["params"]:
            assert group["trained_decay"] == (built.settings["weight_decay"] if id(p) in weights else 0), names[id(p)]


def test_gradients_are_clipped_to_the_norm_of_the_settings(results: Path) -> None:
    trainer = with_settings(gradient_norm=1e-3)
    build(trainer)
    trainer._zept().stage = 2
    for p in trainer.network.parameters():
        p.grad = torch.ones_like(p)
    trainer._clip_and_freeze()
    norms = [p.grad.norm() for p in trainer.network.parameters() if p.grad is not None]
    assert torch.stack(norms).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_paper_trainer_gets_the_papers_decoder(results: Path) -> None:
    decoder = make_trainer(ZePTTrainerPaper).plans_manager.plans["zept"]["decoder"]
    assert (decoder["queries"], decoder["score"]) == ("learned", "minmax")


def test_another_variants_trainer_keeps_the_size_and_the_optimizer_of_the_plans(results: Path) -> None:
    """What both variants have in common is of the plans: or the comparison would be one of two learning rates."""
    of_plans = {"width": 64, "heads": 4, "learning_rate": 4e-3, "weight_decay": 0.5}
    own = {"prompt_probability": 0.3, "alignment": 0.02, "stage_one_share": 0.7}
    block = with_settings(ZePTTrainerPaper, **of_plans, **own).plans_manager.plans["zept"]
    settings = block["decoder"] | block["training"]
    assert {name: settings[name] for name in of_plans} == of_plans
    papers = DECODER_SETTINGS["paper"] | TRAINING_SETTINGS["paper"]
    assert {name: value for name, value in settings.items() if name not in of_plans} == {
        name: value for name, value in papers.items() if name not in of_plans
    }


@pytest.mark.parametrize("start", [1e-4, 30.0])
def test_a_temperature_beyond_its_bounds_comes_back(results: Path, start: float) -> None:
    trainer = two_trainers()[0]
    trainer.current_epoch, temperature = trainer.num_epochs - 1, trainer._zept().log_temperature
    with torch.no_grad():
        temperature.fill_(math.log(start))
    trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
    trainer.train_step(make_batch(trainer))
    low, high = TEMPERATURE_BOUNDS
    assert low < temperature.exp().item() < high
    trainer.optimizer.zero_grad(set_to_none=True)
    forward(trainer, make_batch(trainer))[1].backward()
    assert temperature.grad is not None and temperature.grad.item() != 0


def transform_arguments(trainer: ZePTTrainer) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What nnU-Net gives to get_training_transforms."""
    flags = {"use_mask_for_norm": [False], "is_cascaded": False, "foreground_labels": [1, 2, 3, 4, 5], "regions": None}
    size = trainer.configuration_manager.patch_size
    return (size, (-0.1, 0.1), [[1.0] * 3, [0.5] * 3], (0, 1, 2), False), flags | {"ignore_label": None}


def test_anomalies_go_into_organs_without_tumor_labels(results: Path) -> None:
    plans = make_plans()
    seen = {"mean": 50.0, "std": 40.0, "percentile_00_5": -100.0, "percentile_99_5": 200.0}
    plans["foreground_intensity_properties_per_channel"] = {"0": seen}
    trainer = make_trainer(plans=plans)
    size = trainer.configuration_manager.patch_size
    transforms = trainer.get_training_transforms(*transform_arguments(trainer)[0], **transform_arguments(trainer)[1])
    labels = torch.zeros(1, *size, dtype=torch.int16)
    labels[:, :, 2:11] = 1  # liver: it has tumor labels
    labels[:, :, 13:22] = 3  # pancreas: it has none
    found: set[int] = set()
    np.random.seed(0)
    for _ in range(12):
        sample = transforms(image=torch.zeros(1, *size), segmentation=labels.clone())
        assert [s.shape[1] for s in sample["segmentation"]] == [size[0], size[0] // 2]
        found |= set(sample["segmentation"][0].unique().tolist())
    assert trainer.anomaly_labels == {3: 6} and found == {0, 1, 3, 6}
    assert make_trainer(ZePTTrainerPaper, plans).anomaly_labels == {}


def test_log_holds_no_vectors(results: Path) -> None:
    trainer = make_trainer()
    trainer.print_plans()
    log = Path(trainer.log_file).read_text()
    assert "<vector of 384>" in log and len(log) < 20_000


def test_seed_repeats_the_weights(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = []
    for seed in ("1", "1", "2"):
        monkeypatch.setenv("ZEPT_SEED", seed)
        trainer = make_trainer()
        network = trainer.build_network_architecture(
            trainer.plans_manager, trainer.configuration_manager, 1, len(trainer.taxonomy.channels), True
        )
        weights.append(torch.nn.utils.parameters_to_vector(network.parameters()))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_processes_of_one_training_draw_different_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEPT_SEED", "1")
    drawn = []
    for rank in (None, 0, 1):
        monkeypatch.setattr(dist, "is_initialized", lambda rank=rank: rank is not None)
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        seed_everything()
        drawn.append((float(torch.rand(1)), float(np.random.rand()), random.random()))
    assert drawn[0] == drawn[1] and not set(drawn[1]) & set(drawn[2])


def build(trainer: ZePTTrainer) -> None:
    """Network and loss, as initialize() makes them, without the preprocessed data that it looks for."""
    heads = len(trainer.taxonomy.channels)
    manager, configuration = trainer.plans_manager, trainer.configuration_manager
    trainer.network = trainer.build_network_architecture(manager, configuration, 1, heads, True)
    trainer.loss = trainer._build_loss()


def test_hiding_is_the_same_in_every_process_and_spares_what_nothing_can_replace(results: Path) -> None:
    plans = make_plans()
    plans["zept"] = build_block(deepcopy(DATASET_JSON), settings={"hiding_probability": 0.5})
    trainers = [make_trainer(plans=deepcopy(plans)) for _ in range(2)]
    for trainer in trainers:
        build(trainer)
    draws = [[t.hidden_tumor(epoch, i) for epoch in range(4) for i in range(100)] for t in trainers]
    assert draws[0] == draws[1] and set(draws[0]) == {None, 0, 1}
    assert 0.4 < sum(d is not None for d in draws[0]) / 400 < 0.6
    trainers[0]._zept().anomaly_hosts = ((1,), (2,))  # none for the liver's abnormal tissue
    assert {trainers[0].hidden_tumor(0, i) for i in range(100)} == {None, 1}
    default = make_trainer()
    build(default)
    assert {default.hidden_tumor(0, i) for i in range(50)} == {None}


def test_settings_of_the_plans_reach_the_training(results: Path) -> None:
    plans = make_plans()
    settings = {
        "alignment": 0.0,
        "unlabeled_host_weight": 0.5,
        "synthetic_anomalies": False,
        "organs_include_tumors": True,
    }
    plans["zept"] = build_block(deepcopy(DATASET_JSON), settings=settings)
    trainer = make_trainer(plans=plans)
    build(trainer)
    assert (trainer.loss.weights["query_to_knowledge"], trainer.loss.weights["query_to_query"]) == (0.0, 0.0)
    assert trainer.loss.unlabeled_host_weight == 0.5 and not trainer.anomaly_labels
    targets = trainer._targets(torch.tensor([1, 4]).view(1, 1, 1, 1, 2))
    assert torch.equal(targets.healthy, targets.support)


def test_a_folds_start_keeps_the_thresholds_of_the_model_folder(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = results / "Dataset999_Small" / "ZePTTrainer__nnUNetPlans__3d_fullres"
    folder.mkdir(parents=True)
    thresholds = {"liver_tumor": {"logit": -2.0, "scans": 30}}
    block = build_block(deepcopy(DATASET_JSON))
    (folder / "plans.json").write_text(json.dumps({"zept": {**block, "thresholds": thresholds}}))
    made = make_trainer()
    written = folder / "plans.json"
    monkeypatch.setattr(
        "nnunetv2.training.nnUNetTrainer.nnUNetTrainer.nnUNetTrainer.on_train_start",
        lambda self: written.write_text(json.dumps(self.plans_manager.plans)),  # as it does, among much else
    )
    made.on_train_start()
    assert json.loads(written.read_text())["zept"] == {**block, "thresholds": thresholds}
    assert "thresholds" not in made.plans_manager.plans["zept"]  # this fold is validated as the others were


def test_pseudo_dice_takes_an_unlabeled_tumor_for_its_organ(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prediction finds a tumor in both cases; only the first one's labels hold tumors."""
    trainer = make_trainer(dataset_json=with_zept(annotated={"whole_*": ["liver", "spleen", "pancreas"]}))
    build(trainer)
    organs, tumors = trainer.taxonomy.organs, trainer.taxonomy.tumors
    label_map = torch.zeros(2, 1, 4, 4, 4)
    label_map[:, :, 1:3] = 1
    label_map[0, :, 1] = 4  # the tumor; in the second case it is labeled as liver
    healthy, tumor = torch.full((2, len(organs), 4, 4, 4), -9.0), torch.full((2, len(tumors), 4, 4, 4), -9.0)
    healthy[:, 0, 2] = tumor[:, 0, 1] = 9.0
    output = SimpleNamespace(healthy=[healthy], tumor=[tumor], support=[healthy.maximum(tumor[:, :1])])
    loss = torch.zeros(())
    monkeypatch.setattr(trainer, "_forward", lambda batch: (output, label_map, loss, {}))
    counts = trainer.validation_step({"keys": ["full_1", "whole_1"]})
    assert counts["tp_hard"].tolist() == [16 + 32, 0, 0, 16, 0]
    assert not counts["fp_hard"].any() and not counts["fn_hard"].any()


def test_a_region_is_annotated_as_a_whole_without_its_tumors(results: Path) -> None:
    labels = {"background": 0, "liver and tumor": [1, 2], "liver_tumor": 2, "spleen": 3}
    dataset = DATASET_JSON | {"labels": labels, "regions_class_order": [1, 2, 3]}
    dataset = {**dataset, "zept": {"annotated": {"whole_*": ["liver and tumor", "spleen"]}}}
    trainer = make_trainer(dataset_json=dataset)
    is_annotated = trainer.annotations.of_batch(["whole_1"])
    label_map = torch.tensor([0, 1, 3]).view(1, 1, 3)
    reference, annotated = trainer._reference_channels(make_targets(label_map, trainer.taxonomy), is_annotated)
    assert annotated.tolist() == [[True, False, True]]
    assert reference[0].tolist() == [[False, True, False], [False, False, False], [False, False, True]]


# ---------------------------------------------------------------------------------------------------- one setting
NARROW = {"width": 16, "heads": 4}


def make_batch(trainer: ZePTTrainer, with_anomalies: bool = True) -> dict[str, Any]:
    """Two cases of random labels, those of synthetic anomalies among them."""
    generator = torch.Generator().manual_seed(0)
    anomalies = trainer.anomaly_labels.values() if with_anomalies else ()
    values = torch.tensor([0, *(c.label for c in trainer.taxonomy.classes), *anomalies])
    sizes = [(16, 24, 16), (8, 12, 8), (4, 6, 4)]
    maps = [values[torch.randint(0, len(values), (2, 1, *size), generator=generator)] for size in sizes]
    return {"data": torch.randn(2, 1, *sizes[0], generator=generator), "target": maps, "keys": ["a", "b"]}


def two_trainers(**settings: Any) -> tuple[ZePTTrainer, ZePTTrainer]:
    """The default, and one that differs in the settings; equal weights, no noise."""
    trainers = with_settings(**NARROW), with_settings(**NARROW, **settings)
    for trainer in trainers:
        build(trainer)
        trainer.network.eval()
    trainers[1].network.load_state_dict(trainers[0].network.state_dict())
    return trainers


def forward(trainer: ZePTTrainer, batch: dict[str, Any]) -> tuple[ZePTOutput, torch.Tensor, dict[str, torch.Tensor]]:
    output, _, loss, terms = trainer._forward(batch)
    return output, loss, terms


def unequal_terms(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], rounding: float = 0.0) -> set[str]:
    """Terms that differ; by more than `rounding` of their size where the order of summation may be another."""
    assert set(a) == set(b) == set(TERMS)
    return {term for term in TERMS if not torch.isclose(a[term], b[term], rtol=rounding, atol=0)}


def test_without_alignment_the_loss_lacks_its_two_terms_and_nothing_else(results: Path) -> None:
    trainers = two_trainers(alignment=0.0)
    batch = make_batch(trainers[0])
    (a, total, terms), (b, less, same_terms) = (forward(t, batch) for t in trainers)
    assert differing(a, b) == set() and unequal_terms(terms, same_terms) == set()  # logged all the same
    alignment = terms["query_to_knowledge"] + terms["query_to_query"]
    weight = trainers[0].settings["alignment"]
    assert alignment > 1 and (total - less).item() == pytest.approx(weight * alignment.item(), rel=1e-4)
    learns = []
    for trainer, loss in zip(trainers, (total, less), strict=True):
        loss.backward()
        learns.append({n for n, p in trainer.network.named_parameters() if p.grad is not None and p.grad.any()})
    assert learns[0] - learns[1] == {"to_knowledge.weight", "to_knowledge.bias", "log_temperature"}
    assert not learns[1] - learns[0]


def test_organs_that_include_tumors_change_the_healthy_target_and_nothing_else(results: Path) -> None:
    trainers = two_trainers(organs_include_tumors=True)
    batch = make_batch(trainers[0])
    targets: list[list[Targets]] = [[t._targets(m) for m in batch["target"]] for t in trainers]
    for mine, theirs in zip(*targets, strict=True):
        for name in ("support", "tumor", "abnormal"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name))
        assert torch.equal(theirs.healthy, theirs.support) and not torch.equal(mine.healthy, theirs.healthy)
        assert mine.is_valid is theirs.is_valid is None
    (a, _, terms), (b, _, others) = (forward(t, batch) for t in trainers)
    assert differing(a, b) == set() and unequal_terms(terms, others) == {"organ_healthy"}
    for mine, theirs in zip(*(sorted(t.validation_step(batch).items()) for t in trainers), strict=True):
        assert np.array_equal(mine[1], theirs[1]) == (mine[0] != "loss")  # judged by the labels as they are


def test_without_synthetic_anomalies_a_batch_is_nnunets_own(results: Path) -> None:
    default, other = two_trainers(synthetic_anomalies=False)
    args, flags = transform_arguments(other)
    with_anomalies, without = (t.get_training_transforms(*args, **flags) for t in (default, other))
    steps = [[type(step) for step in t.transforms] for t in (with_anomalies, without)]
    assert [step for step in steps[0] if step is not InsertAnomalies] == steps[1] != steps[0]
    stock = nnUNetTrainer.get_training_transforms(*args, **flags)
    size = other.configuration_manager.patch_size
    labels = torch.full((1, *size), 3, dtype=torch.int16)  # pancreas, whose tumors nobody labeled
    samples = []
    for transforms in (without, stock):
        np.random.seed(0)
        torch.manual_seed(0)
        samples.append([transforms(image=torch.randn(1, *size), segmentation=labels.clone()) for _ in range(3)])
    for mine, theirs in zip(*samples, strict=True):
        assert torch.equal(mine["image"], theirs["image"])
        for a, b in zip(mine["segmentation"], theirs["segmentation"], strict=True):
            assert torch.equal(a, b) and set(a.unique().tolist()) <= {0, 3}


def test_without_synthetic_anomalies_the_loss_says_nothing_of_abnormal_tissue_that_nobody_labeled(
    results: Path,
) -> None:
    trainers = two_trainers(synthetic_anomalies=False)
    batch = make_batch(trainers[0], with_anomalies=False)
    (a, _, terms), (b, loss, others) = (forward(t, batch) for t in trainers)
    assert unequal_terms(terms, others, rounding=1e-5) == {"anomaly", "deviation"}
    assert a.anomaly and not b.anomaly and others["anomaly"] == 0
    assert b.deviation is not None
    b.deviation.retain_grad()
    loss.backward()
    gradient = b.deviation.grad
    assert gradient is not None and gradient[:, :2].any() and not gradient[:, 2].any()  # the pancreas


# ---------------------------------------------------------------------------------------------------- resume
def resumable(seed: int, monkeypatch: pytest.MonkeyPatch) -> ZePTTrainer:
    """Five epochs, the first two of them in stage I, that save every epoch and plot nothing."""
    torch.manual_seed(seed)
    trainer = with_settings(ZePTTrainer_5epochs, stage_one_share=0.4, **NARROW)
    build(trainer)
    trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
    trainer.was_initialized = True
    monkeypatch.setattr(trainer.logger, "plot_progress_png", lambda folder: None)
    return trainer


def run_epoch(trainer: ZePTTrainer, batch: dict[str, Any]) -> None:
    """As nnU-Net's run_training does it; the noise is that of the epoch."""
    torch.manual_seed(100 + trainer.current_epoch)
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    trainer.on_train_epoch_end([trainer.train_step(batch)])
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        trainer.on_validation_epoch_end([trainer.validation_step(batch)])
    trainer.on_epoch_end()


def moments(trainer: ZePTTrainer) -> dict[str, torch.Tensor]:
    """Adam's first moment of each parameter that has one."""
    state = trainer.optimizer.state
    return {n: state[p]["exp_avg"] for n, p in trainer.network.named_parameters() if p in state}


@pytest.mark.parametrize(("stop", "stages"), [(1, [1, 1]), (2, [1, 1, 2]), (3, [1, 1, 2, 2])])
def test_a_resumed_training_goes_on_as_the_one_that_never_stopped(
    results: Path, monkeypatch: pytest.MonkeyPatch, stop: int, stages: list[int]
) -> None:
    """Within stage I, at the hand-over, and within stage II: the next weights are the same in every bit."""
    straight, resumed = resumable(0, monkeypatch), resumable(1, monkeypatch)
    batch = make_batch(straight)
    for _ in range(stop):
        run_epoch(straight, batch)
    resumed.load_checkpoint(str(Path(straight.output_folder) / "checkpoint_latest.pth"))
    assert resumed.current_epoch == stop
    network = resumed._zept()
    advanced = {id(p) for p in network.stage_two_parameters()}
    of_stage_two = {n for n, p in network.named_parameters() if id(p) in advanced}
    everything = {n for n, _ in network.named_parameters()}
    assert set(moments(resumed)) == (everything - of_stage_two if stop < 3 else everything)
    for trainer in (straight, resumed):
        run_epoch(trainer, batch)
        logged = trainer.logger.local_logger.my_fantastic_logging
        assert logged["stage"] == stages and trainer._zept().stage == stages[-1]
    assert set(moments(resumed)) == (everything - of_stage_two if stages[-1] == 1 else everything)
    for mine, theirs in ((straight.network.state_dict(), resumed.network.state_dict()),
                         (moments(straight), moments(resumed))):  # fmt: skip
        assert mine.keys() == theirs.keys()
        assert {n for n, value in mine.items() if not torch.equal(value, theirs[n])} == set()
    a, b = (t.logger.local_logger.my_fantastic_logging for t in (straight, resumed))
    for key in set(a) - {"epoch_start_timestamps", "epoch_end_timestamps"}:
        np.testing.assert_array_equal(a[key], b[key])


def test_stage_one_leaves_the_learned_queries_of_tumors_where_they_are(results: Path) -> None:
    """They are rows of one table with the organs', which stage I trains."""
    trainer = with_settings(ZePTTrainer_5epochs, queries="learned", **NARROW)
    build(trainer)
    trainer.optimizer, _ = trainer.configure_optimizers()
    table = trainer._zept().get_parameter("decoder.seg_layers.queries")
    before = table.detach().clone()
    trainer.train_step(make_batch(trainer))
    assert trainer._zept().stage == 1 and table.shape[0] == 3 + 2 + 1
    assert (table[:3] != before[:3]).any(1).all() and torch.equal(table[3:], before[3:])


def count(dice: tuple[float, ...]) -> dict[str, Any]:
    """A validation step whose five classes have these Dice."""
    tp = np.round(100 * np.array(dice))
    return {"loss": np.array(1.0), "tp_hard": tp, "fp_hard": 100 - tp, "fn_hard": 100 - tp}


@pytest.mark.parametrize("resumed_before", [None, 2, 3])
def test_the_moving_average_of_the_pseudo_dice_starts_again_with_stage_two(
    results: Path, monkeypatch: pytest.MonkeyPatch, resumed_before: int | None
) -> None:
    """Tumors count from there on: an average, and a best one, of organs alone would keep checkpoint_best in stage I."""
    organs_alone, both = (0.8, 0.8, 0.8, 0.0, 0.0), (0.5, 0.5, 0.5, 0.1, 0.1)
    dice = [organs_alone, (0.7, 0.7, 0.7, 0.0, 0.0), both, (0.6, 0.6, 0.6, 0.1, 0.1), (0.1,) * 5]
    zeros = {term: np.array(0.0) for term in ("loss", *TERMS)}
    trainer, best = resumable(0, monkeypatch), []
    for epoch in range(5):
        if epoch == resumed_before:
            folder = trainer.output_folder
            trainer = resumable(1, monkeypatch)
            trainer.load_checkpoint(str(Path(folder) / "checkpoint_latest.pth"))
        monkeypatch.setattr(trainer, "train_step", lambda batch: zeros)
        monkeypatch.setattr(trainer, "validation_step", lambda batch, of=dice[epoch]: count(of))
        run_epoch(trainer, {})
        checkpoint = torch.load(Path(trainer.output_folder) / "checkpoint_best.pth", weights_only=False)
        best.append(checkpoint["current_epoch"] - 1)
    logged = trainer.logger.local_logger.my_fantastic_logging
    assert logged["mean_fg_dice"] == pytest.approx([0.8, 0.7, 0.34, 0.4, 0.1])
    ema = [0.8, 0.79, 0.34, 0.9 * 0.34 + 0.1 * 0.4, 0.9 * (0.9 * 0.34 + 0.1 * 0.4) + 0.1 * 0.1]
    assert logged["ema_fg_dice"] == pytest.approx(ema)
    assert best == [0, 0, 2, 3, 3]
