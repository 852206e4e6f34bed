"""The vectorized network and losses against loops over queries and voxels."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest
import torch

from tests.network import reference
from tests.network.narrow import narrow_block, randomize
from tests.network.reference import array
from tests.small_plans import make_network
from zept_nnunet.losses.alignment import published_alignment, query_positives
from zept_nnunet.losses.segmentation import AnnotatedDiceBCE
from zept_nnunet.network.attention import Attention
from zept_nnunet.network.grouping import GroupingBlock, assign
from zept_nnunet.network.logits import conjunction, union
from zept_nnunet.network.query_decoder import MaskHead
from zept_nnunet.network.self_prompting import calibrated_prompts, calibrated_score, minmax_prompts, minmax_score
from zept_nnunet.network.zept import ZePT, ZePTOutput
from zept_nnunet.plans_block import add_tumor_to_block

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
def watch(module: torch.nn.Module, seen: list[Any], read: Callable[[tuple[Any, ...], Any], Any]) -> None:
    module.register_forward_hook(lambda _, given, returned: seen.append(read(given, returned)))


@pytest.fixture
def grown(dimensions: int) -> ZePT:
    """Two tumors of the training and one that was added; the kidneys share a tumor."""
    block = add_tumor_to_block(narrow_block(), "spleen tumor", ("spleen",), 7)
    block["decoder"]["score_in_maps"] = True
    return randomize(make_network(dimensions, block={**block, "anomalies": {}})).eval()


@torch.no_grad()
def test_every_map_of_the_network(grown: ZePT, image: torch.Tensor) -> None:
    features: list[list[torch.Tensor]] = []
    unlike: list[torch.Tensor] = []
    masks: list[torch.Tensor] = []
    watch(grown.decoder, features, lambda _, returned: returned)
    assert grown.relative is not None
    watch(grown.relative, unlike, lambda _, returned: returned)
    for layer in grown.advanced:
        watch(layer, masks, lambda given, _: given[2])
    grown.prompt_threshold = 1.0  # random maps are high somewhere in each coarse voxel
    output = grown(image)
    assert isinstance(output, ZePTOutput) and output.deviation is not None
    for b in range(2):
        grids = [tuple(f.shape[2:]) for f in features[0]]
        maps_of = [array(f[b].flatten(1)) for f in features[0]]
        wanted = reference.zept(grown, maps_of, array(unlike[0][b].flatten(1)), grids)
        for got, maps in (
            (output.support, wanted.support),
            (output.healthy, wanted.healthy),
            (output.tumor, wanted.tumor),
        ):
            for z, z_wanted in zip(got, reversed(maps), strict=True):
                equal(z[b].flatten(1), z_wanted)
        assert wanted.deviation is not None
        equal(output.deviation[b].flatten(1), wanted.deviation)
        equal(output.organ_embedding[b], wanted.organ_embedding)
        equal(output.tumor_embedding[b], wanted.tumor_embedding)
        for i, mask in enumerate(masks):
            prompt = wanted.prompts[i % len(wanted.prompts)]
            assert np.array_equal(mask[b].numpy(), prompt)
            assert prompt.any(1).all() and not prompt.all()


@torch.no_grad()
def test_every_map_of_the_authors_network(dimensions: int, image: torch.Tensor) -> None:
    network = randomize(make_network(dimensions, block=narrow_block(variant="paper"))).eval()
    features: list[list[torch.Tensor]] = []
    watch(network.decoder, features, lambda _, returned: returned)
    output = network(image)
    for b in range(2):
        wanted = reference.zept(network, [array(f[b].flatten(1)) for f in features[0]], None)
        equal(output.support[0][b].flatten(1), wanted.support[-1])
        equal(output.healthy[0][b].flatten(1), wanted.healthy[-1])
        equal(output.tumor[0][b].flatten(1), wanted.tumor[-1])
        equal(output.organ_embedding[b], wanted.organ_embedding)
        equal(output.tumor_embedding[b], wanted.tumor_embedding)


# ---------------------------------------------------------------------------------------------------- losses
@pytest.mark.parametrize("num_queries", [3, 5])  # stage I has organs alone
def test_published_alignment(num_queries: int) -> None:
    torch.manual_seed(0)
    embedding, knowledge = torch.randn(2, num_queries, 8), torch.randn(5, 8)
    positives = query_positives(((0,), (1, 2)), 3)
    got = published_alignment(embedding, knowledge, positives[:num_queries, :num_queries], torch.tensor(0.4))
    terms = [reference.published_alignment(array(e), array(knowledge), array(positives), 0.4) for e in embedding]
    equal(got, float(np.mean(terms)))


@pytest.mark.parametrize("with_ignore", [False, True])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_segmentation_of_annotated_classes(batch_dice: bool, with_ignore: bool) -> None:
    """BCE is a mean over the valid voxels of the cases that annotate a class, as in nnU-Net; Dice where asked for."""
    torch.manual_seed(0)
    logits, target = 3 * torch.randn(3, 4, 5, 4), torch.rand(3, 4, 5, 4) > 0.7
    is_annotated = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
    is_valid = torch.rand(3, 1, 5, 4) > 0.2 if with_ignore else None
    valid = np.ones((3, 5, 4), dtype=bool) if is_valid is None else is_valid[:, 0].numpy()
    total, pairs = 0.0, 0
    for c in range(4):
        cases = [b for b in range(3) if is_annotated[b, c]]
        if not cases:
            continue
        z, y = ([array(t[b, c])[valid[b]] for b in cases] for t in (logits, target))
        dice = [reference.soft_dice(z_case, y_case) for z_case, y_case in zip(z, y, strict=True)]
        if batch_dice:
            dice = [reference.soft_dice(np.concatenate(z), np.concatenate(y))]
        term = 1 - np.mean(dice) + reference.cross_entropy(np.concatenate(z), np.concatenate(y))
        total, pairs = total + len(cases) * term, pairs + len(cases)
    equal(AnnotatedDiceBCE(batch_dice)(logits, target, is_annotated, is_valid), total / pairs)


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
