"""A synthetic abdominal CT dataset with lesions, in nnU-Net's raw format: the test bed for unseen tumors.

A case is drawn in this order: patient (`phantom_body`, `phantom_organs`), healthy look-alikes (`phantom_lookalikes`),
lesions (`lesions`), scanner (`phantom_scanner`). Each step has a random stream of its own, spawned from the seed, the
split and the case's number: more cases, or other lesions, change nothing in what is there already.

What is unusual: training images show tumors of liver and kidneys alone. The other types stand in the test images and
references only (`zept.unseen` in dataset.json): one to choose variants on, the others for a final figure.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage  # type: ignore[import-untyped]
from tqdm import tqdm  # type: ignore[import-untyped]

from zept_nnunet.datasets.lesions import (
    DEVELOPMENT,
    FINAL,
    LESION_TYPES,
    SEEN,
    Lesion,
    LesionType,
    draw_lesion,
    lesion_fields,
    of_role,
)
from zept_nnunet.datasets.phantom_body import Body, Tissue, draw_body, place_body
from zept_nnunet.datasets.phantom_lookalikes import draw_lookalikes
from zept_nnunet.datasets.phantom_organs import draw_organs
from zept_nnunet.datasets.phantom_parameters import NOISE_HU, NOISE_OF_LARGE_VOXELS_HU, ORGANS, PHASES
from zept_nnunet.datasets.phantom_scanner import Factors, average_down, draw_protocol, majority_label, scan
from zept_nnunet.datasets.raw_folder import new_dataset, write_dataset_json
from zept_nnunet.datasets.shapes import Range, Triple
from zept_nnunet.errors import ZePTError

VERSION = 2  # of the phantom: another one draws other images from the same seed
DATASET_NAME, SUPERVISED_NAME = "ZePTPhantom", "ZePTPhantomSupervised"
DESCRIPTION = "synthetic CT phantom"
LABELS = {"background": 0, **ORGANS, **{name: 7 + i for i, name in enumerate(LESION_TYPES)}}
# Gas in the stomach has no label. nnU-Net takes clipping and normalization from the labeled voxels: with gas these
# spread by 119 HU in place of 47, and a lesion of 30 HU was a quarter of a standard deviation.
_GAS_BELOW_HU = -200
_SPLITS = {"Tr": 0, "Ts": 1}
_STREAMS = ("patient", "scanner", "look-alikes", "seen lesions", "unseen lesions")


@dataclass(frozen=True)
class Size:
    """One size of the dataset.

    Attributes:
        shape: voxels along Z, Y, X.
        slice_mm: spacing along Z.
        width_mm: field of view along X; the spacing along Y is that along X.
        factors: fine voxels per voxel along Z, Y, X.
        noise_hu: standard deviation in the middle of the body, in the voxels as written.
        least_radius_voxels: no lesion's radius is smaller, in voxels of mean size (as far as its range allows).
    """

    shape: tuple[int, int, int]
    slice_mm: Range
    width_mm: Range
    factors: Factors
    noise_hu: Range
    cases_train: int
    cases_test: int
    least_radius_voxels: float


_WIDTH = Range(356, 396, "mm", "fits the patient")
SIZES: Mapping[str, Size] = {
    "tiny": Size(
        (16, 40, 48), Range(10.5, 11.5, "mm", "chosen"), _WIDTH, (3, 2, 2), NOISE_OF_LARGE_VOXELS_HU, 6, 8, 1.6
    ),
    "demo": Size(
        (24, 48, 64), Range(7.0, 8.0, "mm", "chosen"), _WIDTH, (3, 2, 2), NOISE_OF_LARGE_VOXELS_HU, 50, 32, 2.5
    ),
    "small": Size(
        (24, 48, 64), Range(7.0, 8.0, "mm", "chosen"), _WIDTH, (3, 2, 2), NOISE_OF_LARGE_VOXELS_HU, 150, 128, 2.5
    ),
    "full": Size((64, 160, 208), Range(2.6, 3.0, "mm", "routine abdomen"), _WIDTH, (2, 2, 2), NOISE_HU, 40, 64, 2.0),
}


@dataclass(frozen=True)
class PhantomCase:
    """One synthetic CT.

    Attributes:
        image_hu: (Z, Y, X) int16.
        labels: (Z, Y, X) uint8, values of ``LABELS``.
        spacing_mm: along Z, Y, X.
        record: phase, noise, look-alikes and the properties of each lesion; plain JSON.
    """

    image_hu: np.ndarray
    labels: np.ndarray
    spacing_mm: Triple
    record: dict[str, object]


def lesions_of_case(
    split: str, index: int, *, supervised: bool = False, unlabeled_unseen: bool = False
) -> tuple[str, ...]:
    """Lesion classes that a case shows: a matter of its split and number alone.

    Training: of four cases two hold both seen tumors and two one of them, and of eight one holds none. With
    ``supervised``, each unseen type occurs in two of three cases too; with ``unlabeled_unseen``, every third case holds
    one of them.
    Test: every second case is healthy; the others show, in turn, the seen tumors and each of the unseen types.
    """
    seen, unseen = [t.name for t in of_role(SEEN)], [t.name for t in (*of_role(DEVELOPMENT), *of_role(FINAL))]
    if split == "Ts":
        if index % 2 == 0:
            return ()
        turn = index // 2 % (1 + len(unseen))
        return tuple(seen) if turn == 0 else (unseen[turn - 1],)
    present = [name for i, name in enumerate(seen) if index % 4 != i + 1]
    if index % 8 == 7:
        present = []
    if supervised:
        present += [name for i, name in enumerate(unseen) if (index + i) % len(unseen) != 0]
    elif unlabeled_unseen and index % 3 == 1:
        present.append(unseen[index // 3 % len(unseen)])
    return tuple(present)


def draw_phantom_case(
    size: Size, classes: Sequence[str], seed: Sequence[int], *, test: bool = False, phase: str | None = None
) -> PhantomCase:
    """Draw one case that shows lesions of the named classes, one to three of each.

    Args:
        classes: names from ``LESION_TYPES``.
        seed: the case's seed; equal numbers give an equal case, and an equal patient whatever ``classes`` are.
        test: whether look-alikes of the test split may occur.
        phase: contrast phase, of ``PHASES``; drawn where it is not given.
    """
    streams = {
        name: np.random.default_rng(np.random.SeedSequence(seed[0], spawn_key=(*seed[1:], i)))
        for i, name in enumerate(_STREAMS)
    }
    rng = streams["scanner"]
    drawn_phase = PHASES[int(rng.integers(len(PHASES)))]
    phase = drawn_phase if phase is None else phase
    in_plane = size.width_mm.draw(rng) / size.shape[2]
    spacing = (round(size.slice_mm.draw(rng), 2), round(in_plane, 3), round(in_plane, 3))
    protocol = draw_protocol(size.shape, spacing, size.factors, size.noise_hu, rng)

    patient = streams["patient"]
    body = draw_body(place_body(protocol.fine_axes_mm(), patient), phase, patient)
    draw_organs(body, patient)
    draw_lookalikes(body, streams["look-alikes"], test=test)
    least_mm = size.least_radius_voxels * float(np.prod(spacing)) ** (1 / 3)
    records = []
    for name in classes:
        kind = LESION_TYPES[name]
        rng_lesions = streams["seen lesions" if kind.role == SEEN else "unseen lesions"]
        for _ in range(int(rng_lesions.integers(1, 4 if name == "liver tumor" else 3))):
            record = paint_lesion(body, kind, rng_lesions, least_mm)
            if record is not None:
                contrast = record["contrast_hu"]
                cnr = round(abs(float(str(contrast))) / protocol.noise_hu, 3)
                records.append({**record, "noise_hu": round(protocol.noise_hu, 3), "cnr": cnr})

    values = {**{v: v for v in ORGANS.values()}, **{LABELS[n]: LABELS[n] for n in LESION_TYPES}}
    labels = majority_label(body.tissue, values, size.factors)
    image = scan(average_down(body.hu, size.factors), protocol, streams["scanner"])
    labels[(labels == ORGANS["stomach"]) & (image < _GAS_BELOW_HU)] = 0
    case_record: dict[str, object] = {
        "phase": phase,
        "noise_hu": round(protocol.noise_hu, 3),
        "streaks": protocol.streak_hu > 0,
        "motion": protocol.motion_voxels > 0,
        "look_alikes": list(body.lookalikes),
        "lesions": records,
    }
    return PhantomCase(image, labels, spacing, case_record)


def paint_lesion(body: Body, kind: LesionType, rng: np.random.Generator, least_mm: float) -> dict[str, object] | None:
    """Paint one lesion into its host, which it may bulge from, into fat alone. None where no host is large enough."""
    host = kind.hosts[int(rng.integers(len(kind.hosts)))]
    label = ORGANS[host]
    found = ndimage.find_objects(body.tissue == label, max_label=1)
    if not found or found[0] is None:
        return None
    block = found[0]
    steps = [float(axis[1] - axis[0]) for axis in body.grid.axes_mm]
    depth = ndimage.distance_transform_edt(np.pad(body.tissue[block] == label, 1), sampling=steps)[1:-1, 1:-1, 1:-1]
    deepest = float(depth.max())
    lesion = draw_lesion(kind, body.phase, rng, least_mm=least_mm, most_mm=1.3 * deepest)
    if kind.at_surface:
        places = np.argwhere((depth > 1) & (depth < 7))
    else:
        places = np.argwhere(depth >= min(0.55 * lesion.radius_mm, 0.7 * deepest))
    place = places[int(rng.integers(len(places)))] + np.array([part.start for part in block])
    center = [float(axis[i]) for axis, i in zip(body.grid.axes_mm, place, strict=True)]
    host_hu = body.organ_hu(host)
    voxels = _blend(body, lesion, center, label, host_hu)
    return {**lesion.record(), "host": host, "volume_ml": round(voxels * float(np.prod(steps)) / 1000, 3)}


def _blend(body: Body, lesion: Lesion, center_mm: Sequence[float], host_label: int, host_hu: float) -> int:
    """Change attenuation and tissue; returns the number of fine voxels that became lesion."""
    spans = [
        np.flatnonzero(np.abs(axis - c) <= lesion.reach_mm)
        for axis, c in zip(body.grid.axes_mm, center_mm, strict=True)
    ]
    box = (
        slice(spans[0][0], spans[0][-1] + 1),
        slice(spans[1][0], spans[1][-1] + 1),
        slice(spans[2][0], spans[2][-1] + 1),
    )
    weight, contrast = lesion_fields(lesion, body.grid.sub_axes(box), center_mm)
    tissue = body.tissue[box]
    in_host = tissue == host_label
    bulge = ((tissue == Tissue.CAVITY) | (tissue == Tissue.PLANE)) & (weight > 0.5)
    weight = np.where(bulge, 1, np.where(in_host, weight, 0))
    body.hu[box] += weight * (host_hu + contrast - body.hu[box])
    lesion_voxels = weight > 0.5
    tissue[lesion_voxels] = LABELS[lesion.lesion_class]
    return int(lesion_voxels.sum())


def phantom_dataset_json(
    size: str, seed: int, records: Mapping[str, Mapping[str, object]], *, supervised: bool, unlabeled_unseen: bool
) -> dict[str, object]:
    """Content of the phantom's dataset.json. ``records``: case → what was drawn."""
    unseen = (*of_role(DEVELOPMENT), *of_role(FINAL))
    names = [n for n in LABELS if supervised or n not in {t.name for t in unseen}]
    tumors = {t.name: {"hosts": list(t.hosts)} for t in LESION_TYPES.values() if t.name in names}
    block: dict[str, object] = {"tumors": tumors}
    if not supervised:
        block["unseen"] = {t.name: {"hosts": list(t.hosts), "label": LABELS[t.name]} for t in unseen}
    return {
        "channel_names": {"0": "CT"},
        "labels": {n: LABELS[n] for n in names},
        "numTraining": SIZES[size].cases_train,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIO",
        "description": "Synthetic CT phantom of zept-nnunet: not from patients, not for any clinical purpose.",
        "zept": block,
        "zept_phantom": {
            "version": VERSION,
            "size": size,
            "seed": seed,
            "supervised": supervised,
            "unlabeled_unseen": unlabeled_unseen,
            "development_unseen": [t.name for t in of_role(DEVELOPMENT)],
            "final_unseen": [t.name for t in of_role(FINAL)],
            "cases": dict(records),
        },
    }


def write_phantom_dataset(
    raw: str | os.PathLike[str],
    dataset_id: int,
    size: str,
    seed: int,
    *,
    supervised: bool = False,
    unlabeled_unseen: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write the dataset as ``raw/DatasetXXX_ZePTPhantom`` and return that folder, which appears at once, complete.

    Args:
        raw: nnU-Net's ``nnUNet_raw``; made where it is missing.
        dataset_id: 1 to 999.
        size: of ``SIZES``.
        seed: equal seeds give equal bytes on one machine.
        supervised: the ceiling's dataset (``DatasetXXX_ZePTPhantomSupervised``): the same patients and the same test
            set, but training shows the unseen types too, labeled.
        unlabeled_unseen: every third training case holds a lesion of an unseen type under its host's label, as real
            data does; dataset.json says which (``unlabeled`` in the case's record).
        overwrite: replace a dataset of that name.

    Raises:
        ZePTError: for an unknown size, a bad number, both conditions at once, or an ID or folder that is taken.
    """
    if supervised and unlabeled_unseen:
        raise ZePTError("supervised labels the unseen types and unlabeled_unseen hides them: choose one of the two.")
    raw = Path(raw)
    target = check_target(raw, dataset_id, size, seed, supervised=supervised, overwrite=overwrite)
    with new_dataset(target) as scratch:
        records = _write_cases(scratch, SIZES[size], seed, supervised=supervised, unlabeled_unseen=unlabeled_unseen)
        content = phantom_dataset_json(size, seed, records, supervised=supervised, unlabeled_unseen=unlabeled_unseen)
        write_dataset_json(scratch, content)
    return target


def check_target(raw: Path, dataset_id: int, size: str, seed: int, *, supervised: bool, overwrite: bool) -> Path:
    """The folder that `write_phantom_dataset` would write.

    Raises:
        ZePTError: for an unknown size, a bad number, or an ID or folder that is taken.
    """
    if size not in SIZES:
        raise ZePTError(f"The phantom's size is one of {', '.join(SIZES)}; got {size!r}.")
    if not 1 <= dataset_id <= 999:
        raise ZePTError(f"An nnU-Net dataset ID here is 1 to 999; got {dataset_id}.")
    if seed < 0:
        raise ZePTError(f"The phantom's seed is 0 or more; got {seed}.")
    target = raw / f"Dataset{dataset_id:03d}_{SUPERVISED_NAME if supervised else DATASET_NAME}"
    taken = sorted(p for p in raw.glob(f"Dataset{dataset_id:03d}_*") if p != target)
    if taken:
        raise ZePTError(f"Dataset ID {dataset_id} is taken by {taken[0]}. Choose another ID or another folder.")
    if target.exists() and not overwrite:
        raise ZePTError(f"{target} exists already. Choose another ID or folder, or allow it with --overwrite.")
    return target


def _write_cases(
    folder: Path, size: Size, seed: int, *, supervised: bool, unlabeled_unseen: bool
) -> dict[str, dict[str, object]]:
    hosts = {LABELS[t.name]: t.hosts for t in LESION_TYPES.values() if t.role != SEEN}
    records: dict[str, dict[str, object]] = {}
    todo = [("Tr", i) for i in range(size.cases_train)] + [("Ts", i) for i in range(size.cases_test)]
    for split in _SPLITS:
        (folder / f"images{split}").mkdir()
        (folder / f"labels{split}").mkdir()
    for split, index in tqdm(todo, desc="phantom", unit="case"):
        name = f"phantom_{index:03d}" if split == "Tr" else f"phantom_test_{index:03d}"
        classes = lesions_of_case(split, index, supervised=supervised, unlabeled_unseen=unlabeled_unseen)
        case = draw_phantom_case(size, classes, (seed, _SPLITS[split], index), test=split == "Ts")
        labels = case.labels
        if split == "Tr" and not supervised:
            hidden = [n for n in classes if LESION_TYPES[n].role != SEEN]
            for value in (LABELS[n] for n in hidden):
                labels[labels == value] = ORGANS[hosts[value][0]]
            if hidden:
                case.record["unlabeled"] = hidden
        write_image(case.image_hu, case.spacing_mm, folder / f"images{split}" / f"{name}_0000.nii.gz")
        write_image(labels, case.spacing_mm, folder / f"labels{split}" / f"{name}.nii.gz")
        records[name] = case.record
    return records


def write_image(array: np.ndarray, spacing_mm: Triple, path: Path, description: str = DESCRIPTION) -> None:
    """Write (Z, Y, X) as NIfTI: the middle of the volume at 0, ``description`` in the header's field of that name."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing_mm[::-1])
    image.SetOrigin([-(n - 1) / 2 * s for n, s in zip(array.shape[::-1], spacing_mm[::-1], strict=True)])
    image.SetMetaData("ITK_FileNotes", description)
    sitk.WriteImage(image, str(path), useCompression=True)
