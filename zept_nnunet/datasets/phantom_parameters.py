"""What the phantom's healthy body is made of: HU by contrast phase, sizes of organs, noise. Data only.

Where a source gives a figure it is named; "chosen" means that we chose the value so that the image looks like CT.
Geometry is in body coordinates (see `shapes`), for a body of medium build lying on its back; the middle of the volume
is the origin. Each case scales, turns, shifts and bends it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from zept_nnunet.datasets.shapes import Ellipsoid, Range, Triple

PHASES = ("non-contrast", "arterial", "portal", "delayed")
ORGANS = {"liver": 1, "spleen": 2, "kidney left": 3, "kidney right": 4, "pancreas": 5, "stomach": 6}
# Organ → what it is made of, a key of ``TISSUE_HU``.
TISSUE_OF_ORGAN = {
    "liver": "liver",
    "spleen": "spleen",
    "kidney left": "kidney",
    "kidney right": "kidney",
    "pancreas": "pancreas",
    "stomach": "stomach wall",
}

_PLAIN_CT = "around the unenhanced soft tissue values of Lamba et al., AJR 2014;203:1013; width chosen"
_ENHANCED = "Bae, Radiology 2010;256:32 (time course of enhancement); width chosen so that phases overlap"
_LIVER_CT = "Int J Legal Med 2019;133:1861 (PMID 30788563): 58 ± 9 HU"
_SPLEEN_CT = "Karlo et al., Insights Imaging 2013;4:65: about 45 HU"
_CHOSEN = "chosen by eye against clinical CT"


def _by_phase(plain: tuple[float, float], *enhanced: tuple[float, float], source: str = _PLAIN_CT) -> dict[str, Range]:
    sources = (source, *[_ENHANCED] * 3)
    values = (plain, *enhanced)
    return {p: Range(*v, "HU", s) for p, v, s in zip(PHASES, values, sources, strict=True)}


# Mean attenuation of healthy parenchyma and blood. Order of the columns: non-contrast, arterial, portal, delayed.
TISSUE_HU: Mapping[str, Mapping[str, Range]] = {
    "liver": _by_phase((42, 68), (55, 88), (85, 130), (72, 105), source=_LIVER_CT),
    "spleen": _by_phase((38, 54), (85, 140), (95, 140), (75, 108), source=_SPLEEN_CT),
    "kidney": _by_phase((25, 42), (110, 170), (140, 200), (110, 165)),
    "pancreas": _by_phase((30, 50), (80, 125), (75, 115), (60, 92)),
    "stomach wall": _by_phase((30, 48), (60, 100), (65, 100), (55, 85)),
    "muscle": _by_phase((45, 62), (48, 66), (52, 72), (52, 72)),
    "aorta": _by_phase((34, 50), (230, 380), (125, 185), (85, 125)),
    "vena cava": _by_phase((34, 50), (50, 130), (105, 170), (85, 122)),
    "portal vein": _by_phase((34, 50), (80, 150), (140, 195), (88, 125)),
    "hepatic vein": _by_phase((32, 48), (45, 75), (130, 180), (86, 122)),
    "bowel wall": _by_phase((28, 45), (55, 95), (60, 95), (50, 80)),
    "urine": _by_phase((-2, 12), (-2, 14), (0, 18), (150, 420)),
}

HU: Mapping[str, Range] = {
    "air": Range(-1000, -1000, "HU", "definition of the Hounsfield unit"),
    "fat": Range(-112, -94, "HU", _PLAIN_CT),
    "skin": Range(5, 45, "HU", _CHOSEN),
    "lung": Range(-880, -800, "HU", _CHOSEN),
    "cortical bone": Range(450, 850, "HU", _CHOSEN),
    "cancellous bone": Range(130, 260, "HU", _CHOSEN),
    "bile": Range(0, 15, "HU", _PLAIN_CT),
    "gut fluid": Range(0, 40, "HU", _CHOSEN),
    "oral contrast": Range(150, 380, "HU", _CHOSEN),
    "feces": Range(-120, 60, "HU", _CHOSEN),
    "gas": Range(-980, -900, "HU", _CHOSEN),
    "calcification": Range(350, 900, "HU", _CHOSEN),
    "spinal canal": Range(10, 35, "HU", _CHOSEN),
    "table": Range(-250, -80, "HU", _CHOSEN),
}


@dataclass(frozen=True)
class OrganShape:
    """An organ as a smooth union of ellipsoids, and how it varies.

    Attributes:
        parts: from the canonical body.
        shift_mm: standard deviation of each part's position.
        stretch: each part's radii vary by up to this fraction.
        blend_mm: width over which seams between parts are rounded.
        roughness_mm, roughness_scale_mm: standard deviation and wavelength of the surface's irregularity.
        texture_hu, texture_mm: standard deviation and scale of the normal parenchyma's heterogeneity.
    """

    parts: tuple[Ellipsoid, ...]
    shift_mm: float
    stretch: float
    blend_mm: float
    roughness_mm: float
    roughness_scale_mm: float
    texture_hu: Range
    texture_mm: Range


def _e(center_mm: Triple, radii_mm: Triple) -> Ellipsoid:
    return Ellipsoid(center_mm, radii_mm)


_EVEN = Range(1, 4, "HU", _CHOSEN)
_FINE = Range(5, 9, "mm", _CHOSEN)
# The pancreas is lobulated with fat between its lobules: its normal texture is as strong and as coarse as that of the
# hypodense liver lesions of training, and its attenuation is often theirs. Looking like a lesion is not enough.
_LOBULAR = Range(9, 14, "HU", "chosen to cover the texture of the seen hypodense lesions")
_LOBULES = Range(5, 9, "mm", "chosen to cover the texture of the seen hypodense lesions")

ORGAN_SHAPES: Mapping[str, OrganShape] = {
    "kidney left": OrganShape(
        (_e((-8, 46, 56), (36, 25, 25)), _e((-40, 42, 62), (38, 26, 27))), 4, 0.08, 14, 1.2, 18, _EVEN, _FINE
    ),
    "kidney right": OrganShape(
        (_e((-20, 46, -58), (36, 25, 25)), _e((-52, 42, -64), (38, 26, 27))), 4, 0.08, 14, 1.2, 18, _EVEN, _FINE
    ),
    "spleen": OrganShape(
        (_e((30, 44, 94), (44, 36, 28)), _e((20, 14, 106), (36, 34, 22)), _e((40, 58, 76), (32, 26, 26))),
        5, 0.12, 16, 2.0, 22, _EVEN, _FINE,
    ),
    "liver": OrganShape(
        (
            _e((26, 4, -80), (74, 80, 60)),
            _e((-22, 6, -94), (64, 58, 38)),
            _e((44, -42, -18), (38, 36, 54)),
            _e((50, -48, 28), (24, 24, 40)),
        ),
        7, 0.14, 18, 2.5, 30, _EVEN, _FINE,
    ),
    "pancreas": OrganShape(
        (
            _e((-26, -14, -34), (26, 17, 16)),
            _e((-14, -20, -18), (18, 14, 18)),
            _e((0, -26, 8), (13, 12, 24)),
            _e((10, -10, 38), (13, 13, 24)),
            _e((20, 14, 66), (13, 13, 22)),
        ),
        3, 0.12, 10, 1.6, 9, _LOBULAR, _LOBULES,
    ),
    "stomach": OrganShape(
        (
            _e((54, 4, 62), (26, 34, 30)),
            _e((30, -30, 66), (34, 30, 26)),
            _e((4, -48, 42), (24, 24, 30)),
            _e((-6, -46, 4), (16, 17, 28)),
        ),
        5, 0.14, 16, 1.5, 24, _EVEN, _FINE,
    ),
}  # fmt: skip


NOISE_HU = Range(8, 15, "HU", "chosen; measured in patients by Christianson et al., AJR 2015;205:W93")
"""Standard deviation in the middle of the body, in voxels of a routine protocol."""

NOISE_OF_LARGE_VOXELS_HU = Range(2.5, 5, "HU", "chosen: a voxel of 6 mm averages over many of a routine protocol")


@dataclass(frozen=True)
class Scanner:
    """Acquisition: all drawn per case."""

    noise_scale_voxels: Range  # correlation length
    calibration_hu: Range  # shift of all soft tissue
    streak_hu: Range  # amplitude of streaks, where there are any
    streak_probability: float
    motion_voxels: Range  # displacement of the ghost, where there is motion
    motion_probability: float


SCANNER = Scanner(
    noise_scale_voxels=Range(0.5, 0.9, "voxels", _CHOSEN),
    calibration_hu=Range(-5, 5, "HU", "Birnbaum et al., Radiology 2007;242:109 (variability between scanners)"),
    streak_hu=Range(10, 25, "HU", _CHOSEN),
    streak_probability=0.25,
    motion_voxels=Range(0.6, 1.5, "voxels", _CHOSEN),
    motion_probability=0.2,
)


@dataclass(frozen=True)
class Build:
    """A patient's build and position: all drawn per case."""

    scale: Range  # of each axis
    turn_deg: Range  # about the body's axis
    shift_mm: Range  # of each axis
    fat_mm: Range  # subcutaneous
    wall_mm: Range  # abdominal wall muscles
    cavity_mm: tuple[float, float]  # half depth (Y) and half width (X) of the abdominal cavity
    bend_mm: float  # standard deviation of the smooth deformation
    bend_scale_mm: float
    ripple_mm: float
    ripple_scale_mm: float


BUILD = Build(
    scale=Range(0.92, 1.08, "1", _CHOSEN),
    turn_deg=Range(-5, 5, "degrees", _CHOSEN),
    shift_mm=Range(-7, 7, "mm", _CHOSEN),
    fat_mm=Range(8, 32, "mm", _CHOSEN),
    wall_mm=Range(9, 15, "mm", _CHOSEN),
    cavity_mm=(84.0, 128.0),
    bend_mm=4.0,
    bend_scale_mm=70.0,
    ripple_mm=1.2,
    ripple_scale_mm=22.0,
)
