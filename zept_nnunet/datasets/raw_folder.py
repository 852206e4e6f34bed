"""Raw datasets: one appears whole or not at all; label maps with other values."""

from __future__ import annotations

import copy
import gzip
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage  # type: ignore[import-untyped]

from zept_nnunet.errors import ZePTError


@contextmanager
def new_dataset(target: Path) -> Iterator[Path]:
    """A scratch folder beside `target`, which takes its place at the end; after an error nothing is left or lost."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".zept_partial_", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def read_dataset_json(folder: Path) -> dict[str, Any]:
    """The dataset.json of a raw dataset's folder.

    Raises:
        ZePTError: it is missing or no JSON object.
    """
    path = folder / "dataset.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ZePTError(f"{path} cannot be read ({error}); a dataset in nnU-Net's raw format holds one") from error
    if not isinstance(content, dict):
        raise ZePTError(
            f"{path} holds {type(content).__name__} where nnU-Net's format wants an object; restore the file"
        )
    return content


def file_ending_of(dataset_json: Mapping[str, Any], folder: Path) -> str:
    """What the files of a raw dataset end with: ".nii.gz".

    Raises:
        ZePTError: its dataset.json does not say so.
    """
    ending = dataset_json.get("file_ending")
    if not isinstance(ending, str) or not ending:
        raise ZePTError(
            f'{folder / "dataset.json"} wants "file_ending", such as ".nii.gz", as nnU-Net v2 does; found {ending!r}'
        )
    return ending


def training_cases(folder: Path, dataset_json: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Case identifier → its training `images` (list of paths) and `label` (path), as nnU-Net finds them."""
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    found = get_filenames_of_train_images_and_targets(str(folder), copy.deepcopy(dict(dataset_json)))
    return {str(case): found[case] for case in sorted(found)}


def read_label_map(path: Path, reader: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """A label map (*,) as int64, and its properties, by one of nnU-Net's readers.

    Raises:
        ZePTError: the file is missing, cannot be read or ends too early.
    """
    try:
        if path.suffix == ".gz":  # SimpleITK fills up what a file that ends too early lacks, and says nothing
            with gzip.open(path) as content:
                while content.read(1 << 24):
                    pass
        seg, properties = reader.read_seg(str(path))
    except Exception as error:  # each reader raises errors of its own library
        reason = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ZePTError(f"{path} cannot be read ({reason[-1].strip()}); restore the file") from error
    return np.rint(seg[0]).astype(np.int64), properties


def write_dataset_json(folder: Path, content: Mapping[str, Any]) -> None:
    """Write dataset.json into a raw dataset's folder."""
    (folder / "dataset.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def relabeled(values: np.ndarray, table: Mapping[int, int], source: Path) -> np.ndarray:
    """A label map (*,) with other values, uint8, or uint16 where that does not suffice.

    Args:
        values: integers of any type.
        table: old value → new value, every old one.
        source: the dataset.json that says which values there are.

    Raises:
        ZePTError: a value is not in the table.
    """
    whole = np.rint(values).astype(np.int64)
    unknown = sorted(set(np.unique(whole).tolist()) - set(table))
    if unknown:
        raise ZePTError(f"the values {unknown} are no labels of {source}; correct the file")
    lookup = np.zeros(max(table) + 1, dtype=np.uint8 if max(table.values()) < 256 else np.uint16)
    for old, new in table.items():
        lookup[old] = new
    return lookup[whole]


def nearest_hosts(values: np.ndarray, hosts: Mapping[int, Sequence[int]], spacing: Sequence[float]) -> np.ndarray:
    """A copy of a label map (*,) in which each voxel of some tumors holds the label of the nearest of its hosts.

    Where a map shows none of a tumor's hosts, the tumor's voxels hold the first one.

    Args:
        values: integers.
        hosts: label value of a tumor → those of its hosts, one or more.
        spacing: voxel size along each axis of `values`, mm.
    """
    result = values.copy()
    for tumor, labels in hosts.items():
        tumor_voxels, host_voxels = values == tumor, np.isin(values, labels)
        result[tumor_voxels] = labels[0]
        if len(labels) > 1 and tumor_voxels.any() and host_voxels.any():
            indices = ndimage.distance_transform_edt(
                ~host_voxels, sampling=spacing, return_distances=False, return_indices=True
            )
            result[tumor_voxels] = values[tuple(i[tumor_voxels] for i in indices)]
    return result
