"""Relative features: robust statistics against a loop, invariances, absent organs, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zept_nnunet.errors import ZePTError
from zept_nnunet.network.pooling import mean_of_neighbors
from zept_nnunet.network.relative import (
    NUM_SAMPLES,
    RelativeFeatures,
    RelativeHead,
    boxes_of,
    build_relative_head,
    robust_statistics,
)

SIZE = (16, 20, 24)
FAR = 30.0  # a support logit of certainty


def supports(*boxes: tuple[int, int], dimensions: int = 3) -> torch.Tensor:
    """(1, Q, *): organ q fills [a, b) of the last axis, on even voxels."""
    u = torch.full((1, len(boxes), *SIZE[-dimensions:]), -FAR)
    for q, (a, b) in enumerate(boxes):
        u[:, q, ..., a:b] = FAR
    return u


def make_image(dimensions: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 1, *SIZE[-dimensions:], generator=torch.Generator().manual_seed(seed))


def reference_statistics(x: np.ndarray, w: np.ndarray, floor: float) -> tuple[float, float]:
    """One organ, one channel, voxel by voxel in float64."""
    total, samples = w.sum(), []
    for j in range(NUM_SAMPLES):
        level, running = (j + 0.5) / NUM_SAMPLES * total, 0.0
        for value, weight in zip(x, w, strict=True):
            running += weight
            if running > level:
                samples.append(value)
                break
    median = sorted(samples)[NUM_SAMPLES // 2]
    spread = max(1.4826 * sorted(abs(s - median) for s in samples)[NUM_SAMPLES // 2], floor)
    near = [weight * np.exp(-0.5 * ((value - median) / spread) ** 2) for value, weight in zip(x, w, strict=True)]
    mean = sum(n * value for n, value in zip(near, x, strict=True)) / sum(near)
    return mean, 2 * sum(n * (value - mean) ** 2 for n, value in zip(near, x, strict=True)) / sum(near)


def test_statistics_equal_a_loop() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(3, 2, (2, 3, 200)), rng.random((2, 200)) ** 2
    mean, variance = robust_statistics(torch.from_numpy(x).float(), torch.from_numpy(w).float(), torch.full((3,), 0.1))
    for n in range(2):
        for k in range(3):
            wanted = reference_statistics(x[n, k].astype(np.float32), w[n].astype(np.float32), 0.1)
            assert (mean[n, k].item(), variance[n, k].item()) == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_statistics_are_those_of_a_gaussian_and_outliers_hardly_move_them() -> None:
    x = 5 + 2 * torch.randn(1, 1, 40000, generator=torch.Generator().manual_seed(1))
    w, floor = torch.ones(1, 40000), torch.tensor([0.1])
    mean, variance = robust_statistics(x, w, floor)
    assert mean.item() == pytest.approx(5, abs=0.05) and variance.item() == pytest.approx(4, rel=0.07)
    x[..., :10000] -= 40  # a quarter of the organ is a tumor
    mean, variance = robust_statistics(x, w, floor)
    assert mean.item() == pytest.approx(5, abs=0.5) and variance.item() == pytest.approx(4, rel=0.5)
    assert x.mean().item() < -4  # what a plain mean says


def test_a_fractional_weight_counts_as_a_fraction() -> None:
    x = torch.tensor([[[0.0, 1.0, 2.0, 3.0, 100.0]]])
    heavy, _ = robust_statistics(x, torch.tensor([[0.1, 0.1, 0.1, 2.0, 0.1]]), torch.tensor([0.1]))
    light, _ = robust_statistics(x, torch.tensor([[0.1, 2.0, 0.1, 0.1, 0.1]]), torch.tensor([0.1]))
    assert heavy.item() == pytest.approx(3, abs=0.01) and light.item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_invariant_to_offset_and_scale_of_an_organ(dimensions: int) -> None:
    features = RelativeFeatures(0, 4, noise=1e-3, prior_voxels=1e-3)
    x, u = make_image(dimensions), supports((4, 20), dimensions=dimensions)
    f = torch.zeros(1, 4, *x.shape[2:])
    changed = x.clone()
    changed[..., 4:20] = 2.5 * x[..., 4:20] + 3
    before, after = features(x, f, u), features(changed, f, u)
    assert (before - after).abs().max() < 0.02
    assert before[:, :, :3].abs().max() > 1
    # fades to exactly nothing outside
    assert before[..., :2].abs().max() < 1e-6


def test_a_known_offset_gives_a_known_r() -> None:
    features = RelativeFeatures(0, 1, noise=0.1, prior_voxels=1e-4)
    x, u = torch.full((1, 1, *SIZE), 0.5), supports((4, 20))
    x += 0.3 * torch.randn(1, 1, *SIZE, generator=torch.Generator().manual_seed(2))
    x = x.repeat_interleave(2, 2)[:, :, :16].repeat_interleave(2, 3)[:, :, :, :20].repeat_interleave(2, 4)[..., :24]
    x[:, :, 4:8, 4:8, 8:12] = 0.5 - 1.5
    r = features(x, torch.zeros(1, 1, *SIZE), u)
    wanted = -1.5 / np.hypot(0.3, 0.1)
    assert r[0, 0, 0, 2:4, 2:4, 4:6].mean().item() == pytest.approx(wanted, rel=0.15)
    assert torch.equal(r[:, :, 3:6], r[:, :, :3].abs())
    assert r[0, 0, 0, :, :, 2:10].median().abs() < 0.15


def test_permuting_organs_permutes_the_outputs_and_chunks_change_nothing() -> None:
    torch.manual_seed(0)
    x, f, u = make_image(), torch.randn(1, 4, *SIZE), supports((0, 8), (8, 14), (14, 24), (0, 24))
    queries, order = torch.randn(1, 4, 6), torch.tensor([2, 0, 3, 1])
    features = RelativeFeatures(2, 4, query_width=6)
    torch.nn.init.normal_(features.population_of.weight)
    head = RelativeHead(features)
    a, b = head(x, f, u, queries), head(x, f, u[:, order], queries[:, order])
    assert a.shape == u.shape
    torch.testing.assert_close(a[:, order], b)
    assert (a[:, 0] - a[:, 1]).abs().max() > 1e-3
    head.organs_per_chunk = 2
    torch.testing.assert_close(head(x, f, u, queries), a)
    whole, chunked = {}, {}
    for size, grads in ((8, whole), (1, chunked)):
        head.organs_per_chunk = size
        head.zero_grad()
        head(x, f, u, queries).square().mean().backward()
        grads.update({n: p.grad.clone() for n, p in head.named_parameters()})
    for name, grad in whole.items():
        torch.testing.assert_close(chunked[name], grad, msg=name)


@pytest.mark.parametrize("pooling", [1, 2])
@pytest.mark.parametrize("size", [(19, 21, 25), (19, 24)])
def test_organs_cropped_to_where_they_are_give_what_the_whole_patch_gives(pooling: int, size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    dimensions = len(size)
    x, f, queries = torch.randn(2, 1, *size), torch.randn(2, 4, *size), torch.randn(2, 5, 6)
    u = torch.full((2, 5, *size), -FAR)
    u[0, 0, ..., 9:15] = FAR  # in the middle of one axis, from border to border along the others
    u[0, 1, (0,) * (dimensions - 1)] = FAR  # at the border
    u[1, 2, 8:12, 8:14] = torch.randn(u[1, 2, 8:12, 8:14].shape)  # half there; the fourth is nowhere
    u[:, 4] = FAR  # everywhere
    features = RelativeFeatures(2, 4, query_width=6, pooling=pooling)
    torch.nn.init.normal_(features.population_of.weight)
    head = RelativeHead(features)
    inside = features.inside(u)
    assert (inside > 0).flatten(2).any(2).tolist() == [
        [True, True, False, False, True],
        [False, False, True, False, True],
    ]
    shared = features.shared(x, f)
    results = []
    for compute in (head._cropped, head._chunked):
        head.zero_grad()
        logits = compute(*shared, inside, queries) * (inside > 0)
        logits.square().sum().backward(retain_graph=True)
        results.append((logits, {n: p.grad.clone() for n, p in head.named_parameters()}))
    (mine, gradients), (wanted, others) = results
    torch.testing.assert_close(mine, wanted)
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(gradients, others, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head(x, f, u, queries)[1, 3], torch.zeros(size))


def test_boxes_of_masks() -> None:
    masks = torch.zeros(3, 8, 10, dtype=torch.bool)
    masks[0, 3:5, 9] = True
    masks[2] = True
    assert boxes_of(masks, 2) == [(slice(1, 7), slice(7, 10)), (), (slice(0, 8), slice(0, 10))]


@pytest.mark.parametrize(
    ("spacing", "pooling", "smoothing"),
    [
        ((1.0, 1.0, 1.0), (2, 2, 2), (3, 3, 3)),
        ((2.5, 0.8, 0.8), (1, 2, 2), (1, 3, 3)),  # thick slices
        ((7.4, 5.9, 5.9), (1, 1, 1), (3, 3, 3)),  # coarse voxels
        ((5.0, 1.5), (1, 2), (1, 3)),
    ],
)
def test_fine_voxels_are_pooled_and_thick_slices_not_smoothed(
    spacing: tuple[float, ...], pooling: tuple[int, ...], smoothing: tuple[int, ...]
) -> None:
    features = build_relative_head(spacing, 4, 1, 0.1).features
    assert (features.pooling, features.smoothing) == (pooling, smoothing)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 5), (3, 1)])
@pytest.mark.parametrize("shape", [(6, 7, 5), (1, 2, 1)])
def test_mean_of_neighbors_is_that_of_the_voxels_on_the_grid(kernel: tuple[int, ...], shape: tuple[int, ...]) -> None:
    shape = shape[: len(kernel)]
    x = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    mean = mean_of_neighbors(x, kernel)
    for place in np.ndindex(*shape):
        box = tuple(slice(max(0, p - k // 2), p + k // 2 + 1) for p, k in zip(place, kernel, strict=True))
        torch.testing.assert_close(mean[(..., *place)], x[(..., *box)].flatten(2).mean(2))


@pytest.mark.parametrize("size", [(7, 9, 5), (9, 7), (16, 20, 24)])
@pytest.mark.parametrize("kind", ["absent", "everywhere", "single voxel", "saturated"])
def test_finite_for_degenerate_organs_and_constant_images(size: tuple[int, ...], kind: str) -> None:
    torch.manual_seed(0)
    u = torch.full((2, 1, *size), 1000.0 if kind == "everywhere" else -1000.0)
    if kind == "single voxel":
        u.view(2, -1)[:, 3] = 1000.0
    if kind == "saturated":
        u[:] = torch.finfo(torch.float32).min
    for x in (torch.zeros(2, 1, *size), torch.full((2, 1, *size), -7.0), torch.randn(2, 1, *size) * 100):
        f = torch.randn(2, 4, *size, requires_grad=True)
        head = RelativeHead(RelativeFeatures(2, 4))
        logits = head(x, f, u)
        logits.sum().backward()
        assert logits.shape == u.shape and logits.isfinite().all()
        assert f.grad is not None and f.grad.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_a_constant_organ_is_not_anomalous() -> None:
    """CT is clipped: beyond the range an organ is constant, and its spread would be zero."""
    x = make_image()
    x[..., 4:20] = 2.0
    x[:, :, 6:8, 6:8, 8:10] = 2.01  # far below the noise
    r = RelativeFeatures(0, 1, noise=0.1, prior_voxels=1e-3)(x, torch.zeros(1, 1, *SIZE), supports((4, 20)))
    assert r[:, :, :2, :, :, 4:8].abs().max() < 0.2


def test_little_visible_means_the_population_counts() -> None:
    features = RelativeFeatures(0, 1, prior_voxels=64.0)
    with torch.no_grad():
        features.population[:3] = 4.0
    x = torch.full((1, 1, *SIZE), 1.0)
    u = torch.full((1, 1, *SIZE), -FAR)
    u[..., :2, :2, :2] = FAR  # one pooled voxel
    r = features(x, torch.zeros(1, 1, *SIZE), u)
    mean = 1 / 65 * 1.0 + 64 / 65 * 4.0
    sigma = np.exp(0.5 * (1 / 65 * np.log(0.01) + 64 / 65 * np.log(1.01)))  # the organ itself is constant
    assert r[0, 0, 0, 0, 0, 0].item() == pytest.approx((1 - mean) / sigma, rel=1e-4)


def test_support_gets_no_gradient_and_every_parameter_does() -> None:
    torch.manual_seed(0)
    u = supports((4, 14), (10, 24)).requires_grad_()
    f, queries = torch.randn(1, 4, *SIZE, requires_grad=True), torch.randn(1, 2, 6)
    head = RelativeHead(RelativeFeatures(3, 4, query_width=6))
    head(make_image(), f, u, queries).square().mean().backward()
    assert u.grad is None
    assert f.grad is not None and f.grad.abs().max() > 0
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_no_parameter_depends_on_the_number_of_organs_and_autocast_keeps_float32() -> None:
    torch.manual_seed(0)
    head = RelativeHead(RelativeFeatures(2, 4))
    for organs in (1, 3, 11):
        assert head(make_image(), torch.randn(1, 4, *SIZE), supports(*[(2, 12)] * organs)).shape[1] == organs
    f = torch.randn(1, 4, *SIZE)
    wanted = head.features(make_image(), f, supports((4, 20)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        r = head.features(make_image(), f, supports((4, 20)))
        logits = head(make_image(), f, supports((4, 20)))
    assert r.dtype == torch.float32 and torch.equal(r, wanted)
    assert logits.isfinite().all()


def test_thick_slices_are_neither_pooled_nor_smoothed() -> None:
    features = RelativeFeatures(0, 1, pooling=(1, 2, 2), smoothing=(1, 3, 3))
    x = torch.zeros(1, 1, *SIZE)
    x[:, :, 8] = 5.0
    r = features(x, torch.zeros(1, 1, *SIZE), supports((0, 24)))
    assert r.shape[3:] == (16, 10, 12)
    assert r[0, 0, 2, 7].abs().max() < 0.2 and r[0, 0, 2, 8].min() > 5


def test_wrong_set_up_is_refused() -> None:
    with pytest.raises(ZePTError, match="noise"):
        RelativeFeatures(2, 4, noise=0.0)
    with pytest.raises(ZePTError, match="query_width"):
        RelativeFeatures(2, 4, query_width=6)(make_image(), torch.zeros(1, 4, *SIZE), supports((0, 8)))
