"""No NaN and no Inf, in outputs, loss and gradients, where a patch, a target or a number is extreme."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from tests.network.narrow import TWO_KIDNEYS, narrow_block, randomize
from tests.network.test_properties import make
from tests.small_plans import make_network, make_plans
from zept_nnunet.losses import ZePTLoss
from zept_nnunet.losses.alignment import published_alignment, query_positives, query_to_knowledge, query_to_query
from zept_nnunet.network.grouping import assign
from zept_nnunet.network.logits import LOGIT_LIMIT, conjunction, union
from zept_nnunet.network.self_prompting import calibrated_prompts, calibrated_score, minmax_prompts, minmax_score
from zept_nnunet.network.zept import ZePT, ZePTOutput
from zept_nnunet.plans_block import add_tumor_to_block
from zept_nnunet.training.targets import Targets, anomaly_labels, make_targets

VARIANTS = ("zept", "paper")
HALF = (torch.bfloat16, torch.float16)
IGNORE = 7


def flat(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of nested lists, dicts and named tuples, by a name."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if value is None:
        return {}
    items = value._asdict() if hasattr(value, "_asdict") else value
    pairs = items.items() if isinstance(items, dict) else enumerate(items)
    return {n: t for key, v in pairs for n, t in flat(v, f"{name}.{key}").items()}


def assert_finite(value: Any) -> None:
    assert [name for name, tensor in flat(value).items() if not torch.isfinite(tensor).all()] == []


def autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


def targets_for(network: ZePT, output: ZePTOutput, label_map: torch.Tensor, anomalies: dict[int, int]) -> list[Targets]:
    """Of every scale, from the finest label map (B, 1, *)."""
    maps = [F.interpolate(label_map.float(), m.shape[2:], mode="nearest") for m in output.support]
    return [make_targets(m, network.taxonomy, anomalies=anomalies) for m in maps]


def train_and_predict(
    network: ZePT, image: torch.Tensor, label: int | None = None, dtype: torch.dtype | None = None
) -> None:
    """A training step and a prediction, all finite; `label` fills the target, None draws it."""
    block_anomalies = [network.taxonomy.organs[i].name for (i,) in network.anomaly_hosts]
    anomalies = anomaly_labels(network.taxonomy, block_anomalies)
    values = torch.tensor([0, *(c.label for c in network.taxonomy.classes), *anomalies.values()])
    shape = (image.shape[0], 1, *image.shape[2:])
    label_map = values[torch.randint(0, len(values), shape)] if label is None else torch.full(shape, label)
    is_annotated = torch.ones(len(image), network.num_organs + network.num_tumors, dtype=torch.bool)
    network.train()
    for stage in (1, 2):
        network.stage = stage
        network.zero_grad()
        with autocast(dtype):
            output = network(image)
            total, terms = ZePTLoss(network, batch_dice=True)(
                output, targets_for(network, output, label_map, anomalies), is_annotated
            )
        total.backward()
        assert_finite((output, total, terms, {n: p.grad for n, p in network.named_parameters()}))
    network.eval()
    network.decoder.deep_supervision = False
    with torch.no_grad(), autocast(dtype):
        assert_finite((network(image), network.forward_scores(image)))
    network.decoder.deep_supervision = True


# ---------------------------------------------------------------------------------------------------- patches
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_constant_patch_air_and_a_patch_of_huge_values(dimensions: int, image: torch.Tensor, variant: str) -> None:
    network = randomize(make_network(dimensions, block=narrow_block(variant=variant)))
    for patch in (torch.full_like(image, 0.7), torch.full_like(image, -1e3), 1e4 * image):
        train_and_predict(network, patch)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_target_of_nothing_of_one_class_and_of_ignored_voxels(
    dimensions: int, image: torch.Tensor, variant: str
) -> None:
    block = narrow_block({**TWO_KIDNEYS, "ignore": IGNORE}, variant)
    network = randomize(make_network(dimensions, block=block))
    for label in (0, TWO_KIDNEYS["liver"], TWO_KIDNEYS["kidney tumor"], IGNORE):
        train_and_predict(network, image, label)


@dataclass(frozen=True)
class Geometry:
    patch: tuple[int, ...]
    strides: tuple[int, ...]  # of each stage but the first
    spacing: tuple[float, ...]


GEOMETRIES = {
    "thick slices": Geometry((7, 16, 24), (1, 2, 2), (5.0, 1.0, 1.0)),
    "odd axis": Geometry((5, 16, 40), (1, 2, 2), (1.0, 1.0, 1.0)),
    "few slices": Geometry((3, 16, 24), (1, 2, 2), (5.0, 1.0, 1.0)),
    "one slice": Geometry((1, 16, 24), (1, 2, 2), (5.0, 1.0, 1.0)),
    "two thin slices": Geometry((2, 16, 24), (1, 2, 2), (1.0, 1.0, 1.0)),
    "2d, odd axis": Geometry((9, 24), (1, 2), (1.0, 1.0)),
    "2d, long pixels": Geometry((5, 16), (1, 2), (4.0, 1.0)),
}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_odd_patches_and_anisotropic_strides(name: str, variant: str) -> None:
    geometry = GEOMETRIES[name]
    axes = len(geometry.patch)
    plans = make_plans(axes)
    (configuration,) = plans["configurations"].values()
    configuration |= {"patch_size": list(geometry.patch), "spacing": list(geometry.spacing)}
    flat_kernel = [1 if s == 1 else 3 for s in geometry.strides]
    configuration["architecture"]["arch_kwargs"] |= {
        "strides": [[1] * axes] + [list(geometry.strides)] * 3,
        "kernel_sizes": [flat_kernel] * 2 + [[3] * axes] * 2,
    }
    manager = PlansManager(plans)
    torch.manual_seed(0)
    network = ZePT(narrow_block(variant=variant), manager.get_configuration(next(iter(plans["configurations"]))), 1)
    image = torch.randn(1, 1, *geometry.patch)
    train_and_predict(randomize(network), image)
    maps = network(image).support
    assert maps[0].shape[2:] == image.shape[2:]


# ---------------------------------------------------------------------------------------------------- classes
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_organ_with_one_tumor_in_a_batch_of_one(dimensions: int, image: torch.Tensor, variant: str) -> None:
    block = narrow_block({"background": 0, "liver": 1, "liver tumor": 2}, variant)
    train_and_predict(randomize(make_network(dimensions, block=block)), image[:1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_104_organs_and_30_tumors(dimensions: int, variant: str) -> None:
    organs = {f"organ {i}": i for i in range(1, 105)}
    tumors = {f"tumor {k}": 104 + k for k in range(1, 31)}
    hosts = {name: {"hosts": [f"organ {k}" for k in range(1, i + 1)]} for i, name in enumerate(tumors, 1)}
    hosts["tumor 1"] = {"hosts": []}  # anywhere
    block = narrow_block({"background": 0, **organs, **tumors}, variant, 8, tumors=hosts)
    network = randomize(make_network(dimensions, block=block))
    assert (network.num_organs, network.num_tumors) == (104, 30)
    image = torch.randn(1, 1, *[16] * dimensions)
    train_and_predict(network, image)
    network.decoder.deep_supervision = False
    assert network(image).shape[1] == 135


# ---------------------------------------------------------------------------------------------------- precision
HALF_ON_CPU = [(axes, dtype) for dtype in HALF for axes in (2, 3)]


@pytest.mark.parametrize(("dimensions", "dtype"), HALF_ON_CPU)
def test_autocast(dimensions: int, image: torch.Tensor, dtype: torch.dtype) -> None:
    network = randomize(make_network(dimensions, block=narrow_block()))
    train_and_predict(network, image, dtype=dtype)
    train_and_predict(network, torch.full_like(image, -1e3), 0, dtype=dtype)


@pytest.mark.parametrize(("dimensions", "dtype"), HALF_ON_CPU)
def test_autocast_of_the_authors_network(dimensions: int, image: torch.Tensor, dtype: torch.dtype) -> None:
    network = randomize(make_network(dimensions, block=narrow_block(variant="paper")))
    train_and_predict(network, image, dtype=dtype)
    train_and_predict(network, torch.full_like(image, -1e3), 0, dtype=dtype)


def errors_of(network: ZePT, image: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Of each map under autocast, in standard deviations of the map in float32."""
    wanted = all_maps(network, image)
    with autocast(dtype):
        got = all_maps(network, image)
    assert got.keys() == wanted.keys()
    return {name: (got[name].float() - m).abs() / m.std() for name, m in wanted.items()}


@torch.no_grad()
def all_maps(network: ZePT, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of organs, tumors and abnormal tissue, at each scale of training; scores and channels of a prediction."""
    network.eval()
    network.decoder.deep_supervision = True
    fields = network(image)._asdict()
    network.decoder.deep_supervision = False
    maps = {name: fields[name] for name in ("support", "healthy", "tumor", "anomaly", "deviation")}
    return flat({**maps, "scores": network.forward_scores(image)})


@pytest.mark.parametrize(("dimensions", "dtype"), HALF_ON_CPU)
def test_maps_under_autocast_are_those_of_float32(
    dimensions: int, image: torch.Tensor, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 64 units of its last place, in the map's standard deviations, where each voxel's group is that of float32.

    Which one it is, rounding decides where two are about as likely: a voxel of the other group moves the group's query,
    and with it some of the maps. Half of the voxels keep within 16 units all the same.
    """
    network = randomize(make_network(dimensions, block=narrow_block()))
    unit = torch.finfo(dtype).eps
    medians = {name: error.median().item() for name, error in errors_of(network, image, dtype).items()}
    assert {name: error for name, error in medians.items() if error > 16 * unit} == {}

    groups: list[torch.Tensor] = []  # of the two passes in float32, then given to the two others
    again = iter(groups)

    def assign_once(scores: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            return next(again).to(scores.dtype)
        groups.append(assign(scores, *args, **kwargs))
        return groups[-1]

    monkeypatch.setattr("zept_nnunet.network.grouping.assign", assign_once)
    worst = {name: error.max().item() for name, error in errors_of(network, image, dtype).items()}
    assert len(groups) == 2 * network.num_grouping and next(again, None) is None
    assert {name: error for name, error in worst.items() if error > 64 * unit} == {}


@pytest.mark.parametrize(("dimensions", "dtype"), HALF_ON_CPU)
def test_an_added_tumor_under_autocast(dimensions: int, image: torch.Tensor, dtype: torch.dtype) -> None:
    """It leaves the others' maps as they were, to 32 units of the last place, in the map's standard deviations.

    Not to the bit, as nearly in float32: with another query, sums of the attention are taken in another order.
    """
    trained = narrow_block()
    trained["decoder"]["tumor_first"] = False  # or it would lower its host's channel
    before = make(dimensions, trained)
    after = make(dimensions, add_tumor_to_block(trained, "spleen tumor", ("spleen",), 7), before)
    with autocast(dtype):
        wanted, got = all_maps(before, image), all_maps(after, image)
    for name, mine in wanted.items():
        same_channels = got[name][:, : mine.shape[1]].float()
        tolerance = 32 * torch.finfo(dtype).eps * mine.float().std().item()
        torch.testing.assert_close(
            same_channels, mine.float(), rtol=0, atol=tolerance, msg=partial("{}: {}".format, name)
        )


@pytest.mark.parametrize("dtype", HALF)
def test_alignment_is_float32_under_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    embedding, knowledge = torch.randn(1, 4, 384), torch.randn(4, 384)
    positives, temperature = query_positives(((0,), (1,)), 2), torch.tensor(0.01)
    every = torch.ones(1, 4, dtype=torch.bool)

    def terms() -> list[float]:
        return [
            query_to_knowledge(embedding, knowledge, temperature, every).item(),
            query_to_query(embedding, positives, temperature, every).item(),
            published_alignment(embedding, knowledge, positives, temperature).item(),
        ]

    with autocast(dtype):
        half = terms()
    assert half == terms()


# ---------------------------------------------------------------------------------------------------- logits
@pytest.mark.parametrize(("dimensions", "dtype"), [(2, None), (3, None), *HALF_ON_CPU])
@pytest.mark.parametrize("blocked_by", ["no support", "healthy tissue"])
def test_a_fully_blocked_prompt(
    dimensions: int, image: torch.Tensor, blocked_by: str, dtype: torch.dtype | None
) -> None:
    """Logits of ±1e4: there is no anomaly, and either no host or nothing else."""
    network = randomize(make_network(dimensions, block=narrow_block()))
    assert network.relative is not None
    for name, p in network.named_parameters():
        if name.startswith(("support_heads.", "healthy_heads.")) and name.endswith("bias.bias"):
            is_hidden = blocked_by == "no support" and name.startswith("support_heads.")
            torch.nn.init.constant_(p, -1e4 if is_hidden else 1e4)
    torch.nn.init.constant_(network.relative.layers[-1].bias, -1e4)
    masks: list[torch.Tensor] = []
    network.advanced[0].register_forward_hook(lambda _, given, __: masks.append(given[2]))
    for x in (image, torch.zeros_like(image)):
        train_and_predict(network, x, dtype=dtype)
    assert masks and all(mask.all() for mask in masks)  # the whole patch, or the whole of the hosts


EXTREME = (-1e4, -50.0, 0.0, 50.0, 1e4)


def extremes(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs as maps (1, 3, V) of three organs."""
    values = torch.tensor(EXTREME, dtype=dtype)
    pairs = [m.flatten().expand(1, 3, -1).clone() for m in torch.meshgrid(values, values, indexing="ij")]
    pairs[0][:, 1], pairs[1][:, 2] = -1e4, 1e4
    return pairs[0].requires_grad_(), pairs[1].requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_logits_of_ten_thousand_through_scores_prompts_and_unions(dtype: torch.dtype) -> None:
    u, a = extremes(dtype)
    score, relative = calibrated_score(u, a), minmax_score(u)
    values = (conjunction(u, a), union(u), score, union(score), relative)
    assert_finite(values)
    assert_finite(torch.autograd.grad(torch.cat([v.float().flatten() for v in values]).sum(), (u, a)))
    for mask in (
        calibrated_prompts(u, score, ((0,), (0, 1, 2), (), (1,)), -1.4),
        minmax_prompts(relative, 2, 0.5),
    ):
        assert mask.any(-1).all()


def test_conjunction_and_union_of_ten_thousand_keep_their_meaning() -> None:
    u, a = (m.detach() for m in extremes(torch.float32))
    lower, higher = torch.minimum(u, a), torch.maximum(u, a)
    both, either = conjunction(u, a), union(torch.stack((u, a)), 0)
    is_product = higher < 0  # two small probabilities
    wanted = torch.where(is_product, lower + higher, lower)
    assert (both <= wanted + 1e-2).all() and (both >= wanted - 1.2).all()
    is_product = lower > 0  # two small complements
    wanted = torch.where(is_product, lower + higher, higher)
    assert (either >= wanted - 1e-2).all() and (either <= wanted + 1.2).all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_logits_of_ten_thousand_through_loss_and_channels(dimensions: int, logit: float, dtype: torch.dtype) -> None:
    network = make_network(dimensions, block=narrow_block())
    anomalies = anomaly_labels(network.taxonomy, ["spleen"])
    torch.manual_seed(0)
    output = network(torch.randn(2, 1, *(16, 24, 16)[:dimensions]))
    leaves = {
        name: [torch.full_like(m, logit, dtype=dtype).requires_grad_() for m in getattr(output, name)]
        for name in ("support", "healthy", "tumor", "anomaly")
    }
    assert output.deviation is not None
    deviation = torch.full_like(output.deviation, logit).requires_grad_()
    output = output._replace(**leaves, deviation=deviation)
    label_map = torch.randint(0, 8, (2, 1, *output.support[0].shape[2:]))
    targets = targets_for(network, output, label_map, anomalies)
    is_annotated = torch.ones(2, 6, dtype=torch.bool)
    total, terms = ZePTLoss(network, batch_dice=True)(output, targets, is_annotated)
    total.backward()
    assert_finite((total, terms, {f"{n}.{s}": m.grad for n, maps in leaves.items() for s, m in enumerate(maps)}))
    assert deviation.grad is not None and torch.isfinite(deviation.grad).all()
    logits = network.to_channels(leaves["healthy"][0], leaves["tumor"][0], network.thresholds)
    assert_finite(logits)
    assert logits.abs().max() == LOGIT_LIMIT


# ---------------------------------------------------------------------------------------------------- temperature
@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-3, 0.01, 1.0, 3.0, 1e30])
def test_alignment_is_the_one_at_the_bounds_beyond_them(temperature: float) -> None:
    torch.manual_seed(0)
    positives, knowledge = query_positives(((0,), (1, 2)), 3), F.normalize(torch.randn(5, 8), dim=-1)
    bound, every = torch.tensor(0.01 if temperature < 0.1 else 1.0), torch.ones(2, 5, dtype=torch.bool)
    for scale in (1e-20, 1.0, 1e4):
        embedding = (scale * torch.randn(2, 5, 8)).requires_grad_()
        tau = torch.tensor(temperature).requires_grad_()
        terms = (
            partial(query_to_knowledge, embedding, knowledge, is_shown=every),
            partial(query_to_query, embedding, positives, is_shown=every),
            partial(published_alignment, embedding, knowledge, positives),
        )
        for term in terms:
            loss = term(tau)
            assert_finite((loss, torch.autograd.grad(loss, (embedding, tau))))
            assert torch.equal(loss, term(bound))


@pytest.mark.parametrize("log_temperature", [-30.0, -4.605170, 0.0, 30.0])
def test_network_with_the_temperature_at_and_beyond_its_bounds(log_temperature: float) -> None:
    network = randomize(make_network(2, block=narrow_block()))
    torch.nn.init.constant_(network.log_temperature, log_temperature)
    train_and_predict(network, torch.randn(2, 1, 16, 24))
