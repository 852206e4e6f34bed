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


SHOWN = {
    "all": [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]],
    "some": [[0, 2, 3, 4], [1, 3]],  # in the second case nothing is related
    "in one case": [[], [0, 3]],
}


@pytest.mark.parametrize("which", SHOWN)
@pytest.mark.parametrize("num_queries", [3, 5])  # stage I has organs alone
@torch.no_grad()
def test_the_terms_equal_loops(num_queries: int, which: str) -> None:
    torch.manual_seed(0)
    e, k = torch.randn(2, num_queries, 8), torch.randn(5, 8)
    positives = query_positives(HOSTS, 3)[:num_queries, :num_queries]
    shown = [[c for c in case if c < num_queries] for case in SHOWN[which]]
    flags = torch.tensor([[c in case for c in range(num_queries)] for case in shown])
    wanted = reference.query_to_knowledge(array(e), array(k), 0.5, shown)
    assert query_to_knowledge(e, k, TAU, flags).item() == pytest.approx(wanted, abs=1e-5) and wanted > 0.1
    wanted = reference.query_to_query(array(e), HOSTS, 3, 0.5, shown)
    assert query_to_query(e, positives, TAU, flags).item() == pytest.approx(wanted, abs=1e-5)
    assert (wanted > 0.1) == (num_queries == 5 and which != "in one case")  # one other: p is 1
    of_cases = [reference.published_alignment(array(embedding), array(k), HOSTS, 3, 0.5) for embedding in e]
    assert published_alignment(e, k, positives, TAU).item() == pytest.approx(np.mean(of_cases), abs=1e-4)


@pytest.mark.parametrize("is_shown", [True, False])
def test_no_positives_or_nothing_shown_no_loss_and_no_nan(is_shown: bool) -> None:
    e = torch.randn(2, 3, 8, requires_grad=True)
    flags = torch.full((2, 3), is_shown)
    positives = torch.zeros(3, 3) if is_shown else query_positives(((0,),), 2)
    loss = query_to_query(e, positives, TAU, flags)
    if not is_shown:
        loss = loss + query_to_knowledge(e, torch.randn(3, 8), TAU, flags)
    loss.backward()
    assert loss.item() == 0 and (e.grad == 0).all()


def test_temperature_is_bounded_and_a_zero_embedding_is_finite() -> None:
    e = torch.zeros(1, 3, 8, requires_grad=True)
    k = torch.randn(3, 8)
    for tau in (0.0, 1e-9, 50.0):
        every = torch.ones(1, 3, dtype=torch.bool)
        loss = query_to_knowledge(e, k, torch.tensor(tau), every)
        loss = loss + query_to_query(e, query_positives(((0,),), 2), torch.tensor(tau), every)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(e.grad).all()
