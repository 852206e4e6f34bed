"""Of an added tumor the query's own term says where in its host, the deviation whether at all."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from tests.small_plans import DATASET_JSON, make_network
from zept_nnunet.network.logits import conjunction
from zept_nnunet.network.pooling import highest_nearby
from zept_nnunet.network.zept import ZePT, centered_on
from zept_nnunet.plans_block import add_tumor_to_block, build_block

PANCREAS, SPLEEN = 2, 1


def grown(dimensions: int, *hosts: str) -> ZePT:
    """With a tumor that was added to training's two; its index is 2."""
    block = add_tumor_to_block(build_block(deepcopy(DATASET_JSON)), "new tumor", hosts, 6)
    return make_network(dimensions, block=block).eval()


def tumor_maps(network: ZePT, image: Tensor, unlike: Tensor | None, support: Tensor, shift: float = 0.0) -> Tensor:
    features = network.decoder(network.encoder(image))
    queries = network._refine(image, features, network.hosts)
    assert queries.tumors is not None
    head = network.tumor_heads[-1]
    handle = head.register_forward_hook(lambda _, __, a: a + shift)
    maps, _ = network._tumor_maps(queries.tumors, network.hosts, features, -1, support, support, unlike)
    handle.remove()
    return maps


@pytest.fixture
def support(image: Tensor) -> Tensor:
    """Three organs: slabs along the first axis."""
    u = torch.full((2, 3, *image.shape[2:]), -6.0)
    for organ in range(3):
        u[:, organ, 4 * organ : 4 * organ + 4] = 5.0
    return u


def test_centered_on_equals_a_loop(image: Tensor, support: Tensor) -> None:
    a = torch.randn(2, *image.shape[2:]) + 3
    centered = centered_on(a, support[:, 0])
    for case in range(2):
        total = count = 0.0
        for voxel, u in zip(a[case].flatten().tolist(), support[case, 0].flatten().tolist(), strict=True):
            weight = (1 / (1 + torch.exp(torch.tensor(-u, dtype=torch.float64)).item())) ** 2
            total, count = total + weight * voxel, count + weight
        torch.testing.assert_close(centered[case], a[case] - total / (count + 64), rtol=0, atol=1e-5)


def test_a_host_out_of_sight_has_no_center() -> None:
    a = torch.randn(1, 6, 6) + 3
    assert torch.equal(centered_on(a, torch.full_like(a, -30.0)), a)


@torch.no_grad()
def test_the_map_of_an_added_tumor_equals_its_formula(dimensions: int, image: Tensor, support: Tensor) -> None:
    network = grown(dimensions, "spleen", "pancreas")
    unlike = torch.randn_like(support)
    found = tumor_maps(network, image, unlike, support)[:, 2]
    features = network.decoder(network.encoder(image))
    a = network.tumor_heads[-1](network._refine(image, features, network.hosts).tumors, features[-1])[:, 2]
    chance = 1 - (1 - support[:, SPLEEN].sigmoid()) * (1 - support[:, PANCREAS].sigmoid())
    evidence = centered_on(a, torch.logit(chance.double()).float())
    weight = torch.nn.functional.softplus(network.deviation_weight)
    evidence = evidence + weight * (unlike[:, SPLEEN] + unlike[:, PANCREAS])
    near = highest_nearby(support)
    near = 1 - (1 - near[:, SPLEEN].sigmoid()) * (1 - near[:, PANCREAS].sigmoid())
    wanted = conjunction(torch.logit(near.double()).float(), evidence)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)


@torch.no_grad()
def test_the_level_of_the_own_term_counts_for_a_trained_tumor_alone(
    dimensions: int, image: Tensor, support: Tensor
) -> None:
    network = grown(dimensions, "pancreas")
    unlike, lower = torch.randn_like(support), -20.0
    plain, shifted = (tumor_maps(network, image, unlike, support, shift) for shift in (0.0, lower))
    voxels = 4 * image[0, 0, 0].numel()  # of the slab
    left = lower * 64 / (voxels + 64)
    inside = support[:, PANCREAS] > 0
    difference = (shifted - plain)[:, 2][inside]
    assert (difference > left * 1.05).all()
    assert (shifted - plain)[:, SPLEEN][support[:, SPLEEN] > 0].max() < lower / 4


@torch.no_grad()
def test_without_relative_features_the_own_term_is_all_there_is(
    dimensions: int, image: Tensor, support: Tensor
) -> None:
    network = grown(dimensions, "pancreas")
    plain, shifted = (tumor_maps(network, image, None, support, shift)[:, 2] for shift in (0.0, -20.0))
    inside = support[:, PANCREAS] > 0
    assert ((shifted - plain)[inside] < -10).all()


@torch.no_grad()
def test_the_deviation_of_an_added_tumor_counts_to_the_edge_of_its_host(
    dimensions: int, image: Tensor, support: Tensor
) -> None:
    """Where the organ's map leaves a lesion on its surface out, in reach of the gate."""
    network = grown(dimensions, "pancreas")
    at = (0, PANCREAS, 7, *[5] * (dimensions - 1))  # next to the pancreas' slab, which begins at 8
    quiet = torch.zeros_like(support)
    loud = quiet.clone()
    loud[at] = 4.0
    found = [tumor_maps(network, image, unlike, support)[(0, 2, *at[2:])] for unlike in (quiet, loud)]
    assert found[1] - found[0] > 1.0
