"""Evaluation of one or two methods: which files belong together, the work on all cases, and the aggregates."""

from __future__ import annotations

import csv
import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from zept_nnunet.errors import ZePTError
from zept_nnunet.evaluation.calibration import count_components, matched_threshold
from zept_nnunet.evaluation.case import CaseResult, CaseTask, Settings, evaluate_case
from zept_nnunet.evaluation.classes import ClassTable, read_class_table
from zept_nnunet.evaluation.ranking import NAN_CODE, NUM_CODES
from zept_nnunet.evaluation.reading import SCORES_SUFFIX, ScoreFile, read_label_map

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class MethodFolders:
    """A method: one folder of predictions a seed, and validation predictions for its thresholds, one a seed or none."""

    predictions: tuple[Path, ...]
    calibration: tuple[Path, ...] = ()


@dataclass
class MethodResult:
    """A method's cases, seed by seed, in one order."""

    table: ClassTable
    seeds: list[list[CaseResult]]
    thresholds: list[dict[str, dict[float, int]]]
    """Per seed: class → rate → code."""
    with_scores: bool
    calibration_scans: list[dict[str, int]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def evaluate_method(
    references: Path,
    method: MethodFolders,
    settings: Settings,
    *,
    reference_dataset_json: Path | None = None,
    unseen: Sequence[str] = (),
    calibration_references: Path | None = None,
    processes: int = 1,
    show_progress: bool = False,
) -> MethodResult:
    """Evaluate every case that has a reference, for every seed.

    Raises:
        ZePTError: the folders do not fit together. What is wrong with single cases is listed in the result instead.
    """
    tables = [read_class_table(folder, reference_dataset_json, unseen) for folder in method.predictions]
    table = tables[0]
    for folder, other in zip(method.predictions, tables, strict=True):
        if [(c.name, c.seen, c.reference_values) for c in other.classes] != [
            (c.name, c.seen, c.reference_values) for c in table.classes
        ]:
            raise ZePTError(
                f"{folder} and {method.predictions[0]} are seeds of one method and hold different classes; evaluate "
                "them apart"
            )
    cases = list_cases(references, table.file_ending)
    scores = [any(folder.glob(f"*{SCORES_SUFFIX}")) for folder in method.predictions]
    if len(set(scores)) > 1:
        missing = method.predictions[scores.index(False)]
        raise ZePTError(f"{missing} holds no *{SCORES_SUFFIX}, and other seeds do; predict it with --save_scores")
    with_scores = scores[0]
    result = MethodResult(table, [], [{} for _ in tables], with_scores)
    _note_files(result, cases, method.predictions)
    if method.calibration:
        if not with_scores:
            raise ZePTError(
                f"thresholds from {method.calibration[0]} act on scores, and {method.predictions[0]} holds no "
                f"*{SCORES_SUFFIX}; predict with --save_scores"
            )
        if calibration_references is None:
            raise ZePTError("--calibration wants the references of its cases: --calibration-references FOLDER")
        for i, (folder, other) in enumerate(zip(method.calibration, tables, strict=True)):
            _check_apart(folder, calibration_references, method.predictions[i], references)
            result.thresholds[i], scans = calibrate(
                folder, calibration_references, other, settings.fp_rates, processes, show_progress
            )
            result.calibration_scans.append(scans)
    tasks = [
        CaseTask(case, references / (case + table.file_ending), folder, other, settings, with_scores, thresholds)
        for folder, other, thresholds in zip(method.predictions, tables, result.thresholds, strict=True)
        for case in cases
    ]
    done = run_parallel(evaluate_case, tasks, processes, "evaluating", show_progress)
    result.seeds = [done[i : i + len(cases)] for i in range(0, len(done), len(cases))]
    for folder, results in zip(method.predictions, result.seeds, strict=True):
        prefix = f"{folder}: " if len(method.predictions) > 1 else ""
        result.problems += [prefix + problem for r in results for problem in r.problems]
    return result


def list_cases(references: Path, file_ending: str) -> list[str]:
    """The names of the reference files, sorted.

    Raises:
        ZePTError: there are none.
    """
    cases = sorted(p.name[: -len(file_ending)] for p in references.glob(f"*{file_ending}"))
    if not cases:
        raise ZePTError(f"{references} holds no reference named CASE{file_ending}; give the folder of label maps")
    return cases


def _note_files(result: MethodResult, cases: Sequence[str], folders: Iterable[Path]) -> None:
    """What is worth knowing before any file is read."""
    table = result.table
    unknown = [c.name for c in table.classes if c.prediction_values is None]
    if unknown:
        result.problems.append(f"the model does not report {unknown}, which {table.source} names: no DSC, NSD, lesions")
    for folder in folders:
        predicted = {p.name[: -len(table.file_ending)] for p in folder.glob(f"*{table.file_ending}")}
        ours = tuple(f"{case}_{kind}_" for case in cases for kind in ("anomaly", "prompt"))
        predicted = {p for p in predicted if not p.startswith(ours)}
        extra = sorted(predicted - set(cases))
        if extra:
            result.notes.append(f"{folder} also holds {len(extra)} files without a reference, such as {extra[0]}")
    if not result.with_scores:
        result.notes.append(
            f"no *{SCORES_SUFFIX} beside the predictions: no AUROC, AUPR, FPR95, FROC (zept predict --save_scores)"
        )


def _check_apart(calibration: Path, calibration_references: Path, predictions: Path, references: Path) -> None:
    if calibration.resolve() == predictions.resolve() or calibration_references.resolve() == references.resolve():
        raise ZePTError(
            f"thresholds are taken from validation cases, never from the test set, and {calibration} with "
            f"{calibration_references} is the test set itself; give validation predictions and their references"
        )


# ---------------------------------------------------------------------------------------------------- thresholds
def calibrate(
    predictions: Path,
    references: Path,
    table: ClassTable,
    rates: Sequence[float],
    processes: int = 1,
    show_progress: bool = False,
) -> tuple[dict[str, dict[float, int]], dict[str, int]]:
    """Thresholds of every tumor class at each rate, and from how many healthy scans.

    Args:
        predictions: holds CASE_scores.npz of validation cases; other files do not matter.
        references: their references, with the values of the test references.

    Raises:
        ZePTError: no scores, a missing or damaged file, or a class without a healthy scan.
    """
    found = FalsePositives(table)
    found.count(predictions, references, processes, show_progress)
    without = [name for name, count in found.scans.items() if not count]
    if without:
        raise ZePTError(
            f"{predictions}: no healthy scan (no tumor in its reference) with scores of {without}, so there is no rate "
            "of false positives to match; add healthy validation cases, or leave --calibration out"
        )
    return {name: {rate: found.threshold(name, rate) for rate in rates} for name in found.scans}, found.scans


class FalsePositives:
    """Components in healthy scans at every threshold, of each tumor class, summed over folders of predictions.

    `scans`: class → how many healthy scans were counted. A scan is healthy where no tumor stands in its reference; with
    `within_hosts`, for a class, where none stands in that class's hosts. Then a type that training never saw counts in
    scans that do not annotate it too: those where it lies unlabeled make its threshold higher, never lower.
    """

    def __init__(self, table: ClassTable, within_hosts: bool = False):
        self.table, self.within_hosts = table, within_hosts
        self.scans = {c.name: 0 for c in table.tumors}
        self._totals = {name: np.zeros(NUM_CODES, dtype=np.int64) for name in self.scans}
        self._lowest = dict.fromkeys(self.scans, 0)

    def count(
        self, predictions: Path, references: Path | None, processes: int = 1, show_progress: bool = False
    ) -> None:
        """Count in the CASE_scores.npz of a folder. `references` None: every scan is healthy.

        Raises:
            ZePTError: there is none, or a file is missing or damaged.
        """
        cases = sorted(p.name[: -len(SCORES_SUFFIX)] for p in predictions.glob(f"*{SCORES_SUFFIX}"))
        if not cases:
            raise ZePTError(f"{predictions} holds no *{SCORES_SUFFIX}; predict the validation cases with --save_scores")
        tasks = [(case, predictions, references, self.table, self.within_hosts) for case in cases]
        for result in run_parallel(_healthy_components, tasks, processes, "calibrating", show_progress):
            for name, (codes, counts, low) in result.items():
                self._totals[name][codes] += counts
                self._lowest[name] = max(self._lowest[name], low)
                self.scans[name] += 1

    def threshold(self, name: str, rate: float) -> int:
        """The code from which at most `rate` false positives a healthy scan stand; see `matched_threshold`."""
        return matched_threshold(self._totals[name], self._lowest[name], self.scans[name], rate)


def _healthy_components(
    task: tuple[str, Path, Path | None, ClassTable, bool],
) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """Class → components at each code, where the case is healthy; nothing where it is not."""
    case, predictions, references, table, within_hosts = task
    scores = ScoreFile(predictions / (case + SCORES_SUFFIX))
    annotated = {c.name for c in table.classes} if references is None else table.annotated_in(case)
    with_tumor, reference = set(), None
    if references is not None:
        path = references / (case + table.file_ending)
        if not path.is_file():
            raise ZePTError(f"{predictions} holds scores of {case}, and its reference {path} is missing")
        reference = read_label_map(path, table.reorients).array
        if scores.shape[1:] != reference.shape:
            raise ZePTError(f"{scores.path}: scores of shape {scores.shape[1:]}, the reference has {reference.shape}")
        values = {v for c in table.tumors if c.name in annotated for v in c.reference_values}
        with_tumor = values & set(np.unique(reference).tolist())
        if with_tumor and not within_hosts:
            return {}
    found = {}
    for name, codes in scores.codes():
        c = table.find(name)
        if c is None or not c.is_tumor or with_tumor & set(c.host_values or ()):
            continue
        if c.name not in annotated and not (within_hosts and not c.seen):  # an unseen type is annotated nowhere
            continue
        if any((plane == NAN_CODE).any() for plane in codes):
            raise ZePTError(f"{scores.path} holds NaN scores of {name!r}; predict this validation case again")
        if table.ignore_value is not None and reference is not None:
            codes[reference == table.ignore_value] = NAN_CODE
        counts, lowest = count_components(codes)
        used = np.flatnonzero(counts)
        found[c.name] = (used, counts[used], lowest)
    return found


# ---------------------------------------------------------------------------------------------------- the rest
def read_strata(path: Path, table: ClassTable, cases: Sequence[str]) -> dict[str, dict[str, frozenset[str]]]:
    """A CSV `case,class,stratum` → class → stratum → cases.

    Raises:
        ZePTError: a column is missing, or a case or class is unknown.
    """
    if not path.is_file():
        raise ZePTError(f"--strata {path} is no file; give a CSV with the columns case,class,stratum")
    found: dict[str, dict[str, set[str]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"case", "class", "stratum"} <= set(reader.fieldnames or ()):
            raise ZePTError(f"{path}: the columns case,class,stratum are wanted; found {reader.fieldnames}")
        for number, row in enumerate(reader, start=2):
            c = table.find(row["class"])
            if c is None or row["case"] not in cases:
                what = f"class {row['class']!r}" if c is None else f"case {row['case']!r}"
                raise ZePTError(f"{path}, line {number}: there is no {what} among the references")
            found.setdefault(c.name, {}).setdefault(row["stratum"], set()).add(row["case"])
    return {name: {s: frozenset(cases) for s, cases in strata.items()} for name, strata in found.items()}


def run_parallel(
    work: Callable[[T], R], tasks: Sequence[T], processes: int, description: str, show_progress: bool
) -> list[R]:
    """The results in the tasks' order, from worker processes where `processes` is above 1."""
    bar = tqdm(total=len(tasks), desc=description, unit="case", disable=not show_progress)
    with bar:
        if processes <= 1:
            results = []
            for task in tasks:
                results.append(work(task))
                bar.update()
            return results
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(work, task) for task in tasks]
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            return [future.result() for future in futures]


def healthy_scans(results: Sequence[CaseResult], tumors: Iterable[str]) -> Mapping[str, int]:
    """How many scans without any tumor each class was evaluated in."""
    return {name: sum(name in r.classes and r.classes[name].healthy for r in results) for name in tumors}
