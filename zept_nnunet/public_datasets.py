"""Label names that only their dataset explains: "cancer" is a lung tumor in MSD Lung, which labels no organ. No torch.

The table is `knowledge/dataset_labels.yaml`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from zept_nnunet.errors import ZePTError
from zept_nnunet.names import normalize_name


@cache
def dataset_labels() -> dict[str, dict[str, str]]:
    """Public datasets → their label names → the descriptions' names."""
    return {name: dict(entry["labels"]) for name, entry in _table().items()}


def label_readings(dataset_json: Mapping[str, Any], source: str = "dataset.json") -> dict[str, str]:
    """Label names, normalized → the names to read them as; empty where the dataset is none of the table.

    The dataset is the one of `zept.dataset`, else the one that dataset.json's `name` names.

    Raises:
        ZePTError: `zept.dataset` names none of the table.
    """
    block = dataset_json.get("zept")
    given = block.get("dataset") if isinstance(block, Mapping) else None
    title = _find(given) if given is not None else _find(dataset_json.get("name"))
    if given is not None and title is None:
        raise ZePTError(
            f"{source}: zept.dataset wants the name of a public dataset whose labels are known, one of "
            f"{', '.join(_table())}; found {given!r}. Correct or remove it"
        )
    labels = dataset_labels()[title] if title is not None else {}
    return {normalize_name(label): name for label, name in labels.items()}


def read_as(name: str, readings: Mapping[str, str]) -> str:
    """What a class name means by `label_readings`; most names mean themselves."""
    return readings.get(normalize_name(name), name)


def _find(name: Any) -> str | None:
    if not isinstance(name, str):
        return None
    wanted = normalize_name(name)
    return next(
        (title for title, entry in _table().items() if wanted in map(normalize_name, (title, *entry["names"]))), None
    )


@cache
def _table() -> dict[str, dict[str, Any]]:
    path = Path(str(resources.files("zept_nnunet") / "knowledge" / "dataset_labels.yaml"))
    content: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content
