"""What the user says of labels and patients for a merge: a YAML file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from zept_nnunet.errors import ZePTError


@dataclass(frozen=True)
class MergeMap:
    """What the user says of some labels and patients. `labels`: dataset → label → name in the merged dataset, or None
    where it is left out; `patients`: dataset → regular expression whose first group is the patient's name.
    """

    labels: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    patients: Mapping[str, re.Pattern[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> MergeMap:
        """A YAML file: `labels: {101: {kidney_l: left kidney, spleen: null}}` and `patients: {101: "^(p[0-9]+)_"}`.

        Raises:
            ZePTError: it cannot be read or is not of that form.
        """
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise ZePTError(f"{path} cannot be read as YAML: {error}") from error
        if not isinstance(content, dict) or set(content) - {"labels", "patients"}:
            raise ZePTError(f"{path}: wanted the entries 'labels' and 'patients', found {content!r}")
        labels, patients = content.get("labels") or {}, content.get("patients") or {}
        ok = isinstance(labels, dict) and all(
            isinstance(names, dict) and all(n is None or (isinstance(n, str) and n.strip()) for n in names.values())
            for names in labels.values()
        )
        if not ok or not isinstance(patients, dict):
            raise ZePTError(
                f"{path}: 'labels' wants DATASET: {{LABEL: NAME or null}}, 'patients' DATASET: REGULAR EXPRESSION"
            )
        compiled = {}
        for dataset, expression in patients.items():
            try:
                compiled[_id_of(dataset, path)] = re.compile(str(expression))
            except re.error as error:
                raise ZePTError(
                    f"{path}, patients, {dataset}: {expression!r} is no regular expression: {error}"
                ) from error
            if compiled[_id_of(dataset, path)].groups < 1:
                raise ZePTError(f"{path}, patients, {dataset}: {expression!r} has no group (…) that holds the patient")
        return cls({_id_of(d, path): {str(k): v for k, v in names.items()} for d, names in labels.items()}, compiled)


def _id_of(dataset: Any, path: Path) -> str:
    """The three digits of a dataset's ID, from the ID or the whole name."""
    found = re.fullmatch(r"(?:Dataset)?(\d{1,3})(?:_.*)?", str(dataset))
    if found is None:
        raise ZePTError(f"{path}: {dataset!r} is no dataset ID and no name of a dataset")
    return f"{int(found[1]):03d}"
