"""From the fine grid to the CT that is written: partial volume, noise, streaks and motion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import ndimage  # type: ignore[import-untyped]

from zept_nnunet.datasets.phantom_parameters import SCANNER
from zept_nnunet.datasets.shapes import Range, Triple

AIR_HU, MOST_HU = -1024, 3071
Factors = tuple[int, int, int]


@dataclass(frozen=True)
class Protocol:
    """One acquisition: voxel grid and what disturbs the image.

    Attributes:
        shape: voxels along Z, Y, X.
        spacing_mm: along Z, Y, X.
        factors: fine voxels per voxel along Z, Y, X.
    """

    shape: tuple[int, int, int]
    spacing_mm: Triple
    factors: Factors
    noise_hu: float
    noise_scale_voxels: float
    calibration_hu: float
    streak_hu: float  # 0: none
    motion_voxels: float  # 0: none

    def fine_axes_mm(self) -> list[np.ndarray]:
        """Coordinates of the fine voxels' centers along Z, Y, X; the middle of the volume is 0."""
        counts = [n * f for n, f in zip(self.shape, self.factors, strict=True)]
        steps = [s / f for s, f in zip(self.spacing_mm, self.factors, strict=True)]
        return [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(counts, steps, strict=True)]


def draw_protocol(
    shape: tuple[int, int, int], spacing_mm: Triple, factors: Factors, noise_hu: Range, rng: np.random.Generator
) -> Protocol:
    """Draw the acquisition of one case."""
    streaks, motion = rng.uniform(size=2)
    return Protocol(
        shape,
        spacing_mm,
        factors,
        noise_hu.draw(rng),
        SCANNER.noise_scale_voxels.draw(rng),
        SCANNER.calibration_hu.draw(rng),
        SCANNER.streak_hu.draw(rng) * float(streaks < SCANNER.streak_probability),
        SCANNER.motion_voxels.draw(rng) * float(motion < SCANNER.motion_probability),
    )


def average_down(fine: np.ndarray, factors: Factors) -> np.ndarray:
    """(Z, Y, X) float32 mean of each block of fine voxels: partial volume."""
    z, y, x = (n // f for n, f in zip(fine.shape, factors, strict=True))
    return fine.reshape(z, factors[0], y, factors[1], x, factors[2]).mean(axis=(1, 3, 5), dtype=np.float32)


def majority_label(fine: np.ndarray, labels: Mapping[int, int], factors: Factors) -> np.ndarray:
    """(Z, Y, X) uint8: the label that most of a voxel's fine voxels have; ties go to the lower value.

    Args:
        fine: (Z, Y, X) values.
        labels: fine value → label that is written; any other value is background, 0.
    """
    z, y, x = (n // f for n, f in zip(fine.shape, factors, strict=True))
    best: np.ndarray = average_down(~np.isin(fine, list(labels)), factors)  # share of background
    result = np.zeros((z, y, x), dtype=np.uint8)
    for value, label in sorted(labels.items(), key=lambda item: item[1]):
        share = average_down(fine == value, factors)
        wins = share > best
        result[wins] = label
        best = np.maximum(best, share)
    return result


def scan(ideal_hu: np.ndarray, protocol: Protocol, rng: np.random.Generator) -> np.ndarray:
    """(Z, Y, X) int16: the image as a scanner shows it. ``ideal_hu`` is already averaged to its voxels."""
    image: np.ndarray = ideal_hu.astype(np.float32)
    soft = image > -300
    image = np.where(soft, image + protocol.calibration_hu, image)
    if protocol.motion_voxels:
        # Breathing moves the upper part between rotations: a faint second image in a band of slices.
        band = _band(image.shape[0], rng)
        ghost = ndimage.shift(image, (0, protocol.motion_voxels, 0.4 * protocol.motion_voxels), order=1, mode="nearest")
        image = image + (0.4 * band)[:, None, None] * (ghost - image)
    if protocol.streak_hu:
        image = image + protocol.streak_hu * _streaks(image, rng)
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    scale = protocol.noise_scale_voxels
    # CT noise is band-limited: correlated at short range, without the lowest frequencies in the plane.
    fine = ndimage.gaussian_filter(noise, (0.35 * scale, scale, scale), mode="wrap")
    coarse = ndimage.gaussian_filter(noise, (0.35 * scale, 3 * scale, 3 * scale), mode="wrap")
    correlated = fine - coarse
    correlated /= correlated.std()
    image = image + protocol.noise_hu * _noise_profile(image.shape) * correlated
    return np.clip(np.rint(image), AIR_HU, MOST_HU).astype(np.int16)


def _noise_profile(shape: tuple[int, ...]) -> np.ndarray:
    """(1, Y, X): most X-rays are absorbed on the way to the middle, so noise is strongest there."""
    y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape[1:])
    radius = np.sqrt(y[:, None] ** 2 + x[None, :] ** 2)
    return np.clip(1.1 - 0.35 * radius, 0.6, None)[None]


def _band(slices: int, rng: np.random.Generator) -> np.ndarray:
    middle, width = rng.uniform(0.4, 1.0) * slices, 0.15 * slices
    return np.exp(-0.5 * ((np.arange(slices) - middle) / width) ** 2).astype(np.float32)


def _streaks(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(Z, Y, X) within about ±1: rays from the densest point of some slices, as from contrast or metal."""
    result = np.zeros_like(image)
    y, x = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in image.shape[1:]), indexing="ij")
    for index in np.flatnonzero(rng.uniform(size=image.shape[0]) < 0.4):
        at_y, at_x = np.unravel_index(int(image[index].argmax()), image.shape[1:])
        angle = np.arctan2(y - at_y, x - at_x)
        rays = np.zeros_like(angle)
        for frequency in (6, 9, 13):
            rays += np.sin(frequency * angle + rng.uniform(0, 2 * np.pi)).astype(np.float32)
        distance = np.sqrt((y - at_y) ** 2 + (x - at_x) ** 2)
        result[index] = rays / 3 * np.exp(-distance / (0.35 * image.shape[2]))
    return result
