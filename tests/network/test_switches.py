"""Each ablation switch of the decoder changes what it names, and nothing else."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

from tests.small_plans import DATASET_JSON, make_network
from zept_nnunet.errors import ZePTError
from zept_nnunet.network.self_prompting import calibrated_prompts, calibrated_score, minmax_score
from zept_nnunet.network.zept import ZePT, ZePTOutput
from zept_nnunet.plans_block import add_tumor_to_block, build_block


def pair(dimensions: int, **settings: Any) -> tuple[ZePT, ZePT]:
    """The network as it is by default, and one that differs in the settings; equal weights where both have them."""
    default = make_network(dimensions).eval()
    other = make_network(dimensions, block=build_block(deepcopy(DATASET_JSON), settings=settings)).eval()
    weights = {k: v for k, v in default.state_dict().items() if "fingerprint" not in k}  # it holds the settings
    other.load_state_dict(weights, strict=False)
    return default, other


def outputs(networks: tuple[ZePT, ZePT], image: torch.Tensor) -> tuple[ZePTOutput, ZePTOutput]:
    with torch.no_grad():
        return networks[0](image), networks[1](image)


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def names(network: ZePT) -> set[str]:
    return {name for name, _ in network.named_parameters()}


def test_without_grouping_organ_queries_attend_alone(dimensions: int, image: torch.Tensor) -> None:
    default, other = pair(dimensions, grouping=False)
    gone = names(default) - names(other)
    assert {n.split(".")[2] for n in gone} == {"to_q", "to_k", "to_v", "to_out"}
    assert {n.split(".")[0] for n in gone} == {"grouping"} and not names(other) - names(default)
    block, q, x = other.grouping[0], torch.randn(2, 5, 128), torch.randn(2, 30, 128)
    after = q + block.attention(block.norm(q), x)
    assert torch.allclose(block(q, x), after + block.feed_forward(after))
    a, b = outputs((default, other), image)
    assert not equal(a.support, b.support)


def test_without_self_prompting_tumor_queries_attend_everywhere(dimensions: int, image: torch.Tensor) -> None:
    default, other = pair(dimensions, self_prompting=False)
    found = outputs((default, other), image)[0].deviation
    assert found is not None
    seen: list[Any] = []
    for network in (default, other):
        network.advanced[0].register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    outputs((default, other), image)
    assert seen[0].dtype == torch.bool and seen[1] is None
    assert names(default) == names(other)
    default.prompt_threshold = float(found.quantile(0.99))  # a prompt that is part of the patch
    a, b = outputs((default, other), image)
    assert 0 < seen[2].float().mean() < 1
    assert not torch.equal(a.tumor_embedding, b.tumor_embedding)
    assert equal(a.support[-2:], b.support[-2:])  # made before tumor queries are looked at


def test_with_the_score_of_the_organs_tumor_maps_gain_that_hint_alone(dimensions: int, image: torch.Tensor) -> None:
    networks = pair(dimensions, score_in_maps=True)
    a, b = outputs(networks, image)
    assert equal(a.support, b.support) and equal(a.healthy, b.healthy) and torch.equal(a.deviation, b.deviation)
    assert torch.equal(a.tumor_embedding, b.tumor_embedding) and not equal(a.tumor, b.tumor)
    with torch.no_grad():  # softplus(−40) is nothing: the maps without the hint are those with a weight of 0
        networks[1].score_weight.fill_(-40)
    a, b = outputs(networks, image)
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a.tumor, b.tumor, strict=True))


def test_prompts_from_organ_maps_are_their_score(dimensions: int, image: torch.Tensor) -> None:
    default, other = pair(dimensions, prompts="organs")
    assert names(default) == names(other)
    seen: list[torch.Tensor] = []
    for network in (default, other):
        network.prompt_threshold = -3.0
        network.advanced[0].register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    a, b = outputs((default, other), image)
    wanted = calibrated_prompts(*coarsest_prompt_inputs(b), other.hosts + other.anomaly_hosts, -3.0)
    assert torch.equal(seen[1], wanted) and not torch.equal(seen[0], seen[1])
    assert equal(a.support[-2:], b.support[-2:]) and not torch.equal(a.tumor_embedding, b.tumor_embedding)


def test_the_gate_reaches_to_the_neighbors_of_the_host(dimensions: int, image: torch.Tensor) -> None:
    """A lesion on the organ's surface, which the organ's map does not count to the organ, is found all the same."""
    default, other = pair(dimensions, gate="voxel")
    assert names(default) == names(other)
    a, b = outputs((default, other), image)
    assert equal(a.support, b.support) and equal(a.healthy, b.healthy)
    assert torch.equal(a.tumor_embedding, b.tumor_embedding)
    assert all((x >= y - 1e-5).all() for x, y in zip(a.tumor, b.tumor, strict=True)) and not equal(a.tumor, b.tumor)

    hosts = ((0,),)
    axis = 5
    support = torch.full((1, 1, *[axis] * dimensions), -10.0)
    support[0, 0, 1] = 10.0  # the organ is one slice; the lesion lies in the next
    features = [torch.zeros(1, default.tumor_heads[-1].project.out_features, *[axis] * dimensions)] * len(a.tumor)
    with torch.no_grad():
        default.tumor_heads[-1].bias.weight.zero_()
        query = torch.zeros(1, 1, 128)
        maps = [n._tumor_maps(query, hosts, features, -1, support, support)[0][0, 0] for n in (default, other)]
    reached, kept = (m.flatten(1)[:, 0] for m in maps)
    assert reached.isclose(reached[1]).tolist() == [True, True, True, False, False]
    assert kept.isclose(kept[1]).tolist() == [False, True, False, False, False]


def coarsest_prompt_inputs(output: ZePTOutput) -> tuple[torch.Tensor, torch.Tensor]:
    """Support, and the score of the organs' maps, of the coarsest scale."""
    u, h = output.support[-1], output.healthy[-1]
    return u.flatten(2), calibrated_score(u, h).flatten(2)


def test_without_relative_features_only_the_deviation_is_gone(dimensions: int, image: torch.Tensor) -> None:
    default, other = pair(dimensions, relative=False, prompts="organs")
    default.relative_prompts = False
    assert {n.split(".")[0] for n in names(default) - names(other)} == {"relative", "deviation_weight"}
    a, b = outputs((default, other), image)
    assert b.deviation is None and equal(a.support, b.support) and equal(a.tumor[1:], b.tumor[1:])
    assert not torch.equal(a.tumor[0], b.tumor[0])


def test_a_patchwise_score_is_the_same_for_every_tumor(dimensions: int, image: torch.Tensor) -> None:
    default, other = pair(dimensions, score_range="patch", prompt_probability=0.5, prompts="organs")
    assert names(default) == names(other)
    seen: list[torch.Tensor] = []
    for network in (default, other):
        network.advanced[0].register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    a, b = outputs((default, other), image)
    assert (seen[1] == seen[1][:, :1]).all() and seen[1].any() and not seen[1].all()  # one prompt for all
    assert torch.equal(seen[1][:, 0], minmax_score(b.healthy[-1]).flatten(2)[:, 0] >= 0.5)
    assert equal(a.support[-2:], b.support[-2:])


@pytest.mark.usefixtures("as_in_training")
def test_learned_queries_serve_an_added_tumor_by_those_for_abnormal_tissue(
    dimensions: int, image: torch.Tensor
) -> None:
    block = build_block(deepcopy(DATASET_JSON), settings={"queries": "learned"})
    network = make_network(dimensions, block=block)
    table = network.get_parameter("decoder.seg_layers.queries")
    assert len(table) == 3 + 2 + 1 and not any("tumor_queries" in n for n in names(network))
    output = network(image)
    assert [m.shape[1] for m in output.anomaly] == [1] * len(output.tumor)
    output.anomaly[0].sum().backward()
    assert table.grad is not None and (table.grad[5] != 0).any()
    grown = add_tumor_to_block(block, "pancreas tumor", ("pancreas",), 6)
    predictor = make_network(dimensions, block=grown, deep_supervision=False).eval()
    predictor.load_state_dict(network.state_dict())
    with torch.no_grad():
        wanted = network.eval()(image).anomaly[0][:, 0].clamp(-1000, 1000)
        assert torch.allclose(predictor(image)[:, 6], wanted, atol=1e-4)
    with pytest.raises(ZePTError, match="learned one query per class"):
        add_tumor_to_block(block, "another liver tumor", ("liver",), 6)


def test_a_hidden_tumor_is_seen_by_no_other_query(dimensions: int, image: torch.Tensor) -> None:
    block = build_block(deepcopy(DATASET_JSON), settings={"hiding_probability": 0.5})
    network = make_network(dimensions, block=block).eval()
    with torch.no_grad():
        network.joint.attention.to_out.weight.normal_(std=0.1)  # it starts as the identity
        before = network(image)
        network.hide(1)
        hidden = network(image)
        network.knowledge_tumors[1] = -network.knowledge_tumors[1]  # another tumor: what else notices?
        other = network(image)
        network.hide(None)
        after = network(image)
    liver, spleen = 0, 1
    assert not torch.equal(hidden.tumor[0][:, liver], before.tumor[0][:, liver])
    assert torch.allclose(hidden.tumor[0][:, liver], other.tumor[0][:, liver], atol=1e-5)
    assert torch.allclose(hidden.anomaly[0], other.anomaly[0], atol=1e-5)
    assert torch.allclose(hidden.support[0], other.support[0], atol=1e-5)
    assert not torch.allclose(hidden.tumor[0][:, spleen], other.tumor[0][:, spleen], atol=1e-5)
    assert not torch.allclose(after.anomaly[0], other.anomaly[0], atol=1e-5)  # seen again


def test_shuffled_descriptions_change_whose_text_it_is_and_nothing_else() -> None:
    own, shuffled = (build_block(deepcopy(DATASET_JSON), settings={"descriptions": d}) for d in ("own", "shuffled"))
    a, b = (block["knowledge"]["vectors"] for block in (own, shuffled))
    assert a.keys() == b.keys() and all(a[n] != b[n] for n in a)  # "abnormal pancreas" has nobody to exchange with
    groups = (("liver", "spleen", "pancreas"), ("liver_tumor", "spleen_tumor"))
    for group in groups:
        assert sorted(a[n] for n in group) == sorted(b[n] for n in group)
    assert own["decoder"] == shuffled["decoder"] and own["taxonomy"] == shuffled["taxonomy"]
