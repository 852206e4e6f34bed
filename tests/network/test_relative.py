"""Relative features and their head: against loops, invariances, windows, absent organs, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.network import reference
from tests.network.reference import array
from tests.network.test_memory import kept_bytes
from zept_nnunet.errors import ZePTError
from zept_nnunet.network.pooling import mean_of_neighbors
from zept_nnunet.network.relative import (
    KEPT_PER_VOXEL,
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


def test_statistics_equal_a_loop() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(3, 2, (2, 3, 200)), rng.random((2, 200)) ** 2
    mean, variance = robust_statistics(torch.from_numpy(x).float(), torch.from_numpy(w).float(), torch.full((3,), 0.1))
    for n in range(2):
        for k in range(3):
            wanted = reference.robust_statistics(x[n, k].astype(np.float32), w[n].astype(np.float32), 0.1)
            assert (mean[n, k].item(), variance[n, k].item()) == pytest.approx(wanted, rel=1e-5, abs=1e-5)


SPACINGS = {
    "fine": (1.0, 1.2, 1.0),
    "thick slices": (5.0, 1.0, 1.0),
    "coarse": (4.0, 4.5, 4.0),
    "coarse along one axis": (3.5, 2.0, 2.0),
    "2d": (0.8, 0.8),
    "2d, long pixels": (4.0, 1.0),
    "2d, coarse": (5.9, 5.9),
}


def scene(dimensions: int, channels: int = 1) -> tuple[torch.Tensor, ...]:
    """Image, features, support of four organs, and their queries, of two cases on odd axes.

    The first organ is there to some share everywhere; one has an edge; one is nowhere; one is as faint as to be in some
    of the voxels alone. A few voxels deviate more than counts.
    """
    torch.manual_seed(0)
    size = (5, 7, 9)[-dimensions:]
    x, f, queries = torch.randn(2, channels, *size), torch.randn(2, 6, *size), torch.randn(2, 4, 5)
    x[..., 2, 3:5], x[..., 3, 7] = 40.0, -60.0
    u = 3 * torch.randn(2, 4, *size) + 1
    u[:, 1] = 2 + u[:, 1].abs()
    u[:, 1, ..., :2] = u[:, 1, ..., 6:] = -FAR
    u[:, 2] = -FAR
    u[:, 3] = -3 + 0.2 * torch.randn(2, *size)
    return x, f, u, queries


def make_head(spacing: tuple[float, ...], noise: tuple[float, ...] = (0.1,), width: int | None = None) -> RelativeHead:
    """As the models build it, with weights as after a training; 8 voxels weigh as much as the population's values."""
    torch.manual_seed(1)
    head = build_relative_head(spacing, 6, len(noise), noise, width)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        head.features.population[-1] = 20.0  # beyond the bound of a population's spread
    head.features.prior_voxels = 8.0
    return head


@pytest.mark.parametrize("noise", [(0.1,), (0.02, 0.3)], ids=["one channel", "two channels"])
@pytest.mark.parametrize("name", SPACINGS)
@torch.no_grad()
def test_relative_features_equal_loops(name: str, noise: tuple[float, ...]) -> None:
    spacing = SPACINGS[name]
    x, f, u, queries = scene(len(spacing), len(noise))
    head = make_head(spacing, noise, 5)
    got = head.features(x, f, u, queries)
    for b in range(2):
        args = array(x[b]), array(f[b]), array(u[b]), array(queries[b]), spacing, noise
        wanted = reference.relative_features(head.features, *args)
        np.testing.assert_allclose(array(got[b]), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    number = head.features.num_channels
    r, share = wanted[:, :number], wanted[:, 2 * number]
    assert number == 3 * len(noise) + 4 and len(wanted[0]) % 8 == 0
    assert np.isclose(np.abs(r[0]), 10 * share[0]).any()  # as far as r counts
    assert (share[2] == 0).all() and (share[3] == 0).any() and ((share[3] > 0) & (share[3] < 0.1)).any()


@pytest.mark.parametrize("way", ["cropped", "in chunks"])
@pytest.mark.parametrize("name", SPACINGS)
@torch.no_grad()
def test_the_head_equals_loops(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU each organ is cropped to where it is; on a GPU, and compiled, organs go through in chunks."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: way == "in chunks")
    spacing = SPACINGS[name]
    x, f, u, queries = scene(len(spacing))
    for width in (5, None):
        head = make_head(spacing, width=width)
        head.organs_per_chunk = 3
        got = head(x, f, u, queries if width else None)
        for b in range(2):
            args = array(x[b]), array(f[b]), array(u[b]), array(queries[b]) if width else None, spacing
            wanted = reference.relative_head(head, *args)
            np.testing.assert_allclose(array(got[b]), wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()))
            assert not wanted[2].any() and all(np.ptp(wanted[i]) > 0.02 for i in (0, 1, 3))


def test_an_organ_is_where_its_share_of_a_pooled_voxel_exceeds_a_twentieth() -> None:
    features = RelativeFeatures(0, 1, pooling=2)
    shares = torch.tensor([0.2, 0.39, 0.41, 1.0])  # of one voxel in eight
    u = torch.full((1, 1, 2, 2, 8), -FAR)
    u[0, 0, 0, 0, ::2] = torch.logit(shares, eps=1e-7)
    torch.testing.assert_close(features.inside(u).flatten(), torch.tensor([0, 0, 0.41 / 8, 1 / 8]))


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


@pytest.mark.parametrize("at_once", [10**9, 1])
def test_where_the_patch_is_large_an_organ_keeps_next_to_nothing(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of voxels that are not pooled, a whole patch of which would else be kept for each organ and channel."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # in chunks, as on a GPU
    head = RelativeHead(RelativeFeatures(4, 4, pooling=1))
    head.voxels_at_once = at_once
    size = (16, 16, 16)

    def kept(organs: int) -> int:
        x, f, u = torch.randn(1, 1, *size), torch.randn(1, 4, *size), torch.full((1, organs, *size), FAR)
        return kept_bytes(head, lambda: head(x, f, u))

    per_organ = (kept(8) - kept(2)) / (4 * 6 * 16**3)
    if at_once > 1:
        assert per_organ == pytest.approx(KEPT_PER_VOXEL, rel=0.02)
    else:
        assert per_organ < 3


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


# ---------------------------------------------------------------------------------------------------- windows
def volume(dimensions: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image, features, support and queries of more than a window shows. Of the two organs one lies in [14, 24) of each
    axis and grows brighter along the last one; the other is everywhere else.
    """
    torch.manual_seed(2)
    size = [40] * dimensions
    x, f, queries = torch.randn(1, 1, *size), torch.randn(1, 6, *size), torch.randn(1, 2, 5)
    organ = (..., *[slice(14, 24)] * dimensions)
    u = torch.full((1, 2, *size), -FAR)
    u[:, 1] = FAR
    u[:, :1][organ], u[:, 1:][organ] = 2 * torch.randn_like(u[:, :1][organ]) + 2, -FAR
    x[organ] += torch.linspace(-2, 2, 10)
    return x, f, u, queries


def seen_in(start: int, length: int, *maps: torch.Tensor) -> list[torch.Tensor]:
    """What a window shows of maps (B, C, *)."""
    return [m[(..., *[slice(start, start + length)] * (m.ndim - 2))] for m in maps]


def cube(start: int, stop: int, dimensions: int) -> torch.Tensor:
    """Whether a voxel of the volume lies in [start, stop) of each axis."""
    mask = torch.zeros([40] * dimensions, dtype=torch.bool)
    mask[(slice(start, stop),) * dimensions] = True
    return mask


@pytest.mark.parametrize(("offset", "name"), [(4, "2d"), (6, "fine"), (3, "2d, coarse"), (5, "coarse")])
@torch.no_grad()
def test_an_organ_that_two_windows_show_as_a_whole_deviates_alike_in_both(offset: int, name: str) -> None:
    """Three (pooled) voxels around it belong to the whole: averages within the organ reach so far."""
    spacing = SPACINGS[name]
    x, f, u, queries = volume(len(spacing))
    head = make_head(spacing, width=5)
    a, b = (head(*seen_in(start, 30, x, f, u), queries)[:, :1] for start in (0, offset))
    (mine,), (theirs,) = seen_in(12, 14, a), seen_in(12 - offset, 14, b)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
    assert mine.std() > 0.1


@torch.no_grad()
def test_pooled_voxels_follow_the_window() -> None:
    """An offset of one pooled voxel and a half changes which voxels are averaged: equal they are no more."""
    x, f, u, queries = volume(2)
    head = make_head(SPACINGS["2d"], width=5)
    a, b = (head(*seen_in(start, 30, x, f, u), queries)[:, 0] for start in (0, 3))
    assert (a[:, 14:24, 14:24] - b[:, 11:21, 11:21]).abs().max() > 0.05


@torch.no_grad()
def test_of_an_organ_that_the_window_cuts_the_reference_is_what_is_left() -> None:
    """So what the window shows of the organ changes the deviation of each of its voxels."""
    x, f, u, queries = volume(2)
    head = make_head(SPACINGS["2d, coarse"], width=5)
    a, b = (head(*seen_in(start, 20, x, f, u), queries)[:, 0] for start in (8, 0))  # all of it, and up to voxel 20
    whole, cut = a[:, 6:9, 6:9], b[:, 14:17, 14:17]  # far from where it is cut
    assert (whole - cut).abs().max() > 0.05


@pytest.mark.parametrize("name", ["2d", "fine", "2d, coarse"])
@torch.no_grad()
def test_what_lies_outside_an_organ_does_not_change_its_deviation(name: str) -> None:
    """Neither other organs nor features; nor intensities, but for the 1e-4 of their weight that keeps averages within
    the organ finite where it is not, and that reaches three voxels.
    """
    spacing = SPACINGS[name]
    x, f, u, queries = volume(len(spacing))
    head = make_head(spacing, width=5)
    before = head(x, f, u, queries)[:, 0]
    reach = 3 * max(reference.pooling_and_smoothing(spacing)[0])
    is_organ, is_reached = (cube(14 - r, 24 + r, len(spacing)) for r in (0, reach))
    others = u.clone()
    others[:, 1] = torch.randn_like(u[:, 1])
    far, strange = torch.where(is_reached, x, 5 * torch.randn_like(x) + 3), torch.where(is_organ, f, 9 + f)
    same = head(far, strange, others, torch.cat((queries[:, :1], -queries[:, 1:]), 1))[:, 0]
    torch.testing.assert_close(same, before, rtol=0, atol=1e-5)
    near = head(torch.where(is_organ, x, x + 3), f, u, queries)[:, 0]
    assert 0 < (near - before).abs().max() < 0.01
    assert (head(x + 3 * torch.randn_like(x), f, u, queries)[:, 0] - before).abs().max() > 0.2  # inside as well


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
        ((3.5, 2.0, 2.0), (1, 2, 2), (3, 3, 3)),  # coarse along one axis
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
