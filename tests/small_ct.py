"""A small synthetic CT dataset in nnU-Net's raw format, for tests.

Every case is the same rough abdomen (an elliptic body with a fat shell, a muscle ring, spine and bowel; liver, spleen,
two kidneys and a pancreas) in another pose, size and contrast, with tumors in it. Organs and tumors are ellipsoids:
this shows that a network learns and that the commands work together. It says nothing about accuracy on patients.

What is unusual: tumors of the liver and the kidneys stand in the training labels, tumors of the pancreas only in the
test images and their references. No training image shows one, so a model that finds it does so zero-shot.

The volume always covers the same 180 x 208 x 280 mm (Z Y X): a smaller shape means larger voxels, never less anatomy.
The default has thick slices, as many abdominal CTs do: nnU-Net then plans an anisotropic network, which is also faster.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage  # type: ignore[import-untyped]

from zept_nnunet.datasets.raw_folder import new_dataset, write_dataset_json
from zept_nnunet.errors import ZePTError

DATASET_NAME = "ZePTDemo"
FIELD_OF_VIEW_MM = (180.0, 208.0, 280.0)  # Z Y X
DEFAULT_SHAPE = (16, 40, 48)
MIN_SHAPE = (12, 24, 24)
LABEL_VARIANTS = ("plain", "regions", "ignore")

LABELS = {
    "background": 0,
    "liver": 1,
    "spleen": 2,
    "kidney left": 3,
    "kidney right": 4,
    "pancreas": 5,
    "liver tumor": 6,
    "kidney tumor": 7,
}
UNSEEN_TUMOR = "pancreas tumor"
UNSEEN_LABEL = 8
SEEN_HOSTS = {"liver tumor": ("liver",), "kidney tumor": ("kidney left", "kidney right")}
UNSEEN_HOSTS = ("pancreas",)

AIR_HU, FAT_HU, MUSCLE_HU, BONE_HU = -1000.0, -100.0, 55.0, 320.0
ORGAN_HU = {"liver": 115.0, "spleen": 140.0, "kidney left": 190.0, "kidney right": 190.0, "pancreas": 90.0}
NOISE_HU = 12.0

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Ellipsoid:
    """Center and semi-axes in mm, (Z, Y, X), relative to the middle of the body; Y grows to the back, X to the left."""

    center_mm: Triple
    radii_mm: Triple


# The first organ that claims a voxel keeps it, so small organs come before the large ones that would swallow them.
ORGAN_SHAPES: dict[str, tuple[Ellipsoid, ...]] = {
    "kidney left": (Ellipsoid((-26, 40, 60), (52, 24, 27)),),
    "kidney right": (Ellipsoid((-34, 40, -60), (52, 24, 27)),),
    "pancreas": (
        Ellipsoid((-18, -10, -26), (28, 21, 22)),
        Ellipsoid((-6, -16, 4), (23, 19, 26)),
        Ellipsoid((6, -10, 36), (23, 19, 28)),
    ),
    "spleen": (Ellipsoid((40, 20, 86), (42, 36, 24)),),
    "liver": (Ellipsoid((36, -6, -60), (56, 62, 54)), Ellipsoid((48, -40, -4), (32, 28, 58))),
}
# name: radius in mm, contrast to the host in HU
TUMOR_RANGES: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "liver tumor": ((22.0, 32.0), (-80.0, -55.0)),
    "kidney tumor": ((18.0, 25.0), (-120.0, -85.0)),
    "pancreas tumor": ((15.0, 20.0), (-80.0, -60.0)),
}


@dataclass(frozen=True)
class DemoCase:
    """One synthetic CT.

    Attributes:
        image_hu: (Z, Y, X) int16, Hounsfield units.
        labels: (Z, Y, X) uint8, values of ``LABELS`` and ``UNSEEN_LABEL``.
        spacing_mm: voxel size in array order (Z, Y, X).
    """

    image_hu: np.ndarray
    labels: np.ndarray
    spacing_mm: Triple


def draw_demo_case(shape: Sequence[int], tumors: Sequence[str], rng: np.random.Generator) -> DemoCase:
    """Draw one case that shows the named tumors, one of each.

    Args:
        shape: voxels along (Z, Y, X), each at least ``MIN_SHAPE``.
        tumors: names from ``TUMOR_RANGES``.
        rng: the only source of randomness; an equal generator gives an equal case.

    Raises:
        ZePTError: where the shape is too small or a tumor's name is unknown.
    """
    size = _checked_shape(shape)
    unknown = sorted(set(tumors) - set(TUMOR_RANGES))
    if unknown:
        raise ZePTError(
            f"The demo dataset can draw the tumors {sorted(TUMOR_RANGES)}, not {unknown}. Name one of those."
        )
    spacing_mm = (FIELD_OF_VIEW_MM[0] / size[0], FIELD_OF_VIEW_MM[1] / size[1], FIELD_OF_VIEW_MM[2] / size[2])
    points_mm = _body_coordinates(size, spacing_mm, rng)  # (3, Z, Y, X)

    image = _draw_background(points_mm, rng)
    labels = np.zeros(size, dtype=np.uint8)
    organ_hu = {}
    for name, parts in ORGAN_SHAPES.items():
        shift = rng.uniform(-6, 6, size=3)
        stretch = rng.uniform(0.9, 1.1, size=3)
        mask = np.zeros(size, dtype=bool)
        for part in parts:
            mask |= _distance(points_mm, part, shift, stretch) <= 1
        mask &= labels == 0
        organ_hu[name] = ORGAN_HU[name] + rng.uniform(-12, 12)
        labels[mask] = LABELS[name]
        image[mask] = organ_hu[name]

    for name in tumors:
        hosts = SEEN_HOSTS.get(name, UNSEEN_HOSTS)
        host = hosts[int(rng.integers(len(hosts)))]
        _draw_tumor(image, labels, name, host, organ_hu[host], spacing_mm, rng)

    image = ndimage.gaussian_filter(image, sigma=0.5)  # partial volume at every border
    image += rng.normal(0, NOISE_HU, size=size)
    return DemoCase(np.clip(np.rint(image), -1024, 1500).astype(np.int16), labels, spacing_mm)


def write_demo_dataset(
    raw_folder: str | os.PathLike[str],
    dataset_id: int = 900,
    *,
    cases_train: int = 20,
    cases_test: int = 4,
    shape: Sequence[int] = DEFAULT_SHAPE,
    seed: int = 0,
    labels: str = "plain",
    overwrite: bool = False,
) -> Path:
    """Write the dataset as ``raw_folder/DatasetXXX_ZePTDemo`` and return that folder.

    ``imagesTr``/``labelsTr`` hold the seen tumors; ``imagesTs``/``labelsTs`` hold the unseen one as well. Every fifth
    training case lacks the liver tumor, the next one the kidney tumor; every fourth test case has a healthy pancreas.
    A case depends on the seed, its split and its number, and on nothing else. The folder appears at once, complete.

    Args:
        raw_folder: nnU-Net's ``nnUNet_raw``; made where it is missing.
        dataset_id: 1 to 999.
        cases_train: at least 1; nnU-Net's five-fold split wants 5.
        cases_test: may be 0.
        shape: voxels along (Z, Y, X).
        seed: of the random generator.
        labels: ``plain`` (one integer a class), ``regions`` ("liver" is the organ with its tumor, class order given) or
            ``ignore`` (nnU-Net's ignore label covers the top slices of every second training case; the unseen tumor is
            declared without a value there, and the references hold it as the first one after the trained classes).
        overwrite: replace a dataset that stands there already.

    Raises:
        ZePTError: for an unknown variant, a bad number, or a folder that exists.
    """
    if labels not in LABEL_VARIANTS:
        raise ZePTError(f"The demo dataset's labels are one of {', '.join(LABEL_VARIANTS)}; got {labels!r}.")
    if not 1 <= dataset_id <= 999:
        raise ZePTError(f"An nnU-Net dataset ID here is 1 to 999; got {dataset_id}.")
    if cases_train < 1 or cases_test < 0:
        raise ZePTError(f"Wanted at least 1 training case and 0 test cases; got {cases_train} and {cases_test}.")
    size = _checked_shape(shape)
    raw = Path(raw_folder)
    target = raw / f"Dataset{dataset_id:03d}_{DATASET_NAME}"
    taken = sorted(p for p in raw.glob(f"Dataset{dataset_id:03d}_*") if p != target)
    if taken:
        raise ZePTError(f"Dataset ID {dataset_id} is taken by {taken[0]}. Choose another ID or another folder.")
    if target.exists() and not overwrite:
        raise ZePTError(f"{target} exists already. Remove it, or choose another ID or folder, or allow overwriting.")

    with new_dataset(target) as scratch:
        _write_cases(scratch, "Tr", cases_train, size, seed, ignore_every_second=labels == "ignore")
        _write_cases(scratch, "Ts", cases_test, size, seed, ignore_every_second=False)
        write_dataset_json(scratch, demo_dataset_json(cases_train, labels))
    return target


def demo_dataset_json(cases_train: int, labels: str = "plain") -> dict[str, object]:
    """Content of the demo's ``dataset.json`` for a variant of its labels (see ``write_demo_dataset``)."""
    names: dict[str, int | list[int]] = dict(LABELS)
    unseen: dict[str, object] = {"hosts": list(UNSEEN_HOSTS), "label": UNSEEN_LABEL}
    description: dict[str, object] = {
        "channel_names": {"0": "CT"},
        "labels": names,
        "numTraining": cases_train,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIO",
        "description": "Synthetic CT of the zept-nnunet demo: not from patients, not for any clinical purpose.",
    }
    if labels == "regions":
        names["liver"] = [LABELS["liver"], LABELS["liver tumor"]]
        description["regions_class_order"] = [value for name, value in LABELS.items() if name != "background"]
    elif labels == "ignore":
        names["ignore"] = len(LABELS)
        del unseen["label"]
    tumors = {name: {"hosts": list(hosts)} for name, hosts in SEEN_HOSTS.items()}
    description["zept"] = {"tumors": tumors, "unseen": {UNSEEN_TUMOR: unseen}}
    return description


def tumors_of_case(split: str, index: int) -> tuple[str, ...]:
    """Names of the tumors that case ``index`` of split ``Tr`` or ``Ts`` shows."""
    if split == "Tr":
        absent = {3: "liver tumor", 4: "kidney tumor"}.get(index % 5)
        return tuple(name for name in SEEN_HOSTS if name != absent)
    return (*SEEN_HOSTS, *(() if index % 4 == 3 else (UNSEEN_TUMOR,)))


def _checked_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    if len(shape) != 3 or any(given < least for given, least in zip(shape, MIN_SHAPE, strict=True)):
        raise ZePTError(f"The demo's volumes want a shape (Z, Y, X) of at least {MIN_SHAPE}; got {tuple(shape)}.")
    return int(shape[0]), int(shape[1]), int(shape[2])


def _body_coordinates(size: tuple[int, int, int], spacing_mm: Triple, rng: np.random.Generator) -> np.ndarray:
    """(3, Z, Y, X) mm in the frame of the body, which is turned, scaled and shifted at random in the volume."""
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(size, spacing_mm, strict=True)]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    shift = rng.uniform(-8, 8, size=3)
    scale = rng.uniform(0.92, 1.06)
    angle = np.deg2rad(rng.uniform(-7, 7))  # around the body's axis
    z, y, x = (z - shift[0]) / scale, (y - shift[1]) / scale, (x - shift[2]) / scale
    return np.stack([z, np.cos(angle) * y - np.sin(angle) * x, np.sin(angle) * y + np.cos(angle) * x])


def _distance(points_mm: np.ndarray, part: Ellipsoid, shift: np.ndarray, stretch: np.ndarray) -> np.ndarray:
    """(Z, Y, X) distance from the center in semi-axes: at most 1 inside."""
    center = np.asarray(part.center_mm) + shift
    radii = np.asarray(part.radii_mm) * stretch
    scaled = (points_mm - center[:, None, None, None]) / radii[:, None, None, None]
    return np.sqrt((scaled**2).sum(axis=0))


def _draw_background(points_mm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(Z, Y, X) HU of everything that has no label: air, fat, muscle, bowel, spine."""
    _, y, x = points_mm
    shell = rng.uniform(0.9, 0.94)  # where the fat below the skin ends
    radius = np.sqrt((x / 128) ** 2 + (y / 92) ** 2)
    image = np.full(radius.shape, AIR_HU)
    image[radius <= 1] = FAT_HU
    image[radius <= shell] = MUSCLE_HU + rng.uniform(-8, 8)
    image[radius <= shell - 0.08] = FAT_HU + rng.uniform(-5, 15)
    for _ in range(8):
        center = rng.uniform((-85, -62, -60), (0, -20, 90))
        bowel = Ellipsoid((float(center[0]), float(center[1]), float(center[2])), (16, 14, 16))
        image[(_distance(points_mm, bowel, np.zeros(3), np.ones(3)) <= 1) & (radius <= shell)] = rng.uniform(10, 45)
    spine = (x / 20) ** 2 + ((y - 56) / 18) ** 2
    image[spine <= 1] = BONE_HU + rng.uniform(-40, 40)
    image[spine <= 0.5] = 180.0
    return image


def _draw_tumor(
    image: np.ndarray,
    labels: np.ndarray,
    name: str,
    host: str,
    host_hu: float,
    spacing_mm: Triple,
    rng: np.random.Generator,
) -> None:
    """Paint one tumor into its host, in place, in both arrays; never outside the host."""
    (least_mm, most_mm), contrast = TUMOR_RANGES[name]
    radii = np.maximum(rng.uniform(least_mm, most_mm) * rng.uniform(0.85, 1.15, size=3), 1.2 * np.asarray(spacing_mm))
    in_host = labels == LABELS[host]
    depth_mm = ndimage.distance_transform_edt(in_host, sampling=spacing_mm)
    # The deepest fifth: the tumor is mostly inside, and still moves from case to case.
    places = np.argwhere(in_host & (depth_mm >= np.quantile(depth_mm[in_host], 0.8)))
    center = places[int(rng.integers(len(places)))]
    steps = np.stack(np.meshgrid(*(np.arange(n) for n in labels.shape), indexing="ij")) - center[:, None, None, None]
    scaled = steps * (np.asarray(spacing_mm) / radii)[:, None, None, None]
    mask = ((scaled**2).sum(axis=0) <= 1) & in_host
    value = LABELS.get(name, UNSEEN_LABEL)
    labels[mask] = value
    image[mask] = host_hu + rng.uniform(*contrast)


def _write_cases(
    folder: Path, split: str, count: int, size: tuple[int, int, int], seed: int, *, ignore_every_second: bool
) -> None:
    images, references = folder / f"images{split}", folder / f"labels{split}"
    images.mkdir()
    references.mkdir()
    prefix = {"Tr": "demo", "Ts": "test"}[split]
    for index in range(count):
        rng = np.random.default_rng([seed, {"Tr": 0, "Ts": 1}[split], index])
        case = draw_demo_case(size, tumors_of_case(split, index), rng)
        reference = case.labels
        if ignore_every_second and index % 2:
            reference[-size[0] // 4 :] = len(LABELS)
        _write_image(case.image_hu, case.spacing_mm, images / f"{prefix}_{index:03d}_0000.nii.gz")
        _write_image(reference, case.spacing_mm, references / f"{prefix}_{index:03d}.nii.gz")


def _write_image(array: np.ndarray, spacing_mm: Triple, path: Path) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing_mm[::-1])
    image.SetOrigin(tuple(-extent / 2 for extent in FIELD_OF_VIEW_MM[::-1]))
    sitk.WriteImage(image, str(path), useCompression=True)
