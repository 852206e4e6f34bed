"""The weighted sum: which terms a batch has, and over which classes."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.small_plans import DATASET_JSON, make_network
from zept_nnunet.losses import TERMS, ZePTLoss
from zept_nnunet.network.zept import ZePT
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
    for term in set(TERMS) - {"tumor"}:
        assert torch.equal(hidden[term], open_terms[term])
    only_spleen = annotated.clone()
    only_spleen[:, network.num_organs] = False
    assert torch.equal(hidden["tumor"], loss(output, targets, only_spleen)[1]["tumor"])
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
    pancreas, parts, total_weight, entropy = 2, [], 0.0, 0.0
    for case in range(2):
        for organ in range(3):
            z = output.deviation[case, organ].double()
            y = targets[0].abnormal[case, organ].double()
            is_open = targets[0].healthy[case, organ] & (organ == pancreas)
            w = torch.where(is_open, share, 1.0).double()
            p = z.sigmoid()
            parts.append(1 - (2 * (p * y * w).sum() + 1e-5) / ((p * w).sum() + (y * w).sum() + 1e-5))
            entropy += (F.binary_cross_entropy_with_logits(z, y, reduction="none") * w).sum().item()
            total_weight += w.sum().item()
    wanted = torch.stack(parts).mean().item() + entropy / total_weight
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
