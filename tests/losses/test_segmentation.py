from __future__ import annotations

import pytest
import torch

from zept_nnunet.losses.segmentation import AnnotatedDiceBCE


def _reference(z: torch.Tensor, y: torch.Tensor, annotated: torch.Tensor, valid: torch.Tensor | None) -> float:
    """Per case and class, by loops (batch_dice off)."""
    entropies, overlaps = [], []
    for b in range(z.shape[0]):
        for c in range(z.shape[1]):
            if not annotated[b, c]:
                continue
            keep = torch.ones_like(z[b, c], dtype=torch.bool) if valid is None else valid[b, 0]
            p, t = torch.sigmoid(z[b, c][keep]).double(), y[b, c][keep].double()
            dice = (2 * (p * t).sum() + 1e-5) / (p.sum() + t.sum() + 1e-5)
            bce = -(t * p.log() + (1 - t) * (1 - p).log()).mean()
            entropies.append(float(bce))
            if t.any():
                overlaps.append(float(1 - dice))
    return sum(entropies) / len(entropies) + sum(overlaps) / max(len(overlaps), 1)


@pytest.mark.parametrize("spatial", [(5, 6), (4, 5, 3)])
def test_equals_loops_over_cases_and_classes(spatial: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    z, y = torch.randn(3, 4, *spatial), torch.rand(3, 4, *spatial) > 0.6
    y[0, 1] = y[2, 2] = False  # two classes that a case annotates and does not show
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


def test_the_dice_of_a_batch_is_over_the_classes_that_it_shows() -> None:
    torch.manual_seed(0)
    z, y = torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4) > 0.6
    y[0, 0] = False  # shown by the other case
    y[:, 2] = False  # by none
    p = z.sigmoid()
    dice = (2 * (p * y).sum((0, 2, 3)) + 1e-5) / (p.sum((0, 2, 3)) + y.sum((0, 2, 3)) + 1e-5)
    wanted = (1 - dice[:2]).mean() + torch.nn.functional.binary_cross_entropy_with_logits(z, y.float())
    loss = AnnotatedDiceBCE(batch_dice=True)(z, y, torch.ones(2, 3, dtype=torch.bool), None)
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-6)


@pytest.mark.parametrize("batch_dice", [True, False])
def test_nothing_is_gained_by_denying_what_is_absent_to_the_last_digit(batch_dice: bool) -> None:
    """From 1e-4 to 1e-12 the loss of an absent class falls by no more than the 1e-4 that the BCE has left."""
    y = torch.zeros(2, 1, 8, 8, 8, dtype=torch.bool)
    annotated = torch.ones(2, 1, dtype=torch.bool)
    loss = AnnotatedDiceBCE(batch_dice)
    sure, surer = (loss(torch.full(y.shape, z), y, annotated, None).item() for z in (-9.2, -27.6))
    assert 0 <= sure - surer < 2e-4


def test_voxels_that_are_ignored_show_no_class() -> None:
    z, y = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    y[..., 0] = True
    valid = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    valid[..., 0] = False
    loss = AnnotatedDiceBCE(batch_dice=False)(z, y, torch.ones(1, 1, dtype=torch.bool), valid)
    assert loss.item() == pytest.approx(0.6931, abs=1e-3)  # the BCE alone
