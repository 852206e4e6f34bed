"""Synthetic anomalies for training: lesion-like changes in organs whose tumors nobody labeled.

What is unusual: nothing here imitates a tumor type. An anomaly says only "part of this organ differs from the rest of
it", so that a network has a positive example in organs without tumor labels. Train-time only; no image is written.

Construction. A soft union of one to five Gaussian lobes around a center (Blinn, ACM Trans. Graph. 1982), in a rotated,
stretched frame, plus a few plane waves of low frequency; the level is the one at which the free shape has the volume of
a sphere of the drawn radius. The gradient turns the field into a distance in mm, and a logistic edge blends an offset
with correlated texture (random Fourier features: Rahimi and Recht, NeurIPS 2007) into the host. A voxel is labeled
where the blend exceeds one half, as partial volume asks. At the host's surface the *change* fades with the share of
organ in the neighborhood; the label does not, or training would teach that no lesion reaches the surface. Nothing but
host voxels is ever changed. Centers are drawn where at least half of the anomaly lies in the host; what would still
reach beyond is cut off, so there are no exophytic anomalies.

Ranges (`RANGES`), and why:
    contrast_hu  Most solid abdominal tumors are hypodense to parenchyma in the portal venous phase. Of 57 pancreatic
                 carcinomas 49 were hypoattenuating, by 40.5 ± 23.0 HU in the portal venous phase (Ishigami et al.,
                 Eur. J. Radiol. 2009;69:139-146); of 53, 47 were (Prokesch et al., Radiology 2002;224:764-768).
                 −90 HU is about that mean minus two standard deviations. Of the draws, `HYPODENSE_SHARE` are uniform
                 between the lower end and −10 HU, the others between 8 HU and the upper end: none is strongly
                 hyperdense, and none is so faint that its label would be noise.
    radius_mm    Of the sphere of equal volume, log-uniform. Those carcinomas measured 30.3 ± 9.0 mm across when
                 hypoattenuating and 12.4 ± 4.8 mm when not: radii of 4 to 22 mm hold both. It grows where fewer than
                 `MIN_VOXELS` voxels would be covered and shrinks to `MAX_HOST_SHARE` of the visible host (an anomaly
                 that fills the organ would be the norm, not the exception).
    elongation   Longest to shortest axis of the lobes' frame. Our choice.
    edge_mm      10-90 % width of the edge, at most the radius; the voxel's own size comes on top (in quadrature). From
                 sharp to infiltrating. Our choice.
    texture_hu   Standard deviation of the added texture. From 0, so that added noise is no reliable cue. Our choice.
    texture_mm   Its correlation length (squared-exponential). Our choice.

Benign gradients: with probability `GRADIENT_PROBABILITY` a host gets a smooth change of at most `GRADIENT_HU` (standard
deviation) and at least `GRADIENT_MM` correlation length that is *not* labeled, so that shading alone is no cue.

Outside CT there are no Hounsfield units: amplitudes count in the organ's own standard deviation in the patch, taken as
`TYPICAL_ORGAN_SD_HU`, and the sign is drawn evenly, per channel.

All randomness comes from one draw of NumPy's global generator per sample: nnU-Net seeds it anew in every worker (its
augmenters pass no seed to torch, so forked workers may share torch's state). `np.random.seed` makes it repeatable.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform
from torch import Tensor

from zept_nnunet.errors import ZePTError
from zept_nnunet.network.pooling import mean_of_neighbors
from zept_nnunet.training.intensity import IntensityScale

RANGES: Mapping[str, tuple[float, float, str]] = {
    "radius_mm": (4.0, 22.0, "mm"),
    "contrast_hu": (-90.0, 15.0, "HU"),
    "elongation": (1.0, 2.0, "ratio"),
    "edge_mm": (1.0, 8.0, "mm"),
    "texture_hu": (0.0, 12.0, "HU"),
    "texture_mm": (2.0, 10.0, "mm"),
}
"""Property → (low, high, unit) of every draw."""

HYPODENSE_SHARE = 0.9
FAINTEST_HU = (-10.0, 8.0)  # nothing is drawn between these
MIN_VOXELS = 8
MAX_HOST_SHARE = 0.4  # of the host's voxels in the patch
GRADIENT_PROBABILITY, GRADIENT_HU, GRADIENT_MM = 0.3, (2.0, 8.0), (40.0, 100.0)
TYPICAL_ORGAN_SD_HU = 20.0

_GRID = 29  # points along each axis of the grid on which a shape is computed
_REACH = 2.6  # half of that grid's width, in radii
_WAVES, _TEXTURE_WAVES = 8, 32
_IN_HOST = 0.5  # share of the ball around a center that should lie in the host
_LOGISTIC = 2 * math.log(9)  # 10-90 % width of a logistic edge, in its scale


@dataclass(frozen=True)
class Anomaly:
    """Properties of one anomaly, as drawn from the ranges. `contrast_hu` holds one value per image channel."""

    radius_mm: float
    contrast_hu: tuple[float, ...]
    elongation: float
    edge_mm: float
    texture_hu: float
    texture_mm: float


def with_anomalies(transforms: ComposeTransforms, insert: InsertAnomalies) -> ComposeTransforms:
    """nnU-Net's training transforms with `insert` right after the spatial one, before all that changes intensities.

    Raises:
        ZePTError: there is no SpatialTransform among them.
    """
    steps = list(transforms.transforms)
    spatial = [i for i, step in enumerate(steps) if isinstance(step, SpatialTransform)]
    if not spatial:
        names = [type(step).__name__ for step in steps]
        raise ZePTError(
            f"synthetic anomalies come after nnU-Net's SpatialTransform; the training transforms hold none: {names}. "
            "Return nnU-Net's own transforms from get_training_transforms, or add InsertAnomalies there yourself"
        )
    position = spatial[-1] + 1
    if position < len(steps) and isinstance(steps[position], Convert2DTo3DTransform):
        position += 1  # dummy 2D augmentation: axes are folded into channels before it
    return ComposeTransforms([*steps[:position], insert, *steps[position:]])


class InsertAnomalies(BasicTransform):
    """Insert up to `max_anomalies` labeled anomalies into the host organs that a sample shows.

    Works on `image` (C, *) float, normalized, and on channel 0 of `segmentation` (1 or more, *), an integer label map,
    in 2D and 3D. Both come back as new tensors of their dtype where anything was inserted.
    """

    def __init__(
        self,
        anomaly_label: Mapping[int, int],
        tumor_labels: Iterable[int],
        spacing_mm: Sequence[float],
        scales: Sequence[IntensityScale | None],
        probability: float = 0.8,
        max_anomalies: int = 4,
        ranges: Mapping[str, tuple[float, float, str]] = RANGES,
    ):
        """
        Args:
            anomaly_label: host's label → value that its anomalies get. Its keys are the hosts.
            tumor_labels: never painted over; they count as part of the organ.
            spacing_mm: of the patch's axes.
            scales: per image channel, from `intensity.intensity_scales`.
            probability: that a sample gets any anomaly; then their number is uniform in 1…max_anomalies. A draw that
                finds no room inserts none.
            ranges: as `RANGES`.

        Raises:
            ZePTError: a host stands among the tumors or as an anomaly's value, the spacing is not that of a 2D or 3D
                patch, or the probability or number is out of range.
        """
        super().__init__()
        self.anomaly_label = {int(host): int(value) for host, value in anomaly_label.items()}
        self.tumor_labels = tuple(sorted({int(t) for t in tumor_labels}))
        self.spacing_mm = tuple(float(s) for s in spacing_mm)
        self.scales = tuple(scales)
        self.probability, self.max_anomalies = probability, max_anomalies
        self.ranges = {**RANGES, **ranges}
        hosts = set(self.anomaly_label)
        clash = sorted(hosts & ({*self.tumor_labels} | {*self.anomaly_label.values()}))
        if clash or 0 in hosts:
            raise ZePTError(
                f"hosts of synthetic anomalies are organs, got labels {sorted(hosts)}; of these {clash or [0]} "
                f"stand for background, a tumor ({list(self.tumor_labels)}) or an anomaly ({self.anomaly_label}). "
                "Leave them out"
            )
        if len(self.spacing_mm) not in (2, 3) or min(self.spacing_mm) <= 0:
            raise ZePTError(f"synthetic anomalies need the spacing of 2 or 3 axes in mm, got {self.spacing_mm}")
        if not 0 <= probability <= 1 or max_anomalies < 1:
            raise ZePTError(
                f"synthetic anomalies need a probability in [0, 1] and at least one anomaly, got {probability} and "
                f"{max_anomalies}"
            )

    def get_parameters(self, **data_dict: Any) -> dict[str, Any]:
        """The generator of this sample."""
        return {"rng": np.random.default_rng(np.random.randint(0, 2**31 - 1, size=2))}

    def apply(self, data_dict: dict[str, Any], rng: np.random.Generator, **params: Any) -> dict[str, Any]:
        """Insert gradients and anomalies; see the class.

        Raises:
            ZePTError: the number of axes or channels is not the one that was announced.
        """
        image: Tensor = data_dict["image"]
        segmentation: Tensor = data_dict["segmentation"]
        if image.ndim - 1 != len(self.spacing_mm) or image.shape[0] != len(self.scales):
            raise ZePTError(
                f"synthetic anomalies were set up for {len(self.scales)} channels and {len(self.spacing_mm)} axes, got "
                f"an image of shape {tuple(image.shape)}: give the spacing and scales of this configuration's plans"
            )
        count = int(rng.integers(1, self.max_anomalies + 1)) if rng.random() < self.probability else 0
        has_gradient = {host: rng.random() < GRADIENT_PROBABILITY for host in self.anomaly_label}
        if not count and not any(has_gradient.values()):
            return data_dict
        masks = {host: segmentation[0] == host for host in self.anomaly_label}
        masks = {host: mask for host, mask in masks.items() if bool(mask.any())}
        if not masks:
            return data_dict
        image, segmentation = image.clone(), segmentation.clone()
        for host, mask in masks.items():
            if has_gradient[host]:
                self._add_gradient(image, mask, rng)
        for _ in range(count):
            host = int(rng.choice(list(masks)))
            self._add_anomaly(image, segmentation[0], host, rng)
        return {**data_dict, "image": image, "segmentation": segmentation}

    def draw(self, rng: np.random.Generator, smallest_mm: float = 0.0, largest_mm: float = math.inf) -> Anomaly:
        """Properties of one anomaly, with its radius kept between the given ones."""
        low, high, _ = self.ranges["radius_mm"]
        low, high = max(low, smallest_mm), min(max(high, smallest_mm), largest_mm)
        radius = math.exp(rng.uniform(math.log(min(low, high)), math.log(high)))
        uniform = {key: float(rng.uniform(*self.ranges[key][:2])) for key in ("elongation", "texture_hu", "texture_mm")}
        edge = min(float(rng.uniform(*self.ranges["edge_mm"][:2])), radius)
        return Anomaly(radius, tuple(self._draw_contrast(rng, s) for s in self.scales), edge_mm=edge, **uniform)

    def _draw_contrast(self, rng: np.random.Generator, scale: IntensityScale | None) -> float:
        low, high, _ = self.ranges["contrast_hu"]
        is_dark = rng.random() < HYPODENSE_SHARE
        if (is_dark or high <= FAINTEST_HU[1]) and low < FAINTEST_HU[0]:
            contrast = float(rng.uniform(low, min(FAINTEST_HU[0], high)))
        else:
            contrast = float(rng.uniform(max(FAINTEST_HU[1], low), high))
        return contrast if scale is not None or rng.random() < 0.5 else -contrast

    # ------------------------------------------------------------------------------------------------ one anomaly
    def _add_anomaly(self, image: Tensor, labels: Tensor, host: int, rng: np.random.Generator) -> None:
        """In place; nothing where the host is too small or the center found has no room."""
        mask = labels == host
        visible = int(mask.sum())
        smallest, largest = (self._radius_of(n) for n in (MIN_VOXELS, MAX_HOST_SHARE * visible))
        if largest < smallest or largest < self.ranges["radius_mm"][0]:
            return
        anomaly = self.draw(rng, smallest, largest)
        center = self._find_center(mask, anomaly.radius_mm, rng)
        distance, level_axis = _draw_shape(anomaly, len(self.spacing_mm), rng)
        crop, distance = self._resample(distance, level_axis, center, mask.shape, anomaly.edge_mm)
        in_host, value = mask[crop], self.anomaly_label[host]
        edge_mm = math.hypot(anomaly.edge_mm, float(np.mean(self.spacing_mm)))
        blend = torch.sigmoid(distance * (_LOGISTIC / edge_mm)) * in_host
        is_organ = in_host.clone()
        for label in (value, *self.tumor_labels):
            is_organ |= labels[crop] == label
        is_anomaly = blend > 0.5  # on the organ's surface too: many lesions reach it
        blend *= _neighborhood_share(is_organ)
        painted = int(is_anomaly.sum())
        if painted < max(MIN_VOXELS, 0.3 * self._voxels_of(anomaly.radius_mm)):
            return
        texture = self._waves(crop, anomaly.texture_mm, _TEXTURE_WAVES, rng) * anomaly.texture_hu
        for channel, contrast in enumerate(anomaly.contrast_hu):
            self._change(image, channel, crop, (texture + contrast) * blend, in_host, mask)
        labels[crop][is_anomaly] = value

    def _add_gradient(self, image: Tensor, mask: Tensor, rng: np.random.Generator) -> None:
        crop = _bounding_box(mask)
        amplitude, length = rng.uniform(*GRADIENT_HU), rng.uniform(*GRADIENT_MM)
        change = self._waves(crop, length, _WAVES, rng) * amplitude
        for channel in range(image.shape[0]):
            self._change(image, channel, crop, change * mask[crop], mask[crop], mask)

    def _change(
        self, image: Tensor, channel: int, crop: tuple[slice, ...], change_hu: Tensor, in_host: Tensor, mask: Tensor
    ) -> None:
        """Add HU to a crop of one channel; `mask` is the whole host, for its standard deviation where HU mean nothing.

        Host voxels stay in the range to which the preprocessing clips.
        """
        scale = self.scales[channel]
        part = image[channel][crop]
        if scale is None:
            sd = float(image[channel][mask].std()) if int(mask.sum()) > 1 else 0.0
            part += change_hu * (sd / TYPICAL_ORGAN_SD_HU)
        else:
            changed = (part + change_hu / scale.hu_per_unit).clamp(scale.low, scale.high)
            part.copy_(torch.where(in_host & (change_hu != 0), changed, part))

    # ------------------------------------------------------------------------------------------------ geometry
    def _voxels_of(self, radius_mm: float) -> float:
        """Voxels (2D: pixels) of a ball."""
        ball = 4 / 3 * math.pi * radius_mm**3 if len(self.spacing_mm) == 3 else math.pi * radius_mm**2
        return ball / math.prod(self.spacing_mm)

    def _radius_of(self, voxels: float) -> float:
        """Inverse of `_voxels_of`."""
        return float((voxels / self._voxels_of(1.0)) ** (1 / len(self.spacing_mm)))

    def _find_center(self, mask: Tensor, radius_mm: float, rng: np.random.Generator) -> np.ndarray:
        """Voxel of the host around which most of a ball lies in the host; the part outside of the patch is ignored."""
        inside = mask.numpy()
        places = np.argwhere(inside)
        candidates = places[rng.integers(len(places), size=24)]  # (24, axes)
        directions = rng.standard_normal((48, len(self.spacing_mm)))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        ball = directions * radius_mm * rng.uniform(0.3, 1, size=(48, 1))
        probes = candidates[:, None] + np.rint(ball / self.spacing_mm).astype(int)  # (24, 48, axes)
        shape = np.asarray(mask.shape)
        is_seen = ((probes >= 0) & (probes < shape)).all(-1)
        is_host = inside[tuple(np.moveaxis(np.clip(probes, 0, shape - 1), -1, 0))] & is_seen
        share = is_host.sum(1) / np.maximum(is_seen.sum(1), 1)
        good = np.flatnonzero(share >= _IN_HOST)
        return np.asarray(candidates[good[0] if len(good) else share.argmax()])

    def _resample(
        self, distance: Tensor, axis_mm: Tensor, center: np.ndarray, shape: Sequence[int], edge_mm: float
    ) -> tuple[tuple[slice, ...], Tensor]:
        """The part of the patch that a shape around `center` reaches, and its distance map there, multilinear."""
        reached = distance > -edge_mm
        crop = []
        for axis, (size, spacing) in enumerate(zip(shape, self.spacing_mm, strict=True)):
            others = tuple(a for a in range(distance.ndim) if a != axis)
            extent = axis_mm[reached.amax(others)]
            first = math.floor(float(extent[0]) / spacing) + int(center[axis])
            last = math.ceil(float(extent[-1]) / spacing) + int(center[axis])
            start, stop = max(first, 0), min(last + 1, size)
            crop.append(slice(start, stop))
            position = (torch.arange(start, stop) - int(center[axis])) * spacing
            weights = (1 - (position[:, None] - axis_mm).abs() / (axis_mm[1] - axis_mm[0])).clamp_min(
                0
            )  # hat functions
            weights /= weights.sum(1, keepdim=True).clamp_min(1e-6)
            distance = torch.tensordot(weights, distance.movedim(axis, 0), 1).movedim(0, axis)
        return tuple(crop), distance.contiguous()

    def _waves(self, crop: tuple[slice, ...], length_mm: float, count: int, rng: np.random.Generator) -> Tensor:
        """Random field of standard deviation 1 on a crop, with covariance exp(−d² / (2 length²))."""
        axes = [torch.arange(s.start, s.stop) * spacing for s, spacing in zip(crop, self.spacing_mm, strict=True)]
        return _plane_waves(axes, rng.standard_normal((count, len(axes))) / length_mm, rng)


def _draw_shape(anomaly: Anomaly, dimensions: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Signed distance in mm (positive inside) on a cubic grid around the center, and the grid's axis in mm."""
    radius = anomaly.radius_mm
    axis = torch.linspace(-_REACH, _REACH, _GRID)  # in radii
    points = torch.stack(torch.meshgrid(*[axis] * dimensions, indexing="ij"), -1).flatten(0, -2)
    rotation, _ = np.linalg.qr(rng.standard_normal((dimensions, dimensions)))
    stretch = anomaly.elongation ** np.linspace(-0.5, 0.5, dimensions)
    frame = points @ torch.from_numpy(rotation / stretch).float()

    lobes = int(rng.integers(1, 6))
    offsets = rng.standard_normal((lobes, dimensions))
    offsets *= rng.uniform(0.3, 1.0, size=(lobes, 1)) / np.linalg.norm(offsets, axis=1, keepdims=True)
    widths = rng.uniform(0.35, 0.65, size=lobes)
    offsets[0], widths[0] = 0, 0.7
    exponents = [
        -0.5 * ((frame - torch.from_numpy(o).float()) / w).square().sum(-1)
        for o, w in zip(offsets, widths, strict=True)
    ]
    field = torch.logsumexp(torch.stack(exponents), 0).view([_GRID] * dimensions)
    frequencies = rng.uniform(1.5, 4.0, size=(_WAVES, 1)) * rng.standard_normal((_WAVES, dimensions)) / dimensions**0.5
    field = field + rng.uniform(0.0, 0.35) * _plane_waves([axis] * dimensions, frequencies, rng)

    step = float(axis[1] - axis[0])
    unit_ball = 4 / 3 * math.pi if dimensions == 3 else math.pi
    level = field.flatten().topk(round(unit_ball / step**dimensions)).values[-1]
    slopes = torch.gradient(field, spacing=step)
    steepness = torch.stack(slopes).square().sum(0).sqrt().clamp_min(0.2)
    return (field - level) / steepness * radius, axis * radius


def _plane_waves(axes: Sequence[Tensor], frequencies: np.ndarray, rng: np.random.Generator) -> Tensor:
    """√(2/W) Σ cos(k·x + φ) on the grid of 2 or 3 axes; frequencies (W, axes) in radians per unit of the axes."""
    count = len(frequencies)
    k = torch.from_numpy(frequencies).float()
    phase = torch.from_numpy(rng.uniform(0, 2 * math.pi, size=count)).float()
    for axis, coordinates in enumerate(axes[:-1]):  # phases of all but the last axis add up: (X, W), (X, Y, W)
        phase = phase.unsqueeze(-2) + coordinates.float()[:, None] * k[:, axis]
    last = axes[-1].float()[:, None] * k[:, -1]
    # cos(a + b) = cos a cos b − sin a sin b: one matrix product
    left, right = torch.cat((phase.cos(), -phase.sin()), -1), torch.cat((last.cos(), last.sin()), -1)
    return left @ right.T * math.sqrt(2 / count)


def _neighborhood_share(is_organ: Tensor) -> Tensor:
    """Share of organ among each voxel's 3 × 3 (× 3) neighbors in the crop."""
    return mean_of_neighbors(is_organ.float()[None, None], (3,) * is_organ.ndim)[0, 0]


def _bounding_box(mask: Tensor) -> tuple[slice, ...]:
    """Smallest box that holds a mask with at least one voxel."""
    box = []
    for axis in range(mask.ndim):
        others = tuple(a for a in range(mask.ndim) if a != axis)
        hits = mask.amax(others).nonzero().flatten()
        box.append(slice(int(hits[0]), int(hits[-1]) + 1))
    return tuple(box)
