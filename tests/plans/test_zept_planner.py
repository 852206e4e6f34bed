from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from tests.small_ct import write_demo_dataset
from tests.small_plans import DATASET_JSON, make_plans
from zept_nnunet.commands import plan as command
from zept_nnunet.errors import ZePTError
from zept_nnunet.losses import ZePTLoss
from zept_nnunet.network.relative import KEPT_PER_VOXEL, ORGANS_PER_CHUNK, VOXELS_AT_ONCE, pooling_of
from zept_nnunet.network.zept import ZePT
from zept_nnunet.plans.zept_planner import ZePTPlanner, decoder_voxels, query_feature_map_size
from zept_nnunet.plans_block import build_block, read_block
from zept_nnunet.taxonomy import Taxonomy
from zept_nnunet.training.targets import make_targets

DATASET_ID = 903


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A raw dataset with a fingerprint of many large cases, so that the budget and not the image sets the patch."""
    for variable in ("raw", "preprocessed", "results"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(f"nnUNet_{variable}", str(tmp_path / variable))
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    folder = write_demo_dataset(tmp_path / "raw", DATASET_ID, cases_train=5, cases_test=0, shape=(24, 32, 32))
    dataset_json = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(dataset_json | {"numTraining": 500}))
    preprocessed = tmp_path / "preprocessed" / folder.name
    preprocessed.mkdir()
    fingerprint = {
        "spacings": [[2.0, 1.0, 1.0]] * 5,
        "shapes_after_crop": [[96, 192, 192]] * 5,
        "foreground_intensity_properties_per_channel": {"0": {"mean": 0.0, "std": 1.0}},
        "median_relative_size_after_cropping": 1.0,
    }
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    return folder


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())
    return parser.parse_args(["plan", *argv])


def test_decoder_voxels_by_hand() -> None:
    assert decoder_voxels((16, 24, 8), [1, [1, 2, 2], 2, 2]) == [8 * 6 * 2, 16 * 12 * 4, 16 * 24 * 8]


def test_feature_map_size_by_hand() -> None:
    taxonomy = Taxonomy.from_dataset_json(DATASET_JSON)  # 3 organs, 2 tumors
    decoder = {"width": 10, "grouping_scales": 2, "advanced_layers": 3, "background_queries": 4, "relative": False}
    block = {"decoder": decoder, "anomalies": {}}
    # scales of 4, 16 and 64 voxels: 8 maps each; tokens at the first two, which get two and one advanced layers
    kept = 4 * ((2 + 4 + 4) * 10 + 3 * 7) + 16 * ((2 + 4 + 2) * 10 + 3 * 7)
    expected = 2 * 8 * (4 + 16 + 64) + kept / 2.5
    assert query_feature_map_size((8, 8), [1, 2, 2, 2], taxonomy, block) == int(expected)
    block = {"decoder": {**decoder, "relative": True}, "anomalies": {"abnormal spleen": "spleen"}}
    expected += 2 * (4 + 16 + 64 + 3 * 64)
    assert query_feature_map_size((8, 8), [1, 2, 2, 2], taxonomy, block) == int(expected)
    expected += 3 * (64 // 4) * KEPT_PER_VOXEL / 2.5
    assert query_feature_map_size((8, 8), [1, 2, 2, 2], taxonomy, block, pooled=4) == int(expected)


def test_the_relative_head_of_a_large_patch_is_counted_as_what_goes_through_at_once() -> None:
    block = build_block(many_classes(20, 0))
    taxonomy, patch, strides = Taxonomy.from_dict(block["taxonomy"]), (160, 160, 160), [1, 2, 2, 2]
    sizes = [query_feature_map_size(patch, strides, taxonomy, block, pooled) for pooled in (None, 8, 1)]
    assert sizes[1] - sizes[0] == pytest.approx(VOXELS_AT_ONCE * KEPT_PER_VOXEL / 2.5, abs=1)
    assert sizes[2] == sizes[1]


@pytest.mark.parametrize(("num_organs", "num_tumors"), [(4, 2), (20, 8)])
def test_estimate_is_near_what_autograd_keeps(num_organs: int, num_tumors: int) -> None:
    """Bytes kept for the backward pass, in units of the bytes that the stock network keeps per counted element."""
    patch = (32, 48, 48)
    plans = make_plans()
    configuration = plans["configurations"]["3d_fullres"]
    architecture = configuration["architecture"]
    architecture["arch_kwargs"] |= {
        "n_stages": 5,
        "features_per_stage": [32, 64, 128, 256, 320],
        "kernel_sizes": [[3] * 3] * 5,
        "strides": [[1] * 3] + [[2] * 3] * 4,
        "n_conv_per_stage": [2] * 5,
        "n_conv_per_stage_decoder": [2] * 4,
    }
    name, kwargs, imports = (architecture[k] for k in ("network_class_name", "arch_kwargs", "_kw_requires_import"))
    x = torch.randn(1, 1, *patch)
    stock = get_network_from_plans(name, kwargs, imports, 1, 1, deep_supervision=False)
    counted = ExperimentPlanner.static_estimate_VRAM_usage(patch, 1, 1, name, kwargs, imports)
    with _Kept() as kept:
        _ = stock(x).sum()
    bytes_per_element = kept.bytes / counted

    block = build_block(many_classes(num_organs, num_tumors))
    taxonomy = Taxonomy.from_dict(block["taxonomy"])
    network = ZePT(block, PlansManager(plans).get_configuration("3d_fullres"), 1)
    loss = ZePTLoss(network, batch_dice=True)
    maps = [torch.randint(0, 5, (1, 1, *(n // 2**s for n in patch))) for s in range(4)]
    with _Kept() as kept:
        output = network(x)
        annotated = torch.ones(1, num_organs + num_tumors, dtype=torch.bool)
        _ = loss(output, [make_targets(m, taxonomy) for m in maps], annotated)
    measured = kept.bytes / bytes_per_element
    # of many organs the head's activations are computed again, and autograd keeps none
    pooled = math.prod(pooling_of(configuration["spacing"])) if num_organs <= ORGANS_PER_CHUNK else None
    estimate = counted + query_feature_map_size(patch, kwargs["strides"], taxonomy, block, pooled)
    assert 0.85 < estimate / measured < 1.25


class _Kept:
    """Counts the bytes of the storages that autograd keeps."""

    def __enter__(self) -> _Kept:
        self._tensors: dict[int, torch.Tensor] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self._hooks.__enter__()
        return self

    def __exit__(self, *args: object) -> None:
        self._hooks.__exit__(*args)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self._tensors[tensor.untyped_storage().data_ptr()] = tensor.detach()  # alive, so that no address comes back
        return tensor

    @property
    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self._tensors.values())


def many_classes(num_organs: int, num_tumors: int) -> dict[str, Any]:
    """A dataset.json with that many classes."""
    organs = [f"part{chr(97 + i)}" for i in range(num_organs)]
    names = [*organs, *(f"{organ} tumor" for organ in organs[:num_tumors])]
    labels = {"background": 0, **{name: i for i, name in enumerate(names, 1)}}
    return {**DATASET_JSON, "labels": labels}


def plan(**kwargs: Any) -> dict[str, Any]:
    planner = ZePTPlanner(DATASET_ID, **kwargs)
    return planner.plan_experiment()


def test_query_decoder_takes_its_share_of_the_budget(dataset: Path) -> None:
    dataset_json = json.loads((dataset / "dataset.json").read_text())
    labels = many_classes(24, 8)["labels"]
    (dataset / "dataset.json").write_text(json.dumps(dataset_json | {"labels": labels, "zept": {}}))
    stock = ExperimentPlanner(DATASET_ID, plans_name="Stock").plan_experiment()
    ours = plan()
    for configuration in ("2d", "3d_fullres"):
        sizes = [
            int(np.prod(p["configurations"][configuration]["patch_size"]))
            * p["configurations"][configuration]["batch_size"]
            for p in (stock, ours)
        ]
        assert sizes[1] < sizes[0]
        assert sizes[1] > 0.3 * sizes[0]
        planned = ours["configurations"][configuration]
        architecture = planned["architecture"]
        planner = ZePTPlanner(DATASET_ID)
        planner._pooled = math.prod(pooling_of(planned["spacing"]))
        estimate = planner.static_estimate_VRAM_usage(
            planned["patch_size"],
            1,
            33,
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
        )
        reference, batch = (85_000_000, 12) if configuration == "2d" else (560_000_000, 2)
        assert estimate / batch * planned["batch_size"] <= 1.05 * reference  # nnU-Net rounds the batch size


def test_a_larger_budget_gives_a_larger_patch_or_batch(dataset: Path) -> None:
    small, large = (plan(gpu_memory_target_in_gb=g)["configurations"]["3d_fullres"] for g in (8, 24))
    assert np.prod(large["patch_size"]) * large["batch_size"] > np.prod(small["patch_size"]) * small["batch_size"]


def test_plans_hold_the_block_and_stock_classes_read_them(dataset: Path, tmp_path: Path) -> None:
    plan()
    path = tmp_path / "preprocessed" / dataset.name / "ZePTPlans.json"
    plans = json.loads(path.read_text())
    assert plans["plans_name"] == "ZePTPlans"
    dataset_json = json.loads((dataset / "dataset.json").read_text())
    expected = Taxonomy.from_dataset_json(dataset_json)
    assert Taxonomy.from_dict(read_block(plans)["taxonomy"]) == expected
    manager = PlansManager(str(path))
    assert set(manager.available_configurations) >= {"2d", "3d_fullres"}
    assert manager.get_configuration("3d_fullres").network_arch_class_name.endswith("PlainConvUNet")

    # a configuration of the user's survives planning again, and so does the block
    plans["configurations"]["mine"] = {"inherits_from": "3d_fullres", "batch_size": 4}
    path.write_text(json.dumps({k: v for k, v in plans.items() if k != "zept"}))
    plan()
    again = json.loads(path.read_text())
    assert again["configurations"]["mine"]["batch_size"] == 4
    assert again["zept"] == plans["zept"]


def test_small_plans_are_still_wrappable_by_the_estimate(dataset: Path) -> None:
    architecture = make_plans()["configurations"]["3d_fullres"]["architecture"]
    estimate = ZePTPlanner(DATASET_ID).static_estimate_VRAM_usage(
        (16, 24, 16), 1, 6, architecture["network_class_name"], architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
    )  # fmt: skip
    assert estimate > 0


def test_the_small_preset_has_fewer_channels_in_plans_of_its_own_name(dataset: Path, tmp_path: Path) -> None:
    assert command.run(parse("-d", str(DATASET_ID), "-pl", "ZePTSmallPlanner", "--no_pp", "--no_pbar")) == 0
    plans = json.loads((tmp_path / "preprocessed" / dataset.name / "ZePTSmallPlans.json").read_text())
    assert plans["plans_name"] == "ZePTSmallPlans" and read_block(plans)
    for configuration in ("2d", "3d_fullres"):
        kwargs = plans["configurations"][configuration]["architecture"]["arch_kwargs"]
        assert kwargs["features_per_stage"][:4] == [16, 32, 64, 128] and max(kwargs["features_per_stage"]) == 128
        assert kwargs["n_conv_per_stage"][:2] == [1, 2] and set(kwargs["n_conv_per_stage_decoder"]) == {1}


# ---------------------------------------------------------------------------------------------------- command line
def test_bad_datasets_are_refused_before_any_work(dataset: Path, tmp_path: Path) -> None:
    preprocessed = tmp_path / "preprocessed" / dataset.name
    before = sorted(p.name for p in preprocessed.iterdir())
    for argv, message in (
        (("-d", "904"), "904"),
        (("-d", str(DATASET_ID), "-c", "2d", "3d_fullres", "3d_lowres", "-np", "1", "2"), "-np wants"),
    ):
        args = parse(*argv)
        with pytest.raises(ZePTError, match=message):
            args.func(args)
    dataset_json = json.loads((dataset / "dataset.json").read_text())
    (dataset / "dataset.json").write_text(json.dumps(dataset_json | {"zept": {"tumours": {}}}))
    args = parse("-d", str(DATASET_ID))
    with pytest.raises(ZePTError, match=r"dataset\.json.*tumours"):
        args.func(args)
    (dataset / "dataset.json").write_text("{")
    with pytest.raises(ZePTError, match="no valid JSON"):
        args.func(args)
    assert sorted(p.name for p in preprocessed.iterdir()) == before


def test_missing_variable(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_preprocessed")
    args = parse("-d", str(DATASET_ID))
    with pytest.raises(ZePTError, match="nnUNet_preprocessed is not set"):
        args.func(args)
