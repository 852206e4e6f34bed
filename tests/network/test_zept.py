from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from tests.small_plans import DATASET_JSON, make_network
from zept_nnunet.errors import ZePTError
from zept_nnunet.network.heads import to_channels
from zept_nnunet.network.zept import ZePT, ZePTOutput
from zept_nnunet.plans_block import add_tumor_to_block, build_block
from zept_nnunet.taxonomy import Taxonomy

REGIONS = {
    **DATASET_JSON,
    "labels": {"background": 0, "liver": [1, 2], "liver tumor": 2, "spleen": 3},
    "regions_class_order": [1, 2, 3],
}


@pytest.mark.parametrize("variant", ["zept", "paper"])
def test_output_type_follows_deep_supervision_and_not_training(
    dimensions: int, image: torch.Tensor, variant: str
) -> None:
    network = make_network(dimensions, variant=variant)
    for mode in (network.train, network.eval):
        mode()
        network.decoder.deep_supervision = True
        output = network(image)
        assert isinstance(output, ZePTOutput)
        assert output.support[0].shape == (2, 3, *image.shape[2:])
        assert output.tumor[0].shape == (2, 2, *image.shape[2:])
        network.decoder.deep_supervision = False
        logits = network(image)
        assert logits.shape == (2, 6, *image.shape[2:]) and logits.is_contiguous()
        assert torch.equal(logits[:, 0], torch.zeros_like(logits[:, 0]))


@pytest.mark.usefixtures("as_in_training")
def test_deep_supervision_outputs_agree_with_the_prediction(network: ZePT, image: torch.Tensor) -> None:
    network.eval()
    output = network(image)
    network.decoder.deep_supervision = False
    want = network.to_channels(output.healthy[0], output.tumor[0], network.thresholds)
    assert torch.allclose(network(image), want, atol=1e-5)


@torch.no_grad()
def test_certainty_that_healthy_tissue_is_no_tumor_does_not_rank_it_below_what_is_outside(
    network: ZePT, image: torch.Tensor
) -> None:
    """Of what lies outside the host the deviation says nothing, of healthy tissue inside it very much."""
    network.eval()
    trained = network(image)
    inside = torch.zeros_like(trained.support[0][:1, :1], dtype=torch.bool)
    inside[..., : image.shape[-1] // 2] = True
    u = torch.where(inside, 8.0, -9.0).expand(1, network.num_organs, *image.shape[2:])
    d = torch.where(inside, -12.0, 0.0) - torch.rand(u.shape) * inside
    features = network.decoder(network.encoder(image[:1]))
    t = torch.randn(1, network.num_tumors, network.tumor_heads[-1].project.in_features)
    args = t, network.hosts, features, -1, u, u, d
    plain, floored = (network._tumor_maps(*args, floor=f)[0] for f in (None, 4.0))
    inside, beyond = inside[0, 0], ~inside[0, 0]
    beyond[..., image.shape[-1] // 2] = False  # a neighbor of the host
    for k, hosts in enumerate(network.hosts):
        if hosts:
            assert plain[0, k][inside].max() < plain[0, k][beyond].min()
            assert floored[0, k][inside].min() > floored[0, k][beyond].max()
            assert (floored[0, k][inside][plain[0, k][inside].argsort()].diff() > -1e-5).all()  # the same order


@torch.no_grad()
def test_an_organs_surface_does_not_move_away_from_where_it_is_surely_not(
    network: ZePT, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nnU-Net resamples logits: between +4 and −40 its surface would lie a tenth of the way, not in the middle."""
    network.eval()
    network.decoder.deep_supervision = False
    inside = torch.arange(image.shape[-1]).expand(image.shape[2:]) < image.shape[-1] // 2
    h = torch.where(inside, 4.0, -40.0).expand(len(image), network.num_organs, *image.shape[2:])
    monkeypatch.setattr(network, "_organ_maps", lambda *_: (h, h))
    monkeypatch.setattr(network, "predict_tumors", False)
    fine = torch.nn.functional.interpolate(network(image)[:, 1].flatten(1, -2)[:, :1], scale_factor=16.0, mode="linear")
    surface = (fine[0, 0] > 0).sum() / 16
    assert abs(float(surface) - image.shape[-1] // 2) < 0.2


def test_prompts_of_organs_are_those_of_a_tumor_in_each(network: ZePT, image: torch.Tensor) -> None:
    network.eval()
    network.decoder.deep_supervision = False
    assert "prompts" not in network.forward_scores(image)
    scores = network.forward_scores(image, with_prompts=True)
    prompts = scores["prompts"]
    assert prompts.shape == scores["support"].shape and set(prompts.unique().tolist()) <= {0, 1}
    assert prompts.flatten(2).any(-1).all()  # never an empty row
    features = network.decoder(network.encoder(image))
    queries = network._refine(image, features, network.hosts)
    support = queries.coarse[-1][0]
    (prompt,) = network._prompts(queries.coarse[-1:], queries.deviates, ((1,),))
    assert prompt is not None
    used = prompt.reshape(-1, *support.shape[2:])
    step = [a // b for a, b in zip(image.shape[2:], support.shape[2:], strict=True)]
    assert torch.equal(prompts[:, 1][(slice(None), *(slice(None, None, s) for s in step))], used.float())


def test_regions_report_unions_within_the_limit(dimensions: int, image: torch.Tensor) -> None:
    network = make_network(dimensions, REGIONS, deep_supervision=False).eval()
    logits = network(image)
    scores = network.forward_scores(image)
    assert logits.shape[1] == 3
    assert (logits[:, 0] >= logits[:, 1] - 1e-4).all()  # liver holds its tumor
    assert torch.allclose(logits[:, 1], scores["tumor_logits"][:, 0], atol=1e-5)


def test_parameters_do_not_depend_on_the_classes(dimensions: int) -> None:
    few = {**DATASET_JSON, "labels": {"background": 0, "colon": 1, "colon cancer": 2}}
    shapes = [
        {k: v.shape for k, v in make_network(dimensions, d).state_dict().items()} for d in (DATASET_JSON, few, REGIONS)
    ]
    assert shapes[0] == shapes[1] == shapes[2]


def test_organs_only_one_organ_and_body_as_host(dimensions: int, image: torch.Tensor) -> None:
    with pytest.warns(UserWarning, match="body"):
        build_block({**DATASET_JSON, "labels": {"background": 0, "tumor": 1}})
    for labels in ({"background": 0, "liver": 1}, {"background": 0, "tumor": 1}):
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = make_network(dimensions, {**DATASET_JSON, "labels": labels})
        network(image)
        network.decoder.deep_supervision = False
        assert network(image).shape[1] == 2


def test_an_added_tumor_leaves_the_maps_of_the_trained_classes(dimensions: int, image: torch.Tensor) -> None:
    block = build_block(deepcopy(DATASET_JSON))
    before = make_network(dimensions, block=block, deep_supervision=False).eval()
    grown = add_tumor_to_block(block, "pancreas tumor", ("pancreas",), 6)
    after = make_network(dimensions, block=grown, deep_supervision=False, seed=1).eval()
    after.load_state_dict(before.state_dict())  # the fingerprint stays
    old, new = before(image), after(image)
    assert new.shape[1] == 7
    assert torch.allclose(new[:, :6], old, atol=1e-5)
    assert Taxonomy.from_dict(grown["taxonomy"]).tumors[-1].added


@pytest.mark.usefixtures("as_in_training")
def test_anomalies_have_maps_in_training_and_change_no_other(dimensions: int, image: torch.Tensor) -> None:
    block = build_block(deepcopy(DATASET_JSON))  # liver and spleen have tumors, the pancreas has none
    assert block["anomalies"] == {"abnormal pancreas": "pancreas"}
    network = make_network(dimensions, block=block).eval()
    without = make_network(dimensions, block={**block, "anomalies": {}}).eval()
    without.load_state_dict(network.state_dict())
    with torch.no_grad():
        a, b = network(image), without(image)
    assert not b.anomaly and [m.shape[1] for m in a.anomaly] == [1] * len(a.tumor)
    assert a.tumor_embedding.shape == b.tumor_embedding.shape
    for mine, other in zip((*a.tumor, *a.healthy), (*b.tumor, *b.healthy), strict=True):
        assert torch.allclose(mine, other, atol=1e-5)
    # an added tumor with the same words is the same query, met at inference as it was in training
    vector = block["knowledge"]["vectors"]["abnormal pancreas"]
    grown = add_tumor_to_block(block, "pancreas tumor", ("pancreas",), 6)
    grown["knowledge"]["vectors"]["pancreas tumor"] = vector
    predictor = make_network(dimensions, block=grown, deep_supervision=False).eval()
    predictor.load_state_dict(network.state_dict())
    predictor.added.clear()  # but for being centered (test_added.py)
    with torch.no_grad():
        assert torch.allclose(predictor(image)[:, 6], a.anomaly[0][:, 0].clamp(-1000, 1000), atol=1e-4)
    network.stage = 1
    assert not network(image).anomaly


def test_deviation_from_the_own_organ_changes_tumor_maps_alone(dimensions: int, image: torch.Tensor) -> None:
    block = build_block(deepcopy(DATASET_JSON))
    block["decoder"]["prompts"] = "organs"  # or queries would differ as well
    plain = {**block, "decoder": {**block["decoder"], "relative": False}}
    network, without = (make_network(dimensions, block=b).eval() for b in (block, plain))
    mine = {n: v for n, v in network.state_dict().items() if not n.startswith(("relative.", "deviation_weight"))}
    fingerprint = [n for n in mine if n not in dict(network.named_parameters())]
    without.load_state_dict({**mine, **{n: without.state_dict()[n] for n in fingerprint}})
    with torch.no_grad():
        a, b = network(image), without(image)
    assert b.deviation is None and a.deviation is not None
    # log-odds of a conjunction: never above the support
    assert a.deviation.shape == a.support[0].shape and (a.deviation <= a.support[0] + 1e-5).all()
    for mine_map, other in zip(
        (*a.support, *a.healthy, *a.tumor[1:]), (*b.support, *b.healthy, *b.tumor[1:]), strict=True
    ):
        assert torch.allclose(mine_map, other, atol=1e-5)
    assert not torch.allclose(a.tumor[0], b.tumor[0], atol=1e-3)
    network.decoder.deep_supervision = False
    with torch.no_grad():
        assert torch.allclose(network.forward_scores(image)["anomaly"], a.deviation.clamp(-1000, 1000), atol=1e-4)
    network.decoder.deep_supervision, network.stage = True, 1
    assert network(image).deviation is None


def test_other_knowledge_is_refused_on_load(dimensions: int) -> None:
    network = make_network(dimensions)
    other = deepcopy(DATASET_JSON) | {"zept": {"knowledge": {"liver": "another text"}}}
    with pytest.raises(ZePTError, match="other classes, knowledge"):
        make_network(dimensions, other).load_state_dict(network.state_dict())
    make_network(dimensions).load_state_dict(network.state_dict())


def test_tumor_wins_where_its_host_supports_it() -> None:
    taxonomy = Taxonomy.from_dict(build_block(deepcopy(DATASET_JSON))["taxonomy"])
    from zept_nnunet.network.logits import conjunction

    u, a, h = (torch.tensor(v) for v in (8.0, 8.0, -8.0))
    organs = torch.full((1, 3, 1, 1), -8.0)
    organs[:, 0] = h
    tumors = torch.full((1, 2, 1, 1), -8.0)
    tumors[:, 0] = conjunction(u, a)
    assert to_channels(taxonomy, organs, tumors).argmax(1).item() == 4  # liver_tumor


@pytest.mark.parametrize("variant", ["zept", "paper"])
@pytest.mark.parametrize("stage", [1, 2])
def test_every_parameter_gets_a_gradient_and_a_frozen_one_exactly_zero(
    dimensions: int, image: torch.Tensor, variant: str, stage: int
) -> None:
    network = make_network(dimensions, variant=variant)
    network.stage = stage
    output = network(image)
    total = output.anchor + output.organ_embedding.square().sum() + output.tumor_embedding.square().sum()
    for maps in (output.support, output.healthy, output.tumor, output.anomaly):
        total = total + sum(m.square().mean() for m in maps)
    total.backward()
    advanced = {id(p) for p in network.stage_two_parameters()}
    for name, p in network.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        if id(p) in advanced and stage == 1:
            assert (p.grad == 0).all(), name
        elif variant == "zept" and name != "log_temperature":
            zero_at_start = "joint." in name and not name.startswith("joint.attention.to_out")
            assert zero_at_start or p.grad.abs().sum() > 0 or "to_k.bias" in name, name


def test_unusual_inputs_give_no_nan(dimensions: int, image: torch.Tensor) -> None:
    for variant in ("zept", "paper"):
        network = make_network(dimensions, variant=variant, deep_supervision=False).eval()
        for x in (torch.zeros_like(image), torch.full_like(image, -5.0), image * 1e3):
            assert torch.isfinite(network(x)).all()


def test_stage_one_trainer_predicts_no_tumor(dimensions: int, image: torch.Tensor) -> None:
    network = make_network(dimensions, deep_supervision=False).eval()
    network.predict_tumors = False
    assert (network(image)[:, 4:] == -1000).all()
