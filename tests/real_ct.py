"""A small dataset from one real CT: deformed copies with the real organ labels and clearly synthetic lesions.

The CT and its labels are a test fixture of TotalSegmentator (Apache-2.0); they are read from a folder beside
the repository (or ZEPT_TEST_DATA) and never copied into it. One patient shows that the pipeline runs
on real CT, and nothing about accuracy.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

ORGANS = {"spleen": 1, "kidney right": 2, "kidney left": 3, "liver": 5, "stomach": 6}  # label values of the CT's file
LESION_HU = {"liver synthetic lesion": -45.0, "kidney synthetic lesion": -60.0}  # relative to the organ
HOSTS = {"liver synthetic lesion": ["liver"], "kidney synthetic lesion": ["kidney right", "kidney left"]}
NAMES = [*ORGANS, *LESION_HU]
SPACING_MM = (9.0, 9.0, 12.0)  # X Y Z: so that a training takes minutes on two cores


def data_folder(name: str) -> Path:
    """Where a real CT would lie: ZEPT_TEST_DATA, or shared/data beside the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("ZEPT_TEST_DATA", default)) / name


def write_real_ct_dataset(raw: Path, dataset_id: int, cases: int, seed: int = 0) -> Path:
    """Training cases are deformed copies with lesions, the test case is the original volume. Returns the dataset."""
    source = data_folder("abdomen_ct")
    image = _resample(sitk.ReadImage(str(source / "example_ct.nii.gz"), sitk.sitkFloat32), sitk.sitkLinear)
    labels = _resample(sitk.ReadImage(str(source / "example_seg_fast_force_split.nii.gz")), sitk.sitkNearestNeighbor)
    found = sitk.GetArrayFromImage(labels)
    organs = np.zeros(found.shape, np.uint8)
    for value, organ in enumerate(ORGANS.values(), start=1):
        organs[found == organ] = value
    folder = raw / f"Dataset{dataset_id:03d}_RealCTSyntheticLesions"
    for sub in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / sub).mkdir(parents=True)
    rng = np.random.default_rng(seed)
    hu = sitk.GetArrayFromImage(image)
    _write(folder, "Ts", "original", hu, organs, image)
    for case in range(cases):
        moved, moved_labels = _deform(hu, organs, rng)
        for lesion in LESION_HU:
            _insert(moved, moved_labels, lesion, rng)
        _write(folder, "Tr", f"synthetic_lesions_{case:02d}", moved, moved_labels, image)
    (folder / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "CT"},
                "labels": {"background": 0, **{name: i for i, name in enumerate(NAMES, start=1)}},
                "numTraining": cases,
                "file_ending": ".nii.gz",
                "zept": {"tumors": {name: {"hosts": hosts} for name, hosts in HOSTS.items()}},
            }
        )
    )
    return folder


def _resample(image: sitk.Image, interpolator: int) -> sitk.Image:
    size = [max(1, round(n * s / t)) for n, s, t in zip(image.GetSize(), image.GetSpacing(), SPACING_MM, strict=True)]
    return sitk.Resample(
        image, size, sitk.Transform(), interpolator, image.GetOrigin(), SPACING_MM, image.GetDirection(), 0,
        image.GetPixelID(),
    )  # fmt: skip


def _deform(hu: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    field = [ndimage.gaussian_filter(rng.standard_normal(hu.shape), 6) for _ in range(3)]
    where = [g + f / np.abs(f).max() * 1.2 for g, f in zip(np.indices(hu.shape), field, strict=True)]  # ±11 mm
    return (
        ndimage.map_coordinates(hu, where, order=1, mode="nearest") + rng.normal(0, 8, hu.shape),
        ndimage.map_coordinates(labels, where, order=0, mode="nearest"),
    )


def _insert(hu: np.ndarray, labels: np.ndarray, lesion: str, rng: np.random.Generator) -> None:
    host = np.isin(labels, [NAMES.index(h) + 1 for h in HOSTS[lesion]])
    core = np.argwhere(ndimage.binary_erosion(host))
    center = core[rng.integers(len(core))]
    radius = rng.uniform(1.5, 2.2) if "liver" in lesion else rng.uniform(1.1, 1.6)
    inside = host & (sum((g - c) ** 2 for g, c in zip(np.indices(hu.shape), center, strict=True)) <= radius**2)
    hu[inside] += LESION_HU[lesion]
    labels[inside] = NAMES.index(lesion) + 1


def _write(folder: Path, split: str, case: str, hu: np.ndarray, labels: np.ndarray, like: sitk.Image) -> None:
    for sub, name, array in (
        (f"images{split}", f"{case}_0000", hu.astype(np.float32)),
        (f"labels{split}", case, labels.astype(np.uint8)),
    ):
        image = sitk.GetImageFromArray(array)
        image.CopyInformation(like)
        sitk.WriteImage(image, str(folder / sub / f"{name}.nii.gz"), useCompression=True)
