from __future__ import annotations

import torch

from zept_nnunet.network.self_prompting import (
    calibrated_prompts,
    calibrated_score,
    minmax_prompts,
    minmax_score,
    shrink_to,
)


def test_calibrated_score_is_in_the_organ_and_not_healthy() -> None:
    u, h = torch.tensor([[4.0, 4.0, -4.0]]), torch.tensor([[-4.0, 4.0, -4.0]])
    p = torch.sigmoid(calibrated_score(u, h))
    want = torch.sigmoid(u) * (1 - torch.sigmoid(h))
    assert torch.allclose(p, want, atol=1e-6)


def test_minmax_score_of_a_constant_patch_is_zero() -> None:
    assert torch.equal(minmax_score(torch.full((2, 3, 4, 4), 1.7)), torch.zeros(2, 1, 4, 4))


def test_minmax_score_spans_zero_to_one_and_is_high_where_no_organ_answers() -> None:
    maps = torch.tensor([[[5.0, -5.0, 0.0], [-5.0, -5.0, 1.0]]])
    assert torch.allclose(minmax_score(maps), torch.tensor([[[0.0, 1.0, 0.4]]]))


def test_prompt_opens_at_the_anomalous_voxels_of_the_host_alone() -> None:
    support = torch.tensor([[[5.0, 5.0, -5.0, -5.0], [-5.0, -5.0, 5.0, 5.0]]])
    score = torch.tensor([[[2.0, -2.0, -9.0, -9.0], [-9.0, -9.0, -2.0, 2.0]]])
    got = calibrated_prompts(support, score, ((0,), (1,), (0, 1), ()), threshold=0.0)
    want = [[1, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]]
    assert got[0].int().tolist() == want


def test_a_fully_blocked_prompt_falls_back_to_the_host_then_to_everything() -> None:
    support = torch.tensor([[[5.0, -5.0, 5.0]], [[-5.0, -5.0, -5.0]]])
    got = calibrated_prompts(support, torch.full((2, 1, 3), -9.0), ((0,),), threshold=0.0)
    assert got[:, 0].int().tolist() == [[1, 0, 1], [1, 1, 1]]
    assert minmax_prompts(torch.zeros(1, 1, 3), 2, 0.5).all()


def test_each_case_falls_back_by_itself() -> None:
    support = torch.tensor([[[5.0, 5.0]], [[5.0, 5.0]]])
    score = torch.tensor([[[1.0, -1.0]], [[-1.0, -1.0]]])
    got = calibrated_prompts(support, score, ((0,),), threshold=0.0)
    assert got[:, 0].int().tolist() == [[1, 0], [1, 1]]


def test_a_single_voxel_survives_the_way_to_a_coarse_grid() -> None:
    score = torch.full((1, 2, 9, 8), -5.0)
    score[0, 1, 4, 7] = 3.0
    coarse = shrink_to(score, (3, 2))
    assert coarse.shape == (1, 2, 3, 2)
    assert (coarse > 0).nonzero().tolist() == [[0, 1, 1, 1]]
    assert shrink_to(score[:, :0], (3, 2)).shape == (1, 0, 3, 2)
