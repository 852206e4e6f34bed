"""Organ masks that another tool made, as the organ labels of a dataset that has only tumors.

TotalSegmentator's output: one folder a case with a mask a structure (`CASE/liver.nii.gz`), or one multi-label file a
case (`CASE.nii.gz`, its `--ml`). They are a model's, not manual: the merged dataset.json says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from zept_nnunet.datasets.geometry import in_words, on_one_grid, read_header
from zept_nnunet.datasets.raw_folder import read_label_map
from zept_nnunet.errors import ZePTError
from zept_nnunet.names import infer_is_tumor, may_overlap, name_key

TOOL = "TotalSegmentator v2, total"


@cache
def class_map() -> dict[str, int]:
    """Structure → value in TotalSegmentator's multi-label files."""
    text = (resources.files("zept_nnunet.datasets") / "class_maps.yaml").read_text(encoding="utf-8")
    return {name: value for value, name in enumerate(yaml.safe_load(text)[TOOL], start=1)}


def structures_of(name: str) -> list[str]:
    """TotalSegmentator's structures that an organ's name stands for: one, or its sides, lobes or levels; or none."""
    exact = [s for s in class_map() if name_key(s) == name_key(name)]
    return exact or [s for s in class_map() if may_overlap(name, s) and not infer_is_tumor(s)]


@dataclass(frozen=True)
class ModelOrgans:
    """Masks of some structures for every case of a dataset."""

    folder: Path
    names: tuple[str, ...]  # as TotalSegmentator calls them

    @classmethod
    def find(cls, folder: Path, wanted: Sequence[str], cases: Sequence[str]) -> ModelOrgans:
        """Check that every case has its masks.

        Args:
            folder: of TotalSegmentator's output.
            wanted: names of organs, in any spelling; "kidney" is both kidneys, "lung" all lobes.
            cases: identifiers.

        Raises:
            ZePTError: an organ is none of TotalSegmentator's, or a file is missing.
        """
        structures = {w: structures_of(w) for w in wanted}
        unknown = [w for w, names in structures.items() if not names]
        if unknown or not wanted:
            raise ZePTError(
                f"--organs wants structures of {TOOL}; got {unknown or 'none'}. There are: {', '.join(class_map())}"
            )
        found = cls(folder, tuple(dict.fromkeys(n for names in structures.values() for n in names)))
        for case in cases:
            if (folder / f"{case}.nii.gz").is_file():
                continue
            missing = [n for n in found.names if not (folder / case / f"{n}.nii.gz").is_file()]
            if missing:
                raise ZePTError(
                    f"{folder / case / f'{missing[0]}.nii.gz'} is missing, and so is {folder / f'{case}.nii.gz'}: "
                    f"--organs-from wants, for every case, a folder of masks or one multi-label file of {TOOL}"
                )
        return found

    def record(self) -> dict[str, Any]:
        """For dataset.json."""
        return {"tool": TOOL, "made_by": "a model", "folder": str(self.folder), "structures": list(self.names)}

    def files(self, case: str) -> list[Path]:
        """The files that hold a case's masks."""
        multi = self.folder / f"{case}.nii.gz"
        return [multi] if multi.is_file() else [self.folder / case / f"{name}.nii.gz" for name in self.names]

    def check(self, cases: Mapping[str, Mapping[str, Any]]) -> None:
        """Check, by their headers alone, that all masks lie on the grid of their case's label.

        Args:
            cases: case → its training `images` and `label`.

        Raises:
            ZePTError: a mask cannot be read or lies on another grid.
        """
        for case, files in cases.items():
            label = read_header(Path(files["label"]))
            for path in self.files(case):
                mask = read_header(path)
                if label is not None and mask is not None and not on_one_grid(mask, label):
                    raise ZePTError(
                        f"{path} lies on another grid than {files['label']} (voxels, spacing, origin or direction "
                        f"differ): {in_words(mask)}; wanted {in_words(label)}. Make the masks from the dataset's own "
                        "images"
                    )

    def under(self, labels: np.ndarray, case: str, values: Mapping[str, int], reader: Any) -> np.ndarray:
        """Put the organs under what is labeled: a copy of `labels` (*,) whose background voxels hold them.

        Args:
            values: structure → label value.
            reader: nnU-Net's reader of the dataset.

        Raises:
            ZePTError: a mask cannot be read, lies on another grid or holds a value that is no structure.
        """
        result, multi = labels.copy(), self.folder / f"{case}.nii.gz"
        whole = self._read(multi, labels.shape, reader) if multi.is_file() else None
        if whole is not None and (unknown := sorted(set(np.unique(whole).tolist()) - {0, *class_map().values()})):
            raise ZePTError(
                f"{multi} holds the values {unknown}, which are no structures of {TOOL} (1 to {len(class_map())}): "
                "--organs-from wants its multi-label output, not that of another tool or task"
            )
        for name, value in values.items():
            if whole is not None:
                mask = whole == class_map()[name]
            else:
                mask = self._read(self.folder / case / f"{name}.nii.gz", labels.shape, reader) > 0
            result[mask & (result == 0)] = value
        return result

    @staticmethod
    def _read(path: Path, shape: tuple[int, ...], reader: Any) -> np.ndarray:
        array, _ = read_label_map(path, reader)
        if array.shape != shape:
            raise ZePTError(
                f"{path} has {array.shape} voxels, the case's labels {shape}: make the masks on the image's own grid"
            )
        return array
