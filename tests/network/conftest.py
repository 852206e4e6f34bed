"""Small networks on small plans."""

from __future__ import annotations

import pytest
import torch

from tests.small_plans import make_network


@pytest.fixture(params=[3, 2], ids=["3d", "2d"])
def dimensions(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def network(dimensions: int) -> torch.nn.Module:
    return make_network(dimensions)


@pytest.fixture
def image(dimensions: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 1, *(16, 24, 16)[:dimensions])


@pytest.fixture
def as_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evidence against a tumor counts in full at inference too."""
    monkeypatch.setattr("zept_nnunet.network.zept._EVIDENCE_FLOOR", 1e4)
