"""The phantom's organs, vessels and bowel, painted into a `Body`. All of it is healthy.

Every body has look-alikes of lesions, as every patient does: vessels in the liver, its clefts and the gallbladder,
calyces and sinus fat in the kidneys, clefts and arterial moiré in the spleen, the lobules of the pancreas, food,
gas and contrast in stomach and bowel. `phantom_lookalikes` adds those that only some patients have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from zept_nnunet.datasets.phantom_body import Body, Tissue, moved
from zept_nnunet.datasets.phantom_parameters import HU, ORGAN_SHAPES, ORGANS
from zept_nnunet.datasets.shapes import Box, Ellipsoid, Triple, Tube

_FREE = (Tissue.CAVITY,)
_PLANE_MM = 1.2


def draw_organs(body: Body, rng: np.random.Generator) -> None:
    """Paint every organ. What is painted first keeps its place."""
    _draw_great_vessels(body, rng)
    _draw_clefts(body, rng)
    for side in ("left", "right"):
        _draw_kidney(body, side, rng)
    _draw_organ(body, "pancreas", rng)
    _draw_spleen(body, rng)
    _draw_stomach(body, rng)
    _draw_liver(body, rng)
    _draw_bowel(body, rng)
    _draw_mesentery(body, rng)


def _jitter(point: Triple, rng: np.random.Generator, std_mm: float) -> Triple:
    z, y, x = (float(c + std_mm * rng.standard_normal()) for c in point)
    return z, y, x


def _path(
    points: Sequence[Triple], radii: Sequence[float], rng: np.random.Generator, std_mm: float = 2.0
) -> list[Tube]:
    """Tubes along a line of points, each jittered."""
    at = [_jitter(p, rng, std_mm) for p in points]
    return [Tube(at[i], at[i + 1], radii[i], radii[i + 1]) for i in range(len(at) - 1)]


def _draw_great_vessels(body: Body, rng: np.random.Generator) -> None:
    blood = body.mean_hu
    anywhere = (Tissue.CAVITY, Tissue.OTHER, Tissue.PLANE, Tissue.WALL)
    wide = rng.uniform(0.85, 1.2)
    aorta = _path(
        [(140, 30, 10), (60, 24, 8), (-30, 20, 9), (-140, 22, 6)], [12 * wide, 11 * wide, 10 * wide, 9 * wide], rng
    )
    cava = _path([(90, 8, -24), (50, 14, -26), (-10, 20, -24), (-140, 24, -20)], [12, 12, 11, 10], rng)
    groups: list[tuple[str, list[Tube]]] = [
        ("aorta", aorta),
        ("vena cava", cava),
        ("portal vein", _path([(-8, -4, -12), (8, -6, -22), (24, -12, -42)], [7, 7, 6], rng)),
        ("portal vein", _path([(-110, -26, -16), (-50, -20, -14), (-8, -4, -12)], [5, 5.5, 6], rng)),
        ("portal vein", _path([(-8, -4, -12), (4, -4, 16), (12, 6, 44), (26, 30, 72)], [5, 4.5, 4, 3.5], rng)),
        ("aorta", _path([(4, 16, 8), (-8, 2, 6), (-110, -18, 2)], [4, 3.5, 3], rng)),
        ("aorta", _path([(16, 18, 8), (18, 2, 4), (24, -8, -24)], [3.5, 3, 2.2], rng)),
        ("aorta", _path([(-14, 20, 14), (-20, 40, 46)], [3, 2.5], rng)),
        ("aorta", _path([(-16, 22, 0), (-26, 34, -24), (-34, 42, -48)], [3, 2.5, 2.5], rng)),
        ("vena cava", _path([(-16, 14, -16), (-18, 8, 10), (-24, 36, 46)], [4.5, 4, 4], rng)),
        ("vena cava", _path([(-26, 22, -26), (-36, 36, -48)], [4.5, 4], rng)),
    ]
    for name, tubes in groups:
        body.paint(tubes, Tissue.VESSEL, blood[name], allowed=anywhere, plane_mm=0.8)


def _draw_clefts(body: Body, rng: np.random.Generator) -> None:
    """Fat that organs go around (fissures and hilum of the liver, hilum and clefts of the spleen); the gallbladder."""
    clefts = [
        Ellipsoid(_jitter((14, -54, -8), rng, 4), (34, 26, rng.uniform(2.0, 4.5))),  # falciform, round ligament
        Ellipsoid(_jitter((42, -12, -16), rng, 3), (22, rng.uniform(2.0, 4.0), 22)),  # venous ligament
        Ellipsoid(_jitter((22, -12, -38), rng, 3), (10, 9, 15)),  # hilum of the liver
        Ellipsoid(_jitter((36, 26, 72), rng, 4), (20, 15, 9)),  # hilum of the spleen
    ]
    for _ in range(int(rng.integers(1, 4))):  # clefts of the spleen, from its inner side
        clefts.append(Ellipsoid(_jitter((34, 24, 84), rng, 10), (rng.uniform(1.8, 3.5), 9, rng.uniform(12, 20))))
    for cleft in clefts:
        body.paint([cleft], Tissue.PLANE, body.mean_hu["fat"] + 12, allowed=_FREE)
    gallbladder = Ellipsoid(_jitter((-6, -44, -46), rng, 4), (24, rng.uniform(9, 15), rng.uniform(9, 15)))
    body.paint(
        [gallbladder],
        Tissue.OTHER,
        lambda d, _: np.where(d > -1.8, body.mean_hu["bowel wall"], body.mean_hu["bile"]),
        allowed=(Tissue.CAVITY, Tissue.PLANE),
        plane_mm=rng.uniform(0.5, 2.5),
    )


def _draw_organ(
    body: Body,
    name: str,
    rng: np.random.Generator,
    *,
    inner: Callable[[np.ndarray, Box, np.ndarray], np.ndarray] | None = None,
    extra: np.ndarray | None = None,
) -> tuple[tuple[Ellipsoid, ...], Box | None]:
    """Paint an organ with its texture; ``inner`` may change the attenuation, given distance, block and texture."""
    shape = ORGAN_SHAPES[name]
    common = rng.normal(0, shape.shift_mm, 3)
    parts = tuple(
        moved(p, common + rng.normal(0, 0.5 * shape.shift_mm, 3), 1 + shape.stretch * rng.uniform(-1, 1, 3))
        for p in shape.parts
    )
    texture_hu, texture_mm = shape.texture_hu.draw(rng), shape.texture_mm.draw(rng)
    mean = body.organ_hu(name)

    def attenuation(distance: np.ndarray, box: Box) -> np.ndarray:
        texture = texture_hu * body.field(box, texture_mm, rng)
        return mean + texture if inner is None else inner(distance, box, mean + texture)

    def surface(box: Box) -> np.ndarray:
        rough = shape.roughness_mm * body.field(box, shape.roughness_scale_mm, rng)
        wall = np.maximum(body.cavity_mm[box] + 2.0, body.diaphragm_mm[box] + 1.0)  # stay inside the cavity
        return rough + 1000 * (wall > 0)

    box = body.paint(
        parts, ORGANS[name], attenuation, allowed=_FREE, blend_mm=shape.blend_mm, roughness=surface, plane_mm=_PLANE_MM
    )
    return parts, box


def _draw_kidney(body: Body, side: str, rng: np.random.Generator) -> None:
    """Cortex, medullary pyramids where the phase shows them, sinus fat, pelvis and calyces."""
    corticomedullary = {"arterial": 0.55, "portal": 0.12}.get(body.phase, 0.0) * rng.uniform(0.7, 1.3)
    cortex_mm = rng.uniform(6, 9)

    def inner(distance: np.ndarray, box: Box, values: np.ndarray) -> np.ndarray:
        pyramids = (distance < -cortex_mm) & (body.field(box, 11.0, rng) > -0.5)
        return np.where(pyramids, values - corticomedullary * (values - 35), values)

    name = f"kidney {side}"
    parts, _ = _draw_organ(body, name, rng, inner=inner)
    sign = 1.0 if side == "left" else -1.0
    upper, lower = np.asarray(parts[0].center_mm), np.asarray(parts[1].center_mm)
    middle = (upper + lower) / 2 - np.array([0, 4, sign * 8])
    here = (ORGANS[name],)
    sinus = Ellipsoid((middle[0], middle[1], middle[2]), (rng.uniform(18, 27), rng.uniform(7, 11), rng.uniform(8, 12)))
    body.paint([sinus], None, body.mean_hu["fat"] + 25, allowed=here, roughness=lambda b: 2.5 * body.field(b, 9.0, rng))
    pelvis = [Tube((middle[0], middle[1], middle[2] - sign * 10), (middle[0], middle[1], middle[2] + sign * 2), 5, 3)]
    for offset in (-18, -6, 7, 19):
        start = (middle[0] + 0.4 * offset, middle[1], middle[2])
        end = _jitter((middle[0] + offset, middle[1] + 3, middle[2] + sign * 9), rng, 2)
        pelvis.append(Tube(start, end, 2.0, rng.uniform(2.5, 5.0)))
    body.paint(pelvis, None, body.mean_hu["urine"], allowed=here)


def _draw_spleen(body: Body, rng: np.random.Generator) -> None:
    moire = rng.uniform(10, 24) if body.phase == "arterial" else 0.0
    wave_mm = rng.uniform(9, 15)

    def inner(_: np.ndarray, box: Box, values: np.ndarray) -> np.ndarray:
        z, y, x = body.grid.points_in(box)
        turn = 3.5 * body.field(box, 20.0, rng)
        return values + moire * np.sin(2 * np.pi * (0.6 * z + y + 0.7 * x) / wave_mm + turn)

    _draw_organ(body, "spleen", rng, inner=inner)


def _draw_stomach(body: Body, rng: np.random.Generator) -> None:
    """Wall with folds, and fluid, food or contrast with gas above it: the patient lies on the back."""
    wall_mm = rng.uniform(4, 8)
    content = _content_hu(body, rng, 0.25)
    level = rng.uniform(-62, -32)  # gas in front of this Y
    lumps = rng.uniform(4, 22)

    def inner(distance: np.ndarray, box: Box, values: np.ndarray) -> np.ndarray:
        folds = 1.5 * body.field(box, 7.0, rng)
        food = content + lumps * body.field(box, 9.0, rng)
        lumen = np.where(body.grid.points_mm[1][box] < level, body.mean_hu["gas"], food)
        return np.where(distance + folds < -wall_mm, lumen, values)

    _draw_organ(body, "stomach", rng, inner=inner)


def _content_hu(body: Body, rng: np.random.Generator, contrast_probability: float) -> float:
    with_contrast = rng.uniform() < contrast_probability
    return HU["oral contrast" if with_contrast else "gut fluid"].draw(rng)


def _draw_liver(body: Body, rng: np.random.Generator) -> None:
    _draw_organ(body, "liver", rng)
    here = (ORGANS["liver"],)
    portal: list[Tube] = []
    for start, end in (
        ((24, -12, -42), (36, -34, -4)),
        ((24, -12, -42), (20, 2, -84)),
        ((24, -10, -46), (-14, 0, -88)),
        ((24, -10, -46), (46, 4, -82)),
    ):
        portal += _branch(start, _jitter(end, rng, 6), rng.uniform(3.5, 5.0), 2, rng)
    veins: list[Tube] = []
    for end in ((34, 26, -98), (28, -28, -62), (50, -40, 8), (10, 16, -96)):
        veins += _branch((56, 10, -28), _jitter(end, rng, 7), rng.uniform(3.5, 5.0), 2, rng)
    body.paint(veins, None, body.mean_hu["hepatic vein"], allowed=here)
    body.paint(portal, None, body.mean_hu["portal vein"], allowed=here)


def _branch(start: Triple, end: Triple, radius_mm: float, depth: int, rng: np.random.Generator) -> list[Tube]:
    """A vessel that tapers and gives off branches."""
    tubes = [Tube(start, end, radius_mm, 0.55 * radius_mm)]
    if depth == 0:
        return tubes
    axis = np.asarray(end) - np.asarray(start)
    length = float(np.linalg.norm(axis))
    for at in (0.45, 0.8, 1.0):
        aside = rng.standard_normal(3)
        direction = axis / length + 0.9 * aside / np.linalg.norm(aside)
        origin = np.asarray(start) + at * axis
        tip = origin + direction / np.linalg.norm(direction) * length * rng.uniform(0.35, 0.6)
        tubes += _branch(tuple(origin), tuple(tip), radius_mm * (1 - 0.45 * at) * 0.8, depth - 1, rng)
    return tubes


def _draw_gut(
    body: Body, tubes: list[Tube], content_hu: float, gas: float, grain_hu: float, rng: np.random.Generator
) -> None:
    """A piece of gut: wall, content, and gas in its front ``gas`` part (0 none, 1 all)."""
    front = float(np.mean([t.start_mm[1] for t in tubes] + [t.end_mm[1] for t in tubes]))
    radius = max(t.start_radius_mm for t in tubes)
    level = front + radius * (2 * gas - 1)

    def inside(distance: np.ndarray, box: Box) -> np.ndarray:
        content = content_hu + grain_hu * body.field(box, 6.0, rng)
        lumen = np.where(body.grid.points_mm[1][box] < level, body.mean_hu["gas"], content)
        return np.where(distance > -2.4, body.mean_hu["bowel wall"], lumen)

    def surface(box: Box) -> np.ndarray:
        outside = np.maximum(body.cavity_mm[box] + 2.0, body.diaphragm_mm[box] + 1.0) > 0
        return 2.0 * body.field(box, 13.0, rng) + 1000 * outside

    body.paint(tubes, Tissue.BOWEL, inside, allowed=_FREE, roughness=surface, plane_mm=1.5)


def _draw_bowel(body: Body, rng: np.random.Generator) -> None:
    duodenum = _path(
        [(-6, -30, -34), (-10, -14, -54), (-44, -6, -54), (-54, 4, -12), (-50, 0, 20)], [10, 10, 11, 10, 9], rng
    )
    _draw_gut(body, duodenum, _content_hu(body, rng, 0.25), rng.uniform(0, 0.3), 6, rng)
    wide = rng.uniform(0.8, 1.2)
    colon = [
        [(-130, 22, -98), (-80, 20, -100), (-52, -4, -98)],
        [(-44, -40, -84), (-58, -62, -44), (-64, -64, 0)],
        [(-64, -64, 0), (-44, -60, 50), (-16, -40, 88), (4, -14, 106)],
        [(0, 10, 108), (-50, 28, 106), (-130, 24, 102)],
    ]
    for points in colon:
        radii = [float(wide * rng.uniform(13, 22)) for _ in points]
        _draw_gut(body, _path(points, radii, rng, 4), HU["feces"].draw(rng), rng.uniform(0, 0.8), 60, rng)
    for i in range(44):
        if i % 4 == 0:  # jejunum, high on the left, as far back as the kidney's front
            start = (rng.uniform(-60, 5), rng.uniform(-50, 18), rng.uniform(30, 100))
        else:
            start = (rng.uniform(-105, -20), rng.uniform(-68, -2), rng.uniform(-80, 84))
        end = (start[0] + rng.uniform(-18, 18), start[1] + rng.uniform(-12, 12), start[2] + rng.uniform(-40, 40))
        radius = rng.uniform(8, 13)
        gas = rng.uniform(0.3, 0.8) if rng.uniform() < 0.2 else 0.0
        _draw_gut(body, [Tube(start, end, radius, radius)], _content_hu(body, rng, 0.2), gas, 6, rng)


def _draw_mesentery(body: Body, rng: np.random.Generator) -> None:
    """Small vessels and strands in the fat."""
    for _ in range(22):
        start = (rng.uniform(-95, 30), rng.uniform(-60, 30), rng.uniform(-75, 80))
        end = _jitter(start, rng, 18)
        vessel = Tube(start, end, rng.uniform(1.0, 2.4), 0.8)
        name = "portal vein" if rng.uniform() < 0.6 else "aorta"
        body.paint([vessel], Tissue.VESSEL, body.mean_hu[name], allowed=(Tissue.CAVITY, Tissue.PLANE))
