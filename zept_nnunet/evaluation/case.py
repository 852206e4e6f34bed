"""One case: every metric of every class, and what the aggregates need of it. Runs in a worker process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import ndimage  # type: ignore[import-untyped]

from zept_nnunet.errors import ZePTError
from zept_nnunet.evaluation.classes import ClassTable, EvaluatedClass
from zept_nnunet.evaluation.froc import Candidates, find_candidates
from zept_nnunet.evaluation.lesions import LesionCounts, components, match_lesions
from zept_nnunet.evaluation.overlap import dice, surface_dice
from zept_nnunet.evaluation.ranking import NAN_CODE, NUM_CODES, RANKING_METRICS, decode, dice_at, ranking_metrics
from zept_nnunet.evaluation.reading import (
    SCORES_SUFFIX,
    LabelMap,
    ScoreFile,
    grid_difference,
    present_values,
    read_label_map,
)

SCOPES = ("volume", "host")
_PLANE_VOXELS = 1 << 22  # per slab of a joint histogram


@dataclass(frozen=True)
class Settings:
    """What the user chose."""

    tolerance_mm: float = 3.0
    lesion_iou: float = 0.1
    fp_rates: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class CaseTask:
    """The files of a case, and how to evaluate it."""

    case: str
    reference: Path
    predictions: Path
    table: ClassTable
    settings: Settings
    with_scores: bool
    thresholds: Mapping[str, Mapping[float, int]] = field(default_factory=dict)
    """Class → rate of false positives per healthy scan → code (`ranking.encode`) from which a voxel is positive."""


@dataclass
class ClassResult:
    """One class in one case.

    `values`: (scope, metric) → value; NaN where it is not defined. `lesions`: suffix of the metric → counts.
    `histograms`: scope → codes, and the voxels with each on positives and on negatives.
    """

    holds: bool = False
    """The reference holds the class."""
    healthy: bool = False
    """The reference holds no tumor at all."""
    values: dict[tuple[str, str], float] = field(default_factory=dict)
    lesions: dict[str, LesionCounts] = field(default_factory=dict)
    histograms: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=dict)
    candidates: Candidates | None = None


@dataclass
class CaseResult:
    """All classes that the case annotates, and what went wrong."""

    case: str
    classes: dict[str, ClassResult] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    not_annotated: list[str] = field(default_factory=list)


def evaluate_case(task: CaseTask) -> CaseResult:
    """Evaluate one case. What is wrong with its files becomes a problem with NaN rows, never an exception."""
    result = CaseResult(task.case)
    annotated = task.table.annotated_in(task.case)
    classes = [c for c in task.table.classes if c.name in annotated]
    result.not_annotated = [c.name for c in task.table.classes if c.name not in annotated]
    try:
        reference = read_label_map(task.reference, task.table.reorients)
        _check_values(reference.array, task.table.reference_values, task.reference)
    except ZePTError as error:
        return _nothing(result, classes, task, str(error))
    counts = _counts(reference.array)
    held = {c.name: bool(sum(counts[v] for v in c.reference_values if v < len(counts))) for c in classes}
    healthy = not any(held[c.name] for c in classes if c.is_tumor)
    result.classes = {c.name: ClassResult(held[c.name], healthy) for c in classes}
    try:
        prediction = _read_prediction(task, reference)
    except ZePTError as error:
        return _nothing(result, classes, task, str(error))
    ignore = task.table.ignore_value
    if ignore is not None and ignore < len(counts) and counts[ignore]:
        prediction.array[reference.array == ignore] = 0
    _overlap(result, classes, task, reference, prediction.array)
    del prediction
    if task.with_scores:
        _scores(result, [c for c in classes if c.is_tumor], task, reference)
    for c in classes:
        if not task.table.labels_hosts(task.case, c):
            entry = result.classes[c.name]
            entry.values |= {key: float("nan") for key in entry.values if key[0] == "host"}
            entry.histograms.pop("host", None)
    return result


def metric_names(task: CaseTask, c: EvaluatedClass) -> list[tuple[str, str]]:
    """(scope, metric) of every row that a class has in every case."""
    scopes = SCOPES if c.is_tumor else SCOPES[:1]
    names = [(s, m) for m in ("dsc", "nsd") for s in scopes]
    if c.is_tumor:
        names += [("volume", m) for m in _lesion_names("")]
        if task.with_scores:
            names += _score_names(task)
    return names


def _score_names(task: CaseTask) -> list[tuple[str, str]]:
    names = [(s, m) for m in RANKING_METRICS for s in SCOPES] + [("volume", "max_score")]
    if task.thresholds:
        suffixes = [rate_suffix(rate) for rate in task.settings.fp_rates]
        names += [("volume", m) for suffix in suffixes for m in (f"dsc{suffix}", *_lesion_names(suffix))]
    return names


def _lesion_names(suffix: str) -> list[str]:
    return [f"{m}{suffix}" for m in ("lesion_recall", "lesion_precision", "false_positives")]


def rate_suffix(rate: float) -> str:
    """What follows a metric's name where it is taken at a matched rate of false positives per healthy scan."""
    return f"_at_fp_{rate:g}"


# ---------------------------------------------------------------------------------------------------- files
def _nothing(result: CaseResult, classes: list[EvaluatedClass], task: CaseTask, problem: str) -> CaseResult:
    """NaN in every row of the case."""
    result.problems.append(f"{task.case}: {problem}")
    for c in classes:
        values = result.classes.setdefault(c.name, ClassResult()).values
        values |= dict.fromkeys(metric_names(task, c), float("nan"))
    return result


def _read_prediction(task: CaseTask, reference: LabelMap) -> LabelMap:
    path = task.predictions / (task.case + task.table.file_ending)
    if not path.is_file():
        raise ZePTError(f"the prediction {path} is missing; predict this case")
    prediction = read_label_map(path, task.table.reorients)
    difference = grid_difference(reference, prediction)
    if difference is not None:
        raise ZePTError(f"{path} stands on another grid than {task.reference}: {difference}. Predict the image itself")
    _check_values(prediction.array, task.table.prediction_values, path)
    return prediction


def _check_values(array: np.ndarray, known: frozenset[int], path: Path) -> None:
    unknown = sorted(present_values(array) - known)
    if unknown:
        raise ZePTError(
            f"{path} holds the values {unknown}, which are no class; known: {sorted(known)}. Declare the class in "
            "dataset.json (an unseen one under zept.unseen, with its label), or correct the file"
        )


def _counts(array: np.ndarray) -> np.ndarray:
    size = int(array.max(initial=0)) + 1
    return np.sum([np.bincount(plane.ravel(), minlength=size) for plane in array], axis=0)


def _joint(first: np.ndarray, second: np.ndarray, sizes: tuple[int, int]) -> np.ndarray:
    """How often each pair of values occurs: `sizes` int64, counted slab by slab."""
    total = np.zeros(sizes[0] * sizes[1], dtype=np.int64)
    step = max(1, _PLANE_VOXELS // max(1, first[0].size))
    for z in range(0, len(first), step):
        pair = first[z : z + step].astype(np.int64)
        pair *= sizes[1]
        pair += second[z : z + step]
        total += np.bincount(pair.ravel(), minlength=len(total))
    return total.reshape(sizes)


# ---------------------------------------------------------------------------------------------------- segmentations
def _overlap(
    result: CaseResult, classes: list[EvaluatedClass], task: CaseTask, reference: LabelMap, prediction: np.ndarray
) -> None:
    truth = reference.array
    joint = _joint(truth, prediction, (int(truth.max()) + 1, int(prediction.max()) + 1))
    boxes = ndimage.find_objects(truth), ndimage.find_objects(prediction)
    for c in classes:
        entry = result.classes[c.name]
        if c.prediction_values is None:  # the report says once that the model does not know the class
            entry.values |= {n: float("nan") for n in metric_names(task, c) if n not in _score_names(task)}
            continue
        rows, columns = _within(c.reference_values, len(joint)), _within(c.prediction_values, joint.shape[1])
        box = _union([boxes[0][v - 1] for v in rows] + [boxes[1][v - 1] for v in columns])
        ours = theirs = np.zeros((1, 1, 1), dtype=bool)
        if box is not None:
            ours, theirs = np.isin(truth[box], rows), np.isin(prediction[box], columns)
        size = int(joint[rows].sum())
        for scope in SCOPES if c.host_values is not None else SCOPES[:1]:
            host = list(range(len(joint))) if scope == "volume" else _within(c.host_values or (), len(joint))
            predicted = int(joint[host][:, columns].sum())
            entry.values[scope, "dsc"] = dice(int(joint[rows][:, columns].sum()), size, predicted)
            if scope == "host" and predicted < int(joint[:, columns].sum()):
                inside = theirs & np.isin(truth[box or ()], host)
                nsd = surface_dice(ours, inside, reference.spacing_mm, task.settings.tolerance_mm)
            elif scope == "host":
                nsd = entry.values["volume", "nsd"]
            else:
                nsd = surface_dice(ours, theirs, reference.spacing_mm, task.settings.tolerance_mm)
            entry.values[scope, "nsd"] = nsd
        if c.is_tumor:
            _add_lesions(entry, "", match_lesions(ours, theirs, task.settings.lesion_iou))


def _within(values: tuple[int, ...], size: int) -> list[int]:
    return [v for v in values if v < size]


def _union(boxes: list[tuple[slice, ...] | None]) -> tuple[slice, ...] | None:
    there = [b for b in boxes if b is not None]
    if not there:
        return None
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*there, strict=True))


def _add_lesions(entry: ClassResult, suffix: str, counts: LesionCounts) -> None:
    recall, precision, false_positives = _lesion_names(suffix)
    entry.lesions[suffix] = counts
    entry.values["volume", recall] = counts.matched / counts.reference if counts.reference else float("nan")
    entry.values["volume", precision] = counts.matched / counts.predicted if counts.predicted else float("nan")
    entry.values["volume", false_positives] = float(counts.false_positives)


# ---------------------------------------------------------------------------------------------------- scores
def _scores(result: CaseResult, tumors: list[EvaluatedClass], task: CaseTask, reference: LabelMap) -> None:
    missing = {c.name: c for c in tumors}

    def report(problem: str) -> None:
        result.problems.append(f"{task.case}: {problem}")

    path = task.predictions / (task.case + SCORES_SUFFIX)
    try:
        if not path.is_file():
            raise ZePTError(f"{path} is missing, and other cases have scores; predict this case with --save_scores")
        _score_classes(result, missing, task, reference, ScoreFile(path), report)
        if missing:
            report(f"{path} holds no scores of {sorted(missing)}")
    except ZePTError as error:
        report(str(error))
    for name in missing:
        result.classes[name].values |= dict.fromkeys(_score_names(task), float("nan"))


def _score_classes(
    result: CaseResult,
    missing: dict[str, EvaluatedClass],
    task: CaseTask,
    reference: LabelMap,
    scores: ScoreFile,
    report: Callable[[str], None],
) -> None:
    """Evaluate every class of the file; takes those that worked out of `missing`."""
    truth = reference.array
    if scores.shape[1:] != truth.shape:
        raise ZePTError(f"{scores.path}: scores of shape {scores.shape[1:]}, the reference has {truth.shape} (Z, Y, X)")
    for name, codes in scores.codes():
        c = task.table.find(name)
        if c is None or not c.is_tumor:
            report(f"{scores.path} holds scores of {name!r}, which is no tumor of {task.table.source}")
            continue
        if c.name not in missing:
            if c.name in result.classes:
                report(f"{scores.path} holds scores of {c.name!r} twice")
            continue
        if len(c.reference_values) > 1:
            report(f"{scores.path}: a score stands for one label, and {c.name!r} is a region of {c.reference_values}")
            continue
        joint = _joint(truth, codes, (int(truth.max()) + 1, NUM_CODES))
        if joint[:, NAN_CODE].any():
            report(f"{scores.path}: {int(joint[:, NAN_CODE].sum())} scores of {c.name!r} are NaN")
            continue
        _score_class(result.classes[c.name], c, task, reference, codes, joint)
        del missing[c.name]


def _score_class(
    entry: ClassResult, c: EvaluatedClass, task: CaseTask, reference: LabelMap, codes: np.ndarray, joint: np.ndarray
) -> None:
    """`codes` is changed in place."""
    truth, ignore = reference.array, task.table.ignore_value
    own = _within(c.reference_values, len(joint))
    others = [v for v in range(len(joint)) if v not in c.reference_values and v != ignore]
    positives = joint[own].sum(axis=0)
    negatives = {
        "volume": joint[others].sum(axis=0),
        "host": joint[[v for v in others if v in (c.host_values or ())]].sum(axis=0),
    }
    for scope in SCOPES:
        used = np.flatnonzero(positives + negatives[scope])
        entry.histograms[scope] = (used.astype(np.uint16), positives[used], negatives[scope][used])
        metrics = ranking_metrics(positives, negatives[scope])
        entry.values |= {(scope, m): metrics[m] for m in RANKING_METRICS}
    everything = positives + negatives["volume"]
    highest = np.flatnonzero(everything)
    entry.values["volume", "max_score"] = float(decode(highest[-1:])[0]) if len(highest) else float("nan")

    if ignore is not None and ignore < len(joint) and joint[ignore].any():
        codes[truth == ignore] = NAN_CODE
    is_lesion = truth == c.reference_values[0]
    for rate, code in task.thresholds.get(c.name, {}).items():
        suffix = rate_suffix(rate)
        entry.values["volume", f"dsc{suffix}"] = dice_at(positives, negatives["volume"], code)
        _add_lesions(entry, suffix, match_lesions(is_lesion, codes >= code, task.settings.lesion_iou))
    lesions, count = components(is_lesion) if own else (is_lesion, 0)
    entry.candidates = find_candidates(codes, lesions, count, reference.spacing_mm, task.settings.tolerance_mm)
