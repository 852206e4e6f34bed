"""What must hold whatever the weights: order of the classes, batch, window, added classes, and where gradients go."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.network import reference
from tests.network.narrow import TWO_KIDNEYS, narrow_block, randomize
from tests.network.reference import array
from tests.nnunet_folders import make_nnunet_folders
from tests.small_plans import DATASET_JSON, make_network, make_plans
from zept_nnunet.network.grouping import assign
from zept_nnunet.network.heads import to_channels
from zept_nnunet.network.self_prompting import calibrated_score, minmax_score, over_hosts
from zept_nnunet.network.zept import ZePT, ZePTOutput
from zept_nnunet.plans_block import add_tumor_to_block, build_block
from zept_nnunet.taxonomy import Taxonomy
from zept_nnunet.training.trainer import ZePTTrainer
from zept_nnunet.training.variants import ZePTTrainerPaper

FINGERPRINT = "decoder.seg_layers.fingerprint"
LEARNED = "decoder.seg_layers.queries"


def make(dimensions: int, block: dict[str, Any], weights: ZePT | None = None, deep_supervision: bool = True) -> ZePT:
    """In eval mode, with the weights of another network."""
    network = randomize(make_network(dimensions, block=block, deep_supervision=deep_supervision)).eval()
    if weights is not None:
        state = {n: v for n, v in weights.state_dict().items() if n != FINGERPRINT}
        network.load_state_dict({**state, FINGERPRINT: network.state_dict()[FINGERPRINT]})
    return network


def same(got: torch.Tensor, wanted: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance * max(1.0, wanted.abs().max().item()))


def maps_of(output: ZePTOutput) -> dict[str, torch.Tensor]:
    """Everything that belongs to the cases of a batch."""
    fields = output._asdict()
    single = {n: fields[n] for n in ("deviation", "organ_embedding", "tumor_embedding") if fields[n] is not None}
    lists = {f"{n}.{s}": m for n in ("support", "healthy", "tumor", "anomaly") for s, m in enumerate(fields[n])}
    return single | lists


# ---------------------------------------------------------------------------------------------------- order
@pytest.mark.parametrize("variant", ["zept", "paper"])
@torch.no_grad()
def test_permuting_the_organs_permutes_their_maps_and_nothing_else(
    dimensions: int, image: torch.Tensor, variant: str
) -> None:
    block, order = narrow_block(variant=variant), [2, 0, 3, 1]
    permuted = deepcopy(block)
    permuted["taxonomy"]["organs"] = [block["taxonomy"]["organs"][i] for i in order]
    one = make(dimensions, block)
    other = make(dimensions, permuted, one)
    if variant == "paper":
        other.get_parameter(LEARNED)[:4] = one.get_parameter(LEARNED)[order]
    a, b = one(image), other(image)
    for mine, theirs in zip((*a.support, *a.healthy), (*b.support, *b.healthy), strict=True):
        same(theirs, mine[:, order])
        assert (theirs - mine).abs().max() > 0.1
    same(b.organ_embedding, a.organ_embedding[:, order])
    assert (a.deviation is None) == (b.deviation is None) == (variant == "paper")
    if a.deviation is not None and b.deviation is not None:
        same(b.deviation, a.deviation[:, order])
        assert (b.deviation - a.deviation).abs().max() > 0.1
    for mine, theirs in zip((*a.tumor, *a.anomaly), (*b.tumor, *b.anomaly), strict=True):
        same(theirs, mine)
    same(b.tumor_embedding, a.tumor_embedding)
    one.decoder.deep_supervision = other.decoder.deep_supervision = False
    same(other(image), one(image))  # channels follow the labels
    mine, theirs = (n.forward_scores(image, with_prompts=True) for n in (one, other))
    for name in ("support", "anomaly", "prompts"):
        same(theirs[name], mine[name][:, order])
    same(theirs["tumor_logits"], mine["tumor_logits"])


@torch.no_grad()
def test_permuting_the_tumors_permutes_their_maps_and_nothing_else(dimensions: int, image: torch.Tensor) -> None:
    block = narrow_block({**TWO_KIDNEYS, "spleen tumor": 7})
    permuted = deepcopy(block)
    permuted["taxonomy"]["tumors"] = [block["taxonomy"]["tumors"][k] for k in (1, 2, 0)]
    one = make(dimensions, block)
    a, b = one(image), make(dimensions, permuted, one)(image)
    for mine, theirs in zip((*a.tumor, a.tumor_embedding), (*b.tumor, b.tumor_embedding), strict=True):
        same(theirs, mine[:, [1, 2, 0]])
    assert a.deviation is not None and b.deviation is not None
    for mine, theirs in zip((*a.support, *a.healthy, a.deviation), (*b.support, *b.healthy, b.deviation), strict=True):
        same(theirs, mine)


# ---------------------------------------------------------------------------------------------------- batch
@pytest.mark.parametrize("variant", ["zept", "paper"])
@torch.no_grad()
def test_a_case_does_not_depend_on_the_rest_of_its_batch(dimensions: int, image: torch.Tensor, variant: str) -> None:
    network = make(dimensions, narrow_block(variant=variant))
    for beside in (image[1:], torch.zeros_like(image[:1]), 1e3 * image[1:]):
        alone, together = maps_of(network(image[:1])), maps_of(network(torch.cat((beside, image[:1]))))
        assert len(alone) > 4
        for name, mine in alone.items():
            same(together[name][1:], mine)


# ---------------------------------------------------------------------------------------------------- added tumors
@torch.no_grad()
def test_added_tumors_change_no_map_of_another_even_after_joint_attention_has_learned(
    dimensions: int, image: torch.Tensor
) -> None:
    """At the start joint attention is the identity and could hide what an added query does to the others."""
    trained = narrow_block()
    trained["decoder"]["tumor_first"] = False  # the maps themselves, before one lowers its host's channel
    first = add_tumor_to_block(trained, "spleen tumor", ("spleen",), 7)
    second = add_tumor_to_block(first, "any tumor", ("liver", "spleen"), 8)
    zero = make(dimensions, trained, deep_supervision=False)
    networks = [zero, *(make(dimensions, b, zero, deep_supervision=False) for b in (first, second))]
    logits = [n(image) for n in networks]
    assert [z.shape[1] for z in logits] == [7, 8, 9]
    same(logits[1][:, :7], logits[0], 1e-6)
    same(logits[2][:, :8], logits[1], 1e-6)
    scores = [n.forward_scores(image) for n in networks]
    for name in ("support", "anomaly"):
        same(scores[2][name], scores[0][name], 1e-6)
    joint = networks[2].joint.attention.to_out.weight
    joint.zero_()
    assert (networks[2](image)[:, 7] - logits[2][:, 7]).abs().max() > 1e-2  # it attends the others


@torch.no_grad()
def test_queries_of_synthetic_anomalies_change_no_other_map_after_joint_attention_has_learned(
    dimensions: int, image: torch.Tensor
) -> None:
    block = narrow_block()
    assert block["anomalies"] == {"abnormal spleen": "spleen"}
    network = make(dimensions, block)
    a, b = network(image), make(dimensions, {**block, "anomalies": {}}, network)(image)
    assert a.anomaly and not b.anomaly
    for mine, theirs in zip((*a.support, *a.healthy, *a.tumor), (*b.support, *b.healthy, *b.tumor), strict=True):
        same(theirs, mine, 1e-6)


# ---------------------------------------------------------------------------------------------------- window
def test_the_calibrated_score_of_a_voxel_depends_on_no_other_voxel() -> None:
    """Min–max normalization over the patch does: each voxel moves all."""
    torch.manual_seed(0)
    support, healthy = (torch.randn(1, 2, 6, 5, requires_grad=True) for _ in range(2))
    gradients = torch.autograd.grad(calibrated_score(support, healthy)[0, 1, 2, 3], (support, healthy))
    for gradient in gradients:
        assert gradient[0, 1, 2, 3] != 0 and gradient.count_nonzero() == 1
    (gradient,) = torch.autograd.grad(minmax_score(support)[0, 0, 2, 3], support)
    assert gradient.count_nonzero() == 3  # itself, and the lowest and the highest voxel of the patch


def test_the_same_voxel_scores_the_same_in_every_window() -> None:
    """Two windows share a region; one also shows a bright organ, the other something strange."""
    torch.manual_seed(0)
    support, healthy = torch.randn(1, 2, 12, 12), torch.randn(1, 2, 12, 12)
    support[:, :, :2], healthy[:, :, :2] = 9.0, 9.0
    support[:, :, 10:] = -9.0
    upper, lower = slice(0, 8), slice(4, 12)
    hosts = ((0,), (0, 1))
    scores = [calibrated_score(support[:, :, w], healthy[:, :, w]) for w in (upper, lower)]
    same(scores[0][:, :, 4:], scores[1][:, :, :4], 1e-6)
    same(scores[0], calibrated_score(support, healthy)[:, :, upper], 1e-6)
    for a, b in zip(*(over_hosts(s, hosts) for s in scores), strict=True):
        assert a is not None and b is not None
        same(a[:, 4:], b[:, :4], 1e-6)
    upper_score, lower_score = (minmax_score(support[:, :, w]) for w in (upper, lower))
    assert (upper_score[:, :, 4:] - lower_score[:, :, :4]).abs().min() > 0.05


@pytest.mark.parametrize(("gate", "reach"), [("voxel", 0), ("neighborhood", 1)])
@pytest.mark.parametrize("floor", [None, 4.0])
@torch.no_grad()
def test_a_tumor_map_is_the_same_in_every_window(dimensions: int, gate: str, reach: int, floor: float | None) -> None:
    """Given what the U-Net and the relative head say: then a voxel depends on itself, and by the gate on its neighbors.

    What these two say does change with the window: a convolution sees as far as it reaches, instance norms the whole
    patch, and the relative head what the patch shows of the organ (`test_relative.py`).
    """
    block = narrow_block()
    block["decoder"] |= {"gate": gate, "score_in_maps": True}
    network = make(dimensions, block)
    torch.manual_seed(0)
    size = [13] * dimensions
    features = torch.randn(1, network.tumor_heads[-1].project.out_features, *size)
    support, healthy, unlike = (4 * torch.randn(1, 4, *size) for _ in range(3))
    queries = torch.randn(1, 2, 16)

    def maps(start: int, stop: int) -> torch.Tensor:
        f, u, h, d = (m[(..., *[slice(start, stop)] * dimensions)] for m in (features, support, healthy, unlike))
        return network._tumor_maps(queries, network.hosts, [f], -1, u, h, d, floor)[0]

    start, stop = 3, 11
    inner = (..., *[slice(start + reach, stop - reach)] * dimensions)
    window = (..., *[slice(reach, stop - start - reach)] * dimensions)
    whole, part = maps(0, 13), maps(start, stop)
    same(part[window], whole[inner], 1e-6)
    border = (..., *[slice(start, stop)] * dimensions)
    assert (part - whole[border]).abs().max() < 1e-4 or reach  # at the border neighbors are missing
    assert (part - whole[border]).abs().max() > 0.1 or not reach


@torch.no_grad()
def test_with_a_patch_wise_score_a_tumor_map_changes_with_the_window(dimensions: int) -> None:
    block = narrow_block()
    block["decoder"] |= {"score_range": "patch", "prompts": "organs", "gate": "voxel", "score_in_maps": True}
    network = make(dimensions, block)
    torch.manual_seed(0)
    size = [8] * dimensions
    features = torch.randn(1, network.tumor_heads[-1].project.out_features, *size)
    support, healthy = (torch.randn(1, 4, *size) for _ in range(2))
    healthy[:, :, 0] = 30.0  # an organ of which one window shows nothing
    queries = torch.randn(1, 2, 16)
    whole, _ = network._tumor_maps(queries, network.hosts, [features], -1, support, healthy)
    part, _ = network._tumor_maps(
        queries, network.hosts, [features[:, :, 1:]], -1, support[:, :, 1:], healthy[:, :, 1:]
    )
    assert (part - whole[:, :, 1:]).abs().max() > 0.05


def test_channels_are_made_voxel_by_voxel() -> None:
    labels = {"background": 0, "liver": [1, 3], "spleen": 2, "liver tumor": 3}
    taxonomy = Taxonomy.from_dataset_json({**DATASET_JSON, "labels": labels, "regions_class_order": [1, 2, 3]})
    torch.manual_seed(0)
    organs, tumors = 5 * torch.randn(1, 2, 9, 7), 5 * torch.randn(1, 1, 9, 7)
    whole = to_channels(taxonomy, organs, tumors)
    window = slice(2, 6)
    same(to_channels(taxonomy, organs[:, :, window], tumors[:, :, window]), whole[:, :, window], 1e-6)


# ---------------------------------------------------------------------------------------------------- gradients
def test_noisy_assignment_is_one_hot_forward_and_soft_backward() -> None:
    torch.manual_seed(0)
    scores, weights = torch.randn(1, 4, 20, requires_grad=True), torch.randn(1, 4, 20)
    torch.manual_seed(5)
    hard = assign(scores, noisy=True)
    assert torch.equal(hard.detach().round().sort(1).values[0, :, 0], torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert torch.allclose(hard.detach(), hard.detach().round(), atol=1e-6)
    (hard * weights).sum().backward()
    torch.manual_seed(5)
    noise = -torch.log(-torch.log(torch.rand(1, 4, 20)))
    soft = reference.assign(array(scores[0]), array(noise[0]), hard=False)
    assert scores.grad is not None
    same(scores.grad[0].double(), torch.from_numpy(reference.assign_backward(soft, array(weights[0]))))


def make_trainer(
    trainer: type[ZePTTrainer], monkeypatch: pytest.MonkeyPatch, folder: Path, block: dict[str, Any] | None = None
) -> ZePTTrainer:
    """Initialized on small plans, with a query path that has left its starting point."""
    make_nnunet_folders(folder, monkeypatch)
    plans = {**make_plans(), "zept": block or narrow_block()}
    preprocessed = folder / "nnUNet_preprocessed" / plans["dataset_name"] / "nnUNetPlans_x"
    preprocessed.mkdir(parents=True)
    (preprocessed / "a.b2nd").touch()  # nnU-Net tells the file format by the names
    dataset_json = {**DATASET_JSON, "labels": TWO_KIDNEYS}
    made = trainer(plans | {"continue_training": False}, "3d_fullres", 0, dataset_json, torch.device("cpu"))
    made.initialize()
    randomize(made._zept())
    return made


def make_batch(trainer: ZePTTrainer) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([0, *(c.label for c in trainer.taxonomy.classes), *trainer.anomaly_labels.values()])
    sizes = [(16, 24, 16), (8, 12, 8), (4, 6, 4)]
    maps = [values[torch.randint(0, len(values), (2, 1, *size), generator=generator)] for size in sizes]
    return {"data": torch.randn(2, 1, *sizes[0], generator=generator), "target": maps, "keys": ["a", "b"]}


def gradients(trainer: ZePTTrainer, stage: int) -> tuple[dict[str, torch.Tensor | None], set[str]]:
    """After one training step: each parameter's gradient, and which parameters moved."""
    trainer.current_epoch = 0 if stage == 1 else trainer.num_epochs - 1
    network = trainer._zept().train()
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    trainer.train_step(make_batch(trainer))
    assert network.stage == stage
    moved = {n for n, p in network.named_parameters() if not torch.equal(p, before[n])}
    return {n: p.grad for n, p in network.named_parameters()}, moved


def advanced_names(network: ZePT) -> set[str]:
    """Parameters that stage I freezes."""
    advanced = {id(p) for p in network.stage_two_parameters()}
    return {n for n, p in network.named_parameters() if id(p) in advanced}


def has_gradient(gradient: torch.Tensor | None) -> bool:
    return gradient is not None and bool(gradient.count_nonzero())


def is_constant(name: str) -> bool:
    """No output depends on it: softmax over the tokens does not see what all keys have in common."""
    return name.endswith("to_k.bias")


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "learned queries": {"queries": "learned"},
    "score in maps": {"score_in_maps": True},
    "no grouping": {"grouping": False},
    "no relative features": {"relative": False, "prompts": "organs"},
}
ADVANCED = {"advanced", "joint", "tumor_heads", "tumor_queries", "host_to_tumor", "relative", "deviation_weight"}
"""What belongs to tumor queries alone, and trains in stage II."""
LACKS = {
    "learned queries": {"tumor_queries", "host_to_tumor"},
    "no relative features": {"relative", "deviation_weight"},
}


def narrow_settings(setting: str) -> dict[str, Any]:
    return build_block({**DATASET_JSON, "labels": TWO_KIDNEYS}, settings={"width": 16, "heads": 4, **SETTINGS[setting]})


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_gradient_reaches_every_parameter_that_the_stage_trains_and_no_other(
    stage: int, setting: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trainer = make_trainer(ZePTTrainer, monkeypatch, tmp_path, narrow_settings(setting))
    table = dict(trainer._zept().named_parameters()).get(LEARNED)
    before = None if table is None else table.detach().clone()
    found, moved = gradients(trainer, stage)
    network = trainer._zept()
    advanced = advanced_names(network)
    wanted = (ADVANCED | ({"score_weight"} if setting == "score in maps" else set())) - LACKS.get(setting, set())
    assert {n.split(".")[0] for n in advanced} == wanted
    assert {n for n in found if n.split(".")[0] in wanted} == advanced
    trained = set(found) - advanced if stage == 1 else set(found)
    idle = {n for n in trained if is_constant(n)}
    if setting == "no grouping":
        idle.add("background_queries")  # what they take up is only what is assigned to them
    assert {n for n in trained if found[n] is None} == set()
    assert {n for n in trained if not has_gradient(found[n])} - idle == set()
    assert not has_gradient(found["background_queries"]) or setting != "no grouping"
    assert all(torch.isfinite(g).all() for g in found.values() if g is not None)
    assert {n for n in set(found) - trained if has_gradient(found[n])} == set()
    assert trained - moved - idle == set()
    with_state = {n for n, p in network.named_parameters() if p in trainer.optimizer.state}
    assert with_state == trained, "moments of a frozen parameter would begin with a stage of zeros"
    assert not moved - trained, "weight decay or momentum moved a parameter that this stage freezes"
    if before is not None:  # one table of organs, tumors, and queries for abnormal tissue
        assert table is not None and table.grad is not None
        rows = [bool(row.any()) for row in table.grad]
        assert rows == [True] * 4 + [stage == 2] * 3
        assert [bool(row.any()) for row in table.detach() - before] == rows


def test_tumor_maps_send_no_gradient_into_organ_maps(dimensions: int, image: torch.Tensor) -> None:
    """Neither the gate nor the score nor the deviation: or a tumor would be learned by moving its host."""
    block = narrow_block()
    block["decoder"]["score_in_maps"] = True
    network = randomize(make_network(dimensions, block=block))
    output = network(image)
    assert output.deviation is not None and output.anomaly
    sum(m.sum() for m in (*output.tumor, *output.anomaly, output.deviation)).backward()
    for heads in (network.support_heads, network.healthy_heads):
        assert not any(has_gradient(p.grad) for p in heads.parameters())
    assert all(has_gradient(p.grad) for p in network.tumor_heads.parameters())


def test_a_batch_that_hides_a_tumor_trains_every_parameter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = {"hiding_probability": 1.0, "unlabeled_host_weight": 0.5, "width": 16, "heads": 4}
    block = build_block({**DATASET_JSON, "labels": TWO_KIDNEYS}, settings=settings)
    trainer = make_trainer(ZePTTrainer, monkeypatch, tmp_path, block)
    assert len(trainer._zept().anomaly_hosts) == 4  # a query for abnormal tissue in every organ
    assert trainer.hidden_tumor(trainer.num_epochs - 1, 0) is not None
    found, moved = gradients(trainer, 2)
    assert {n for n, g in found.items() if not has_gradient(g) and not is_constant(n)} == set()
    assert {n for n in set(found) - moved if not is_constant(n)} == set()
    assert torch.equal(trainer._zept().sees_training, hidden_visibility(trainer))
    trainer.validation_step(make_batch(trainer))
    assert not torch.equal(trainer._zept().sees_training, hidden_visibility(trainer))  # validation hides nothing


def hidden_visibility(trainer: ZePTTrainer) -> torch.Tensor:
    """Of the queries while the first batch's tumor is hidden."""
    network, hidden = trainer._zept(), trainer.hidden_tumor(trainer.num_epochs - 1, 0)
    assert hidden is not None
    seen = [True] * (network.num_organs + network.num_tumors) + [False] * len(network.anomaly_hosts)
    seen[network.num_organs + hidden] = False
    return torch.tensor(seen)[None] | torch.eye(len(seen), dtype=torch.bool)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_authors_loss_leaves_their_coarse_maps_untrained(
    stage: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They are made from detached scores and supervised at the finest scale alone."""
    trainer = make_trainer(ZePTTrainerPaper, monkeypatch, tmp_path)
    found, moved = gradients(trainer, stage)
    network = trainer._zept()
    advanced = advanced_names(network)
    untrained = {n for n, g in found.items() if not has_gradient(g) and not is_constant(n)}
    coarse = {n for n in found if n.startswith(("support_heads.", "tumor_heads.")) and n.split(".")[1] in "01"}
    wanted = coarse | {"background_queries"} | (advanced if stage == 1 else set())
    assert untrained == {n for n in wanted if not is_constant(n)}
    assert {n.split(".")[0] for n in advanced} == {"advanced", "joint", "tumor_heads"}
    if stage == 1:
        assert not moved & advanced and not any(has_gradient(found[n]) for n in advanced)
        assert not {n for n, p in network.named_parameters() if p in trainer.optimizer.state} & advanced
