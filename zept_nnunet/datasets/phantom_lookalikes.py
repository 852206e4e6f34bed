"""Healthy findings that only some patients have, at the size and contrast of lesions. They carry the organ's label.

Those of ``TRAINING`` occur everywhere. Those of ``TEST_ONLY`` occur in no training image: a method that calls
everything unusual a tumor is caught by them. None is a ball: their shape tells them from a lesion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from zept_nnunet.datasets.phantom_body import Body
from zept_nnunet.datasets.phantom_parameters import ORGANS
from zept_nnunet.datasets.shapes import Box, Ellipsoid, Range, Tube


@dataclass(frozen=True)
class LookAlike:
    """A healthy finding.

    Attributes:
        organ: whose label it keeps.
        probability: that a patient has it.
        contrast_hu: to the organ's mean.
        size_mm: its longest half axis.
        shape: "sheet" (flat, beside the falciform), "wedge" (a cone, base on the surface), "specks", "patch" (with
            straight borders) or "bolus" (in the lumen).
    """

    organ: str
    probability: float
    contrast_hu: Range
    size_mm: Range
    shape: str


_FATTY = "fatty change and sparing beside the falciform: Hamer et al., Radiographics 2006;26:1637; width chosen"

TRAINING: Mapping[str, LookAlike] = {
    "focal fatty change beside the falciform": LookAlike(
        "liver",
        0.35,
        Range(-45, -20, "HU", _FATTY),
        Range(10, 20, "mm", "chosen"),
        "sheet",
    ),
    "focal fat sparing": LookAlike(
        "liver",
        0.25,
        Range(12, 30, "HU", _FATTY),
        Range(10, 20, "mm", "chosen"),
        "sheet",
    ),
    "granulomas": LookAlike("spleen", 0.25, Range(200, 500, "HU", "chosen"), Range(1.5, 3.0, "mm", "chosen"), "specks"),
    "hepatic calcifications": LookAlike(
        "liver", 0.15, Range(200, 500, "HU", "chosen"), Range(1.5, 3.0, "mm", "chosen"), "specks"
    ),
}
TEST_ONLY: Mapping[str, LookAlike] = {
    "perfusion difference": LookAlike(
        "liver", 0.3, Range(15, 35, "HU", "chosen: a wedge, as perfusion differences are"),
        Range(25, 45, "mm", "chosen"), "wedge",
    ),
    "late-filling wedge": LookAlike(
        "spleen", 0.3, Range(-40, -20, "HU", "heterogeneous enhancement: Karlo et al., Insights Imaging 2013;4:65"),
        Range(18, 32, "mm", "chosen"), "wedge",
    ),
    "focal fatty infiltration": LookAlike(
        "pancreas", 0.3, Range(-60, -30, "HU", "chosen: front of the head, straight borders"),
        Range(10, 16, "mm", "chosen"), "patch",
    ),
    "food bolus": LookAlike("stomach", 0.3, Range(20, 90, "HU", "chosen"), Range(10, 18, "mm", "chosen"), "bolus"),
    "column of Bertin": LookAlike(
        "kidney left", 0.3, Range(0, 20, "HU", "chosen"), Range(8, 13, "mm", "chosen"), "patch"
    ),
}  # fmt: skip


def draw_lookalikes(body: Body, rng: np.random.Generator, *, test: bool) -> None:
    """Paint those that this patient has; their names are added to ``body.lookalikes``.

    The draws do not depend on ``test``: a patient keeps the same findings of ``TRAINING`` either way.
    """
    for group, allowed in ((TRAINING, True), (TEST_ONLY, test)):
        for name, kind in group.items():
            child = np.random.default_rng(int(rng.integers(2**62)))
            if child.uniform() < kind.probability and allowed and _PAINTERS[kind.shape](body, kind, child):
                body.lookalikes.append(name)


def _some_point(body: Body, organ: str, rng: np.random.Generator) -> np.ndarray | None:
    """Body coordinates of a random voxel of an organ."""
    voxels = np.argwhere(body.tissue == ORGANS[organ])
    if len(voxels) == 0:
        return None
    z, y, x = voxels[int(rng.integers(len(voxels)))]
    return body.grid.points_mm[:, z, y, x].astype(float)


def _attenuation(body: Body, kind: LookAlike, rng: np.random.Generator) -> Callable[[np.ndarray, Box], np.ndarray]:
    """Contrast in full inside, fading over the outer 2 mm, on top of the organ's own texture."""
    weak = 0.45 if body.phase == "non-contrast" and kind.shape in ("wedge", "patch") else 1.0
    contrast = weak * kind.contrast_hu.draw(rng)

    def values(distance: np.ndarray, box: Box) -> np.ndarray:
        return body.hu[box] + contrast * np.clip(-distance / 2.0, 0, 1)

    return values


def _paint_sheet(body: Body, kind: LookAlike, rng: np.random.Generator) -> bool:
    """Along the falciform ligament."""
    size = kind.size_mm.draw(rng)
    center = (rng.uniform(5, 40), -48 + rng.normal(0, 4), rng.choice([-16.0, 2.0]) + rng.normal(0, 2))
    sheet = Ellipsoid(center, (size, 0.9 * size, rng.uniform(4, 7)))
    return _changed(body, kind, sheet, rng)


def _paint_patch(body: Body, kind: LookAlike, rng: np.random.Generator) -> bool:
    point = _some_point(body, kind.organ, rng)
    if point is None:
        return False
    if kind.organ == "pancreas":  # the front of the head
        point = np.array([-26.0, -24.0, -34.0]) + rng.normal(0, 3, 3)
    size = kind.size_mm.draw(rng)
    return _changed(body, kind, Ellipsoid(tuple(point), (size, 0.6 * size, 0.8 * size)), rng)


def _paint_bolus(body: Body, kind: LookAlike, rng: np.random.Generator) -> bool:
    point = _some_point(body, kind.organ, rng)
    if point is None:
        return False
    size, middle = kind.size_mm.draw(rng), body.organ_hu(kind.organ) + kind.contrast_hu.draw(rng)
    box = body.paint(
        [Ellipsoid(tuple(point), (0.7 * size, 0.8 * size, size))],
        None,
        lambda d, b: middle + 20 * body.field(b, 5.0, rng),
        allowed=(ORGANS[kind.organ],),
        roughness=lambda b: 2.0 * body.field(b, 6.0, rng),
    )
    return box is not None


def _paint_wedge(body: Body, kind: LookAlike, rng: np.random.Generator) -> bool:
    """A cone whose base lies on the organ's outer surface."""
    positions = body.grid.points_where(body.tissue == ORGANS[kind.organ])  # (3, voxels)
    if positions.size == 0:
        return False
    middle = positions.mean(axis=1)
    direction = rng.standard_normal(3)
    direction /= np.linalg.norm(direction)
    base = positions[:, int(np.argmax(direction @ (positions - middle[:, None])))]
    length = kind.size_mm.draw(rng)
    inward = middle - base
    apex = base + inward / np.linalg.norm(inward) * length
    return _changed(body, kind, Tube(tuple(apex), tuple(base), 0.5, 0.45 * length), rng)


def _paint_specks(body: Body, kind: LookAlike, rng: np.random.Generator) -> bool:
    for _ in range(int(rng.integers(1, 5))):
        point = _some_point(body, kind.organ, rng)
        if point is None:
            return False
        size = kind.size_mm.draw(rng)
        value = body.organ_hu(kind.organ) + kind.contrast_hu.draw(rng)
        body.paint([Ellipsoid(tuple(point), (size, size, size))], None, value, allowed=(ORGANS[kind.organ],))
    return True


def _changed(body: Body, kind: LookAlike, shape: Ellipsoid | Tube, rng: np.random.Generator) -> bool:
    values = _attenuation(body, kind, rng)
    box = body.paint(
        [shape], None, values, allowed=(ORGANS[kind.organ],), roughness=lambda b: 1.5 * body.field(b, 8.0, rng)
    )
    return box is not None


_PAINTERS: Mapping[str, Callable[[Body, LookAlike, np.random.Generator], bool]] = {
    "sheet": _paint_sheet,
    "patch": _paint_patch,
    "bolus": _paint_bolus,
    "wedge": _paint_wedge,
    "specks": _paint_specks,
}
