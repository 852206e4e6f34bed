"""Synthetic lesions in real anatomy: a copy of a raw CT dataset with organ labels, with lesions painted into organs.

The lesions are those of the phantom (`lesions`). Everything that holds one says so: the dataset's name and description,
the case's name, the header of image and label. Noise and texture of the original stay under the lesion: its smoothed
attenuation is replaced, what is left over is kept.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from scipy import ndimage  # type: ignore[import-untyped]
from tqdm import tqdm  # type: ignore[import-untyped]

from zept_nnunet.datasets.lesions import LESION_TYPES, Lesion, draw_lesion, lesion_fields
from zept_nnunet.datasets.phantom_parameters import PHASES, TISSUE_HU, TISSUE_OF_ORGAN
from zept_nnunet.datasets.phantom_scanner import average_down
from zept_nnunet.datasets.raw_folder import new_dataset, write_dataset_json
from zept_nnunet.errors import ZePTError
from zept_nnunet.names import infer_hosts, normalize_name
from zept_nnunet.taxonomy import Taxonomy, declared_unseen

SUFFIX = "_synthetic_lesion"  # of a case that holds one
KEY = "zept_synthetic_lesions"  # of dataset.json: what was inserted where
AUTO = "auto"
FAT_HU = (-150.0, -30.0)  # a lesion may bulge into unlabeled fat, and into nothing else
LEAST_DEPTH_MM = 4.0  # a host whose deepest voxel lies less deep gets no lesion
SMOOTH_MM = 3.0  # below this scale the original's texture stays
TEXTURE_HU = 40.0  # and no stronger than this: gas, stones and contrast do not show through
SOFT_HU = (0.0, 200.0)  # what the wall of a hollow organ may measure
_WALL_MM = 7.0  # a lesion of the wall starts within this depth
_FINE = 2  # sub-voxels per voxel along each axis


@dataclass(frozen=True)
class Insertion:
    """One type to insert: its name, the value that its label gets, and the organs (label values) that host it here."""

    name: str
    label: int
    hosts: Mapping[str, int]


def insert_lesions(
    source: Path,
    target: Path,
    types: Sequence[str],
    *,
    seed: int = 0,
    per_case: int = 1,
    phase: str = AUTO,
    test_only: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write ``target``, a raw dataset with lesions of some types inserted into every case of ``source``.

    Args:
        source: a raw dataset of one CT channel with plain labels, organs among them.
        target: ``DatasetXXX_Name``; the name says "synthetic".
        types: names from ``LESION_TYPES``. A type that ``source`` does not label becomes a new label.
        seed: equal seeds give equal images. A case depends on the seed and its name.
        per_case: lesions of each type a case.
        phase: contrast phase, of ``PHASES``; "auto" takes, case by case, the one nearest to the host's attenuation.
        test_only: insert into the test cases alone (imagesTs with labelsTs), and declare new types as unseen.
        overwrite: replace ``target``.

    Raises:
        ZePTError: ``source`` is not such a dataset, no labeled organ hosts a type, no case has room for one, or
            ``target`` exists.
    """
    if per_case < 1 or seed < 0:
        raise ZePTError(f"Wanted at least 1 lesion a case and a seed of 0 or more; got {per_case} and {seed}.")
    if phase not in (AUTO, *PHASES):
        raise ZePTError(f"The contrast phase is one of {', '.join((AUTO, *PHASES))}; got {phase!r}.")
    if "synthetic" not in target.name.lower():
        raise ZePTError(f"{target.name}: a dataset with inserted lesions says 'synthetic' in its name.")
    taken = sorted(p for p in target.parent.glob(f"{target.name[:10]}_*") if p != target)
    if taken:
        raise ZePTError(f"The dataset ID of {target.name} is taken by {taken[0]}. Choose another one.")
    if target.exists() and not overwrite:
        raise ZePTError(f"{target} exists already. Choose another name or ID, or allow it with --overwrite.")
    dataset_json = _read_dataset_json(source)
    insertions = plan_insertions(dataset_json, types, str(source / "dataset.json"))
    content = _new_dataset_json(dataset_json, insertions, test_only, str(source / "dataset.json"))
    cases = _find_cases(source, dataset_json, test_only)

    with new_dataset(target) as scratch:
        records = _write_cases(
            scratch, cases, insertions, dataset_json["file_ending"], seed, per_case, phase, test_only
        )
        inserted = {str(lesion["class"]) for lesions in records.values() for lesion in lesions}
        missing = [i.name for i in insertions if i.name not in inserted]
        if missing:
            raise ZePTError(
                f"{source}: no case has room for {missing}: the hosts are absent, or thinner than "
                f"{2 * LEAST_DEPTH_MM:g} mm. Leave that type out, or use a dataset that shows the organ."
            )
        content[KEY] = {"source": source.name, "seed": seed, "cases": records}
        write_dataset_json(scratch, content)
    return target


def plan_insertions(dataset_json: dict[str, Any], types: Sequence[str], source: str) -> list[Insertion]:
    """Which label each type gets, and which labeled organs host it.

    Raises:
        ZePTError: an unknown type, labels as regions, not one CT channel, or no labeled organ hosts a type.
    """
    known = {normalize_name(name): name for name in LESION_TYPES}
    unknown = [t for t in types if normalize_name(t) not in known]
    if unknown or not types:
        raise ZePTError(f"Wanted lesion types out of {sorted(LESION_TYPES)}; got {unknown or 'none'}.")
    channels = dataset_json.get("channel_names") or {}
    if [str(c).lower() for c in channels.values()] != ["ct"]:
        raise ZePTError(
            f"{source}: lesions are painted in Hounsfield units, so the one channel must be CT; got {channels}."
        )
    taxonomy = Taxonomy.from_dataset_json(dataset_json, source)
    if taxonomy.has_regions or taxonomy.ignore_label is not None:
        raise ZePTError(f"{source}: wanted plain labels, one integer a class; it holds regions or an ignore label.")
    organs = {o.name: o.label for o in taxonomy.organs}
    labels = {normalize_name(c.name): (c.name, c.label) for c in taxonomy.classes}
    reserved = {normalize_name(u.name): (u.name, u.label) for u in declared_unseen(dataset_json, source)}
    free = max([v for _, v in labels.values()] + [v for _, v in reserved.values() if v is not None], default=0) + 1
    found: list[Insertion] = []
    for name in dict.fromkeys(known[normalize_name(t)] for t in types):
        hosts = infer_hosts(name, organs)
        if not hosts:
            raise ZePTError(
                f"{source}: no labeled organ hosts {name!r} (it grows in {' or '.join(LESION_TYPES[name].hosts)}); "
                f"labeled organs: {list(organs)}. Add that organ's label, or choose another type."
            )
        _, label = labels.get(normalize_name(name)) or reserved.get(normalize_name(name)) or (name, None)
        if label is None:
            label, free = free, free + 1
        found.append(Insertion(name, label, {h: organs[h] for h in hosts}))
    return found


def paint_into(
    image: np.ndarray,
    labels: np.ndarray,
    insertion: Insertion,
    spacing_mm: Sequence[float],
    phase: str,
    rng: np.random.Generator,
) -> dict[str, object] | None:
    """Paint one lesion, in place, into ``image`` (Z, Y, X) float32 HU and ``labels`` (Z, Y, X).

    Returns:
        The lesion's record, or None where no host has room.
    """
    hosts = [(name, value) for name, value in insertion.hosts.items() if (labels == value).any()]
    for i in rng.permutation(len(hosts)):
        name, value = hosts[int(i)]
        block = ndimage.find_objects(labels == value, max_label=1)[0]
        in_host = np.pad(labels[block] == value, 1)
        depth = ndimage.distance_transform_edt(in_host, sampling=spacing_mm)[1:-1, 1:-1, 1:-1]
        deepest = float(depth.max())
        if deepest < LEAST_DEPTH_MM:
            continue
        kind = LESION_TYPES[insertion.name]
        host_hu = _host_hu(image[block], depth, kind.at_surface)
        lesion_phase = nearest_phase(name, host_hu) if phase == AUTO else phase
        lesion = draw_lesion(kind, lesion_phase, rng, most_mm=1.3 * deepest)
        low, high = (0.0, _WALL_MM) if kind.at_surface else (min(0.55 * lesion.radius_mm, 0.7 * deepest), np.inf)
        places = np.argwhere((depth > low) & (depth <= high))
        center = places[int(rng.integers(len(places)))] + np.array([part.start for part in block])
        voxels = _blend(image, labels, lesion, insertion.label, value, center, spacing_mm, host_hu)
        if voxels == 0:
            continue
        volume = round(voxels * float(np.prod(spacing_mm)) / 1000, 3)
        return {**lesion.record(), "host": name, "phase": lesion_phase, "volume_ml": volume}
    return None


def _host_hu(image: np.ndarray, depth_mm: np.ndarray, hollow: bool) -> float:
    """Attenuation of the healthy host: its inside, or of a hollow organ the soft tissue near its surface."""
    deepest = float(depth_mm.max())
    inside = depth_mm > min(SMOOTH_MM, 0.5 * deepest)
    if hollow:
        wall = (depth_mm > 0) & (depth_mm <= _WALL_MM) & (image > SOFT_HU[0]) & (image < SOFT_HU[1])
        inside = wall if wall.any() else inside
    return float(np.median(image[inside]))


def nearest_phase(host: str, host_hu: float) -> str:
    """The contrast phase in which a healthy organ's range lies nearest to an attenuation; portal for other organs."""
    tissue = next((t for t in TISSUE_OF_ORGAN.values() if infer_hosts(f"{t} tumor", [host])), None)
    if tissue is None:
        return "portal"
    middle = {p: 0.5 * (r.low + r.high) for p, r in TISSUE_HU[tissue].items()}
    return min(PHASES, key=lambda p: abs(middle[p] - host_hu))


def _blend(
    image: np.ndarray,
    labels: np.ndarray,
    lesion: Lesion,
    label: int,
    host_label: int,
    center: np.ndarray,
    spacing_mm: Sequence[float],
    host_hu: float,
) -> int:
    """Replace the smoothed attenuation; returns the number of voxels that became lesion."""
    reach = [int(np.ceil(lesion.reach_mm / s)) + 1 for s in spacing_mm]
    low = [max(0, int(c) - r) for c, r in zip(center, reach, strict=True)]
    high = [min(n, int(c) + r + 1) for n, c, r in zip(labels.shape, center, reach, strict=True)]
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    fine_axes = [
        (np.arange(a * _FINE, b * _FINE) + 0.5) * (s / _FINE) for a, b, s in zip(low, high, spacing_mm, strict=True)
    ]
    middle = [(int(c) + 0.5) * s for c, s in zip(center, spacing_mm, strict=True)]
    fine_weight, fine_contrast = lesion_fields(lesion, fine_axes, middle)
    factors = (_FINE, _FINE, _FINE)
    weight = average_down(fine_weight, factors)  # partial volume
    contrast = average_down(fine_weight * fine_contrast, factors)

    present, values = labels[box], image[box]
    in_host = present == host_label
    fat = (present == 0) & (values > FAT_HU[0]) & (values < FAT_HU[1])
    bulge = fat & (weight > 0.5) & ndimage.binary_dilation(in_host, iterations=2)
    weight = np.where(in_host | bulge, weight, 0)
    contrast = np.where(in_host | bulge, contrast, 0)
    for region in (in_host, bulge):
        smooth = _smooth_inside(values, region, spacing_mm)
        texture = np.clip(values - smooth, -TEXTURE_HU, TEXTURE_HU)
        values[region] = (values + weight * (host_hu + texture - values) + contrast)[region]
    inside = weight > 0.5
    present[inside] = label
    return int(inside.sum())


def _smooth_inside(values: np.ndarray, region: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Gaussian mean over the voxels of a region alone."""
    sigma = [max(SMOOTH_MM / s, 1.0) for s in spacing_mm]  # voxel noise is texture too
    share = ndimage.gaussian_filter(region.astype(np.float32), sigma)
    return ndimage.gaussian_filter(np.where(region, values, 0).astype(np.float32), sigma) / np.maximum(share, 1e-3)


def _write_cases(
    folder: Path,
    cases: Sequence[tuple[str, str, Path, Path]],
    insertions: Sequence[Insertion],
    ending: str,
    seed: int,
    per_case: int,
    phase: str,
    test_only: bool,
) -> dict[str, list[dict[str, object]]]:
    records: dict[str, list[dict[str, object]]] = {}
    for split, case, image_path, label_path in tqdm(cases, desc="synthetic lesions", unit="case"):
        for kind in ("images", "labels"):
            (folder / f"{kind}{split}").mkdir(exist_ok=True)
        lesions: list[dict[str, object]] = []
        if split == "Ts" or not test_only:
            image, label = _read(image_path), _read(label_path)
            hu, values = sitk.GetArrayFromImage(image).astype(np.float32), sitk.GetArrayFromImage(label).copy()
            if hu.shape != values.shape:
                raise ZePTError(f"{label_path}: wanted the grid of {image_path}, {hu.shape}; got {values.shape}.")
            rng = np.random.default_rng([seed, *case.encode()])
            for insertion in insertions:
                for _ in range(per_case):
                    drawn = paint_into(hu, values, insertion, label.GetSpacing()[::-1], phase, rng)
                    if drawn is not None:
                        lesions.append(drawn)
        if not lesions:
            shutil.copyfile(image_path, folder / f"images{split}" / f"{case}_0000{ending}")
            shutil.copyfile(label_path, folder / f"labels{split}" / f"{case}{ending}")
            continue
        note = "synthetic lesion: " + ", ".join(dict.fromkeys(str(x["class"]) for x in lesions))
        integer = np.issubdtype(sitk.GetArrayViewFromImage(image).dtype, np.integer)
        hu = (np.rint(hu) if integer else hu).astype(sitk.GetArrayViewFromImage(image).dtype)
        name = case + SUFFIX
        _write(hu, image, folder / f"images{split}" / f"{name}_0000{ending}", note)
        _write(values, label, folder / f"labels{split}" / f"{name}{ending}", note)
        records[name] = lesions
    return records


def _read(path: Path) -> sitk.Image:
    try:
        return sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise ZePTError(f"{path} cannot be read as an image ({str(error).splitlines()[-1]}); convert it.") from error


def _write(array: np.ndarray, like: sitk.Image, path: Path, note: str) -> None:
    image = sitk.GetImageFromArray(array)
    image.CopyInformation(like)
    image.SetMetaData("ITK_FileNotes", note[:79])  # NIfTI's field "descrip" holds 79 characters
    sitk.WriteImage(image, str(path), useCompression=True)


def _read_dataset_json(source: Path) -> dict[str, Any]:
    path = source / "dataset.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ZePTError(f"{path} cannot be read ({error}); a dataset in nnU-Net's raw format holds one.") from error
    if not isinstance(content, dict) or not isinstance(content.get("file_ending"), str):
        raise ZePTError(f"{path}: wanted a dictionary with 'file_ending', as nnU-Net writes it.")
    return content


def _find_cases(source: Path, dataset_json: dict[str, Any], test_only: bool) -> list[tuple[str, str, Path, Path]]:
    """(split, case, image, label), training first; test cases are those with a reference in labelsTs."""
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    ending = dataset_json["file_ending"]
    cases: list[tuple[str, str, Path, Path]] = []
    if (source / "imagesTr").is_dir() or "dataset" in dataset_json:
        found = get_filenames_of_train_images_and_targets(str(source), copy.deepcopy(dataset_json))
        cases += [("Tr", str(c), Path(found[c]["images"][0]), Path(found[c]["label"])) for c in sorted(found)]
    for label in sorted((source / "labelsTs").glob(f"*{ending}")):
        case = label.name[: -len(ending)]
        cases.append(("Ts", case, source / "imagesTs" / f"{case}_0000{ending}", label))
    missing = [str(p) for _, _, image, label in cases for p in (image, label) if not p.is_file()]
    if missing:
        raise ZePTError(f"{source}: {len(missing)} files are missing, the first is {missing[0]}.")
    if not any(split == "Ts" or not test_only for split, *_ in cases):
        wanted = "labelsTs with imagesTs" if test_only else "imagesTr with labelsTr, or labelsTs with imagesTs"
        raise ZePTError(f"{source}: no labeled case; wanted {wanted}.")
    return cases


def _new_dataset_json(
    dataset_json: dict[str, Any], insertions: Sequence[Insertion], test_only: bool, source: str
) -> dict[str, Any]:
    content = copy.deepcopy(dataset_json)
    content.pop("dataset", None)  # the new folder holds its own files
    content["description"] = (
        f"Holds synthetic lesions inserted by zept-nnunet. {content.get('description', '')}".strip()
    )
    block = content.setdefault("zept", {})
    labeled = {normalize_name(n) for n in content["labels"]}
    new = [i for i in insertions if normalize_name(i.name) not in labeled]
    unseen = dict(block.get("unseen") or {})
    for insertion in new:
        entry: dict[str, Any] = {"hosts": list(insertion.hosts)}
        declared = [n for n in unseen if normalize_name(n) == normalize_name(insertion.name)]
        for name in declared:
            del unseen[name]
        if test_only:
            unseen[insertion.name] = {**entry, "label": insertion.label}
        else:
            content["labels"][insertion.name] = insertion.label
            block.setdefault("tumors", {})[insertion.name] = entry
    values = sorted(int(v) for v in content["labels"].values())
    if values != list(range(len(values))):
        raise ZePTError(
            f"{source}: zept.unseen gives {[i.name for i in new]} the labels {[i.label for i in new]}, and nnU-Net's "
            f"labels leave no gaps. Insert the types with smaller labels too ({sorted(unseen)}), or use --test-only."
        )
    if unseen or "unseen" in block:
        block["unseen"] = unseen
    if block.get("annotated") and not test_only:
        names = [i.name for i in insertions]
        patterns = {p: list(dict.fromkeys([*classes, *names])) for p, classes in block["annotated"].items()}
        block["annotated"] = {**patterns, **{p + SUFFIX: c for p, c in patterns.items() if not p.endswith("*")}}
    return content


def target_name(output: str, source_name: str) -> str:
    """``DatasetXXX_Name`` for ``-o``: an ID, or such a name; the name says "synthetic lesions" in either case.

    Raises:
        ZePTError: it is neither.
    """
    if re.fullmatch(r"\d{1,3}", output) and int(output) > 0:
        stem = re.sub(r"^Dataset\d{3}_", "", source_name)
        return f"Dataset{int(output):03d}_{stem}SyntheticLesions"
    if not re.fullmatch(r"Dataset\d{3}_\w+", output):
        raise ZePTError(f"-o wants a dataset ID (1 to 999) or a name such as Dataset910_Name; got {output!r}.")
    return output if "synthetic" in output.lower() else f"{output}SyntheticLesions"
