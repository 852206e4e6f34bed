from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.losses import reference
from tests.network.reference import array
from tests.two_processes import in_two_processes
from zept_nnunet.losses.segmentation import AnnotatedDiceBCE

PATTERNS = torch.tensor([[1, 0, 1, 0, 1], [1, 1, 1, 0, 1], [1, 0, 0, 0, 1]], dtype=torch.bool)
"""Of three cases and five classes; the fourth is annotated by none."""


@pytest.mark.parametrize("spatial", [(5, 6), (4, 5, 3)])
@pytest.mark.parametrize("weigh", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("with_ignore", [False, True], ids=["", "ignore"])
@pytest.mark.parametrize("batch_dice", [False, True], ids=["", "batch"])
def test_equals_loops_over_cases_classes_and_voxels(
    batch_dice: bool, with_ignore: bool, weigh: bool, spatial: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    z, y = 3 * torch.randn(3, 5, *spatial), torch.rand(3, 5, *spatial) > 0.7
    y[0, 0] = y[2, 0] = False  # cases that annotate a class and do not show it
    y[:, 4] = False  # nor does any of them that one
    valid = torch.rand(3, 1, *spatial) > 0.2 if with_ignore else None
    weight = None
    if weigh:  # as λ: voxels that count a quarter or nothing, others for each class
        weight = torch.tensor([0.0, 0.25, 1.0])[torch.randint(0, 3, (3, 5, *spatial))]
        weight[:, 2] = 1.0
        weight[1, 1] = 0.0  # all that a case has to say of a class
    weights = np.ones(z.shape) if weight is None else array(weight)
    weights = weights if valid is None else weights * array(valid)
    flat = [m.reshape(3, 5, -1) for m in (array(z), y.numpy(), weights)]
    for annotated in (PATTERNS, torch.ones(3, 5, dtype=torch.bool)):
        wanted = reference.annotated_dice_bce(flat[0], flat[1], annotated.numpy(), flat[2], batch_dice)
        got = AnnotatedDiceBCE(batch_dice)(z, y, annotated, valid, weight).item()
        assert got == pytest.approx(wanted, abs=1e-5)


def test_what_a_class_weighs_does_not_depend_on_which_other_classes_are_annotated() -> None:
    """The loss is the mean over classes, whether they go through together or each by itself."""
    torch.manual_seed(0)
    z, y = torch.randn(2, 2, 6, 6), torch.rand(2, 2, 6, 6) > 0.6
    weight = torch.rand(2, 2, 6, 6).square()
    weight[:, 1] *= 0.2
    loss, annotated = AnnotatedDiceBCE(batch_dice=False), torch.ones(2, 2, dtype=torch.bool)
    together = loss(z, y, annotated, None, weight).item()
    alone = [loss(z, y, annotated & (torch.arange(2) == c), None, weight).item() for c in range(2)]
    assert together == pytest.approx(sum(alone) / 2, abs=1e-6)


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


# ---------------------------------------------------------------------------------------------------- two processes
def whole_batch(with_ignore: bool, weigh: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Logits, target, valid voxels and weights of four cases; the first two show classes that the others do not."""
    generator = torch.Generator().manual_seed(0)
    z, y = 3 * torch.randn(4, 5, 5, 6, generator=generator), torch.rand(4, 5, 5, 6, generator=generator) > 0.7
    y[2:, [1, 3]] = False
    y[:, 4] = False  # and nobody shows this one
    valid = weight = None
    if with_ignore:  # as many voxels in either half, over which the means of the BCE are taken
        valid = torch.arange(30).view(1, 1, 5, 6).expand(4, 1, -1, -1) % 3 > 0
    if weigh:
        weight = torch.tensor([0.25, 1.0])[torch.randint(0, 2, (1, 5, 5, 6), generator=generator)].expand(4, -1, -1, -1)
    return z, y, valid, weight


KINDS = [(False, False), (True, False), (True, True)]


def loss_in_a_process(rank: int) -> list[tuple[Tensor, Tensor]]:
    """Loss and gradient of the logits of this process's two cases, for each kind."""
    half, results = slice(2 * rank, 2 * rank + 2), []
    for kind in KINDS:
        z, y, valid, weight = (m if m is None else m[half] for m in whole_batch(*kind))
        z = z.clone().requires_grad_()
        loss = AnnotatedDiceBCE(batch_dice=True, ddp=True)(z, y, torch.ones(2, 5, dtype=torch.bool), valid, weight)
        loss.backward()
        results.append((loss.detach(), z.grad))
    return results


def test_two_processes_of_which_one_shows_fewer_classes_count_as_one(tmp_path: Path) -> None:
    """DDP takes the mean of the processes' gradients, so theirs are those of the mean of their losses."""
    halves = in_two_processes(loss_in_a_process, tmp_path)
    for kind, first, second in zip(KINDS, *halves, strict=True):
        z, y, valid, weight = whole_batch(*kind)
        z.requires_grad_()
        loss = AnnotatedDiceBCE(batch_dice=True)(z, y, torch.ones(4, 5, dtype=torch.bool), valid, weight)
        loss.backward()
        torch.testing.assert_close((first[0] + second[0]) / 2, loss.detach())
        torch.testing.assert_close(torch.cat((first[1], second[1])) / 2, z.grad)
        assert first[0] != second[0]  # the BCE is each one's own
