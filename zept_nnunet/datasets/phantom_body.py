"""The phantom's body: layers of the wall, diaphragm and lungs, spine, ribs, muscles. Organs come in `phantom_organs`.

`Body` is the canvas on which everything is painted, on a grid finer than the voxels that are written at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np

from zept_nnunet.datasets.phantom_parameters import BUILD, HU, TISSUE_HU, TISSUE_OF_ORGAN
from zept_nnunet.datasets.shapes import BodyGrid, Box, Ellipsoid, Triple, Tube, smooth_field, smooth_union


class Tissue(IntEnum):
    """What a fine voxel is, beside the organs' labels (which are below 100)."""

    OUTSIDE = 100
    SUBCUTANEOUS = 101
    WALL = 102
    CAVITY = 103  # fat that organs and bowel may take
    PLANE = 104  # fat that they may not take
    LUNG = 105
    BONE = 106
    VESSEL = 107
    BOWEL = 108
    OTHER = 109


@dataclass
class Body:
    """One patient on the fine grid.

    Attributes:
        hu: (Z, Y, X) float32.
        tissue: (Z, Y, X) uint8, values of ``Tissue`` or an organ's label.
        phase: contrast phase, of ``PHASES``.
        mean_hu: this patient's mean attenuation by tissue, keys of ``TISSUE_HU`` and ``HU``.
        cavity_mm: (Z, Y, X) signed distance to the wall of the cavity.
        diaphragm_mm: (Z, Y, X) height above the diaphragm.
        lookalikes: names of the healthy look-alikes that were painted, beside what every body has.
    """

    grid: BodyGrid
    hu: np.ndarray
    tissue: np.ndarray
    phase: str
    mean_hu: dict[str, float]
    cavity_mm: np.ndarray
    diaphragm_mm: np.ndarray
    lookalikes: list[str] = field(default_factory=list)

    def paint(
        self,
        shapes: Sequence[Ellipsoid | Tube],
        tissue: int | None,
        hu: float | Callable[[np.ndarray, Box], np.ndarray],
        *,
        allowed: Sequence[int],
        blend_mm: float = 0.0,
        roughness: np.ndarray | Callable[[Box], np.ndarray] | None = None,
        plane_mm: float = 0.0,
    ) -> Box | None:
        """Paint a union of shapes over some tissues.

        Args:
            tissue: what the voxels become; None keeps it and changes the attenuation alone.
            hu: attenuation, or a function of the signed distance (…) in the block and the block.
            allowed: tissues that may be overwritten.
            blend_mm: smooth union over that width; 0 is a plain union.
            roughness: added to the distance, in mm: an irregular surface.
            plane_mm: a layer of fat of that thickness around it that nothing painted later takes.

        Returns:
            The block that was touched, None where the shapes lie outside the volume.
        """
        bounds = [shape.bounds(8.0 + plane_mm + blend_mm) for shape in shapes]
        box = self.grid.box(np.min([b[0] for b in bounds], axis=0), np.max([b[1] for b in bounds], axis=0))
        if box is None:
            return None
        points = self.grid.points_in(box)
        distances = [shape.distance(points) for shape in shapes]
        distance = smooth_union(distances, blend_mm) if blend_mm else np.minimum.reduce(distances)
        if roughness is not None:
            distance = distance + (roughness(box) if callable(roughness) else roughness)
        present = self.tissue[box]
        free = np.isin(present, np.asarray(allowed, dtype=np.uint8))
        inside = free & (distance <= 0)
        if plane_mm:
            present[free & (distance > 0) & (distance <= plane_mm) & (present == Tissue.CAVITY)] = Tissue.PLANE
        values = hu(distance, box) if callable(hu) else hu
        self.hu[box][inside] = values[inside] if isinstance(values, np.ndarray) else values
        if tissue is not None:
            present[inside] = tissue
        return box

    def organ_hu(self, organ: str) -> float:
        """This patient's mean attenuation of an organ's healthy parenchyma or wall."""
        return self.mean_hu[TISSUE_OF_ORGAN[organ]]

    def field(self, box: Box, scale_mm: float, rng: np.random.Generator) -> np.ndarray:
        """A smooth random field of unit standard deviation on a block."""
        return smooth_field(self.grid.sub_axes(box), scale_mm, rng)


def place_body(axes_mm: Sequence[np.ndarray], rng: np.random.Generator) -> BodyGrid:
    """Lay a patient of random build in the scanner: scaled, turned, shifted and smoothly bent."""
    scale = [BUILD.scale.draw(rng) for _ in range(3)]
    shift = [BUILD.shift_mm.draw(rng) for _ in range(3)]
    angle = np.deg2rad(BUILD.turn_deg.draw(rng))
    z, y, x = ((np.asarray(a, dtype=np.float32) - s) / f for a, s, f in zip(axes_mm, shift, scale, strict=True))
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    points = np.empty((3, len(z), len(y), len(x)), dtype=np.float32)
    points[0] = z[:, None, None]
    points[1] = (cosine * y[:, None] - sine * x[None, :])[None]
    points[2] = (sine * y[:, None] + cosine * x[None, :])[None]
    for i in range(3):
        points[i] += np.float32(BUILD.bend_mm) * smooth_field(axes_mm, BUILD.bend_scale_mm, rng)
        points[i] += np.float32(BUILD.ripple_mm) * smooth_field(axes_mm, BUILD.ripple_scale_mm, rng)
    return BodyGrid(axes_mm, points)


def draw_body(grid: BodyGrid, phase: str, rng: np.random.Generator) -> Body:
    """The body without its organs."""
    mean_hu = {name: ranges[phase].draw(rng) for name, ranges in TISSUE_HU.items()}
    mean_hu |= {name: value.draw(rng) for name, value in HU.items()}
    z, y, x = grid.points_mm
    half_depth, half_width = BUILD.cavity_mm
    power = np.float32(2.4)  # a superellipse: flatter than an ellipse in front and behind
    rho = (np.abs(x / half_width) ** power + np.abs(y / half_depth) ** power) ** (1 / power) + np.float32(1e-4)
    radius = np.sqrt(x**2 + y**2) + np.float32(1e-4)
    cavity = radius * (1 - 1 / rho)  # along the ray from the middle
    wall = BUILD.wall_mm.draw(rng)
    fat = BUILD.fat_mm.draw(rng) * (0.7 + 0.5 * (x / radius) ** 2)
    diaphragm = z - _diaphragm(y, x, rng)

    tissue = np.full(grid.shape, Tissue.OUTSIDE, dtype=np.uint8)
    hu = np.full(grid.shape, mean_hu["air"], dtype=np.float32)
    body = Body(grid, hu, tissue, phase, mean_hu, cavity, diaphragm)
    everywhere = (slice(None), slice(None), slice(None))
    strands = body.field(everywhere, 9.0, rng)

    skin = cavity <= wall + fat + 2.5
    hu[skin], tissue[skin] = mean_hu["skin"], Tissue.SUBCUTANEOUS
    below_skin = cavity <= wall + fat
    hu[below_skin] = mean_hu["fat"] + 5 * strands[below_skin]
    in_wall = cavity <= wall
    hu[in_wall], tissue[in_wall] = mean_hu["muscle"] + 9 * strands[in_wall], Tissue.WALL
    # A layer of fat between the muscles of the wall, as between the obliques.
    between = in_wall & (np.abs(cavity - 0.45 * wall) < 1.0) & (strands > -0.3)
    hu[between] = mean_hu["fat"] + 40
    inside = cavity <= 0
    hu[inside] = mean_hu["fat"] + 8 * strands[inside]
    tissue[inside] = Tissue.CAVITY

    edge = half_depth + wall + 0.7 * float(fat.max()) + 3
    table = (tissue == Tissue.OUTSIDE) & (np.abs(y - edge - 8 + 0.0011 * x**2) < 1.5)
    hu[table] = mean_hu["table"]

    _draw_lungs(body, inside, rng)
    _draw_muscles(body, rng)
    _draw_ribs(body, wall, rng)
    _draw_spine(body, rng)
    return body


def _diaphragm(y: np.ndarray, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(Z, Y, X) height of the diaphragm's two domes in mm."""
    right, left = 80 + rng.uniform(-8, 8), 70 + rng.uniform(-8, 8)
    on_the_right = right - 40 * ((x + 62) / 70) ** 2 - 42 * ((y + 6) / 76) ** 2
    on_the_left = left - 40 * ((x - 62) / 70) ** 2 - 42 * ((y + 2) / 76) ** 2
    return np.maximum(on_the_right, on_the_left)


def _draw_lungs(body: Body, inside: np.ndarray, rng: np.random.Generator) -> None:
    _, y, x = body.grid.points_mm
    mediastinum = (x / 27) ** 2 + ((y + 16) / 62) ** 2 < 1 + 0.3 * np.sin(y / 13 + rng.uniform(0, 6))
    heart = Ellipsoid((92, -34, 20), (24 + rng.uniform(-6, 6), 38, 52))
    above = inside & (body.diaphragm_mm > 0) & (body.cavity_mm < -2)
    body.hu[above & (body.diaphragm_mm < 3)] = body.mean_hu["muscle"]
    body.tissue[above] = Tissue.OTHER
    lung = above & (body.diaphragm_mm >= 3) & ~mediastinum
    box = body.grid.box(np.array([-40.0, -100, -150]), np.array([200.0, 100, 150]))
    if box is not None:
        grain, vessels = body.field(box, 8.0, rng), body.field(box, 7.0, rng)
        values = body.mean_hu["lung"] + 35 * grain
        values[vessels > 1.9] = -150
        body.hu[box][lung[box]] = values[lung[box]]
    body.tissue[lung] = Tissue.LUNG
    blood = 0.5 * (body.mean_hu["aorta"] + body.mean_hu["vena cava"])
    allowed = (Tissue.LUNG, Tissue.OTHER)
    body.paint([heart], Tissue.OTHER, lambda d, _: np.where(d > -7, 0.6 * blood + 25, blood), allowed=allowed)
    body.paint([Tube((70, 26, 2), (140, 24, 0), 9, 9)], Tissue.OTHER, body.mean_hu["muscle"], allowed=allowed)


def _draw_muscles(body: Body, rng: np.random.Generator) -> None:
    anywhere = (Tissue.WALL, Tissue.CAVITY, Tissue.SUBCUTANEOUS, Tissue.PLANE)
    size = rng.uniform(0.9, 1.12)

    def flesh(_: np.ndarray, box: Box) -> np.ndarray:
        return body.mean_hu["muscle"] + 10 * body.field(box, 7.0, rng) - 6

    for side in (-1, 1):
        spinal = Tube((-200, 88, side * 30), (200, 86, side * 28), 25 * size, 22 * size)
        psoas = Tube((20, 58, side * 24), (-110, 52, side * 46), 5 * size, 21 * size)
        lumborum = Tube((-15, 74, side * 62), (-110, 78, side * 66), 6 * size, 11 * size)
        crus = Tube((60, 34, side * 14), (-35, 36, side * 16), 7, 3)
        for muscle in (spinal, psoas, lumborum, crus):
            body.paint([muscle], Tissue.WALL, flesh, allowed=anywhere)


def _draw_ribs(body: Body, wall: float, rng: np.random.Generator) -> None:
    """Ribs run down towards the front, so an axial slice cuts each of them as an oval."""
    z, y, _ = body.grid.points_mm
    start, period = rng.uniform(0, 26), 26.0
    across = np.abs((z - 0.6 * y - start) % period - period / 2)  # distance from a rib's middle line
    middle = body.cavity_mm - 0.4 * wall
    rib = np.sqrt((across / 1.5) ** 2 + (1.15 * middle) ** 2)
    covered = z > -58 + 0.9 * np.maximum(0, 20 - y)  # the costal margin rises towards the front
    allowed = body.tissue == Tissue.WALL
    inside = allowed & covered & (rib < 3.4) & (np.abs(body.grid.points_mm[2]) > 30)
    in_front = y < -62  # cartilage
    body.hu[inside] = np.where(rib < 1.9, body.mean_hu["cancellous bone"], body.mean_hu["cortical bone"] * 0.8)[inside]
    body.hu[inside & in_front] = 120
    body.tissue[inside] = Tissue.BONE


def _draw_spine(body: Body, rng: np.random.Generator) -> None:
    z, y, x = body.grid.points_mm
    period = rng.uniform(32, 37)
    along = (z + rng.uniform(0, period)) % period
    disc = along < 8
    waist = 1 - 0.06 * np.cos((along - 8) / (period - 8) * 2 * np.pi - np.pi)  # vertebrae are narrower in the middle
    rho = np.sqrt((x / (23 * waist)) ** 2 + ((y - 50) / (17 * waist)) ** 2)
    box = body.grid.box(np.array([-300.0, 20, -60]), np.array([300.0, 130, 60]))
    if box is None:
        return
    trabeculae = np.zeros(body.grid.shape, dtype=np.float32)
    trabeculae[box] = body.field(box, 5.0, rng)
    vertebra = rho < 1
    soft = body.mean_hu["cancellous bone"]
    values = np.where(rho > 0.9, body.mean_hu["cortical bone"] * 0.75, soft + 28 * trabeculae)
    values = np.where(disc, 85 + 8 * trabeculae, np.where((along < 10) | (along > period - 2), soft + 180, values))
    arch = (np.abs(np.sqrt(x**2 + (y - 74) ** 2) - 12) < 3) & (along > 12)
    spinous = (np.abs(x) < 3.5) & (y > 84) & (y < 108) & (along > 14) & (along < 30)
    transverse = (
        (np.abs(y - 72 - 0.12 * np.abs(x)) < 4.5) & (np.abs(x) < 42) & (np.abs(x) > 10) & (along > 18) & (along < 28)
    )
    rest = (arch | spinous | transverse) & ~vertebra
    body.hu[vertebra] = values[vertebra]
    body.hu[rest] = (body.mean_hu["cortical bone"] * 0.65 + 60 * trabeculae)[rest]
    body.tissue[vertebra | rest] = Tissue.BONE
    canal = (x**2 + (y - 74) ** 2 < 9**2) & ~vertebra
    body.hu[canal] = body.mean_hu["spinal canal"]
    body.tissue[canal] = Tissue.OTHER


def moved(shape: Ellipsoid, shift_mm: np.ndarray, stretch: np.ndarray) -> Ellipsoid:
    """The ellipsoid at another place, its semi-axes multiplied."""
    center: Triple = tuple(float(c + s) for c, s in zip(shape.center_mm, shift_mm, strict=True))  # type: ignore[assignment]
    radii: Triple = tuple(float(r * f) for r, f in zip(shape.radii_mm, stretch, strict=True))  # type: ignore[assignment]
    return replace(shape, center_mm=center, radii_mm=radii)
