"""Which classes there are, what hosts them, and which were unseen."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.small_folders import PLANS, PREDICTION_JSON, RAW_JSON
from zept_nnunet.errors import ZePTError
from zept_nnunet.evaluation.classes import read_class_table


def folder(path: Path, dataset_json: dict[str, Any], plans: dict[str, Any] | None = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "dataset.json").write_text(json.dumps(dataset_json))
    if plans is not None:
        (path / "plans.json").write_text(json.dumps(plans))
    return path


def test_an_added_tumor_is_unseen(tmp_path: Path) -> None:
    table = read_class_table(folder(tmp_path, PREDICTION_JSON, PLANS))
    assert [(c.name, c.is_tumor, c.seen, c.host_values) for c in table.classes] == [
        ("liver", False, True, None),
        ("pancreas", False, True, None),
        ("liver tumor", True, True, (1, 3)),
        ("pancreas tumor", True, False, (2, 4)),
    ]
    assert table.reference_values == table.prediction_values == {0, 1, 2, 3, 4}


def test_the_raw_datasets_declaration_makes_unseen_too(tmp_path: Path) -> None:
    """A supervised baseline has a label for it; it is compared in the same group."""
    raw = folder(tmp_path / "raw", RAW_JSON) / "dataset.json"
    table = read_class_table(folder(tmp_path / "supervised", PREDICTION_JSON), raw)
    assert [c.name for c in table.classes if not c.seen] == ["pancreas tumor"]
    alone = read_class_table(tmp_path / "supervised")
    assert all(c.seen for c in alone.classes)
    named = read_class_table(tmp_path / "supervised", unseen=["Pancreas_Tumor"])
    assert [c.name for c in named.classes if not c.seen] == ["pancreas tumor"]
    with pytest.raises(ZePTError, match="'liver'"):
        read_class_table(tmp_path / "supervised", unseen=["liver"])


def test_values_are_joined_by_name(tmp_path: Path) -> None:
    raw_json = deepcopy(RAW_JSON)
    raw_json["zept"]["unseen"]["pancreas tumor"]["label"] = 9
    raw = folder(tmp_path / "raw", raw_json) / "dataset.json"
    c = read_class_table(folder(tmp_path / "p", PREDICTION_JSON, PLANS), raw).find("pancreas tumor")
    assert c is not None
    assert (c.reference_values, c.prediction_values, c.host_values) == ((9,), (4,), (2, 9))


def test_a_class_that_the_model_does_not_report(tmp_path: Path) -> None:
    c = read_class_table(folder(tmp_path, RAW_JSON)).find("pancreas tumor")
    assert c is not None and c.prediction_values is None and not c.seen and c.reference_values == (4,)


def test_a_class_that_the_references_do_not_know(tmp_path: Path) -> None:
    raw_json = {k: v for k, v in RAW_JSON.items() if k != "zept"}
    raw = folder(tmp_path / "raw", raw_json) / "dataset.json"
    with pytest.raises(ZePTError, match=r"pancreas tumor.*does not name"):
        read_class_table(folder(tmp_path / "p", PREDICTION_JSON, PLANS), raw)


def test_all_tumors_of_a_host_lie_in_the_host(tmp_path: Path) -> None:
    dataset_json = deepcopy(PREDICTION_JSON)
    dataset_json["labels"]["pancreas cyst"] = 5
    table = read_class_table(folder(tmp_path, dataset_json))
    assert [c.host_values for c in table.tumors] == [(1, 3), (2, 4, 5), (2, 4, 5)]


def test_without_an_organ_the_whole_body_is_the_host(tmp_path: Path) -> None:
    dataset_json = {**RAW_JSON, "labels": {"background": 0, "lesion": 1}, "zept": {"tumors": {"lesion": {"hosts": []}}}}
    assert read_class_table(folder(tmp_path, dataset_json)).classes[0].host_values == (0, 1)


def test_regions_are_unions(tmp_path: Path) -> None:
    dataset_json = deepcopy(PREDICTION_JSON)
    dataset_json["labels"]["liver"] = [1, 3]
    dataset_json["regions_class_order"] = [1, 2, 3, 4]
    table = read_class_table(folder(tmp_path, dataset_json))
    liver, tumor = table.find("liver"), table.find("liver tumor")
    assert liver is not None and tumor is not None
    assert liver.reference_values == liver.prediction_values == (1, 3) and not liver.is_tumor
    assert tumor.reference_values == (3,) and tumor.host_values == (1, 3)


def test_an_added_tumor_takes_the_value_of_ignore(tmp_path: Path) -> None:
    raw_json = deepcopy(RAW_JSON)
    raw_json["labels"]["ignore"] = 4
    del raw_json["zept"]["unseen"]["pancreas tumor"]["label"]
    prediction_json = deepcopy(PREDICTION_JSON)
    prediction_json["labels"]["ignore"] = 5
    raw = folder(tmp_path / "raw", raw_json) / "dataset.json"
    table = read_class_table(folder(tmp_path / "p", prediction_json, PLANS), raw)
    c = table.find("pancreas tumor")
    assert c is not None and c.reference_values == (4,) and table.ignore_value == 5


def test_what_a_case_annotates(tmp_path: Path) -> None:
    dataset_json = deepcopy(PREDICTION_JSON)
    dataset_json["zept"]["annotated"] = {"a_*": ["liver", "liver tumor"]}
    table = read_class_table(folder(tmp_path, dataset_json))
    assert table.annotated_in("a_1") == {"liver", "liver tumor"}
    assert len(table.annotated_in("b_1")) == 4


def test_files_that_are_missing_or_unknown(tmp_path: Path) -> None:
    with pytest.raises(ZePTError, match=r"dataset\.json is missing"):
        read_class_table(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(ZePTError, match="no valid JSON"):
        read_class_table(tmp_path)
    with pytest.raises(ZePTError, match="file_ending"):
        read_class_table(folder(tmp_path, {**RAW_JSON, "file_ending": ".png"}))
    with pytest.raises(ZePTError, match="Tiff3DIO"):
        read_class_table(folder(tmp_path, {**RAW_JSON, "overwrite_image_reader_writer": "Tiff3DIO"}))
    assert read_class_table(folder(tmp_path, RAW_JSON, {"image_reader_writer": "NibabelIOWithReorient"})).reorients
