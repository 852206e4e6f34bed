"""From the official download of a public dataset to a raw dataset of nnU-Net, by a recipe (`recipes.yaml`).

Images that end as dataset.json says, in `.nii.gz`, stay where they are and are referred to by its `"dataset"`; `.nii`,
DICOM and PNG are rewritten. Every label file is read once: a value that the recipe does not know, or a grid that is not
the image's, stops it.
"""

from __future__ import annotations

import csv
import json
import locale
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import yaml
from tqdm import tqdm  # type: ignore[import-untyped]

from zept_nnunet.datasets.geometry import in_words
from zept_nnunet.datasets.model_organs import class_map
from zept_nnunet.datasets.raw_folder import new_dataset, write_dataset_json
from zept_nnunet.errors import ZePTError
from zept_nnunet.names import infer_hosts, infer_is_tumor, organs_named
from zept_nnunet.taxonomy import Taxonomy

KEY = "zept_recipe"
"""Where a prepared dataset.json says where it comes from."""
ENDING = ".nii.gz"
_NIFTI = (".nii.gz", ".nii")
_SOFT = (-50, 250)  # HU: soft tissue with contrast agent, neither fat nor dense bone nor air
_CLEARLY = 0.05  # by how much a larger share of a label must be soft tissue one way than the other
_ABOUT = ("title", "source", "license", "citation", "pitfalls", "tested_on_download")


@cache
def recipes() -> dict[str, dict[str, Any]]:
    """Name → recipe, as `recipes.yaml` has it."""
    text = (resources.files("zept_nnunet.datasets") / "recipes.yaml").read_text(encoding="utf-8")
    content: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return content


def labels_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Class → its value, or its masks' names, in the download; ascending as nnU-Net's labels will be."""
    labels = recipe["labels"]
    return {name: [name] for name in class_map()} if isinstance(labels, str) else dict(labels)


@dataclass
class Case:
    """The files of one case, image first."""

    image: list[Path] = field(default_factory=list)
    label: dict[str, list[Path]] = field(default_factory=dict)  # mask name → files; "" where one file holds all


def expression(pattern: str, case_pattern: str = "[^/]+?") -> re.Pattern[str]:
    """A pattern of `recipes.yaml` as a regular expression for a path in the download."""
    parts = re.split(r"(\*\*/|\*|\{case\}|\{name\}|\{\w+:[^}]*\})", pattern)
    known = {"**/": "(?:[^/]+/)*", "*": "[^/]*", "{case}": f"(?P<case>{case_pattern})", "{name}": "(?P<name>[^/]+)"}
    written = []
    for part in parts:
        choice = re.fullmatch(r"\{(\w+):([^}]*)\}", part)
        written.append(f"(?:{choice[2]})" if choice else known.get(part, re.escape(part)))
    return re.compile("".join(written))


def shown(pattern: str, case: str, name: str = "…") -> str:
    """What a file of a pattern would be called."""
    text = pattern.replace("**/", "").replace("{case}", case).replace("{name}", name)
    return re.sub(r"\{\w+:([^}|]*)[^}]*\}", r"\1", text)


def expected_cases(recipe: Mapping[str, Any]) -> list[str]:
    """The identifiers that a complete download holds; none where the recipe does not say."""
    cases = recipe.get("cases")
    if cases is None:
        return []
    ranges = cases.get("ranges") or [[cases["first"], cases["last"]]]
    return [cases["format"].format(n) for first, last in ranges for n in range(first, last + 1)]


def listed_cases(source: Path, recipe: Mapping[str, Any], relative: Mapping[Path, str]) -> list[str]:
    """The identifiers that a file of the download lists; none where the recipe names no such file.

    Args:
        relative: the download's files → their paths in it.

    Raises:
        ZePTError: the file is missing, or is another.
    """
    pattern = recipe.get("listed_in")
    if pattern is None:
        return []
    regex = expression(pattern)
    path = next((p for p, name in relative.items() if regex.fullmatch(name)), None)
    if path is None:
        raise ZePTError(
            f"{source}: {shown(pattern, '')} is missing, which lists the cases. Download it, or go on with what is "
            "there: --partial"
        )
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                names = [row["image_id"] for row in csv.DictReader(file, delimiter=";")]
            else:
                content = json.load(file)
                entries = [entry for part in ("training", "validation") for entry in content.get(part, [])]
                names = [Path(entry["image"]).name.removesuffix(ENDING) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ZePTError(f"{path} does not list the cases as the official download's does ({error!r})") from error
    return sorted(name for name in names if re.fullmatch(recipe["case_pattern"], name))


def find_cases(source: Path, recipe: Mapping[str, Any], partial: bool = False) -> dict[str, Case]:
    """Every case of a download. What is left out is printed.

    Args:
        partial: a part of the download will do; cases that lack a file are left out.

    Raises:
        ZePTError: nothing of it is there, a file is there twice, or one is missing; names the first such one.
    """
    relative = _files(source)
    found = _match(recipe["image"], recipe["label"], recipe, relative)
    wanted = expected_cases(recipe)
    others = sorted(set(found) - set(wanted)) if wanted else []
    found = {case: files for case, files in sorted(found.items()) if case not in others}
    images = sum(bool(files.image) for files in found.values())
    if not images:
        first = wanted[0] if wanted else "CASE"
        raise ZePTError(
            f"{source} holds no {shown(recipe['image'], first)}: that is not the layout of the official download "
            f"({recipe['source']})"
        )
    if others:  # withdrawn ones, of which the label archive knows nothing
        print(f"{len(others)} cases that are not the dataset's are left out: {listed(others)}")
    if not partial:
        wanted = wanted or listed_cases(source, recipe, relative)
        for case in wanted:
            if case not in found or not found[case].image:
                raise ZePTError(
                    f"{source}: {shown(recipe['image'], case)} is missing (found {images} of {len(wanted)} images). "
                    "Download the rest, or go on with what is there: --partial"
                )
    kept, unlabeled, lacking = {}, [], []
    for case, its in found.items():
        missing = _missing(recipe, case, its)
        if not missing:
            _refuse_copies(its)
            kept[case] = its
        elif not its.label and recipe.get("images_without_label") == "skip":
            unlabeled.append(case)
        elif partial:
            lacking.append(case)
        else:
            raise ZePTError(f"{source}: {missing}")
    for left_out, why in ((unlabeled, "images have no label"), (lacking, "cases lack a file")):
        if left_out:
            print(f"{len(left_out)} {why} and are left out: {listed(left_out)}")
    if not kept:
        case, its = next(iter(found.items()))
        raise ZePTError(f"{source}: {_missing(recipe, case, its)}; no case is whole")
    return kept


def _files(source: Path) -> dict[Path, str]:
    """The download's files → their paths in it; not those that systems hide."""
    files = sorted(p for p in source.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {p: p.relative_to(source).as_posix() for p in files}


def _missing(recipe: Mapping[str, Any], case: str, its: Case) -> str:
    """Which file a case lacks, to say; empty where it is whole."""
    if not its.image:
        return f"{shown(recipe['image'], case)} is missing, whose label is there"
    if not its.label:
        return f"{shown(recipe['label'], case)} is missing, whose image is there"
    if "" in its.label:
        return ""
    masks = labels_of(recipe)
    for label in recipe.get("required", masks):
        if not any(fnmatchcase(name, pattern) for name in its.label for pattern in masks[label]):
            return f"{shown(recipe['label'], case, masks[label][0])} is missing"
    return ""


def _refuse_copies(its: Case) -> None:
    for paths in (its.image, *its.label.values()):
        first = paths[0]
        copy = next((p for p in paths[1:] if p.parent != first.parent or p.name.endswith(_NIFTI)), None)
        if copy is not None:
            raise ZePTError(f"{first} and {copy}: the case is there twice; move one of them out of the folder")


def listed(names: Sequence[str]) -> str:
    """The first of them, to read."""
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")


def _match(image: str, label: str | None, recipe: Mapping[str, Any], relative: Mapping[Path, str]) -> dict[str, Case]:
    case_pattern = recipe.get("case_pattern", "[^/]+?")
    found: dict[str, Case] = {}
    expressions = [(expression(p, case_pattern), p) for p in (image, label) if p]
    for path, name in relative.items():
        for index, (regex, _) in enumerate(expressions):
            match = regex.fullmatch(name)
            if match is None:
                continue
            case = found.setdefault(match["case"], Case())
            if index == 0:
                case.image.append(path)
            else:
                case.label.setdefault(match.groupdict().get("name") or "", []).append(path)
            break
    return found


def prepare(
    name: str, source: Path, target: Path, tumor: str | None = None, partial: bool = False, host: str | None = None
) -> int:
    """Write the raw dataset; returns the number of training cases.

    Args:
        name: of a recipe.
        source: the folder of the download.
        target: folder of the new dataset, which does not exist.
        tumor: of "one-tumor", the name of its class, a tumor whatever the name.
        partial: a part of the download will do.
        host: of "one-tumor", the organ that the tumor sits in, which need not be labeled; it becomes a part of the
            class's name where it is none, so that `zept merge` finds it among the organs of other datasets.

    Raises:
        ZePTError: as `find_cases`; a label file holds another value than the recipe knows or lies on another grid.
    """
    recipe = dict(recipes()[name])
    if name == "one-tumor":
        tumor = tumor or next(iter(recipe["labels"]))
        if host is not None and not organs_named(tumor, [host]):
            tumor = f"{host} {tumor}"
        recipe |= {"labels": {tumor: 1}, "tumors": [tumor]}
    labels = {"background": 0, **{label: i for i, label in enumerate(labels_of(recipe), start=1)}}
    cases = find_cases(source, recipe, partial)
    with new_dataset(target) as scratch:
        mapping = {
            f"{case}": _write_case(recipe, case, files, scratch, target)
            for case, files in tqdm(cases.items(), desc=target.name, unit="case")
        }
        _write_tests(recipe, source, scratch)
        content = dataset_json(name, recipe, labels, source) | {"numTraining": len(mapping), "dataset": mapping}
        Taxonomy.from_dataset_json(content)
        write_dataset_json(scratch, content)
    return len(mapping)


def dataset_json(name: str, recipe: Mapping[str, Any], labels: Mapping[str, int], source: Path) -> dict[str, Any]:
    """The dataset.json but for its cases."""
    tumors = [n for n in labels if n != "background" and (n in recipe.get("tumors", ()) or infer_is_tumor(n))]
    organs = [n for n in labels if n != "background" and n not in tumors]
    hosts = {n: list(recipe.get("hosts", {}).get(n) or infer_hosts(n, organs)) for n in tumors}
    return {
        "channel_names": {"0": "CT"},
        "labels": dict(labels),
        "file_ending": ENDING,
        "zept": {"organs": organs, "tumors": {n: {"hosts": h} for n, h in hosts.items()}},
        KEY: {"recipe": name, "folder": str(source.resolve()), **{k: recipe[k] for k in _ABOUT}},
    }


# ---------------------------------------------------------------------------------------------------- one case
def _write_case(recipe: Mapping[str, Any], case: str, files: Case, scratch: Path, target: Path) -> dict[str, Any]:
    """Write what must be written of a case; returns its entry in `"dataset"`."""
    reference = read_image(files.image)
    if len(files.image) == 1 and files.image[0].name.endswith(ENDING):
        image = os.path.relpath(files.image[0].resolve(), target)
    else:
        image = f"imagesTr/{case}_0000{ENDING}"
        _write(reference, scratch / image)
    values, keeps = read_labels(recipe, case, files, reference)
    own = files.label.get("", [])
    if keeps and len(own) == 1 and own[0].name.endswith(ENDING):
        return {"images": [image], "label": os.path.relpath(own[0].resolve(), target)}
    label = sitk.GetImageFromArray(values)
    label.CopyInformation(reference)
    _write(label, scratch / f"labelsTr/{case}{ENDING}")
    return {"images": [image], "label": f"labelsTr/{case}{ENDING}"}


def read_labels(recipe: Mapping[str, Any], case: str, files: Case, reference: Any) -> tuple[np.ndarray, bool]:
    """A case's labels as nnU-Net will see them (z, y, x) uint8, and whether the file holds just that.

    Raises:
        ZePTError: an unknown value, another grid, or a mask that is missing.
    """
    labels = labels_of(recipe)
    result = np.zeros(tuple(reversed(reference.GetSize())), np.uint8)
    if "" in files.label:
        path = files.label[""][0]
        paths = _in_image_order(files.label[""], files.image) if _png(path) else files.label[""]
        array = _array(paths, reference, "label_rows" not in recipe)
        if recipe.get("label_rows") == "either":
            array = _rows_as_the_image(array, reference, path)
        table = {0: 0}
        for new, wanted in enumerate(labels.values(), start=1):
            table |= {int(v): new for v in (wanted if isinstance(wanted, list) else [wanted])}
        unknown = sorted(set(np.unique(array).tolist()) - set(table))
        if unknown:
            raise ZePTError(
                f"{path}: the values {unknown} are not those of the recipe, {sorted(table)}. Label values changed "
                "between releases, or this is another dataset"
            )
        for old, new in table.items():
            result[array == old] = new
        changed = any(old != new for old, new in table.items()) or "label_rows" in recipe
        return result, not changed
    places = _places(files.image) if len(files.image) > 1 else {}
    for new, patterns in enumerate(labels.values(), start=1):
        for name, mask in sorted(files.label.items()):
            if any(fnmatchcase(name, p) for p in patterns):
                if places:
                    _check_slices(_places(mask), places)
                result[_array(mask, reference) > 0] = new
    return result, False


def _rows_as_the_image(array: np.ndarray, reference: Any, path: Path) -> np.ndarray:
    """A label (z, y, x) whose file does not say which way its rows run, so that it lies on the image's soft tissue.

    Raises:
        ZePTError: as much of it lies there either way.
    """
    if not array.any():
        return array
    image = sitk.GetArrayViewFromImage(reference)
    soft = (image >= _SOFT[0]) & (image <= _SOFT[1])
    turned = array[:, ::-1]
    shares = [float(soft[label > 0].mean()) for label in (array, turned)]
    if abs(shares[0] - shares[1]) < _CLEARLY:
        raise ZePTError(
            f"{path} does not say which way its rows run, and either way about as much of it lies on soft tissue "
            f"({shares[0]:.2f} of it as stored, {shares[1]:.2f} turned). Look at it on its image; to leave the case "
            "out, move both away and say --partial"
        )
    return array if shares[0] > shares[1] else turned


def _array(paths: Sequence[Path], reference: Any, placed: bool = True) -> np.ndarray:
    """Integer label values (z, y, x), on the image's grid.

    Args:
        placed: the file says where it lies.
    """
    image = read_image(paths)
    array = np.rint(sitk.GetArrayFromImage(image)).astype(np.int64)
    if array.ndim == 4:  # PNG slices with color channels
        array = array.max(-1)
    shape = tuple(reversed(reference.GetSize()))
    if array.shape != shape:
        raise ZePTError(
            f"{paths[0]}{' and the other slices' if len(paths) > 1 else ''}: {array.shape} voxels, but the image has "
            f"{shape}"
        )
    if placed and not _png(paths[0]):
        _check_grid(image, reference, paths[0])
    return array


def _check_grid(label: Any, image: Any, path: Path) -> None:
    """A label lies on its image within half a voxel; headers of one grid differ by rounding.

    Raises:
        ZePTError: it lies elsewhere.
    """
    if not np.allclose(_corners(label), _corners(image), rtol=0, atol=0.5 * min(image.GetSpacing())):
        raise ZePTError(
            f"{path} does not lie on its image: {in_words(label)}; wanted the image's {in_words(image)}. Resample it "
            "to the image, or correct the header that is wrong"
        )


def _corners(image: Any) -> np.ndarray:
    """The first voxel and the last one along each axis, in mm: (4, 3)."""
    axes = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    ends = np.vstack([np.zeros(3), np.diag(np.array(image.GetSize()) - 1)])
    corners: np.ndarray = np.array(image.GetOrigin()) + ends @ axes.T
    return corners


def _check_slices(masks: Mapping[float, Path], images: Mapping[float, Path]) -> None:
    """Every DICOM slice of the one has one of the other at its position.

    Raises:
        ZePTError: it has not; names the slice.
    """
    for these, those in ((images, masks), (masks, images)):
        for place, path in these.items():
            if min(abs(place - other) for other in those) > 0.1:  # mm; slices are farther apart
                folder = next(iter(those.values())).parent
                raise ZePTError(f"{path}: {folder} holds no slice at its position, {place:g} mm. Download it again")


def _png(path: Path) -> bool:
    return path.suffix.lower() == ".png"


def _in_image_order(labels: Sequence[Path], images: Sequence[Path]) -> list[Path]:
    """PNG slices, which hold no position, in the order of the DICOM slices that their names count along with.

    Raises:
        ZePTError: there are more of one than of the other.
    """
    if len(labels) != len(images):
        raise ZePTError(
            f"{labels[0].parent} holds {len(labels)} slices and {images[0].parent} {len(images)}, wanted a label slice "
            "for each image slice; download both again"
        )
    label_of = dict(zip(sorted(images, key=_counted), sorted(labels, key=_counted), strict=True))
    return [label_of[path] for path in _series(images)]


def _counted(path: Path) -> list[tuple[int, str]]:
    """To sort file names by their numbers: "2.png" before "10.png"."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", path.name)]


def read_image(paths: Sequence[Path]) -> Any:
    """A file, or slices: those of one DICOM series by position, others in the order given.

    Raises:
        ZePTError: they cannot be read.
    """
    try:
        with locale_kept():
            if len(paths) == 1:
                return sitk.ReadImage(str(paths[0]))
            reader = sitk.ImageSeriesReader()
            reader.SetFileNames([str(p) for p in (paths if _png(paths[0]) else _series(paths))])
            return reader.Execute()
    except RuntimeError as error:
        raise ZePTError(f"{paths[0]} cannot be read: {str(error).strip().splitlines()[-1]}") from error


@contextmanager
def locale_kept() -> Iterator[None]:
    """SimpleITK's DICOM leaves the process in the locale "C", and Python then takes text files for ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


def _series(paths: Sequence[Path]) -> list[Path]:
    """DICOM slices in the order of their positions, against the slices' normal first: of axial ones the feet."""
    return list(_places(paths).values())


def _places(paths: Sequence[Path]) -> dict[float, Path]:
    """Position along the slices' normal in mm → DICOM slice, ascending. No voxels are read.

    Every file counts, whatever its series is called: anonymization may give each slice a series of its own.

    Raises:
        ZePTError: a file is no DICOM slice, or two lie at one position.
    """
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    found: dict[float, Path] = {}
    for path in paths:
        try:
            with locale_kept():
                reader.SetFileName(str(path))
                reader.ReadImageInformation()
        except RuntimeError as error:
            raise ZePTError(f"{path} is no readable DICOM slice; remove it, or download it again") from error
        normal = np.array(reader.GetDirection()).reshape(3, 3)[:, 2]
        place = round(float(normal @ reader.GetOrigin()), 3)
        if place in found:
            raise ZePTError(f"{found[place]} and {path} lie at one position, {place:g} mm; keep the slices of one scan")
        found[place] = path
    return dict(sorted(found.items()))


def _write(image: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


def _write_tests(recipe: Mapping[str, Any], source: Path, scratch: Path) -> None:
    """imagesTs, and labelsTs where the labels are published: links, or NIfTI where the download has another format."""
    test = recipe.get("test")
    if test is None:
        return
    for case, files in _match(test["image"], test.get("label"), recipe, _files(source)).items():
        if not files.image:
            continue
        _refuse_copies(files)
        _link(files.image, scratch / "imagesTs" / f"{case}_0000{ENDING}")
        if files.label:
            values, keeps = read_labels(recipe, case, files, read_image(files.image))
            path = scratch / "labelsTs" / f"{case}{ENDING}"
            if keeps:
                _link(files.label[""], path)
            else:
                label = sitk.GetImageFromArray(values)
                label.CopyInformation(read_image(files.image))
                _write(label, path)


def _link(files: Sequence[Path], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(files) == 1 and files[0].name.endswith(ENDING):
        path.symlink_to(files[0].resolve())
    else:
        _write(read_image(files), path)


def about(name: str) -> str:
    """What a recipe is, its source, license, classes with their values in the download, and pitfalls, to read."""
    recipe = recipes()[name]
    lines = [f"{name}: {recipe['title']}", f"  source    {recipe['source']}", f"  license   {recipe['license']}"]
    lines += [f"  citation  {' '.join(recipe['citation'].split())}"]
    classes = [
        label if value == [label] else f"{label} = {' or '.join(value) if isinstance(value, list) else value}"
        for label, value in labels_of(recipe).items()
    ]
    lines.append(f"  classes   {', '.join(classes[:16])}{', …' if len(classes) > 16 else ''}")
    lines += [f"  - {pitfall}" for pitfall in recipe["pitfalls"]]
    if not recipe["tested_on_download"]:
        lines.append("  NOT YET RUN on the real download: look at some cases before you train")
    return "\n".join(lines)
