"""The folds of a merged dataset: nnU-Net's splits_final.json."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from zept_nnunet.datasets.merge import Merge, MergeSource
from zept_nnunet.datasets.same_scan import Ties
from zept_nnunet.errors import ZePTError
from zept_nnunet.files import write_whole

NUM_FOLDS = 5
Splits = list[dict[str, list[str]]]


def make_splits(merge: Merge, same: Mapping[str, str], seed: int = 12345) -> Splits:
    """Five folds: each dataset is spread over all of them, and a patient's scans, and one scan of several datasets,
    stay together. Fewer patients than folds: as many folds as patients. Where every dataset has fewer cases than
    folds, none can be spread over all of them, and the folds are of all cases alike.

    Raises:
        ZePTError: all cases are of one patient, or the map's expression does not fit a case.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # type: ignore[import-untyped]

    names, strata, groups = [], [], []
    for source, case, _ in merge.cases():
        names.append(source.merged_case(case))
        strata.append(source.id)
        groups.append(patient_of(merge, source, case))
    patient = dict(zip(names, groups, strict=True))
    ties = Ties()
    for name, leader in same.items():  # scans that are the same tie their patients together
        ties.tie(patient[name], patient[leader])
    roots = [ties.root(g) for g in groups]
    folds = min(NUM_FOLDS, len(set(roots)))
    if folds < 2:
        raise ZePTError("all cases are of one patient: there is nothing to validate on")
    if max(Counter(strata).values()) < folds:  # scikit-learn wants one stratum that fills the folds
        strata = [""] * len(names)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # a dataset of fewer cases than folds
        return [
            {"train": sorted(names[i] for i in train), "val": sorted(names[i] for i in val)}
            for train, val in splitter.split(names, strata, roots)
        ]


def remarks(merge: Merge, splits: Splits) -> list[str]:
    """What a user should know of these folds; most often nothing."""
    found = []
    small = [s.folder.name for s in merge.sources if len(s.cases) < len(splits)]
    if small:
        found.append(f"{', '.join(small)}: fewer cases than folds, so some folds hold none of them")
    if len(splits) < NUM_FOLDS:
        found.append(
            f"there are {len(splits)} folds, one for each patient: train no others, nnU-Net would split at random"
        )
    return found


def patient_of(merge: Merge, source: MergeSource, case: str) -> str:
    """By the map's expression, or the case itself.

    Raises:
        ZePTError: the expression does not fit the case.
    """
    expression = merge.mapping.patients.get(source.id)
    if expression is None:
        return f"{source.id}/case/{case}"
    found = expression.search(case)
    if found is None:
        raise ZePTError(f"the map's patients[{source.id}] {expression.pattern!r} does not fit the case {case!r}")
    return f"{source.id}/patient/{found[1]}"


def check_splits(folder: Path, splits: Splits) -> None:
    """Refuse other folds than these: models may have been trained with them.

    Args:
        folder: of the merged dataset in nnUNet_preprocessed; it need not be there.
        splits: what this merge would write there.

    Raises:
        ZePTError: the file holds other folds, or cannot be read.
    """
    path = folder / "splits_final.json"
    if not path.is_file():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ZePTError(
            f"{path} cannot be read as JSON ({error}); restore it, or remove it if no model was trained with it"
        ) from error
    if found != splits:
        raise ZePTError(f"{path} holds other folds than this merge makes; remove it if no model was trained with it")


def write_splits(folder: Path, splits: Splits) -> None:
    """splits_final.json, where nnU-Net looks for it: whole or not at all. `folder` as in `check_splits`."""
    write_whole(folder / "splits_final.json", json.dumps(splits, indent=2) + "\n")
