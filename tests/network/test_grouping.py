from __future__ import annotations

import pytest
import torch

from zept_nnunet.network.grouping import GroupingBlock, assign


def test_assignment_is_one_hot_forward_and_soft_backward() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 4, 9, requires_grad=True)
    hard = assign(scores)
    assert torch.allclose(hard.sum(1), torch.ones(2, 9))
    assert torch.equal(hard.detach().argmax(1), scores.detach().argmax(1))
    weights = torch.randn(2, 4, 9)
    (hard * weights).sum().backward()
    got, scores.grad = scores.grad, None
    (assign(scores, hard=False) * weights).sum().backward()
    assert torch.allclose(got, scores.grad)


def test_noise_is_gumbel_and_only_when_asked() -> None:
    scores = torch.zeros(1, 2, 20000)
    torch.manual_seed(0)
    share = assign(scores + torch.tensor([1.0, 0.0])[None, :, None], noisy=True).detach()[0, 0].mean().item()
    assert abs(share - torch.sigmoid(torch.tensor(1.0)).item()) < 0.02  # Gumbel-max samples the softmax
    assert torch.equal(assign(scores), assign(scores))


@torch.no_grad()
def test_block_equals_loops_over_voxels_and_queries() -> None:
    torch.manual_seed(0)
    block = GroupingBlock(8, 2).eval()
    q, x = torch.randn(2, 3, 8), torch.randn(2, 11, 8)
    got = block(q, x)
    for b in range(2):
        attended = q + block.attention(block.norm(q), x)
        keys, values = block.to_k(x[b]), block.to_v(x[b])
        sums, counts = torch.zeros(3, 8), torch.zeros(3)
        for j in range(11):
            affinity = [float(block.to_q(attended[b, i]) @ keys[j]) / 8**0.5 for i in range(3)]
            winner = max(range(3), key=lambda i: affinity[i])
            sums[winner] += values[j]
            counts[winner] += 1
        for i in range(3):
            grouped = block.to_out(sums[i] / (counts[i] + 1)) + attended[b, i]
            want = grouped + block.feed_forward(grouped)
            assert torch.allclose(got[b, i], want, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_constant_patch_of_the_size_that_a_gpu_takes_is_finite_under_autocast(dtype: torch.dtype) -> None:
    """All 32³ tokens belong to one query: their sum is beyond what float16 holds."""
    torch.manual_seed(0)
    block = GroupingBlock(16, 2).eval()
    q, x = torch.randn(1, 3, 16), torch.randn(1, 1, 16).expand(-1, 32**3, -1)
    with torch.autocast("cpu", dtype=dtype):
        got = block(q, 4 * x)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got.float(), block(q, 4 * x), rtol=0.1, atol=0.1)
    got.float().square().mean().backward()
    gradients = [p.grad for p in block.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients)
