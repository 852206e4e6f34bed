"""Thresholds of a model's tumors at a stated rate of false positives per healthy scan, kept in its plans.

The network's output is shifted by them (`network/heads.py`), so nnUNetv2_predict and everything else that decodes it
by nnU-Net's rules applies them. Scores (`CASE_scores.npz`) and training do not depend on them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from zept_nnunet.errors import ZePTError
from zept_nnunet.evaluation.classes import read_class_table
from zept_nnunet.evaluation.ranking import decode
from zept_nnunet.evaluation.run import FalsePositives
from zept_nnunet.files import write_whole
from zept_nnunet.inference.model_folder import dump_like, folds, read_json
from zept_nnunet.inference.predict import ZePTPredictor
from zept_nnunet.network.logits import LOGIT_LIMIT
from zept_nnunet.plans_block import read_block

CASES_AT_ONCE = 16
"""Scores of so many cases stand on the disk together."""


@dataclass(frozen=True)
class Threshold:
    """Of one tumor: `logit` from which it is reported, and the healthy scans that it was chosen on.

    Without a healthy scan, the threshold that it had before, if any.
    """

    name: str
    logit: float | None
    scans: int


@dataclass(frozen=True)
class _Part:
    """Cases that one set of folds predicts: case → image files."""

    folds: tuple[int | str, ...]
    cases: Mapping[str, Sequence[str]]
    references: Path | None  # None: all are healthy


def calibrate_model(
    model_folder: str | os.PathLike[str],
    predictor: ZePTPredictor,
    rate: float,
    images: str | os.PathLike[str] | None = None,
    use_folds: Sequence[str] | None = None,
    checkpoint: str = "checkpoint_final.pth",
    processes: tuple[int, int] = (3, 3),
) -> list[Threshold]:
    """Choose a threshold for each tumor, and write them into the folder's plans.json. Nothing is written on an error.

    Args:
        predictor: with `save_scores`.
        rate: false positives (26-connected components, per class) a healthy scan.
        images: a folder of healthy scans in nnU-Net's naming, predicted with all of `use_folds` together; None: the
            training cases, each predicted by the fold that was not trained on it. A case counts for a tumor where no
            tumor is labeled in its hosts.
        use_folds: default: all that are trained.
        processes: for preprocessing and for the export.

    Returns:
        One entry for each tumor. One that no healthy scan could be counted for keeps the threshold that it had.

    Raises:
        ZePTError: no model, a cascade's second stage, no images or damaged ones, no held-out cases, or no healthy scan.
    """
    folder = Path(model_folder)
    plans = read_json(folder / "plans.json")
    block = read_block(plans, str(folder / "plans.json"))
    there = [name.removeprefix("fold_") for name in folds(folder)]
    wanted = list(use_folds) if use_folds is not None else there
    missing = [f for f in wanted if f not in there]
    if missing:
        raise ZePTError(f"{folder} holds the trained folds {there}; -f asks for {missing}")
    numbers = [f if f == "all" else int(f) for f in wanted]
    dataset_json = read_json(folder / "dataset.json")
    if images is not None:
        parts = [_Part(tuple(numbers), _scans(Path(images), dataset_json["file_ending"]), None)]
    else:
        parts = [_held_out(plans, dataset_json, fold) for fold in numbers]
    found = None
    with _scratch(folder) as scratch:
        for part in parts:
            predictor.initialize_from_trained_model_folder(str(folder), part.folds, checkpoint_name=checkpoint)
            predictor.check_scores_available()
            if predictor.configuration_manager.previous_stage_name is not None:
                raise ZePTError(
                    f"{folder} is the second stage of a cascade, which wants the predictions of the first; calibrate a "
                    "3d_fullres, 3d_lowres or 2d model"
                )
            names = list(part.cases)
            for start in range(0, len(names), CASES_AT_ONCE):
                chunk = names[start : start + CASES_AT_ONCE]
                try:
                    predictor.predict_from_files(
                        [list(part.cases[name]) for name in chunk],
                        [str(scratch / name) for name in chunk],
                        num_processes_preprocessing=processes[0],
                        num_processes_segmentation_export=processes[1],
                    )
                except RuntimeError as error:  # a worker of nnU-Net's died; it has printed why
                    raise ZePTError(
                        f"one of {', '.join(chunk)} in {Path(next(iter(part.cases.values()))[0]).parent} could not be "
                        f"predicted ({error}): see above, and repair or remove it. No threshold was changed"
                    ) from error
                for name in ("dataset.json", "plans.json"):
                    shutil.copyfile(folder / name, scratch / name)
                found = found or FalsePositives(read_class_table(scratch), within_hosts=True)
                found.count(scratch, part.references)
                for path in scratch.iterdir():
                    path.unlink()
    if found is None or not any(found.scans.values()):
        raise ZePTError(
            f"{folder}: every held-out training case has a tumor in the hosts of every tumor, so no rate of false "
            "positives can be counted; give healthy scans with -i FOLDER"
        )
    before = block.get("thresholds", {})
    thresholds = [
        Threshold(name, _boundary(found.threshold(name, rate)) if scans else before.get(name, {}).get("logit"), scans)
        for name, scans in found.scans.items()
    ]
    source = "healthy scans given" if images is not None else "held-out training cases"
    entries = {
        t.name: {
            "logit": t.logit,
            "false_positives_per_scan": rate,
            "scans": t.scans,
            "source": source,
            "calibrated_at": date.today().isoformat(),
        }
        for t in thresholds
        if t.scans
    }
    write_thresholds(folder, {**before, **entries})
    return thresholds


def _boundary(code: int) -> float:
    """The logit from which on a score is saved, in float16, as that code or a higher one."""
    codes = np.maximum([code, code - 1, code - 2], 0)
    at, *below = np.nan_to_num(decode(codes), nan=-LOGIT_LIMIT).clip(-LOGIT_LIMIT, LOGIT_LIMIT).tolist()
    return float(at + next((b for b in below if b < at), at)) / 2  # there are two zeros


def write_thresholds(folder: Path, entries: Mapping[str, Mapping[str, Any]] | None) -> None:
    """Put them into plans.json in place of those that stand there; None removes all. One rename: never half-written."""
    path = folder / "plans.json"
    plans = read_json(path)
    block = {key: value for key, value in (plans.get("zept") or {}).items() if key != "thresholds"}
    if entries:
        block["thresholds"] = {name: dict(entry) for name, entry in entries.items()}
    plans["zept"] = block or None
    read_block(plans, str(path))  # without the old ones: a damaged threshold can be removed
    write_whole(path, dump_like(path, plans))


def _scans(folder: Path, file_ending: str) -> dict[str, list[str]]:
    """Case → its channels' files."""
    cases: dict[str, list[str]] = {}
    for path in sorted(folder.glob(f"*_[0-9][0-9][0-9][0-9]{file_ending}")):
        cases.setdefault(path.name[: -len(file_ending) - 5], []).append(str(path))
    if not cases:
        raise ZePTError(
            f"-i {folder} holds no image; healthy scans are wanted in nnU-Net's naming, CASE_0000{file_ending}"
        )
    return cases


def _held_out(plans: Mapping[str, Any], dataset_json: dict[str, Any], fold: int | str) -> _Part:
    """The cases that this fold validates on."""
    name = plans["dataset_name"]
    if fold == "all":
        raise ZePTError("fold 'all' holds no case out, so it has none to calibrate on; give healthy scans, -i FOLDER")
    for variable, path in (("nnUNet_raw", nnUNet_raw), ("nnUNet_preprocessed", nnUNet_preprocessed)):
        if not path.is_set():
            raise ZePTError(f"the environment variable {variable} is not set: export {variable}=FOLDER, or use -i")
    raw, preprocessed = Path(str(nnUNet_raw)) / name, Path(str(nnUNet_preprocessed)) / name
    split = preprocessed / "splits_final.json"
    for path in (split, raw / "dataset.json", preprocessed / "gt_segmentations"):
        if not path.exists():
            raise ZePTError(
                f"{path} is missing: the held-out cases are those of the training on {name}. Calibrate where it was "
                "trained, or on healthy scans (-i FOLDER)"
            )
    splits = load_json(str(split))
    if not isinstance(fold, int) or fold >= len(splits):
        raise ZePTError(f"{split} holds {len(splits)} folds; there is no fold {fold}")
    files = get_filenames_of_train_images_and_targets(str(raw), load_json(str(raw / "dataset.json")))
    cases = {case: files[case]["images"] for case in splits[fold]["val"]}
    return _Part((fold,), cases, preprocessed / "gt_segmentations")


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A hidden folder beside the model: scores of large scans may not fit into the system's temporary folder."""
    with tempfile.TemporaryDirectory(
        dir=folder.resolve().parent, prefix=f".{folder.resolve().name}_calibrate_"
    ) as name:
        yield Path(name)
