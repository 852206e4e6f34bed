from __future__ import annotations

import math

import pytest
import torch

from zept_nnunet.losses.alignment import (
    published_alignment,
    query_positives,
    query_to_knowledge,
    query_to_query,
)

HOSTS = ((0,), (1, 2))  # 3 organs, 2 tumors
TAU = torch.tensor(0.5)


def _cos(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def test_positives_are_tumor_tumor_and_organ_with_its_tumor() -> None:
    want = torch.zeros(5, 5)
    want[3, 4] = want[4, 3] = 1
    for i, k in ((0, 3), (1, 4), (2, 4)):
        want[i, k] = want[k, i] = 0.5
    assert torch.equal(query_positives(HOSTS, 3), want)


@torch.no_grad()
def test_query_to_knowledge_equals_loops() -> None:
    torch.manual_seed(0)
    e, k = torch.randn(2, 3, 8), torch.randn(5, 8)
    values = []
    for b in range(2):
        for i in range(3):
            logits = [_cos(e[b, i], k[j]) / 0.5 for j in range(5)]
            values.append(-logits[i] + math.log(sum(math.exp(x) for x in logits)))
    assert query_to_knowledge(e, k, TAU).item() == pytest.approx(sum(values) / len(values), abs=1e-5)


@torch.no_grad()
def test_query_to_query_equals_loops_and_leaves_out_the_self_pair() -> None:
    torch.manual_seed(0)
    e, positives = torch.randn(2, 5, 8), query_positives(HOSTS, 3)
    values = []
    for b in range(2):
        for i in range(5):
            logits = {j: _cos(e[b, i], e[b, j]) / 0.5 for j in range(5) if j != i}
            norm = math.log(sum(math.exp(x) for x in logits.values()))
            weight = float(positives[i].sum())
            values.append(-sum(float(positives[i, j]) / weight * (logits[j] - norm) for j in logits))
    assert query_to_query(e, positives, TAU).item() == pytest.approx(sum(values) / len(values), abs=1e-5)


def test_no_positives_no_loss_and_no_nan() -> None:
    e = torch.randn(2, 3, 8, requires_grad=True)
    loss = query_to_query(e, torch.zeros(3, 3), TAU)
    loss.backward()
    assert loss.item() == 0 and (e.grad == 0).all()


def test_temperature_is_bounded_and_a_zero_embedding_is_finite() -> None:
    e = torch.zeros(1, 3, 8, requires_grad=True)
    k = torch.randn(3, 8)
    for tau in (0.0, 1e-9, 50.0):
        loss = query_to_knowledge(e, k, torch.tensor(tau)) + query_to_query(
            e, query_positives(((0,),), 2), torch.tensor(tau)
        )
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(e.grad).all()


def test_published_alignment_has_one_target_for_both_terms() -> None:
    torch.manual_seed(0)
    e, k = torch.randn(1, 5, 8), torch.randn(5, 8)
    related = (query_positives(HOSTS, 3) > 0).float() + torch.eye(5)
    want = 0.0
    for other in (k, e[0]):
        logits = e[0] @ other.T / 0.5
        want -= float((related * torch.log_softmax(logits, -1)).sum(-1).mean())
    assert published_alignment(e, k, query_positives(HOSTS, 3), TAU).item() == pytest.approx(want, abs=1e-4)
