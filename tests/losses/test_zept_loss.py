"""The weighted sum: which terms a batch has, and over which classes."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.losses import reference
from tests.network.narrow import TWO_KIDNEYS
from tests.network.reference import array
from tests.small_plans import DATASET_JSON, make_network
from zept_nnunet.losses import TERMS, ZePTLoss
from zept_nnunet.network.zept import ZePT, ZePTOutput
from zept_nnunet.plans_block import build_block
from zept_nnunet.training.targets import anomaly_labels, make_targets


@pytest.fixture
def everything() -> tuple[ZePT, Any, list[Any]]:
    return two_cases()


def two_cases(**settings: Any) -> tuple[ZePT, Any, list[Any]]:
    """Network, output and targets of two cases; liver and spleen have labeled tumors, the pancreas anomalies."""
    network = make_network(block=build_block(deepcopy(DATASET_JSON), settings=settings))
    labels = anomaly_labels(network.taxonomy, ["pancreas"])
    torch.manual_seed(0)
    output = network(torch.randn(2, 1, 16, 24, 16))
    values = torch.tensor([0, *(c.label for c in network.taxonomy.classes), *labels.values()])
    maps = [values[torch.randint(0, len(values), (2, 1, *m.shape[2:]))] for m in output.support]
    return network, output, [make_targets(m, network.taxonomy, anomalies=labels) for m in maps]


def test_deviation_is_judged_where_abnormal_tissue_is_labeled(everything: tuple[ZePT, Any, list[Any]]) -> None:
    """Dice + BCE of "in the organ and not healthy", by loops over the cases and organs that label it."""
    network, output, targets = everything
    organs = [o.name for o in network.taxonomy.organs]
    annotated = torch.ones(2, len(organs) + network.num_tumors, dtype=torch.bool)
    spleen_tumor = next(k for k, t in enumerate(network.taxonomy.tumors) if t.hosts == ("spleen",))
    annotated[1, len(organs) + spleen_tumor] = False  # the second case's spleen may hold tumors that nobody labeled
    _, terms = ZePTLoss(network, batch_dice=False)(output, targets, annotated)
    wanted = []
    for case in range(2):
        for i, name in enumerate(organs):
            if (case, name) == (1, "spleen"):
                continue
            z = output.deviation[case, i].double()
            y = (targets[0].support[case, i] & ~targets[0].healthy[case, i]).double()
            dice = (2 * (z.sigmoid() * y).sum() + 1e-5) / (z.sigmoid().sum() + y.sum() + 1e-5)
            wanted.append(1 - dice + F.binary_cross_entropy_with_logits(z, y))
    assert terms["deviation"].item() == pytest.approx(torch.stack(wanted).mean().item(), abs=1e-5)


def test_stage_one_has_organ_terms_alone(everything: tuple[ZePT, Any, list[Any]]) -> None:
    network, _, targets = everything
    network.stage = 1
    output = network(torch.randn(2, 1, 16, 24, 16))
    annotated = torch.ones(2, network.num_organs + network.num_tumors, dtype=torch.bool)
    _, terms = ZePTLoss(network, batch_dice=False)(output, targets, annotated)
    assert set(terms) == set(TERMS)
    assert all(terms[t] == 0 for t in ("tumor", "anomaly", "deviation"))
    assert all(terms[t] > 0 for t in ("organ_support", "organ_healthy"))


def test_a_hidden_tumor_is_judged_as_abnormal_tissue_alone() -> None:
    network, output, targets = two_cases(hiding_probability=0.5)
    annotated = torch.ones(2, network.num_organs + network.num_tumors, dtype=torch.bool)
    loss = ZePTLoss(network, batch_dice=False)
    _, open_terms = loss(output, targets, annotated)
    _, hidden = loss(output, targets, annotated, hidden=0)
    aligned = {"query_to_knowledge", "query_to_query"}
    for term in set(TERMS) - {"tumor"} - aligned:
        assert torch.equal(hidden[term], open_terms[term])
    only_spleen = annotated.clone()
    only_spleen[:, network.num_organs] = False
    for term in {"tumor"} | aligned:
        assert torch.equal(hidden[term], loss(output, targets, only_spleen)[1][term])
        assert not torch.equal(hidden[term], open_terms[term])
    assert annotated.all()  # the caller's own stays as it was


def test_each_organs_query_for_abnormal_tissue_learns_its_tumors_and_anomalies() -> None:
    network, output, targets = two_cases(hiding_probability=0.5)
    annotated = torch.ones(2, network.num_organs + network.num_tumors, dtype=torch.bool)
    annotated[1, network.num_organs] = False  # nobody labeled the second case's liver tumors
    _, terms = ZePTLoss(network, batch_dice=False)(output, targets, annotated)
    assert network.anomaly_hosts == ((0,), (1,), (2,))
    total, weights = 0.0, [0.5**s for s in range(len(output.anomaly))]
    for s, weight in enumerate(weights):
        parts = []
        for case in range(2):
            for organ in range(3):
                if (case, organ) == (1, 0):
                    continue
                z = output.anomaly[s][case, organ].double()
                y = (targets[s].support & ~targets[s].healthy)[case, organ].double()
                dice = (2 * (z.sigmoid() * y).sum() + 1e-5) / (z.sigmoid().sum() + y.sum() + 1e-5)
                parts.append(1 - dice + F.binary_cross_entropy_with_logits(z, y))
        total += weight / sum(weights) * torch.stack(parts).mean().item()
    assert terms["anomaly"].item() == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_open_voxels_of_an_unlabeled_host_count_by_their_weight(
    everything: tuple[ZePT, Any, list[Any]], share: float
) -> None:
    """The pancreas holds synthetic anomalies: its other voxels may hold tumors that nobody labeled."""
    network, output, targets = everything
    annotated = torch.ones(2, network.num_organs + network.num_tumors, dtype=torch.bool)
    _, terms = ZePTLoss(network, batch_dice=False, unlabeled_host_weight=share)(output, targets, annotated)
    pancreas, parts, entropies = 2, [], []
    for organ in range(3):
        entropy, total_weight = 0.0, 0.0
        for case in range(2):
            z = output.deviation[case, organ].double()
            y = targets[0].abnormal[case, organ].double()
            is_open = targets[0].healthy[case, organ] & (organ == pancreas)
            w = torch.where(is_open, share, 1.0).double()
            p = z.sigmoid()
            parts.append(1 - (2 * (p * y * w).sum() + 1e-5) / ((p * w).sum() + (y * w).sum() + 1e-5))
            entropy += (F.binary_cross_entropy_with_logits(z, y, reduction="none") * w).sum().item()
            total_weight += w.sum().item()
        entropies.append(entropy / total_weight)
    wanted = torch.stack(parts).mean().item() + sum(entropies) / 3
    assert terms["deviation"].item() == pytest.approx(wanted, abs=1e-5)


def test_an_organ_labeled_as_a_whole_says_nothing_of_its_healthy_tissue(
    everything: tuple[ZePT, Any, list[Any]],
) -> None:
    """Nobody outlined the first case's liver tumors: its label is liver and tumors, so only the support is told."""
    network, output, targets = everything
    annotated = torch.ones(2, network.num_organs + network.num_tumors, dtype=torch.bool)
    annotated[0, network.num_organs] = False
    for maps in (output.healthy, output.support):
        maps[0].retain_grad()
    loss, _ = ZePTLoss(network, batch_dice=False)(output, targets, annotated)
    loss.backward()
    healthy, support = output.healthy[0].grad, output.support[0].grad
    liver, spleen = 0, 1
    assert not healthy[0, liver].any() and healthy[0, spleen].any() and healthy[1, liver].any()
    assert support[0, liver].any()


# ---------------------------------------------------------------------------------------------------- as a whole
LABELS = {**TWO_KIDNEYS, "ignore": 7}
ORGANS = ("liver", "left kidney", "right kidney", "spleen")
CASES: dict[str, tuple[str, ...]] = {
    "full": (*ORGANS, "liver tumor", "kidney tumor"),
    "liver alone": (*ORGANS, "liver tumor", "kidney tumor"),  # labels all, shows little
    "lits": ("liver", "liver tumor"),
    "kits": ("kidney tumor",),  # and not in which kidney
    "organs": ORGANS,
    "left": ("left kidney", "spleen", "kidney tumor"),
}
"""What each case of the batch labels."""
SIZES = {2: [(5, 12), (4, 9), (3, 6)], 3: [(3, 3, 12), (2, 3, 9), (2, 2, 6)]}
WEIGHTS = {"tumor": 2.0, "anomaly": 0.5, "deviation": 0.25, "query_to_query": 0.0}


@cache
def network_of(variant: str = "zept", with_ignore: bool = True, **settings: Any) -> ZePT:
    """Whose classes and hosts the loss reads."""
    labels = LABELS if with_ignore else TWO_KIDNEYS
    settings = {"width": 16, "heads": 4, **settings}
    return make_network(2, block=build_block({**DATASET_JSON, "labels": labels}, variant, settings=settings))


def label_maps(size: tuple[int, ...], anomaly: int, with_ignore: bool) -> torch.Tensor:
    """(B, 1, *): voxels at random, the left kidney and its tumor in the first third of the last axis, and the right one
    with its tumor in the last third.
    """
    third, maps = size[-1] // 3, []
    for case, names in CASES.items():
        seen = ("liver", "liver tumor") if case == "liver alone" else names
        values = [0, *(LABELS[n] for n in seen if "kidney" not in n)]
        values += [anomaly] if "spleen" in seen else []
        values += [LABELS["ignore"]] if with_ignore else []
        label = torch.tensor(values)[torch.randint(0, len(values), size)]
        tumors = torch.rand(size) < 0.3 if "kidney tumor" in seen else torch.zeros(size, dtype=torch.bool)
        for kidney, part in (("left kidney", slice(0, third)), ("right kidney", slice(-third, None))):
            label[..., part][tumors[..., part]] = LABELS["kidney tumor"]
            if kidney in seen:
                label[..., 0 if kidney == "left kidney" else -1] = LABELS[kidney]
        maps.append(label[None])
    return torch.stack(maps)


def random_output(network: ZePT, dimensions: int, stage: int) -> ZePTOutput:
    """Maps of every scale, with gradients."""
    cases, knowledge = len(CASES), network.knowledge_organs.shape[1]
    sizes = SIZES[dimensions] if network.is_calibrated else SIZES[dimensions][:1]
    organs, tumors, abnormal = network.num_organs, network.num_tumors, len(network.anomaly_hosts)

    def maps(number: int, is_there: bool = True) -> list[torch.Tensor]:
        return [3 * torch.randn(cases, number, *size) for size in sizes] if is_there else []

    return ZePTOutput(
        support=maps(organs),
        healthy=maps(organs),
        tumor=maps(tumors, stage == 2),
        anomaly=maps(abnormal, stage == 2 and abnormal > 0),
        deviation=maps(organs)[0] if stage == 2 and network.relative is not None else None,
        organ_embedding=torch.randn(cases, organs, knowledge),
        tumor_embedding=torch.randn(cases, tumors if stage == 2 else 0, knowledge),
        temperature=torch.tensor(0.3),
        anchor=torch.zeros(()),
    )


def equals_loops(
    network: ZePT, dimensions: int, stage: int, batch_dice: bool, share: float = 1.0, hidden: str | None = None
) -> dict[str, float]:
    """Each term, and their weighted sum."""
    torch.manual_seed(0)
    taxonomy = network.taxonomy
    with_ignore = taxonomy.ignore_label is not None
    spleen, own = LABELS["spleen"], 8 if with_ignore else 7
    anomalies = {spleen: own} if network.anomaly_hosts else {}
    output = random_output(network, dimensions, stage)
    maps = [label_maps(tuple(m.shape[2:]), own if anomalies else spleen, with_ignore) for m in output.support]
    names = [c.name for c in taxonomy.classes]
    annotated = torch.tensor([[name in labeled for name in names] for labeled in CASES.values()])
    loss = ZePTLoss(network, batch_dice, weights=WEIGHTS, unlabeled_host_weight=share)
    targets = [make_targets(m, taxonomy, anomalies=anomalies) for m in maps]
    index = None if hidden is None else [t.name for t in taxonomy.tumors].index(hidden)
    total, terms = loss(output, targets, annotated, index)

    fields = {
        name: [array(m) for m in value] if isinstance(value, list) else None if value is None else array(value)
        for name, value in output._asdict().items()
    }
    wanted = reference.zept_loss(
        network,
        {**fields, "temperature": 0.3},
        [m[:, 0].numpy() for m in maps],
        [set(labeled) for labeled in CASES.values()],
        anomalies,
        batch_dice,
        share,
        hidden,
    )
    assert set(terms) == set(wanted) == set(TERMS)
    for name, term in terms.items():
        assert term.item() == pytest.approx(wanted[name], rel=1e-5, abs=1e-5), name
    assert total.item() == pytest.approx(sum(WEIGHTS.get(n, 1.0) * w for n, w in wanted.items()), rel=1e-5, abs=5e-5)
    return wanted


@pytest.mark.parametrize("with_ignore", [False, True], ids=["", "ignore"])
@pytest.mark.parametrize("batch_dice", [False, True], ids=["", "batch"])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_every_term_of_stage_two_equals_loops(
    dimensions: int, share: float, batch_dice: bool, with_ignore: bool
) -> None:
    network = network_of(with_ignore=with_ignore)
    assert min(equals_loops(network, dimensions, 2, batch_dice, share).values()) > 0.1


@pytest.mark.parametrize("batch_dice", [False, True], ids=["", "batch"])
@pytest.mark.parametrize("hidden", [None, "liver tumor", "kidney tumor"])
def test_every_term_of_a_batch_that_hides_a_tumor_equals_loops(hidden: str | None, batch_dice: bool) -> None:
    """With a query for abnormal tissue of each organ."""
    equals_loops(network_of(hiding_probability=0.5), 2, 2, batch_dice, 0.5, hidden)


@pytest.mark.parametrize("batch_dice", [False, True], ids=["", "batch"])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_every_term_of_stage_one_equals_loops(dimensions: int, batch_dice: bool) -> None:
    wanted = equals_loops(network_of(), dimensions, 1, batch_dice)
    assert {name for name, term in wanted.items() if term} == {"organ_support", "organ_healthy", "query_to_knowledge"}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("batch_dice", [False, True], ids=["", "batch"])
def test_every_term_of_the_authors_loss_equals_loops(batch_dice: bool, stage: int) -> None:
    equals_loops(network_of("paper"), 2, stage, batch_dice)


@pytest.mark.parametrize("setting", [{"synthetic_anomalies": False}, {"relative": False, "prompts": "organs"}], ids=str)
def test_every_term_without_a_part_equals_loops(setting: dict[str, Any]) -> None:
    equals_loops(network_of(**setting), 2, 2, True, 0.5)


def judged(organ: str, labeled: tuple[str, ...]) -> dict[str, bool]:
    """Whether a case that labels these classes judges an organ's support and its deviation."""
    network = network_of()
    torch.manual_seed(0)
    output, taxonomy = random_output(network, 2, 2), network.taxonomy
    assert output.deviation is not None
    for m in (output.support[0], output.deviation):
        m.requires_grad_()
    names = [c.name for c in taxonomy.classes]
    annotated = torch.tensor([[name in labeled for name in names]] * len(CASES))
    maps = [label_maps(tuple(m.shape[2:]), 8, True) for m in output.support]
    targets = [make_targets(m, taxonomy, anomalies={LABELS["spleen"]: 8}) for m in maps]
    ZePTLoss(network, batch_dice=False)(output, targets, annotated)[0].backward()
    i = ORGANS.index(organ)
    gradients = {"support": output.support[0].grad, "deviation": output.deviation.grad}
    return {name: bool(g[:, i].any()) for name, g in gradients.items() if g is not None}


def test_an_organ_that_a_case_does_not_label_holds_no_synthetic_anomalies_there() -> None:
    """Nor is it known where the organ is, and that it would be healthy."""
    assert judged("spleen", ("liver", "liver tumor")) == {"support": False, "deviation": False}
    assert judged("spleen", ("spleen",)) == {"support": True, "deviation": True}


def test_a_tumor_of_two_organs_is_told_apart_by_the_labels_of_both() -> None:
    for kidney, other in (("left kidney", "right kidney"), ("right kidney", "left kidney")):
        assert judged(kidney, ("kidney tumor",)) == {"support": False, "deviation": False}
        assert judged(kidney, ("kidney tumor", kidney)) == {"support": False, "deviation": False}
        assert judged(kidney, ("kidney tumor", kidney, other)) == {"support": True, "deviation": True}
        assert judged(kidney, (kidney,)) == {"support": True, "deviation": False}
