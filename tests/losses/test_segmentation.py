from __future__ import annotations

import pytest
import torch

from zept_nnunet.losses.segmentation import AnnotatedDiceBCE


def _reference(z: torch.Tensor, y: torch.Tensor, annotated: torch.Tensor, valid: torch.Tensor | None) -> float:
    """Per case and class, by loops (batch_dice off)."""
    values = []
    for b in range(z.shape[0]):
        for c in range(z.shape[1]):
            if not annotated[b, c]:
                continue
            keep = torch.ones_like(z[b, c], dtype=torch.bool) if valid is None else valid[b, 0]
            p, t = torch.sigmoid(z[b, c][keep]).double(), y[b, c][keep].double()
            dice = (2 * (p * t).sum() + 1e-5) / (p.sum() + t.sum() + 1e-5)
            bce = -(t * p.log() + (1 - t) * (1 - p).log()).mean()
            values.append(float(1 - dice + bce))
    return sum(values) / len(values)


@pytest.mark.parametrize("spatial", [(5, 6), (4, 5, 3)])
def test_equals_loops_over_cases_and_classes(spatial: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    z, y = torch.randn(3, 4, *spatial), torch.rand(3, 4, *spatial) > 0.6
    loss = AnnotatedDiceBCE(batch_dice=False)
    everything = torch.ones(3, 4, dtype=torch.bool)
    assert loss(z, y, everything, None).item() == pytest.approx(_reference(z, y, everything, None), abs=1e-5)
    some = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)
    assert loss(z, y, some, None).item() == pytest.approx(_reference(z, y, some, None), abs=1e-5)
    valid = (torch.rand(1, 1, *spatial) > 0.3).expand(3, 1, *spatial)
    assert loss(z, y, some, valid).item() == pytest.approx(_reference(z, y, some, valid), abs=1e-5)


def test_an_unannotated_class_neither_rewards_nor_punishes() -> None:
    z = torch.randn(2, 2, 4, 4, requires_grad=True)
    y = torch.zeros(2, 2, 4, 4, dtype=torch.bool)
    annotated = torch.tensor([[True, False], [True, False]])
    AnnotatedDiceBCE(batch_dice=True)(z, y, annotated, None).backward()
    assert (z.grad[:, 1] == 0).all() and (z.grad[:, 0] != 0).any()


def test_nothing_annotated_is_zero_with_a_zero_gradient() -> None:
    z = torch.randn(1, 2, 4, 4, requires_grad=True)
    loss = AnnotatedDiceBCE(batch_dice=True)(z, z > 0, torch.zeros(1, 2, dtype=torch.bool), None)
    loss.backward()
    assert loss.item() == 0 and (z.grad == 0).all()
