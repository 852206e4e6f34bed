"""The vectorized network against loops over queries and voxels."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest
import torch

from tests.network import reference
from tests.network.narrow import TWO_KIDNEYS, narrow_block, randomize
from tests.network.reference import EVIDENCE_FLOOR, array
from tests.small_plans import DATASET_JSON, make_network
from zept_nnunet.network.attention import Attention
from zept_nnunet.network.grouping import GroupingBlock, assign
from zept_nnunet.network.logits import conjunction, union
from zept_nnunet.network.query_decoder import MaskHead
from zept_nnunet.network.self_prompting import calibrated_prompts, calibrated_score, minmax_prompts, minmax_score
from zept_nnunet.network.zept import ZePT, ZePTOutput
from zept_nnunet.plans_block import add_tumor_to_block, build_block

HOSTS = ((0,), (1, 2), ())


def equal(got: torch.Tensor, wanted: np.ndarray | float, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest value, or of 1."""
    np.testing.assert_allclose(array(got), wanted, rtol=0, atol=tolerance * max(1, np.abs(wanted).max()))


def gumbel(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The noise that `assign` draws after this seed."""
    torch.manual_seed(seed)
    return -np.log(-np.log(array(torch.rand(shape))))


# ---------------------------------------------------------------------------------------------------- parts
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("hard", [False, True])
def test_assignment(noisy: bool, hard: bool) -> None:
    scores = 2 * torch.randn(2, 5, 30, generator=torch.Generator().manual_seed(0))
    noise = gumbel(scores.shape, 7) if noisy else [None, None]
    torch.manual_seed(7)
    got = assign(scores, temperature=0.6, noisy=noisy, hard=hard)
    for b in range(2):
        equal(got[b], reference.assign(array(scores[b]), noise[b], 0.6, hard), 1e-6)


def test_grouping_in_training_adds_gumbel_noise() -> None:
    torch.manual_seed(1)
    block = GroupingBlock(8, 2)
    q, x = torch.randn(2, 4, 8), torch.randn(2, 15, 8)
    noise = gumbel((2, 4, 15), 3)
    torch.manual_seed(3)
    got = block(q, x)
    without = block.eval()(q, x)
    for b in range(2):
        equal(got[b], reference.grouping(block, array(q[b]), array(x[b]), noise[b]))
        equal(without[b], reference.grouping(block, array(q[b]), array(x[b])))
    assert (got - without).abs().max() > 1e-3


def test_masked_attention_of_several_heads() -> None:
    torch.manual_seed(0)
    layer = Attention(12, 3)
    q, x = torch.randn(2, 4, 12), torch.randn(2, 9, 12)
    masks = torch.rand(2, 4, 9) > 0.7
    masks[..., 0] |= ~masks.any(-1)
    for may_attend in (masks, None):
        got = layer(q, x, may_attend)
        for b in range(2):
            mask = None if may_attend is None else may_attend[b].numpy()
            equal(got[b], reference.attention(layer, array(q[b]), array(x[b]), mask))


@pytest.mark.parametrize("mask_shape", [None, (2, 5, 40), (1, 5, 40), (5, 40)])
def test_few_queries_attend_as_many_do(mask_shape: tuple[int, ...] | None) -> None:
    """The short way for few queries gives what the long way gives, and so do its gradients."""
    torch.manual_seed(0)
    attention = Attention(64, 4).double()
    q = torch.randn(2, 5, 64, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 40, 64, dtype=torch.float64, requires_grad=True)
    mask = None
    if mask_shape is not None:
        mask = torch.rand(mask_shape) > 0.5
        mask[..., 0] = True
    more = q.expand(2, 5, 64).repeat(1, 4, 1)  # the same queries four times: too many for the short way
    wide = None if mask is None else mask.repeat(*[1] * (mask.ndim - 2), 4, 1)
    results = []
    for out in (attention(q, x, mask), attention(more, x, wide)[:, :5]):
        gradients = torch.autograd.grad(out.square().sum(), (q, x, attention.to_v.weight, attention.to_k.weight))
        results.append((out, *gradients))
    for short, long in zip(*results, strict=True):
        torch.testing.assert_close(short, long, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scaled", [False, True])
def test_mask_head(scaled: bool) -> None:
    torch.manual_seed(0)
    head = MaskHead(8, 6, scaled)
    for p in head.parameters():
        torch.nn.init.normal_(p)
    q, features = torch.randn(2, 3, 8), torch.randn(2, 6, 4, 2, 3)
    got = head(q, features)
    assert got.shape == (2, 3, 4, 2, 3)
    for b in range(2):
        equal(got[b].flatten(1), reference.mask_head(head, array(q[b]), array(features[b].flatten(1))))


@pytest.mark.parametrize("spatial", [(7, 5), (5, 4, 3)])
def test_scores_and_prompts(spatial: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    support, healthy = 4 * torch.randn(3, 3, *spatial), 4 * torch.randn(3, 3, *spatial)
    support[1, 1:] = -5 - support[1, 1:].abs()  # neither kidney in sight
    healthy[2, 0] = support[2, 0].abs() + 2  # a healthy liver
    support[0] /= 40  # the authors' score spans 0 to 1 in a dull patch too
    score, minmax = calibrated_score(support, healthy), minmax_score(support)
    prompts = calibrated_prompts(support.flatten(2), score.flatten(2), HOSTS, -1.0)
    shared = minmax_prompts(minmax.flatten(2), 2, 0.6)
    for b in range(3):
        u, h = array(support[b].flatten(1)), array(healthy[b].flatten(1))
        equal(score[b].flatten(1), reference.calibrated_score(u, h))
        equal(minmax[b, 0].flatten(), reference.minmax_score(u))
        wanted = reference.calibrated_prompts(u, reference.calibrated_score(u, h), HOSTS, -1.0)
        assert np.array_equal(prompts[b].numpy(), wanted)
        assert np.array_equal(shared[b].numpy(), reference.minmax_prompts(reference.minmax_score(u), 2, 0.6))


def exact_log_odds(p: Decimal) -> float:
    return float(p.ln() - (1 - p).ln())


def exact_sigmoid(z: float) -> Decimal:
    return 1 / (1 + Decimal(-z).exp())


@pytest.mark.parametrize("combine", ["conjunction", "union"])
def test_log_odds_of_far_tails_equal_exact_arithmetic(combine: str) -> None:
    """Where p or 1 − p is below 1e-16, float64 probabilities say nothing."""
    values = torch.tensor([-90.0, -40.0, -17.0, -8.0, -0.5, 0.0, 3.0, 17.0, 40.0, 90.0])
    u, a = (g.flatten() for g in torch.meshgrid(values, values, indexing="ij"))
    with localcontext() as context:
        context.prec = 120
        both = [(exact_sigmoid(x), exact_sigmoid(y)) for x, y in zip(u.tolist(), a.tolist(), strict=True)]
        if combine == "conjunction":
            got, wanted = conjunction(u, a), [exact_log_odds(p * q) for p, q in both]
        else:
            got, wanted = union(torch.stack((u, a)), 0), [exact_log_odds(1 - (1 - p) * (1 - q)) for p, q in both]
    equal(got, np.array(wanted))


def test_reference_log_odds_equal_exact_arithmetic() -> None:
    rng = np.random.default_rng(0)
    with localcontext() as context:
        context.prec = 60
        for u, a in rng.normal(0, 8, (50, 2)).tolist():
            p, q = exact_sigmoid(u), exact_sigmoid(a)
            assert reference.conjunction(u, a) == pytest.approx(exact_log_odds(p * q), rel=1e-12, abs=1e-12)
            assert reference.union([u, a]) == pytest.approx(exact_log_odds(1 - (1 - p) * (1 - q)), rel=1e-12, abs=1e-12)


# ---------------------------------------------------------------------------------------------------- network
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "score in maps": {"score_in_maps": True},
    "learned queries": {"queries": "learned"},
    "no grouping": {"grouping": False},
    "no self-prompting": {"self_prompting": False},
    "no relative features": {"relative": False, "prompts": "organs"},
    "prompts from organ maps": {"prompts": "organs"},
    "gate of the voxel": {"gate": "voxel"},
    "patch-wise score": {"score_range": "patch", "prompts": "organs", "score_in_maps": True},
}
CASES = [(3, "score in maps"), *((2, name) for name in SETTINGS)]
LABELS = {**TWO_KIDNEYS, "spleen tumor": 7, "any tumor": 8}


def grow(dimensions: int, setting: str, deep_supervision: bool = True) -> ZePT:
    """Two tumors of the training, the kidneys' in both of them; one that was added, and one more that may lie anywhere
    in the body (unless queries are learned: it would have none).
    """
    block = narrow_block()
    block = {**block, "decoder": {**block["decoder"], **SETTINGS[setting]}}
    block = add_tumor_to_block(block, "spleen tumor", ("spleen",), 7)
    if setting != "learned queries":
        block = add_tumor_to_block(block, "any tumor", (), 8)
    network = randomize(make_network(dimensions, block=block, deep_supervision=deep_supervision)).eval()
    bias = network.tumor_heads[-1].bias
    assert isinstance(bias, torch.nn.Linear)
    torch.nn.init.constant_(bias.bias, -EVIDENCE_FLOOR)  # there is evidence on both sides
    if network.score_per_organ:
        network.prompt_threshold = 1.0  # random maps are high somewhere in each coarse voxel
    return network


@pytest.fixture
def patch(dimensions: int, image: torch.Tensor) -> torch.Tensor:
    """As small as the loops want it in 3D."""
    return image if dimensions == 2 else image[:, :, :8, :16, :8]


def watch(module: torch.nn.Module, read: Callable[[tuple[Any, ...], Any], Any]) -> list[Any]:
    seen: list[Any] = []
    module.register_forward_hook(lambda _, given, returned: seen.append(read(given, returned)))
    return seen


def compute(
    network: ZePT, image: torch.Tensor, features: list[torch.Tensor], case: int, is_training: bool = True
) -> reference.Maps:
    """By loops, for one case of the batch, from the U-Net's features."""
    maps = [array(f[case]) for f in features]
    return reference.zept(network, array(image[case]), maps, (1.0,) * (image.ndim - 2), is_training)


def equal_maps(network: ZePT, image: torch.Tensor) -> ZePTOutput:
    """All that training sees, and the prompts."""
    features = watch(network.decoder, lambda _, returned: returned)
    masks = [watch(layer, lambda given, _: given[2]) for layer in network.advanced]
    output = network(image)
    assert isinstance(output, ZePTOutput) and output.tumor
    advanced = output.tumor
    if output.anomaly:
        advanced = [torch.cat(maps, 1) for maps in zip(output.tumor, output.anomaly, strict=True)]
    for b in range(len(image)):
        wanted = compute(network, image, features[0], b)
        pairs = (output.support, wanted.support), (output.healthy, wanted.healthy), (advanced, wanted.tumor)
        for got, maps in pairs:
            for z, z_wanted in zip(got, list(reversed(maps))[: len(got)], strict=True):  # the authors': the finest
                equal(z[b].flatten(1), z_wanted)
        assert (output.deviation is None) == (wanted.deviation is None)
        if output.deviation is not None and wanted.deviation is not None:
            equal(output.deviation[b].flatten(1), wanted.deviation)
        equal(output.organ_embedding[b], wanted.organ_embedding)
        equal(output.tumor_embedding[b], wanted.tumor_embedding)
        for i, (mask,) in enumerate(masks):
            prompt = wanted.prompts[i % len(wanted.prompts)]
            assert (mask is None) == (prompt is None)
            if prompt is not None:
                assert np.array_equal(mask[b].numpy(), prompt)
                assert prompt.any(1).all() and not prompt.all()
    return output


@pytest.mark.parametrize(("dimensions", "setting"), CASES)
@torch.no_grad()
def test_every_map_of_the_network(dimensions: int, patch: torch.Tensor, setting: str) -> None:
    network = grow(dimensions, setting)
    output = equal_maps(network, patch)
    assert output.anomaly and len(output.tumor) == len(output.support) == 3


@pytest.mark.parametrize(
    ("dimensions", "changed"), [(3, {}), (2, {}), (2, {"score_in_maps": False}), (2, {"grouping": False})], ids=str
)
@torch.no_grad()
def test_every_map_of_the_authors_network(dimensions: int, patch: torch.Tensor, changed: dict[str, Any]) -> None:
    block = narrow_block(variant="paper")
    block = {**block, "decoder": {**block["decoder"], **changed}}
    equal_maps(randomize(make_network(dimensions, block=block)).eval(), patch)


def equal_scores(network: ZePT, image: torch.Tensor, labels: dict[str, Any], thresholds: dict[str, float]) -> None:
    """All that inference gives, of the last case."""
    features = watch(network.decoder, lambda _, returned: returned)
    got = network.forward_scores(image, with_prompts=True)
    equal(network(image)[-1], array(got["logits"][-1]), 1e-7)
    wanted = compute(network, image, features[0], -1, is_training=False)
    support, healthy, tumor = (maps[-1] for maps in (wanted.support, wanted.healthy, wanted.tumor))
    assert network.num_tumors == len(tumor)
    maps = {name: z[-1].flatten(1) for name, z in got.items()}
    equal(maps["support"], support)
    equal(maps["tumor_logits"], tumor)
    anomaly = wanted.score if wanted.deviation is None else wanted.deviation
    equal(maps["anomaly"], np.broadcast_to(anomaly, support.shape))
    equal(maps["logits"], reference.channels(labels, network.taxonomy, healthy, tumor, thresholds))
    grid, coarse = image.shape[2:], features[0][network.num_grouping - 1].shape[2:]
    for v, place in enumerate(np.ndindex(*grid)):
        of = tuple(i * m // n for i, n, m in zip(place, grid, coarse, strict=True))
        prompt = wanted.organ_prompts[:, np.ravel_multi_index(of, coarse)]
        assert np.array_equal(maps["prompts"][:, v], prompt)


@pytest.mark.parametrize(("dimensions", "setting"), CASES)
@torch.no_grad()
def test_every_score_of_a_prediction(
    dimensions: int, patch: torch.Tensor, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evidence against a tumor counts by its logarithm from 4 log-odds on; scores know no threshold, channels do."""
    network = grow(dimensions, setting, deep_supervision=False)
    names = [t.name for t in network.taxonomy.tumors]
    thresholds = {"kidney tumor": -3.0, names[-1]: 1.0}
    network.thresholds = [thresholds.get(name, 0.0) for name in names]
    labels = {name: value for name, value in LABELS.items() if value == 0 or value <= 4 or name in names}
    equal_scores(network, patch, labels, thresholds)
    found = network.forward_scores(patch)["tumor_logits"]
    monkeypatch.setattr("zept_nnunet.network.zept._EVIDENCE_FLOOR", 1e4)
    assert (found - network.forward_scores(patch)["tumor_logits"]).abs().max() > 0.1


@torch.no_grad()
def test_every_score_of_a_prediction_by_the_authors_network(dimensions: int, patch: torch.Tensor) -> None:
    block = narrow_block(variant="paper")
    network = randomize(make_network(dimensions, block=block, deep_supervision=False)).eval()
    equal_scores(network, patch, TWO_KIDNEYS, {})


@torch.no_grad()
def test_every_score_of_a_prediction_of_regions() -> None:
    labels = {"background": 0, "abdomen": [1, 2, 3], "liver": [1, 3], "spleen": 2, "liver tumor": 3}
    dataset = {**DATASET_JSON, "labels": labels, "regions_class_order": [1, 1, 2, 3]}
    block = build_block(dataset, settings={"width": 16, "heads": 4})
    network = randomize(make_network(2, block=block, deep_supervision=False)).eval()
    torch.manual_seed(0)
    equal_scores(network, torch.randn(2, 1, 16, 24), labels, {})
