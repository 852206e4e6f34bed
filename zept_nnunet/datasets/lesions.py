"""Synthetic lesions: their types with the ranges of every property, and how one is drawn and painted.

What is unusual: the ranges say what "unseen" means. Training shows only the types with the role ``seen``, all of them
darker than their host with an edge of at most 5 mm. A ``development`` type looks like them in another organ. A
``final`` type lies outside their ranges in the properties that `outside_of_seen` lists.

Contrast is lesion minus healthy host, by contrast phase. Radius is that of a ball of equal volume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from zept_nnunet.datasets.phantom_parameters import PHASES
from zept_nnunet.datasets.shapes import Range, Triple, smooth_field

KINDS = ("hypodense", "hyperdense", "rim-enhancing", "cystic", "infiltrating")
SEEN, DEVELOPMENT, FINAL = "seen", "development-unseen", "final-unseen"
PROPERTIES = ("radius_mm", "contrast_hu", "elongation", "edge_mm", "texture_hu", "texture_mm")
_EDGE_SIGMAS = 2 * np.log(9)  # a logistic edge falls from 90 % to 10 % over this many of its scale parameters


@dataclass(frozen=True)
class Appearance:
    """The ranges of one kind of lesion.

    Attributes:
        kind: one of ``KINDS``.
        contrast_hu: by phase; lesion minus healthy host.
        elongation: longest over shortest axis before the surface is made irregular.
        edge_mm: width over which the lesion falls from 90 % to 10 %.
        texture_hu, texture_mm: standard deviation and scale of the heterogeneity inside.
        irregularity: standard deviation of the surface's lobulation, as a fraction of the radius.
        rim_mm, rim_hu: thickness of an enhancing rim, and its contrast to the host. None: no rim.
    """

    kind: str
    radius_mm: Range
    contrast_hu: Mapping[str, Range]
    elongation: Range
    edge_mm: Range
    texture_hu: Range
    texture_mm: Range
    irregularity: Range
    rim_mm: Range | None = None
    rim_hu: Range | None = None

    def bounds(self, name: str) -> tuple[float, float, str]:
        """Low, high and unit of a property of ``PROPERTIES``; of the contrast over all phases."""
        value = getattr(self, name)
        ranges = list(value.values()) if isinstance(value, Mapping) else [value]
        return min(r.low for r in ranges), max(r.high for r in ranges), ranges[0].unit


@dataclass(frozen=True)
class LesionType:
    """A class of lesions: where it grows, what it may look like, and in which role the phantom uses it."""

    name: str
    hosts: tuple[str, ...]
    role: str
    appearances: tuple[Appearance, ...]
    at_surface: bool = False  # grows from the organ's wall, not from its depth


def _contrast(source: str, *ranges: tuple[float, float]) -> dict[str, Range]:
    return {phase: Range(*r, "HU", source) for phase, r in zip(PHASES, ranges, strict=True)}


_SIZE_LIVER = "diameters of liver tumors, LiTS: Bilic et al., Med Image Anal 2023;84:102680; narrowed"
_SIZE_KIDNEY = (
    "papillary carcinoma 1.2–11 cm: Prevalence of low-attenuation homogeneous papillary RCC, AJR 2018; narrowed"
)
_METASTASIS = "best seen at the portal phase: Sheafor et al., AJR 1999;172:961; figures chosen"
_RIM = "73 % of colorectal metastases show a rim: Ann Acad Med Singap 2003;32:191; figures chosen"
_PAPILLARY = "14.7–50.7, 32–100, 41–95, 18–73 HU by phase (same study) minus the kidney's range; narrowed"
_CYST = "−9 to 20 HU in all phases: Bosniak 2019, Radiology 2019;292:475, minus kidney's range"
_SPLEEN = "hypodense focal lesions, e.g. lymphoma: Karlo et al., Insights Imaging 2013;4:65; figures chosen"
_PDAC = "60 ± 25, 41 ± 23, 18 ± 12 HU below the gland (pancreatic, portal, delayed), 30 ± 9 mm: PMID 17961951"
_GIST = "stromal tumor, after Jpn J Radiol 2020;38:771 (small below 5 cm, large above); figures chosen for the sign"
_SHAPE = "chosen"

_ROUND = Range(1.0, 1.5, "1", _SHAPE)
_SHARP = Range(0.5, 2.0, "mm", _SHAPE)
_USUAL_EDGE = Range(1.0, 5.0, "mm", _SHAPE)
_SOLID_HU, _SOLID_MM = Range(3, 9, "HU", _SHAPE), Range(4, 9, "mm", _SHAPE)
_EVEN_HU = Range(0, 2, "HU", _SHAPE)
_USUAL_SURFACE = Range(0.06, 0.16, "1", _SHAPE)

_LIVER_HYPODENSE = Appearance(
    "hypodense",
    Range(8, 28, "mm", _SIZE_LIVER),
    _contrast(_METASTASIS, (-28, -14), (-45, -20), (-75, -35), (-50, -24)),
    _ROUND, _USUAL_EDGE, _SOLID_HU, _SOLID_MM, _USUAL_SURFACE,
)  # fmt: skip
_LIVER_RIM = Appearance(
    "rim-enhancing",
    Range(10, 28, "mm", _SIZE_LIVER),
    _contrast(_RIM, (-30, -16), (-55, -25), (-80, -40), (-50, -24)),
    _ROUND, _USUAL_EDGE, _SOLID_HU, _SOLID_MM, _USUAL_SURFACE,
    rim_mm=Range(2, 6, "mm", _RIM),
    rim_hu=Range(-15, 8, "HU", _RIM),
)  # fmt: skip
_KIDNEY_HYPODENSE = Appearance(
    "hypodense",
    Range(8, 24, "mm", _SIZE_KIDNEY),
    _contrast(_PAPILLARY, (-20, -8), (-95, -45), (-110, -60), (-85, -45)),
    _ROUND, _USUAL_EDGE, _SOLID_HU, _SOLID_MM, _USUAL_SURFACE,
)  # fmt: skip
_KIDNEY_CYSTIC = Appearance(
    "cystic",
    Range(8, 24, "mm", _SIZE_KIDNEY),
    _contrast(_CYST, (-32, -18), (-150, -100), (-180, -125), (-145, -95)),
    Range(1.0, 1.25, "1", _SHAPE), _SHARP, _EVEN_HU, _SOLID_MM, Range(0.0, 0.05, "1", _SHAPE),
)  # fmt: skip
_SPLEEN_HYPODENSE = Appearance(
    "hypodense",
    Range(8, 24, "mm", _SPLEEN),
    _contrast(_SPLEEN, (-22, -12), (-60, -28), (-65, -30), (-45, -22)),
    _ROUND, _USUAL_EDGE, _SOLID_HU, _SOLID_MM, _USUAL_SURFACE,
)  # fmt: skip
_PANCREAS_INFILTRATING = Appearance(
    "infiltrating",
    Range(9, 20, "mm", _PDAC),
    _contrast(_PDAC, (-18, -8), (-85, -36), (-63, -18), (-30, -7)),
    Range(1.6, 2.4, "1", _SHAPE), Range(6.0, 12.0, "mm", _SHAPE), _SOLID_HU, _SOLID_MM, Range(0.12, 0.25, "1", _SHAPE),
)  # fmt: skip
_STOMACH_HYPERDENSE = Appearance(
    "hyperdense",
    Range(10, 28, "mm", _GIST),
    _contrast(_GIST, (18, 28), (55, 115), (45, 85), (28, 55)),
    _ROUND, _USUAL_EDGE, Range(14, 26, "HU", _GIST), Range(11, 16, "mm", _SHAPE), _USUAL_SURFACE,
)  # fmt: skip

LESION_TYPES: Mapping[str, LesionType] = {
    t.name: t
    for t in (
        LesionType("liver tumor", ("liver",), SEEN, (_LIVER_HYPODENSE, _LIVER_RIM)),
        LesionType("kidney tumor", ("kidney left", "kidney right"), SEEN, (_KIDNEY_HYPODENSE, _KIDNEY_CYSTIC)),
        LesionType("spleen tumor", ("spleen",), DEVELOPMENT, (_SPLEEN_HYPODENSE,)),
        LesionType("pancreas tumor", ("pancreas",), FINAL, (_PANCREAS_INFILTRATING,)),
        LesionType("stomach tumor", ("stomach",), FINAL, (_STOMACH_HYPERDENSE,), at_surface=True),
    )
}


def of_role(role: str) -> tuple[LesionType, ...]:
    """The types of a role, in the order of ``LESION_TYPES``."""
    return tuple(t for t in LESION_TYPES.values() if t.role == role)


def property_range(types: Sequence[LesionType], name: str) -> tuple[float, float, str]:
    """Low, high and unit of a property over all appearances of some types."""
    bounds = [a.bounds(name) for t in types for a in t.appearances]
    return min(b[0] for b in bounds), max(b[1] for b in bounds), bounds[0][2]


def outside_of_seen(lesion_type: LesionType) -> tuple[str, ...]:
    """Properties in which no lesion of this type can have a value that a seen one may have."""
    seen = of_role(SEEN)
    found = []
    for name in PROPERTIES:
        low, high, _ = property_range((lesion_type,), name)
        seen_low, seen_high, _ = property_range(seen, name)
        if high < seen_low or low > seen_high:
            found.append(name)
    return tuple(found)


@dataclass(frozen=True)
class Lesion:
    """One lesion: every random choice except the fields of its surface and texture, which ``field_seed`` stands for."""

    lesion_class: str
    kind: str
    radius_mm: float
    contrast_hu: float
    elongation: float
    edge_mm: float
    texture_hu: float
    texture_mm: float
    irregularity: float
    rim_mm: float
    rim_hu: float
    direction: Triple  # unit vector of the longest axis
    field_seed: int

    @property
    def reach_mm(self) -> float:
        """No point farther from the center is touched."""
        return self.radius_mm * self.elongation ** (2 / 3) * (1 + 3 * self.irregularity) + 1.5 * self.edge_mm

    def record(self) -> dict[str, object]:
        """The properties, for the case's record."""
        values = asdict(self)
        for hidden in ("field_seed", "direction"):
            del values[hidden]
        values["class"] = values.pop("lesion_class")
        return {k: round(v, 3) if isinstance(v, float) else v for k, v in values.items()}


def draw_lesion(
    lesion_type: LesionType, phase: str, rng: np.random.Generator, *, least_mm: float = 0.0, most_mm: float = np.inf
) -> Lesion:
    """Draw a lesion of a type.

    Args:
        phase: of ``PHASES``; decides the contrast.
        least_mm, most_mm: narrow the radius (coarse voxels; a small host), never beyond the type's own range.
    """
    look = lesion_type.appearances[int(rng.integers(len(lesion_type.appearances)))]
    low = min(max(look.radius_mm.low, least_mm), look.radius_mm.high)
    high = max(min(look.radius_mm.high, most_mm), low)
    direction = rng.standard_normal(3)
    direction /= np.linalg.norm(direction)
    return Lesion(
        lesion_type.name,
        look.kind,
        float(rng.uniform(low, high)),
        look.contrast_hu[phase].draw(rng),
        look.elongation.draw(rng),
        look.edge_mm.draw(rng),
        look.texture_hu.draw(rng),
        look.texture_mm.draw(rng),
        look.irregularity.draw(rng),
        0.0 if look.rim_mm is None else look.rim_mm.draw(rng),
        0.0 if look.rim_hu is None else look.rim_hu.draw(rng),
        (float(direction[0]), float(direction[1]), float(direction[2])),
        int(rng.integers(2**31)),
    )


def lesion_fields(
    lesion: Lesion, axes_mm: Sequence[np.ndarray], center_mm: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """What a lesion does on a rectilinear grid.

    Args:
        axes_mm: coordinates of the grid's voxels along Z, Y, X.
        center_mm: of the lesion, on the same axes.

    Returns:
        weight (Z, Y, X) in 0…1, above one half inside, and contrast to the host (Z, Y, X) in HU. The image with the
        lesion is ``(1 − weight) · image + weight · (host + contrast)``.
    """
    rng = np.random.default_rng(lesion.field_seed)
    axes = [np.asarray(a, dtype=np.float32) - np.float32(c) for a, c in zip(axes_mm, center_mm, strict=True)]
    z, y, x = axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :]
    d = lesion.direction
    along = z * d[0] + y * d[1] + x * d[2]
    square = z**2 + y**2 + x**2
    long_axis = lesion.radius_mm * lesion.elongation ** (2 / 3)  # volume is that of the ball
    short_axis = lesion.radius_mm * lesion.elongation ** (-1 / 3)
    scaled = np.sqrt(np.maximum(square - along**2, 0) / short_axis**2 + along**2 / long_axis**2)
    surface = smooth_field(axes_mm, 0.7 * lesion.radius_mm, rng)
    texture = smooth_field(axes_mm, lesion.texture_mm, rng)
    depth_mm = (scaled - 1 - lesion.irregularity * surface) * short_axis  # negative inside
    weight = 1 / (1 + np.exp(np.clip(depth_mm * (_EDGE_SIGMAS / lesion.edge_mm), -60, 60)))
    contrast = lesion.contrast_hu + lesion.texture_hu * texture
    if lesion.rim_mm > 0:
        # The rim lies inside the margin; its inner side is as smooth as the lesion's edge.
        rim = 1 / (1 + np.exp(np.clip(-(depth_mm + lesion.rim_mm) * (_EDGE_SIGMAS / lesion.edge_mm), -60, 60)))
        contrast = contrast + rim * (lesion.rim_hu - lesion.contrast_hu)
    weight[np.broadcast_to(square > lesion.reach_mm**2, weight.shape)] = 0
    return weight.astype(np.float32), contrast.astype(np.float32)
