"""What autograd keeps for the backward pass: for a class and voxel a few numbers, not one per query or feature
channel.

Measured in 2D as a mixed difference, (4N classes − N) × (2V voxels − V): what grows with classes alone (queries) or
with voxels alone (the U-Net, tokens) cancels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.network.narrow import narrow_block, randomize
from tests.small_plans import DATASET_JSON, make_network
from zept_nnunet.knowledge import KnowledgeBank
from zept_nnunet.losses import ZePTLoss
from zept_nnunet.network.zept import ZePT
from zept_nnunet.plans_block import own_parts
from zept_nnunet.taxonomy import Taxonomy
from zept_nnunet.training.targets import make_targets

FLOAT = 4  # bytes
SCALES = (1, 1 / 4, 1 / 16)  # voxels of each decoder scale, in those of the finest
GROUPING_SCALES = SCALES[1:]
PER_CONJUNCTION = 8  # maps that the conjunction of two may keep, of both and of what it computes
PER_LOSS = 3  # maps that Dice + BCE may keep for each that it judges
MANY = 16  # tumors, from which attention projects the tokens; with few it does not, and keeps less
WIDTHS = (16, 32)  # D; each is well above what a class may keep per voxel


def make(
    num_organs: int, num_tumors: int, width: int, variant: str = "zept", stage: int = 2, num_abnormal: int = 0
) -> ZePT:
    """Each tumor has one host; so many of the other organs have a query for abnormal tissue.

    Vectors are random: to encode the words of so many classes would take nearly all of the time.
    """
    organs = {f"organ {i}": i for i in range(1, num_organs + 1)}
    tumors = {f"tumor {k}": num_organs + k for k in range(1, num_tumors + 1)}
    hosts = {f"tumor {k}": {"hosts": [f"organ {k}"]} for k in range(1, num_tumors + 1)}
    labels = {"background": 0, **organs, **tumors}
    dataset_json = {**DATASET_JSON, "labels": labels, "zept": {"tumors": hosts}}
    decoder, training, anomalies = own_parts(dataset_json, variant, "dataset.json", {"width": width, "heads": 4})
    anomalies = dict(list(anomalies.items())[:num_abnormal])
    names = [*organs, *tumors, *anomalies]
    vectors = torch.randn(len(names), 32, generator=torch.Generator().manual_seed(0)).tolist()
    block = {
        "taxonomy": Taxonomy.from_dataset_json(dataset_json).to_dict(),
        "knowledge": KnowledgeBank("random", "0", 32, dict(zip(names, vectors, strict=True))).to_dict(),
        "decoder": decoder,
        "training": training,
        "anomalies": anomalies,
    }
    network = make_network(2, block=block).train()
    network.stage = stage
    assert len(network.anomaly_hosts) == num_abnormal
    return network


def kept_bytes(network: torch.nn.Module, run: Callable[[], object]) -> int:
    """Storages that `run` saves for the backward pass, each once, without parameters and buffers."""
    own = {p.untyped_storage().data_ptr() for p in (*network.parameters(), *network.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    assert result is not None  # alive until all is counted, so that no address is used twice
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


def per_class_and_voxel(count: Callable[[int, int], int], classes: int) -> float:
    """Numbers per class and finest voxel, from `count(classes, columns)` in bytes."""
    few, many, columns = classes, 4 * classes, 24
    mixed = count(many, 2 * columns) - count(few, 2 * columns) - count(many, columns) + count(few, columns)
    return mixed / (FLOAT * (many - few) * 16 * columns)


def organ_bytes(width: int, variant: str, stage: int, organs: int, columns: int) -> int:
    network, image = make(organs, 2, width, variant, stage), torch.randn(1, 1, 16, columns)
    return kept_bytes(network, lambda: network(image))


def tumor_bytes(width: int, tumors: int, columns: int) -> int:
    network, image = make(4 * MANY, tumors, width), torch.randn(1, 1, 16, columns)
    return kept_bytes(network, lambda: network(image))


@pytest.mark.parametrize("variant", ["zept", "paper"])
def test_stage_one_keeps_assignments_at_the_coarse_scales_and_nothing_at_the_finest(variant: str) -> None:
    slopes = [per_class_and_voxel(partial(organ_bytes, width, variant, 1), 9) for width in WIDTHS]
    soft_and_one_hot = 2 * sum(GROUPING_SCALES)
    region = {"zept": GROUPING_SCALES[0], "paper": 0}[variant]  # for the mean of its tokens
    assert slopes == pytest.approx([soft_and_one_hot + region] * 2)


def test_an_organ_keeps_its_maps_alone() -> None:
    """Support and healthy maps cost nothing here; the deviation, a conjunction at the finest scale, does."""
    slopes = [per_class_and_voxel(partial(organ_bytes, width, "zept", 2), 9) for width in WIDTHS]
    assert slopes[0] == pytest.approx(slopes[1])
    assert slopes[0] <= 2 * sum(GROUPING_SCALES) + GROUPING_SCALES[0] + PER_CONJUNCTION


def test_a_tumor_keeps_its_maps_alone() -> None:
    slopes = [per_class_and_voxel(partial(tumor_bytes, width), MANY) for width in WIDTHS]
    assert slopes[0] == pytest.approx(slopes[1])
    assert slopes[0] <= PER_CONJUNCTION * sum(SCALES)


def abnormal_bytes(width: int, abnormal: int, columns: int) -> int:
    network, image = make(4 * MANY + 2, 2, width, num_abnormal=abnormal), torch.randn(1, 1, 16, columns)
    return kept_bytes(network, lambda: network(image))


def test_a_query_for_abnormal_tissue_keeps_its_maps_alone() -> None:
    slopes = [per_class_and_voxel(partial(abnormal_bytes, width), MANY) for width in WIDTHS]
    assert slopes[0] == pytest.approx(slopes[1])
    assert 0 < slopes[0] <= PER_CONJUNCTION * sum(SCALES)


def loss_bytes(width: int, organs: int, columns: int) -> int:
    network = make(organs, 2, width)
    loss = ZePTLoss(network, batch_dice=True)
    output = network(torch.randn(1, 1, 16, columns))
    targets = [make_targets(torch.zeros(1, 1, *m.shape[2:]), network.taxonomy) for m in output.support]
    is_annotated = torch.ones(1, organs + 2, dtype=torch.bool)
    return kept_bytes(network, lambda: loss(output, targets, is_annotated))


def test_the_loss_keeps_an_organs_maps_alone() -> None:
    slopes = [per_class_and_voxel(partial(loss_bytes, width), 9) for width in WIDTHS]
    assert slopes[0] == pytest.approx(slopes[1])
    support_healthy_and_deviation = 2 * sum(SCALES) + 1
    assert slopes[0] <= PER_LOSS * support_healthy_and_deviation


def abnormal_loss_bytes(share: float, abnormal: int, columns: int) -> int:
    network = make(4 * MANY + 2, 2, WIDTHS[0], num_abnormal=abnormal)
    loss = ZePTLoss(network, batch_dice=True, unlabeled_host_weight=share)
    output = network(torch.randn(1, 1, 16, columns))
    targets = [make_targets(torch.zeros(1, 1, *m.shape[2:]), network.taxonomy) for m in output.support]
    is_annotated = torch.ones(1, network.num_organs + 2, dtype=torch.bool)
    return kept_bytes(network, lambda: loss(output, targets, is_annotated))


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_loss_keeps_the_maps_of_abnormal_tissue_alone(share: float) -> None:
    """Also where voxels have weights of their own: one more map for each that is judged."""
    slope = per_class_and_voxel(partial(abnormal_loss_bytes, share), MANY)
    judged = sum(SCALES) + 1  # its maps, and the deviation of its organ, which is judged where such a query is
    assert 0 < slope <= (PER_LOSS + (share < 1)) * judged


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, kept or not."""

    elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        returned = function(*args, **(kwargs or {}))
        for value in returned if isinstance(returned, tuple | list) else (returned,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return returned


@pytest.mark.parametrize("deep_supervision", [True, False])
@pytest.mark.parametrize("variant", ["zept", "paper"])
def test_no_operation_multiplies_classes_voxels_and_channels(variant: str, deep_supervision: bool) -> None:
    organs, columns = 72, 24
    network = make(organs, 2, WIDTHS[0], variant)
    network.decoder.deep_supervision = deep_supervision
    with Largest() as largest:
        network(torch.randn(1, 1, 16, columns))
    maps = organs * 16 * columns
    assert maps <= largest.elements <= 3 * maps  # three: 0, u and a of a conjunction


@pytest.mark.parametrize("variant", ["zept", "paper"])
@torch.no_grad()
def test_deep_supervision_on_and_off_load_the_same_weights(dimensions: int, image: torch.Tensor, variant: str) -> None:
    block = narrow_block(variant=variant)
    trained = randomize(make_network(dimensions, block=block)).eval()
    predictor = make_network(dimensions, block=block, deep_supervision=False, seed=1).eval()
    assert (predictor(image) - trained.forward_scores(image)["logits"]).abs().max() > 0.1
    predictor.load_state_dict(trained.state_dict())
    torch.testing.assert_close(predictor(image), trained.forward_scores(image)["logits"])
    again = make_network(dimensions, block=block, seed=2).eval()
    again.load_state_dict(predictor.state_dict())
    torch.testing.assert_close(again(image).support, trained(image).support)
