"""What nnU-Net decodes: a tumor before its hosts, from its threshold on."""

from __future__ import annotations

import torch

from zept_nnunet.network.heads import at_thresholds, keep_to_annotated

HOSTS = ((0,), (1,), (0, 1), ())  # the last one: anywhere in the body


def decode(organs: torch.Tensor, tumors: torch.Tensor) -> torch.Tensor:
    background = torch.zeros_like(organs[:, :1])
    return torch.cat((background, organs, tumors), 1).argmax(1)


def test_without_thresholds_nothing_changes() -> None:
    organs, tumors = torch.randn(1, 2, 50), torch.randn(1, 4, 50)
    same = at_thresholds(organs, tumors, HOSTS, [None] * 4)
    assert same[0] is organs and same[1] is tumors


def test_a_tumor_is_decoded_exactly_where_it_exceeds_its_threshold() -> None:
    """Even where its organ's map is sure of healthy tissue; elsewhere the organ is decoded as before."""
    organs, tumors = torch.randn(1, 1, 4000) * 5, torch.randn(1, 3, 4000) * 5
    thresholds = [-3.0, 2.0, 0.5]
    margins = tumors - torch.tensor(thresholds).view(1, -1, 1)
    found = decode(*at_thresholds(organs, tumors, ((0,), (0,), ()), thresholds))
    wanted = torch.where(margins.amax(1) > 0, margins.argmax(1) + 2, (organs[:, 0] > 0).long())
    assert torch.equal(found, wanted)


def test_windows_and_folds_that_disagree_decide_about_a_tumor_as_its_mean_does() -> None:
    """Also about the organ: one window sees it and the other does not."""
    organs, tumors = torch.randn(2, 1, 4000) * 9, torch.randn(2, 1, 4000) * 5
    healthy, margin = at_thresholds(organs, tumors, ((0,),), [0.0])
    found = decode(healthy.mean(0, keepdim=True), margin.mean(0, keepdim=True))[0]
    mean = tumors.mean(0)[0]
    is_clear = mean.abs() > 1e-4
    assert torch.equal((found == 2)[is_clear], (mean > 0)[is_clear])


def test_an_organ_that_hosts_none_of_the_calibrated_tumors_keeps_its_map() -> None:
    organs, tumors = torch.randn(1, 2, 100), torch.randn(1, 4, 100)
    healthy, shifted = at_thresholds(organs, tumors, HOSTS, [1.0, None, None, None])
    assert torch.equal(healthy[:, 1], organs[:, 1]) and not torch.equal(healthy[:, 0], organs[:, 0])
    assert torch.equal(shifted[:, 1:], tumors[:, 1:])


def test_what_a_case_does_not_label_goes_to_its_host_or_to_nothing() -> None:
    organs, tumors = torch.randn(2, 2, 3000) * 5, torch.randn(2, 4, 3000) * 5
    labels = torch.tensor([[True, False, False, True, True, False], [True] * 6])
    kept, found = keep_to_annotated(organs, tumors, organs, HOSTS, labels)
    assert torch.allclose(kept[1], organs[1], atol=1e-4) and torch.equal(found[1], tumors[1])
    one_of = 1 - torch.sigmoid(-organs[0, 0].double()) * torch.sigmoid(-tumors[0, 0].double())  # an unlabeled tumor's
    assert torch.allclose(torch.sigmoid(kept[0, 0].double()), one_of, atol=1e-6)
    assert torch.equal(found[0, 1:3], tumors[0, 1:3])
    decoded = decode(kept, found)[0]
    assert {int(c) for c in decoded.unique()} == {0, 1, 4, 5}  # background, the first organ, two tumors


def test_of_two_hosts_the_one_that_it_lies_in_takes_an_unlabeled_tumor() -> None:
    """Also as nnU-Net adds windows up, in float16, which cannot tell a sure tumor with this healthy map or that."""
    organs, tumors = torch.tensor([[[-11.0], [-7.0]]]), torch.tensor([[[7.0]]])
    support = torch.tensor([[[-9.0], [5.0]]])
    labels = torch.tensor([[True, True, False]])
    for mirrored in (False, True):
        args = [x.flip(1) if mirrored else x for x in (organs, support)]
        kept, found = keep_to_annotated(args[0], tumors, args[1], ((0, 1),), labels)
        assert decode(kept.half(), found.half()).item() == (1 if mirrored else 2)
        assert (kept > 0).sum() == 1  # decoded by regions, the other host does not claim it either
