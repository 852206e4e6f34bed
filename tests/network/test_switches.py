"""Each ablation switch of the decoder changes what it names, and nothing else."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.network.compare import differing
from tests.small_plans import DATASET_JSON, make_network
from zept_nnunet.errors import ZePTError
from zept_nnunet.network.grouping import assign
from zept_nnunet.network.self_prompting import calibrated_prompts, calibrated_score, minmax_score
from zept_nnunet.network.zept import ZePT, ZePTOutput
from zept_nnunet.plans_block import add_tumor_to_block, build_block

PATCHWISE: dict[str, Any] = {"score_range": "patch", "prompt_probability": 0.5, "prompts": "organs"}
TABLE = "decoder.seg_layers.queries"


def pair(
    dimensions: int, variant: str = "zept", base: dict[str, Any] | None = None, **settings: Any
) -> tuple[ZePT, ZePT]:
    """A variant's network (with `base`, if given), and one that differs in the settings; equal weights where both have
    them in the same shape.
    """
    shared = base or {}
    default, other = (
        make_network(dimensions, block=build_block(deepcopy(DATASET_JSON), variant, settings=s)).eval()
        for s in (shared, shared | settings)
    )
    theirs = other.state_dict()
    weights = {  # the fingerprint holds the settings
        k: v
        for k, v in default.state_dict().items()
        if "fingerprint" not in k and k in theirs and theirs[k].shape == v.shape
    }
    other.load_state_dict(weights, strict=False)
    return default, other


def outputs(networks: tuple[ZePT, ZePT], image: torch.Tensor) -> tuple[ZePTOutput, ZePTOutput]:
    with torch.no_grad():
        return networks[0](image), networks[1](image)


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def refined_queries(networks: tuple[ZePT, ZePT]) -> list[torch.Tensor]:
    """Fills with the queries that maps are made from, network by network."""
    found: list[torch.Tensor] = []
    for network in networks:
        network.joint.register_forward_hook(lambda _, __, queries: found.append(queries))
    return found


def names(network: ZePT) -> set[str]:
    return {name for name, _ in network.named_parameters()}


def masks_of(networks: tuple[ZePT, ZePT]) -> list[Any]:
    """Filled by every forward pass: where the first advanced layer lets tumor queries attend."""
    seen: list[Any] = []
    for network in networks:
        network.advanced[0].register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    return seen


def test_settings_of_the_loss_the_targets_and_the_schedule_leave_the_network_as_it_is(
    dimensions: int, image: torch.Tensor
) -> None:
    settings = {
        "alignment": 0.0,
        "organs_include_tumors": True,
        "unlabeled_host_weight": 0.0,
        "stage_one_share": 0.0,
        "learning_rate": 0.1,
        "warmup_iterations": 9,
        "weight_decay": 0.0,
        "gradient_norm": 1.0,
    }
    default, other = pair(dimensions, **settings)
    assert {n: p.shape for n, p in default.named_parameters()} == {n: p.shape for n, p in other.named_parameters()}
    assert differing(*outputs((default, other), image)) == set()


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
    queries = refined_queries(networks)
    a, b = outputs(networks, image)
    assert equal(a.support, b.support) and equal(a.healthy, b.healthy) and torch.equal(a.deviation, b.deviation)
    assert torch.equal(*queries) and not equal(a.tumor, b.tumor)
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
    queries = refined_queries((default, other))
    a, b = outputs((default, other), image)
    assert equal(a.support, b.support) and equal(a.healthy, b.healthy)
    assert torch.equal(*queries)
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
    predictor.added.clear()  # but for being centered (test_added.py)
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


# ---------------------------------------------------------------------------------------------------- score, prompts
@pytest.mark.parametrize(("variant", "base"), [("paper", {}), ("zept", PATCHWISE)], ids=["paper", "patchwise"])
def test_without_self_prompting_a_score_of_the_patch_prompts_nobody(
    dimensions: int, image: torch.Tensor, variant: str, base: dict[str, Any]
) -> None:
    networks = pair(dimensions, variant, base, self_prompting=False)
    assert names(networks[0]) == names(networks[1])
    seen = masks_of(networks)
    a, b = outputs(networks, image)
    assert 0 < seen[0].float().mean() < 1 and seen[1] is None
    assert differing(a, b) == {"tumor", "tumor_embedding"} | ({"anomaly"} if variant == "zept" else set())


def test_without_the_score_the_authors_maps_are_those_of_the_queries(dimensions: int, image: torch.Tensor) -> None:
    """With it, it is added to every tumor's map and taken off those of organs that have one."""
    networks = pair(dimensions, "paper", score_in_maps=False)
    assert names(networks[0]) == names(networks[1])
    a, b = outputs(networks, image)
    assert differing(a, b) == {"healthy", "tumor"}
    score = minmax_score(b.support[0])
    assert torch.equal(a.tumor[0], b.tumor[0] + score) and equal(b.healthy, b.support)
    has_tumor = torch.tensor([1.0, 1.0, 0.0]).view(1, 3, *[1] * dimensions)  # the pancreas has none
    assert torch.equal(a.healthy[0], b.healthy[0] - score * has_tumor)


def test_a_patchwise_score_in_the_maps_is_the_same_hint_for_every_tumor(dimensions: int, image: torch.Tensor) -> None:
    default, other = pair(dimensions, base=PATCHWISE, score_in_maps=True)
    assert names(other) - names(default) == {"score_weight"} and not names(default) - names(other)
    a, b = outputs((default, other), image)
    assert differing(a, b) == {"tumor", "anomaly", "tumor_embedding"}  # read where the map is
    support = torch.full_like(a.support[0], 40.0)  # the gate stands open: maps are the evidence
    with torch.no_grad():
        features = default.decoder(default.encoder(image))
        queries = torch.randn(2, 2, 128)
        maps = [n._tumor_maps(queries, n.hosts, features, -1, support, a.healthy[0])[0] for n in (default, other)]
        assert other.score_weight is not None
        hint = F.softplus(other.score_weight) * minmax_score(a.healthy[0])
    torch.testing.assert_close(maps[1] - maps[0], hint.expand_as(maps[0]), rtol=0, atol=2e-5)
    assert hint.max() > 0.3


def test_the_published_score_brings_the_published_maps_and_leaves_the_queries(
    dimensions: int, image: torch.Tensor
) -> None:
    """More than a switch: no healthy maps, plain products, the finest scale alone, an embedding of the whole query."""
    default, other = pair(dimensions, base={**PATCHWISE, "relative": False}, score="minmax")
    biases = {n for n in names(default) if n.startswith(("support_heads.", "tumor_heads.")) and ".bias." in n}
    healthy = {n for n in names(default) if n.startswith("healthy_heads.")}
    assert names(default) - names(other) == healthy | biases
    assert names(other) - names(default) == {"knowledge_norm.weight", "knowledge_norm.bias"}
    with torch.no_grad():
        features = [n.decoder(n.encoder(image)) for n in (default, other)]
        first, second = (n._refine(image, f, ()) for n, f in zip((default, other), features, strict=True))
    assert equal(*features) and torch.equal(first.organs, second.organs)
    seen = masks_of((default, other))
    a, b = outputs((default, other), image)
    assert [len(o.support) for o in (a, b)] == [3, 1] and equal(b.healthy, b.support)
    assert torch.equal(seen[1][:, 0], minmax_score(second.coarse[0][0]).flatten(2)[:, 0] >= 0.5)
    with torch.no_grad():
        head = default.support_heads[-1]
        bias = head.bias(first.organs).view(2, 3, *[1] * dimensions)
        embedding = other.knowledge_norm(other.to_knowledge(second.organs))
    torch.testing.assert_close((a.support[0] - bias) / head.scale, b.support[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(b.organ_embedding, embedding)


# ---------------------------------------------------------------------------------------------------- queries
def test_learned_queries_change_where_queries_come_from_and_nothing_else(dimensions: int, image: torch.Tensor) -> None:
    default, other = pair(dimensions, queries="learned")
    assert names(other) - names(default) == {TABLE}
    generators = {n.split(".")[0] for n in names(default) - names(other)}
    assert generators == {"organ_queries", "tumor_queries", "host_to_tumor"}
    assert "support" in differing(*outputs((default, other), image))
    with torch.no_grad():
        other.get_parameter(TABLE).copy_(torch.cat(default._given_queries(default.hosts + default.anomaly_hosts)))
    assert differing(*outputs((default, other), image)) == set()


def test_without_background_queries_every_voxel_belongs_to_an_organ(
    dimensions: int, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = pair(dimensions, background_queries=0)
    assert names(networks[0]) == names(networks[1])
    assert [len(n.background_queries) for n in networks] == [4, 0]
    shares: list[tuple[torch.Tensor, torch.Tensor]] = []

    def spy(scores: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        shares.append((scores, assign(scores, *args, **kwargs)))
        return shares[-1][1]

    monkeypatch.setattr("zept_nnunet.network.grouping.assign", spy)
    given: list[Any] = []
    for network in networks:
        network.grouping[0].register_forward_pre_hook(lambda _, args: given.append(args))
    outputs(networks, image)
    (queries, tokens), (organs, same_tokens) = given
    assert torch.equal(queries[:, :3], organs) and torch.equal(tokens, same_tokens)
    scales = networks[0].num_grouping
    with_background, alone = shares[:scales], shares[scales:]
    assert [s.shape[1] for s, _ in shares] == [7] * scales + [3] * scales
    scores = with_background[0][0][:, :3]  # each query attends for itself, so the organs' scores are the same
    torch.testing.assert_close(alone[0][0], scores)
    torch.testing.assert_close(alone[0][1], assign(scores))
    for (_, some), (_, every) in zip(with_background, alone, strict=True):
        assert (some[:, :3].sum(1) < 0.5).any()
        torch.testing.assert_close(every.sum(1), torch.ones_like(every[:, 0]))


@pytest.mark.parametrize(
    ("settings", "rows"), [({"synthetic_anomalies": False}, 0), ({"hiding_probability": 0.5}, 3)], ids=lambda v: str(v)
)
def test_queries_for_abnormal_tissue_come_and_go_and_nothing_else_does(
    dimensions: int, image: torch.Tensor, settings: dict[str, Any], rows: int
) -> None:
    """Without synthetic anomalies there are none; hiding wants one in the hosts of labeled tumors too."""
    networks = pair(dimensions, **settings)
    default, other = networks
    assert names(default) == names(other) and (len(default.anomaly_hosts), len(other.anomaly_hosts)) == (1, rows)
    a, b = outputs(networks, image)
    assert differing(a, b) - {"tumor", "tumor_embedding"} == {"anomaly"}
    for mine, theirs in zip((*a.tumor, a.tumor_embedding), (*b.tumor, b.tumor_embedding), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)  # sums over other numbers of queries
    assert [m.shape[1] for m in b.anomaly] == [rows] * (3 if rows else 0)
    if rows:
        pancreas = torch.stack([m[:, 2] for m in b.anomaly[:1]])
        torch.testing.assert_close(pancreas, a.anomaly[0].transpose(0, 1), rtol=0, atol=1e-5)
    for network in networks:
        network.decoder.deep_supervision = False
    with torch.no_grad():
        wanted = default(image)
        assert torch.equal(other(image), wanted)
        if rows:
            other.hide(1)  # it is for training alone
            assert torch.equal(other(image), wanted)
