"""The small functions between the maps, at ±10,000 log-odds, in half precision, with organs of one voxel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests.network.narrow import narrow_block
from tests.network.test_numerics import HALF, assert_finite, autocast
from tests.small_plans import make_network
from zept_nnunet.network.heads import at_thresholds
from zept_nnunet.network.logits import LOGIT_LIMIT, conjunction, less_certain
from zept_nnunet.network.pooling import highest_nearby
from zept_nnunet.network.query_decoder import MaskHead
from zept_nnunet.network.relative import RelativeFeatures, RelativeHead
from zept_nnunet.network.self_prompting import shrink_to
from zept_nnunet.network.zept import deviation, inside_hosts
from zept_nnunet.plans_block import add_tumor_to_block

TYPES = (torch.float32, *HALF)
ERROR = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
LARGE = 1e4
INPUTS = (torch.float32, torch.float16)
"""Of features: what a decoder gives without autocast, and under it."""


# ---------------------------------------------------------------------------------------------------- deviation
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("logit", [-LARGE, LARGE])
def test_thirty_hosts_that_all_say_the_same(logit: float, dtype: torch.dtype) -> None:
    """Their sum is beyond what float16 can hold."""
    organs = 30
    unlike = torch.full((1, organs, 4), logit, dtype=dtype).requires_grad_()
    support = torch.tensor([-LARGE, -1.0, 1.0, LARGE]).expand(1, organs, 4)
    hosts: tuple[tuple[int, ...], ...] = (tuple(range(organs)), (), (3,))
    of_all, of_body, of_one = inside_hosts(support, unlike, hosts)
    assert of_body is None and of_all is not None and of_one is not None
    assert_finite((of_all, of_one))
    share = torch.tensor([0.0, *torch.tensor([-1.0, 1.0]).sigmoid().tolist(), 1.0])
    torch.testing.assert_close(of_all[0].float(), organs * logit * share, rtol=1e-2, atol=0)
    torch.testing.assert_close(of_one[0].float(), logit * share, rtol=1e-2, atol=0)
    assert_finite(torch.autograd.grad(conjunction(support[:, 0].to(of_all.dtype), of_all).float().sum(), unlike))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("logit", [-LARGE, LARGE])
@torch.no_grad()
def test_maps_of_tumors_in_thirty_hosts(logit: float, dtype: torch.dtype) -> None:
    """Of one that training knows, and of one that was added: their evidence counts in different ways."""
    organs = {f"organ {i}": i for i in range(1, 31)}
    block = narrow_block({"background": 0, **organs, "tumor": 31}, tumors={"tumor": {"hosts": [*organs]}})
    network = make_network(2, block=add_tumor_to_block(block, "other tumor", tuple(organs), 32))
    assert [len(h) for h in network.hosts] == [30, 30] and network.added == {1}
    support = torch.tensor([-LARGE, -1.0, 1.0, LARGE], dtype=dtype).expand(1, 30, 4, 4)
    head = network.tumor_heads[-1]
    assert isinstance(head, MaskHead)
    features = [torch.randn(1, head.project.out_features, 4, 4).to(dtype)] * 3
    args = torch.randn(1, 2, 16), network.hosts, features, -1, support, support, torch.full_like(support, logit)
    with autocast(None if dtype == torch.float32 else dtype):
        for floor in (None, 4.0):
            maps, _ = network._tumor_maps(*args, floor=floor)
            assert_finite(maps)
            assert maps.shape == (1, 2, 4, 4)
            assert ((maps[..., 2:] > 0) == (logit > 0)).all()  # where all organs are


@pytest.mark.parametrize("dtype", HALF)
def test_many_small_hosts_add_up_in_half_precision(dtype: torch.dtype) -> None:
    unlike = torch.full((1, 31, 3), 0.5, dtype=dtype)
    unlike[:, 0] = 512.0  # beside which a half is lost one at a time in bfloat16
    (total,) = inside_hosts(torch.full((1, 31, 3), 30.0), unlike, (tuple(range(31)),))
    assert total is not None
    torch.testing.assert_close(total.float(), torch.full((1, 3), 527.0), rtol=4e-3, atol=0)


@pytest.mark.parametrize("dtype", TYPES)
def test_deviation_never_exceeds_support_or_evidence(dtype: torch.dtype) -> None:
    values = torch.tensor([-LARGE, -50.0, -1.0, 0.0, 1.0, 50.0, LARGE])
    support, unlike = (m.flatten()[None, None] for m in torch.meshgrid(values, values, indexing="ij"))
    found = deviation(support, unlike.to(dtype).requires_grad_())
    assert_finite(found)
    # half precision loses digits of the smaller one to the larger one
    error = torch.maximum(support.abs(), unlike.abs()).clamp_min(1) * ERROR[dtype]
    assert (found.float() <= torch.minimum(support, unlike) + error).all()


# ---------------------------------------------------------------------------------------------------- certainty
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("floor", [0.0, 4.0, LARGE])
def test_less_certain_keeps_the_order_of_all_logits(floor: float, dtype: torch.dtype) -> None:
    z = torch.cat((torch.linspace(-LARGE, LARGE, 4001), torch.linspace(-20, 20, 4001))).sort().values.to(dtype)
    low = less_certain(z, floor)
    assert low.dtype == dtype
    assert_finite(low)
    assert (low.diff() >= 0).all() and (low >= z).all()
    assert torch.equal(low[z >= -floor], z[z >= -floor])
    below = z < -floor
    wanted = -floor - (1 + (-floor - z[below].double())).log()
    torch.testing.assert_close(low[below].double(), wanted, rtol=2e-2, atol=1e-4)
    assert not below.any() or low[below].unique().numel() > 50  # an order, in any precision


@pytest.mark.parametrize("dtype", TYPES)
def test_less_certain_of_infinity_is_no_nan(dtype: torch.dtype) -> None:
    z = torch.tensor([-math.inf, math.inf], dtype=dtype)
    assert less_certain(z, 4.0).tolist() == z.tolist()


# ---------------------------------------------------------------------------------------------------- neighbors
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 5), (1, 1, 1), (2, 1, 4), (3, 4, 5)])
def test_highest_nearby_is_that_of_a_loop_and_leaves_its_input(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(2, 3, *shape) * 3).to(dtype)
    x.view(-1)[::7], x.view(-1)[3::11] = LARGE, -LARGE
    before = x.clone()
    found = highest_nearby(x)
    assert torch.equal(x, before) and found.dtype == dtype
    for place in np.ndindex(*shape):
        box = x
        for axis, p in enumerate(place, start=2):
            box = box.narrow(axis, max(0, p - 1), min(p + 2, x.shape[axis]) - max(0, p - 1))
        at_place = found.flatten(2)[..., np.ravel_multi_index(place, shape)]
        assert torch.equal(at_place, box.flatten(2).amax(-1))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 5), (1, 2, 3), (7, 5, 4)])
@pytest.mark.parametrize("dtype", TYPES)
def test_shrink_to_loses_no_maximum_at_odd_sizes(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    score = torch.full((2, 3, *(7, 5, 4)[: len(size)]), -LARGE, dtype=dtype)
    assert torch.equal(shrink_to(score, size), torch.full((2, 3, *size), -LARGE, dtype=dtype))
    score.view(2, 3, -1)[:, 1, 9] = LARGE
    score.view(2, 3, -1)[:, 2] = torch.randn(2, score[0, 0].numel()).to(dtype)
    coarse = shrink_to(score, size)
    assert coarse.dtype == dtype and coarse.shape[2:] == size
    assert torch.equal(coarse.flatten(2).amax(-1), score.flatten(2).amax(-1))
    assert (coarse[:, 1] == LARGE).flatten(1).any(1).all() and (coarse[:, 0] == -LARGE).all()
    if size == score.shape[2:]:
        assert torch.equal(coarse, score)


# ---------------------------------------------------------------------------------------------------- thresholds
def decode(organs: torch.Tensor, tumors: torch.Tensor) -> torch.Tensor:
    """As nnU-Net does, of logits within the limit."""
    maps = torch.cat((torch.zeros_like(organs[:, :1]), organs, tumors), 1)
    return maps.clamp(-LOGIT_LIMIT, LOGIT_LIMIT).argmax(1)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("threshold", [0.0, 1.0, -LOGIT_LIMIT, LOGIT_LIMIT])
def test_thresholds_at_their_limits(threshold: float, dtype: torch.dtype) -> None:
    """In logits: 0 and 1, and the lowest and the highest that a score can have."""
    values = (-LARGE, -LOGIT_LIMIT, -1.0, 0.0, 1.0, LOGIT_LIMIT, LARGE)
    pairs = torch.tensor(list(itertools.product(values, values)), dtype=dtype)
    organs, tumors = pairs[:, 0].view(1, 1, -1), pairs[:, 1].view(1, 1, -1)
    hosts: tuple[Sequence[int], ...]
    for hosts in (((0,),), ((),)):
        healthy, margin = at_thresholds(organs, tumors, hosts, [threshold])
        assert healthy.dtype == margin.dtype == dtype
        assert_finite((healthy, margin))
        assert torch.equal(margin > 0, tumors > threshold)
        wanted = torch.where(tumors > threshold, 2, (organs > 0).long())[0]
        is_decided = (tumors != threshold)[0]
        assert torch.equal(decode(healthy, margin)[is_decided], wanted[is_decided])
        assert not (decode(healthy, margin)[~is_decided] == 2).any()


def test_a_threshold_of_zero_is_not_the_same_as_none() -> None:
    """The tumor wins against its host from 0 on, where without a threshold the stronger of both does."""
    organs, tumors = torch.tensor([[[5.0]]]), torch.tensor([[[1.0]]])
    assert decode(*at_thresholds(organs, tumors, ((0,),), [None])).item() == 1
    assert decode(*at_thresholds(organs, tumors, ((0,),), [0.0])).item() == 2


# ---------------------------------------------------------------------------------------------------- relative features
SIZES = ((8, 12), (8, 12, 10))
KINDS = ("absent", "one voxel", "constant", "one voxel of a constant", "patch of huge values")


def patch(kind: str, size: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Image (2, 1, *) and support of two organs (2, 2, *); the second one is ordinary."""
    torch.manual_seed(0)
    x, support = torch.randn(2, 1, *size), torch.full((2, 2, *size), -LARGE)
    support[:, 1, 4:] = LARGE
    if kind.startswith("one voxel"):
        support.view(2, 2, -1)[:, 0, 3] = LARGE
    if kind == "constant":
        support[:, 0, :4] = LARGE
    if kind.endswith("constant"):
        x[:, :, :4] = 0.7
    if kind == "patch of huge values":
        x, support[:, 0, :4] = x * LARGE, LARGE
    return x, support


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pooling", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_relative_features_are_float32s_under_autocast(kind: str, pooling: int, size: tuple[int, ...]) -> None:
    x, support = patch(kind, size)
    features = torch.randn(2, 4, *size).half().float()  # what float16 can hold
    relative = RelativeFeatures(2, 4, pooling=pooling, query_width=6)
    assert relative.population_of is not None
    torch.nn.init.normal_(relative.population_of.weight)
    queries = torch.randn(2, 2, 6)
    wanted = relative(x, features, support, queries)
    assert_finite(wanted)
    for dtype, inputs in itertools.product(HALF, INPUTS):
        with autocast(dtype):
            found = relative(x, features.to(inputs), support, queries)
        assert found.dtype == torch.float32 and torch.equal(found, wanted)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", KINDS)
def test_relative_head_and_its_gradients_under_autocast(kind: str, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    x, support = patch(kind, size)
    features = torch.randn(2, 4, *size)
    head = RelativeHead(RelativeFeatures(2, 4))
    results = []
    for wanted in (None, dtype):
        head.zero_grad()
        f = features.clone().to(wanted or torch.float32).requires_grad_()
        with autocast(wanted):
            logits = head(x, f, support)
        logits.float().square().mean().backward()
        gradients = {n: p.grad.clone() for n, p in head.named_parameters() if p.grad is not None}
        assert len(gradients) == len(list(head.parameters())) and f.grad is not None
        assert_finite((logits, gradients, f.grad))
        results.append(logits.detach().float())
    torch.testing.assert_close(results[1], results[0], rtol=0.05, atol=0.05)
    if kind == "absent":
        assert not results[0][:, 0].any()


@pytest.mark.parametrize("dtype", [None, *HALF])
@pytest.mark.parametrize("size", SIZES)
def test_an_organ_of_one_voxel_is_measured_by_what_organs_are_like(
    size: tuple[int, ...], dtype: torch.dtype | None
) -> None:
    """Its own voxel counts 1 of 65; of nothing else in the patch it depends."""
    relative = RelativeFeatures(0, 1, pooling=1, prior_voxels=64.0, noise=0.1)
    x, support = patch("one voxel", size)
    x.view(2, -1)[:, 3] = 2.0
    zero = torch.zeros(2, 1, *size)
    with autocast(dtype):
        r = relative(x, zero, support)
        x.view(2, -1)[:, 4:] = -5.0
        other = relative(x, zero, support)
    own = r.flatten(3)[:, 0, :3, 3]
    sigma = math.exp(0.5 * (1 / 65 * math.log(0.01) + 64 / 65 * math.log(1.01)))
    torch.testing.assert_close(own, torch.full((2, 3), (2.0 - 2.0 / 65) / sigma), rtol=1e-2, atol=0)
    torch.testing.assert_close(other.flatten(3)[:, 0, :, 3], r.flatten(3)[:, 0, :, 3], rtol=0.02, atol=0.02)
    outside = r.flatten(3)[:, 0].clone()
    outside[..., 3] = 0
    assert not outside.any()


@pytest.mark.parametrize("dtype", [None, *HALF])
@pytest.mark.parametrize("size", SIZES)
def test_a_constant_organ_deviates_from_itself_nowhere(size: tuple[int, ...], dtype: torch.dtype | None) -> None:
    relative = RelativeFeatures(0, 1, pooling=1, prior_voxels=1e-6, noise=0.1)
    x, support = patch("constant", size)
    with autocast(dtype):
        r = relative(x, torch.zeros(2, 1, *size), support)
    assert r[:, 0, :6].abs().max() < 1e-3 and r[:, 1, :3].abs().max() > 1
