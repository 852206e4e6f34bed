from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.losses import reference
from tests.network.reference import array
from zept_nnunet.losses.alignment import (
    published_alignment,
    query_positives,
    query_to_knowledge,
    query_to_query,
)

HOSTS = ((0,), (1, 2))  # 3 organs, 2 tumors
TAU = torch.tensor(0.5)


def test_positives_are_tumor_tumor_and_organ_with_its_tumor() -> None:
    want = torch.zeros(5, 5)
    want[3, 4] = want[4, 3] = 1
    for i, k in ((0, 3), (1, 4), (2, 4)):
        want[i, k] = want[k, i] = 0.5
    assert torch.equal(query_positives(HOSTS, 3), want)


@pytest.mark.parametrize("num_queries", [3, 5])  # stage I has organs alone
@torch.no_grad()
def test_the_terms_equal_loops(num_queries: int) -> None:
    torch.manual_seed(0)
    e, k = torch.randn(2, num_queries, 8), torch.randn(5, 8)
    positives = query_positives(HOSTS, 3)[:num_queries, :num_queries]
    pairs = [(array(embedding), array(k)) for embedding in e]
    wanted = [reference.query_to_knowledge(*pair, 0.5) for pair in pairs]
    assert query_to_knowledge(e, k, TAU).item() == pytest.approx(np.mean(wanted), abs=1e-5)
    wanted = [reference.query_to_query(embedding, HOSTS, 3, 0.5) for embedding, _ in pairs]
    assert query_to_query(e, positives, TAU).item() == pytest.approx(np.mean(wanted), abs=1e-5)
    assert (np.mean(wanted) > 0.1) == (num_queries == 5)
    wanted = [reference.published_alignment(*pair, HOSTS, 3, 0.5) for pair in pairs]
    assert published_alignment(e, k, positives, TAU).item() == pytest.approx(np.mean(wanted), abs=1e-4)


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
