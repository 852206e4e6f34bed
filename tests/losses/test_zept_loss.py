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
from zept_nnunet.taxonomy import Taxonomy
from zept_nnunet.training.targets import anomaly_labels, make_targets


@pytest.fixture
def everything() -> tuple[ZePT, Any, list[Any]]:
    """Network, output and targets of two cases; liver and spleen have labeled tumors, the pancreas anomalies."""
    block = build_block(deepcopy(DATASET_JSON))
    taxonomy = Taxonomy.from_dict(block["taxonomy"])
    labels = anomaly_labels(taxonomy, block["anomalies"].values())
    network = make_network(block=block)
    torch.manual_seed(0)
    output = network(torch.randn(2, 1, 16, 24, 16))
    values = torch.tensor([0, *(c.label for c in taxonomy.classes), *labels.values()])
    maps = [values[torch.randint(0, len(values), (2, 1, *m.shape[2:]))] for m in output.support]
    return network, output, [make_targets(m, taxonomy, anomalies=labels) for m in maps]


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
