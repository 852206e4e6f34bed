"""Relative features: how far a voxel deviates from the rest of its own organ (method, "What a first experiment
showed", 3), and the one small head that turns them into an anomaly logit for every organ alike.

What is unusual: the reference is the patient's own organ in the patch, so one appearance rule holds for all organs and
contrast phases, and no parameter depends on the number of organs. Ours; the paper and its code hold nothing like it.

r_h(v) = (R(v) − μ_h) / σ_h, with R the intensity (as it is, and smoothed inside the organ at two scales) and a small
projection of the finest features. Per organ:
  - weights w_h = sg[σ(u_h)²]: a tumor belongs to its organ's support, so μ_h and σ_h must be robust;
  - start: weighted median and 1.4826 · MAD, breakdown at one half. They are taken over `NUM_SAMPLES` voxels drawn
    systematically along the cumulated weights, so that no sort grows with the patch;
  - one reweighting by exp(−½((R − μ)/s)²) over all voxels, which carries the gradient. It shrinks the variance of a
    Gaussian by two, which is therefore doubled;
  - shrinkage of μ and log σ towards learned population values, as if `prior_voxels` more voxels had them;
  - a floor under σ at the image noise: nnU-Net clips CT, and an organ beyond the clipping range is constant.

Limits. The reference is what the *patch* shows. Shrinkage covers an organ of which little is visible, but an anomaly
that makes up half of the visible organ or more becomes the norm, and r changes with the window's position there: with
sliding windows the same voxel gets several values, which nnU-Net averages.

Letters as in `backbone.py`; K channels of R, `*` the input's grid, `/` the pooled one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zept_nnunet.errors import ZePTError
from zept_nnunet.network.pooling import mean_of_neighbors

NUM_SAMPLES = 1025
"""Voxels per organ for median and MAD; odd, so that the median is one of them."""

_PROJECTED = 4  # channels of the projection of the finest features, in the models
_THICK = 2.0  # an axis whose voxels are more than so many times the smallest is neither pooled nor smoothed
_COARSE = 3.0  # mm; such voxels are not pooled: a lesion of a few centimeters would be one or two of them
_INSIDE = 0.05  # share of a pooled voxel below which an organ is not in it: what lies there is neither norm nor deviant
_LIMIT = 10.0  # |r| beyond it says no more; outside an organ r would be hundreds
_MAD_TO_SD = 1.4826
_EPS = 1e-6
_SMOOTHINGS = (0, 1, 3)  # passes of a 3-voxel box on the pooled grid
_REACH = max(_SMOOTHINGS)  # pooled voxels around an organ that the head's logits in it depend on
_AROUND = 1  # and those of which the head sees more than the smoothed intensities
KEPT_PER_VOXEL = 132
"""Numbers that the head keeps for the backward pass, per organ and pooled voxel; tests/network/test_relative.py."""
ORGANS_PER_CHUNK = 8
VOXELS_AT_ONCE = 2**20
"""Pooled voxels of a batch, of all organs that go through the head together: they keep about 0.5 GB."""


def weighted_samples(weights: Tensor, count: int = NUM_SAMPLES) -> Tensor:
    """Indices of `count` systematic samples along the cumulated weights: (N, V) ≥ 0 → (N, count), ascending.

    Sample j is the first voxel whose cumulated weight exceeds (j + ½)/count of the total, so a plain median over the
    samples is the weighted median up to 1/(2 count) of the weight. Without any weight: the last voxel, repeatedly.
    """
    cumulated = weights.double().cumsum(-1) if weights.device.type != "mps" else weights.cumsum(-1)
    levels = (torch.arange(count, device=weights.device, dtype=cumulated.dtype) + 0.5) / count
    wanted = levels * cumulated[:, -1:]
    return torch.searchsorted(cumulated, wanted, right=True).clamp_max(weights.shape[-1] - 1)


def robust_statistics(values: Tensor, weights: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Robust mean and variance of an organ; see the module. The gradient reaches `values` alone.

    values (N, K, V) and weights (N, V) ≥ 0, float32; floor (K,), the smallest spread that the reweighting assumes →
    two of (N, K). Finite without any weight.
    """
    weights = weights.detach()
    with torch.no_grad():
        index = weighted_samples(weights)[:, None].expand(-1, values.shape[1], -1)
        samples = values.gather(-1, index)
        median = samples.median(-1, keepdim=True).values
        spread = _MAD_TO_SD * (samples - median).abs().median(-1, keepdim=True).values
        spread = torch.maximum(spread, floor[:, None])
        near = weights[:, None] * torch.exp(-0.5 * ((values - median) / spread).square())
        near = near / near.sum(-1, keepdim=True).clamp_min(_EPS)
    mean = (near * values).sum(-1)
    variance = 2 * (near * (values - mean[..., None]).square()).sum(-1)
    return mean, variance


class RelativeFeatures(nn.Module):
    """Per organ, the deviation of every voxel from that organ.

    `num_features` per organ: K of signed r, K of |r|, the organ's support, and zeros up to a multiple of 8 (which
    convolutions are fast at), on the grid pooled by `pooling`; both kinds of r are multiplied by the support, so that
    they fade to zero outside of the organ. Statistics are computed in float32 whatever the autocast.
    """

    floor: Tensor

    def __init__(
        self,
        num_projected: int,
        feature_channels: int,
        image_channels: int = 1,
        *,
        noise: float | Sequence[float] = 0.1,
        query_width: int | None = None,
        pooling: int | Sequence[int] = 2,
        smoothing: int | Sequence[int] = 3,
        prior_voxels: float = 64.0,
    ):
        """
        Args:
            num_projected: channels of the projection of F; 0 for none.
            feature_channels: of F.
            noise: floor of σ for the intensities, one or one per image channel, in normalized units (of CT: noise in HU
                divided by the standard deviation in the plans). Projected channels have 0.1, in units of their own.
            query_width: D where the population values come from organ queries, None where all organs share them.
            pooling: of every axis or one per axis.
            smoothing: size of the box in pooled voxels, odd, of every axis or one per axis.
            prior_voxels: pooled voxels that the population values weigh.
        """
        super().__init__()
        floors = [float(noise)] * image_channels if isinstance(noise, (int, float)) else [float(n) for n in noise]
        if len(floors) != image_channels or min(floors) <= 0:
            raise ZePTError(f"noise must hold one positive number per image channel ({image_channels}), got {noise}")
        self.image_channels, self.num_projected = image_channels, num_projected
        self.pooling = pooling if isinstance(pooling, int) else tuple(pooling)
        self.smoothing = smoothing
        self.prior_voxels = prior_voxels
        self.num_channels = len(_SMOOTHINGS) * image_channels + num_projected
        self.num_features = -(-(2 * self.num_channels + 1) // 8) * 8
        floor = torch.tensor(floors * len(_SMOOTHINGS) + [0.1] * num_projected)
        self.register_buffer("floor", floor, persistent=False)
        # 1 × 1 convolution without bias: r does not see a constant
        self.project = nn.Linear(feature_channels, num_projected, bias=False) if num_projected else None
        self.population = nn.Parameter(torch.zeros(2 * self.num_channels))  # means, then log variances
        self.population_of = nn.Linear(query_width, 2 * self.num_channels, bias=False) if query_width else None
        if self.population_of is not None:
            nn.init.zeros_(self.population_of.weight)

    def forward(self, x: Tensor, features: Tensor, support: Tensor, queries: Tensor | None = None) -> Tensor:
        """Image (B, C, *), finest features (B, C_f, *), support logits (B, Q, *), organ queries (B, Q, D) with
        `query_width` → (B, Q, num_features, /). Nothing flows back through `support`.
        """
        return self.relate(*self.shared(x, features), self.inside(support), queries)

    def shared(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """What all organs have in common: pooled intensities (B, C, /) and projected features (B, P, /), float32."""
        with torch.autocast(x.device.type, enabled=False):
            pooled = self._pool(x.detach().float())
            if self.project is None:
                return pooled, pooled[:, :0]
            half = features if features.device.type == "cuda" else features.float()  # no float32 copy at full size
            return pooled, self.project(self._pool(half).float().movedim(1, -1)).movedim(-1, 1)

    @torch.no_grad()
    def inside(self, support: Tensor) -> Tensor:
        """Share of a pooled voxel that the organ takes up, 0 where it is small: logits (B, Q, *) → (B, Q, /)."""
        with torch.autocast(support.device.type, enabled=False):
            share = self._pool(support.float().sigmoid())
            return share * (share > _INSIDE)

    def relate(self, pooled: Tensor, projected: Tensor, inside: Tensor, queries: Tensor | None = None) -> Tensor:
        """As `forward`, from what `shared` and `inside` return; for any subset of the organs."""
        values = self.values(pooled, projected, inside).flatten(0, 1).flatten(2)
        features = self.compare(values, inside.flatten(0, 1).flatten(1), queries)
        return features.view(*inside.shape[:2], -1, *inside.shape[2:])

    def values(self, pooled: Tensor, projected: Tensor, inside: Tensor) -> Tensor:
        """R of every voxel, which smoothing makes another one for each organ: → (B, Q, K, /)."""
        with torch.autocast(pooled.device.type, enabled=False):
            with torch.no_grad():
                intensities = self._smooth_inside(pooled, inside.square())  # (B, Q, 3C, /)
            shared = projected[:, None].expand(-1, inside.shape[1], *projected.shape[1:])
            return torch.cat((intensities, shared), 2)

    def compare(self, values: Tensor, inside: Tensor, queries: Tensor | None = None) -> Tensor:
        """r, |r| and the organ's share: R (N, K, V) of N organs, their shares (N, V) → (N, num_features, V).

        V: all voxels, or those that have a share; the others have no weight, and zeros for features.
        """
        with torch.autocast(values.device.type, enabled=False):
            weights = inside.square()
            mean, variance = robust_statistics(values, weights, self.floor)
            mean, sigma = self._shrink(mean, variance, weights.sum(-1, keepdim=True), queries)
            inside = inside[:, None]
            r = ((values - mean[..., None]) / sigma[..., None]).clamp(-_LIMIT, _LIMIT) * inside
            zeros = inside.new_zeros(1, 1, 1).expand(len(r), self.num_features - 2 * r.shape[1] - 1, r.shape[2])
            return torch.cat((r, r.abs(), inside, zeros), 1)

    def _shrink(self, mean: Tensor, variance: Tensor, visible: Tensor, queries: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and σ, towards the population where little is visible; `visible` (B·Q, 1) in pooled voxels.

        σ is averaged in its logarithm: a population spread ten times the organ's would else outweigh any organ.
        """
        population = self.population.float()
        if self.population_of is not None:
            if queries is None:
                raise ZePTError("RelativeFeatures was built with query_width: give the organ queries (B, Q, D)")
            population = population + self.population_of(queries.float()).flatten(0, 1)
        population_mean, log_variance = population.chunk(2, -1)
        own = visible / (visible + self.prior_voxels)
        noise = self.floor.square()
        log_sigma = 0.5 * torch.lerp((log_variance.clamp(-10, 10).exp() + noise).log(), (variance + noise).log(), own)
        return torch.lerp(population_mean, mean, own), log_sigma.exp()

    def _smooth_inside(self, pooled: Tensor, weights: Tensor) -> Tensor:
        """Intensities averaged over the organ's own voxels: (B, C, /), (B, Q, /) → (B, Q, 3C, /).

        Averages that cross the surface would make every border anomalous. Far outside, the plain average.
        """
        batch, organs = weights.shape[:2]
        w = weights.flatten(0, 1)[:, None]  # (B·Q, 1, /)
        plain = pooled[:, None].expand(-1, organs, *pooled.shape[1:]).flatten(0, 1)  # (B·Q, C, /)
        w = w + 1e-4
        scales, sums, passes = [plain], torch.cat((plain * w, w), 1), 0
        for wanted in _SMOOTHINGS[1:]:
            while passes < wanted:
                sums, passes = self.mean_around(sums), passes + 1
            scales.append(sums[:, :-1] / sums[:, -1:])
        return torch.cat(scales, 1).view(batch, organs, -1, *pooled.shape[2:])

    def mean_around(self, x: Tensor, axes: int | None = None) -> Tensor:
        """Mean over the voxels of a box that are in the patch: (B, C, *) → (B, C, *).

        Args:
            axes: how many there are to average over after the first two; more may follow. None: all.
        """
        size = self.smoothing
        return mean_of_neighbors(x, [size] * (axes or x.ndim - 2) if isinstance(size, int) else size)

    def _pool(self, x: Tensor) -> Tensor:
        """Average over `pooling`; a part of a window at the far border counts by itself (odd sizes)."""
        if self.pooling in (1, (1,) * (x.ndim - 2)):
            return x
        pool = F.avg_pool3d if x.ndim == 5 else F.avg_pool2d
        return pool(x, self.pooling, ceil_mode=True, count_include_pad=False)


class RelativeHead(nn.Module):
    """One anomaly logit per organ and voxel, by the same weights for every organ; 0 where the organ is not.

    On a GPU, and compiled, organs go through in chunks of at most `organs_per_chunk`, fewer where the patch is large
    (`voxels_at_once`), and with more than one chunk their activations are computed again in the backward pass: memory
    does not grow with Q. On a CPU each organ of each case goes through by itself, cropped to where it is, and of that
    its own voxels alone; the logits are the same.
    """

    def __init__(self, features: RelativeFeatures, width: int = 16, organs_per_chunk: int = ORGANS_PER_CHUNK):
        super().__init__()
        self.features = features
        self.organs_per_chunk, self.voxels_at_once = organs_per_chunk, VOXELS_AT_ONCE
        # No norm over the patch: it would make the logit depend on what else the patch shows. What lies around a voxel
        # comes from means: 3 × 3 × 3 convolutions on voxels that are not pooled cost more than the rest of the network.
        self.of_voxel = nn.Sequential(nn.Linear(features.num_features, width), nn.LeakyReLU(0.01))
        self.layers = nn.Sequential(nn.Linear(2 * width, width), nn.LeakyReLU(0.01), nn.Linear(width, 1))

    def forward(self, x: Tensor, features: Tensor, support: Tensor, queries: Tensor | None = None) -> Tensor:
        """As `RelativeFeatures.forward` → anomaly logits (B, Q, *) on the input's grid."""
        if support.shape[1] == 0:
            return support.detach() * 0
        pooled, projected = self.features.shared(x, features)
        inside = self.features.inside(support.detach())
        crops = x.device.type == "cpu" and not torch.compiler.is_compiling()
        logits = (self._cropped if crops else self._chunked)(pooled, projected, inside, queries)
        logits = logits * (inside > 0)
        if logits.shape[2:] == support.shape[2:]:
            return logits
        return F.interpolate(logits, support.shape[2:], mode="trilinear" if support.ndim == 5 else "bilinear")

    def _chunked(self, pooled: Tensor, projected: Tensor, inside: Tensor, queries: Tensor | None) -> Tensor:
        organs, logits = inside.shape[1], []
        voxels = inside.shape[0] * math.prod(inside.shape[2:])
        size = max(1, min(self.organs_per_chunk, self.voxels_at_once // voxels))
        for start in range(0, organs, size):
            chunk = slice(start, start + size)
            q = None if queries is None else queries[:, chunk]
            logits.append(_maybe_again(self._chunk, organs > size, pooled, projected, inside[:, chunk], q))
        return torch.cat(logits, 1)

    def _cropped(self, pooled: Tensor, projected: Tensor, inside: Tensor, queries: Tensor | None) -> Tensor:
        organs, grid = inside.shape[1], inside.shape[2:]
        boxes, cores = (boxes_of(inside.flatten(0, 1) > 0, margin) for margin in (_REACH, _AROUND))
        nowhere = not any(boxes)
        if nowhere:
            boxes[0] = cores[0] = tuple(slice(0, 1) for _ in grid)  # every parameter gets a gradient, if only of zero
        logits = []
        for n, (box, core) in enumerate(zip(boxes, cores, strict=True)):
            if box:
                b, q = slice(n // organs, n // organs + 1), slice(n % organs, n % organs + 1)
                whole, own = (b, slice(None), *box), (b, q, *box)
                query = None if queries is None else queries[b, q]
                within = tuple(slice(c.start - s.start, c.stop - s.start) for c, s in zip(core, box, strict=True))
                args = pooled[whole], projected[whole], inside[own], query, within
                logits.append(_maybe_again(self._of_organ, organs > self.organs_per_chunk, *args))
        found = torch.cat(logits)
        maps = found.new_zeros(inside.shape)
        return maps + 0 * found.sum() if nowhere else maps.masked_scatter(inside > 0, found)

    def _chunk(self, pooled: Tensor, projected: Tensor, inside: Tensor, queries: Tensor | None) -> Tensor:
        """(B, N, /) for the organs of `inside`."""
        r = self.features.relate(pooled, projected, inside, queries)
        voxels = self.of_voxel(r.flatten(0, 1).movedim(1, -1)).movedim(-1, 1)
        around = self.features.mean_around(voxels)
        logits: Tensor = self.layers(torch.cat((voxels, around), 1).movedim(1, -1))
        return logits.view(*r.shape[:2], *r.shape[3:])

    def _of_organ(
        self, pooled: Tensor, projected: Tensor, inside: Tensor, queries: Tensor | None, within: tuple[slice, ...]
    ) -> Tensor:
        """Logits of the voxels of one organ of one case, in order: as `_chunk` computes them. Elsewhere all features
        are zero, so that the first layer gives every voxel the same.

        within: where in the crop the organ and its neighbors lie; the rest is there for the smoothing.
        """
        share = inside[0, 0][within]
        place = share.flatten().nonzero()[:, 0]
        place = place if len(place) else place.new_zeros(1)
        own: tuple[slice | int, ...] = (slice(None), 0, slice(None), *within)
        values = self.features.values(pooled, projected, inside)[own].flatten(2).index_select(-1, place)
        r = self.features.compare(values, share.flatten()[None, place], queries)
        voxels = self.of_voxel(r[0].T)  # (voxels of the organ, width)
        elsewhere = self.of_voxel(r.new_zeros(self.features.num_features))
        everywhere = elsewhere.expand(share.numel(), -1).index_copy(0, place, voxels)
        around = self.features.mean_around(everywhere.view(1, 1, *share.shape, -1), share.ndim).view_as(everywhere)
        logits: Tensor = self.layers(torch.cat((voxels, around.index_select(0, place)), 1))[:, 0]
        return logits


def _maybe_again(compute: Callable[..., Tensor], again: bool, *args: Any) -> Tensor:
    """`compute(*args)`; `again`: computed once more in the backward pass."""
    if again and torch.is_grad_enabled():
        result: Tensor = checkpoint(compute, *args, use_reentrant=False)
        return result
    return compute(*args)


def boxes_of(masks: Tensor, margin: int) -> list[tuple[slice, ...]]:
    """The smallest box around each mask, and `margin` more on every side within the grid; () for an empty mask.

    masks bool (N, *).
    """
    axes = range(1, masks.ndim)
    shown = [masks.any([a for a in axes if a != axis]).tolist() for axis in axes]  # (N, size of the axis)
    boxes = []
    for n in range(len(masks)):
        box = []
        for profile in (per_axis[n] for per_axis in shown):
            if True not in profile:
                break
            first, last = profile.index(True), len(profile) - profile[::-1].index(True)
            box.append(slice(max(0, first - margin), min(len(profile), last + margin)))
        boxes.append(tuple(box))
    return boxes


def build_relative_head(
    spacing: Sequence[float],
    feature_channels: int,
    image_channels: int,
    noise: float | Sequence[float],
    query_width: int | None = None,
) -> RelativeHead:
    """The head as the models have it.

    Args:
        spacing: of the patch's 2 or 3 axes.
        feature_channels, image_channels, noise, query_width: see `RelativeFeatures`.
    """
    features = RelativeFeatures(
        _PROJECTED,
        feature_channels,
        image_channels,
        noise=noise,
        query_width=query_width,
        pooling=pooling_of(spacing),
        smoothing=tuple(1 if thick else 3 for thick in _is_thick(spacing)),
    )
    return RelativeHead(features)


def pooling_of(spacing: Sequence[float]) -> tuple[int, ...]:
    """Voxels that become one, per axis: 2, but not along thick slices, and not of coarse voxels."""
    return tuple(1 if thick or s >= _COARSE else 2 for thick, s in zip(_is_thick(spacing), spacing, strict=True))


def _is_thick(spacing: Sequence[float]) -> list[bool]:
    return [s > _THICK * min(spacing) for s in spacing]
