"""Scans are known by what they show, whatever their grid, crop, orientation and noise."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from tests.real_ct import data_folder
from zept_nnunet.datasets.same_scan import Landmarks, candidates, find_same_scans, groups_of, read_landmarks
from zept_nnunet.errors import ZePTError

REAL_CT = data_folder("abdomen_ct") / "example_ct.nii.gz"


def patient(seed: int, shape: tuple[int, int, int] = (72, 96, 96)) -> sitk.Image:
    """Tissue of random texture in a body that is alike in all patients; 2.5 mm."""
    rng = np.random.default_rng(seed)
    texture = sum(ndimage.gaussian_filter(rng.normal(size=shape), s) * s**1.5 for s in (2, 4, 6))
    _, y, x = np.indices(shape)
    body = ((y - shape[1] / 2) / 40) ** 2 + ((x - shape[2] / 2) / 44) ** 2 < 1
    image = sitk.GetImageFromArray(np.where(body, 40 + 60 * texture / texture.std(), -1000).astype(np.float32))
    image.SetSpacing((2.5, 2.5, 2.5))
    image.SetOrigin((-100.0, 20.0, 7.0))
    return image


def resampled(image: sitk.Image, spacing: tuple[float, float, float]) -> sitk.Image:
    size = [int(n * s / new) for n, s, new in zip(image.GetSize(), image.GetSpacing(), spacing, strict=True)]
    return sitk.Resample(
        image, size, sitk.Transform(), sitk.sitkLinear, image.GetOrigin(), spacing, image.GetDirection(), -1000.0
    )


def cropped(image: sitk.Image, share: float) -> sitk.Image:
    """The middle; where it lay in the room is forgotten."""
    low = [int(n * (1 - share) / 2) for n in image.GetSize()]
    part = sitk.RegionOfInterest(image, [int(n * share) for n in image.GetSize()], low)
    part.SetOrigin((0.0, 0.0, 0.0))
    return part


def noisy(image: sitk.Image) -> sitk.Image:
    """Clipped, as some datasets are published, and noisier."""
    array = sitk.GetArrayFromImage(image).clip(-200, 300)
    out = sitk.GetImageFromArray((array + np.random.default_rng(9).normal(0, 10, array.shape)).astype(np.float32))
    out.CopyInformation(image)
    return out


def variants_of(image: sitk.Image) -> dict[str, sitk.Image]:
    return {
        "as it was": image,
        "resampled": resampled(image, (1.9, 3.1, 4.0)),
        "cropped": cropped(image, 0.7),
        "turned": sitk.DICOMOrient(image, "RAI"),
        "cropped and resampled": resampled(cropped(image, 0.8), (3.0, 3.0, 2.0)),
        "clipped and noisy": noisy(image),
    }


def written(images: dict[str, sitk.Image], folder: Path) -> dict[str, Path]:
    paths = {name: folder / f"{i}.nii.gz" for i, name in enumerate(images)}
    for name, image in images.items():
        sitk.WriteImage(image, str(paths[name]))
    return paths


def pairs_of(paths: dict[str, Path]) -> set[frozenset[str]]:
    scans = {name: read_landmarks(path) for name, path in paths.items()}
    return {frozenset((p.first, p.second)) for p in find_same_scans(paths, scans)}


def test_every_variant_of_a_scan_is_found_and_no_other_patient(tmp_path: Path) -> None:
    images = {f"other {seed}": patient(seed) for seed in range(1, 6)} | variants_of(patient(0))
    found = pairs_of(written(images, tmp_path))
    wanted = {frozenset((a, b)) for a in variants_of(patient(0)) for b in variants_of(patient(0)) if a != b}
    assert found == wanted


@pytest.mark.skipif(not REAL_CT.is_file(), reason=f"no real CT at {REAL_CT} (ZEPT_TEST_DATA)")
def test_real_ct_is_found_again(tmp_path: Path) -> None:
    image = sitk.ReadImage(str(REAL_CT), sitk.sitkFloat32)
    found = pairs_of(written({"a phantom": patient(1)} | variants_of(image), tmp_path))
    assert {frozenset(("as it was", name)) for name in variants_of(image) if name != "as it was"} <= found
    assert not any("a phantom" in pair for pair in found)


def test_scans_without_landmarks_are_a_pair_where_every_voxel_is_the_same(tmp_path: Path) -> None:
    images = {}
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        flat = sitk.GetImageFromArray(np.full((40, 40, 40), seed, np.float32))
        flat.SetSpacing((4.0, 4.0, 4.0))
        tiny = sitk.GetImageFromArray(rng.normal(size=(4, 4, 4)).astype(np.float32))
        slice_ = sitk.GetImageFromArray(rng.normal(size=(8, 8)).astype(np.float32))
        images |= {f"flat {seed}": flat, f"tiny {seed}": tiny, f"2D {seed}": slice_}
    images["tiny again"] = images["tiny 1"]
    assert pairs_of(written(images, tmp_path)) == {frozenset(("tiny 1", "tiny again"))}
    assert not list(candidates({}))


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.nii.gz").write_text("no image")
    with pytest.raises(ZePTError, match=r"broken\.nii\.gz"):
        read_landmarks(tmp_path / "broken.nii.gz")


def test_sameness_reaches_by_way_of_a_third() -> None:
    from zept_nnunet.datasets.same_scan import SameScan

    pairs = [SameScan("b", "c", 1.0), SameScan("a", "c", 1.0)]
    assert groups_of(["a", "b", "c", "d"], pairs) == {"a": "a", "b": "a", "c": "a", "d": "d"}


def landmarks_of_patients(count: int) -> dict[str, Landmarks]:
    """Of patients that are much alike, so that nearly every landmark has as many votes as it may have."""
    rng, scans = np.random.default_rng(0), {}
    kinds = rng.normal(size=(4, 27))
    for i in range(count):
        descriptions = rng.normal(size=(128, 4)) @ kinds
        descriptions = (descriptions - descriptions.mean(1, keepdims=True)) / descriptions.std(1, keepdims=True)
        positions = rng.uniform(0, 300, (128, 3))
        scans[f"scan {i}"] = Landmarks(positions.astype(np.float32), descriptions.astype(np.float32))
    return scans


def test_memory_of_a_scan_does_not_grow_with_the_number_of_scans() -> None:
    """10,000 scans are compared in at most 1.5 GB, whatever their size."""
    peaks = []
    for count in (50, 150):
        scans = landmarks_of_patients(count)
        scans["again"] = Landmarks(scans["scan 7"].positions + np.float32([8, -4, 2]), scans["scan 7"].descriptions)
        scans["no landmark"] = Landmarks(np.zeros((0, 3), np.float32), np.zeros((0, 27), np.float32))
        own = sum(x.positions.nbytes + x.descriptions.nbytes for x in scans.values())
        tracemalloc.start()
        ((first, second, shift),) = candidates(scans)
        peaks.append((tracemalloc.get_traced_memory()[1] + own) / count)
        tracemalloc.stop()
        assert (first, second) == ("scan 7", "again") and np.allclose(shift, [8, -4, 2], atol=1e-3)
    assert peaks[1] < 1.1 * peaks[0] and 10_000 * max(peaks) < 1.5e9
