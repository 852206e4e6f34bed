from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.inference.model_folder import make_model_folder, read_json
from tests.inference.test_add_tumor import PANCREAS, REGIONS, json_files
from tests.small_plans import DATASET_JSON
from zept_nnunet.cli import main
from zept_nnunet.errors import ZePTError
from zept_nnunet.inference.add_tumor import TumorRequest, add_tumors, declared_requests
from zept_nnunet.inference.calibrate import write_thresholds
from zept_nnunet.inference.remove_tumor import remove_tumors

DECLARED: dict[str, Any] = DATASET_JSON | {
    "zept": {
        "unseen": {"pancreas tumor": {"hosts": ["pancreas"], "label": 6}},
        "knowledge": {"pancreas tumor": "round", "liver": "large"},
    },
    "licence": "x",
}
IGNORE: dict[str, Any] = DATASET_JSON | {"labels": {**DATASET_JSON["labels"], "ignore": 6}}
NULL: dict[str, Any] = DATASET_JSON | {"zept": None}


@pytest.mark.parametrize(
    "dataset_json", [DATASET_JSON, REGIONS, DECLARED, IGNORE, NULL], ids="plain regions zept ignore null".split()
)
@pytest.mark.parametrize("layout", [{"indent": 4}, {"indent": 2, "ensure_ascii": False}, {}])
def test_removing_all_gives_the_trained_model_back_to_the_bit(
    tmp_path: Path, dataset_json: dict[str, Any], layout: dict[str, Any]
) -> None:
    model = make_model_folder(tmp_path, dataset_json, folds=(0,))
    for name in ("plans.json", "dataset.json"):
        for folder in (model, model / "crossval_results_folds_0_1"):
            (folder / name).write_text(json.dumps(read_json(folder / name), **layout), encoding="utf-8")
    first = add_tumors(model, declared_requests(model) if dataset_json is DECLARED else [TumorRequest("liver cyst")])
    second = add_tumors(first.folder, [TumorRequest("spleen lesion", ("spleen",), "dark, with a müde edge")])
    back = remove_tumors(second.folder, [t[0] for t in (*first.tumors, *second.tumors)], tmp_path / "back")
    assert json_files(back.folder) == json_files(model) and back.tumors == ()
    assert len(json_files(model)) == 4
    checkpoint = "fold_0/checkpoint_final.pth"
    assert (back.folder / checkpoint).read_bytes() == (model / checkpoint).read_bytes()


def test_one_of_two_is_removed_as_if_it_had_never_been_added(tmp_path: Path) -> None:
    model = make_model_folder(tmp_path, folds=(0,))
    cyst = TumorRequest("spleen cyst", ("spleen",), "thin wall")
    both = add_tumors(model, [PANCREAS, cyst], tmp_path / "both")
    left = remove_tumors(both.folder, ["Pancreas_Tumour"], tmp_path / "A__nnUNetPlans_plus__3d_fullres")
    alone = add_tumors(model, [cyst])
    assert left.tumors == (("spleen cyst", 6, ("spleen",)),)  # it moves up from 7
    assert json_files(left.folder) == json_files(alone.folder)


def test_the_default_output_is_the_folder_without_plus(tmp_path: Path) -> None:
    model = make_model_folder(tmp_path, folds=(0,))
    plus = add_tumors(model, [PANCREAS]).folder
    before = json_files(model)
    argv = ["remove-tumor", str(plus), "--name", "pancreas tumor"]
    assert main(argv) == 1  # the trained model stands there
    model.rename(tmp_path / "elsewhere")
    assert main(argv) == 0
    assert json_files(model) == before


@pytest.mark.parametrize("is_plus_there", [True, False])
def test_the_default_output_after_two_additions(
    tmp_path: Path, is_plus_there: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named as the trained model was, and not as the one between."""
    model = make_model_folder(tmp_path, folds=(0,))
    plus = add_tumors(model, [PANCREAS]).folder
    both = add_tumors(plus, [TumorRequest("spleen cyst", ("spleen",))]).folder
    before = json_files(model)
    if not is_plus_there:
        plus.rename(tmp_path / "plus")
    argv = ["remove-tumor", str(both), "--name", "pancreas tumor", "--name", "spleen cyst"]
    assert main(argv) == 1
    assert f"the output {model} exists already; the model as it was trained" in capsys.readouterr().err
    model.rename(tmp_path / "elsewhere")
    assert main(argv) == 0
    assert json_files(model) == before


def test_the_default_output_of_plans_whose_own_name_ends_in_plus(tmp_path: Path) -> None:
    made = make_model_folder(tmp_path, folds=(0,), plans_name="Own_plus")
    model = made.rename(made.with_name("ZePTTrainer__Own_plus__3d_fullres"))
    added, before = add_tumors(model, [PANCREAS]).folder, json_files(model)
    model.rename(tmp_path / "elsewhere")
    assert remove_tumors(added, ["pancreas tumor"]).folder == model
    assert json_files(model) == before


def test_copies_that_are_older_than_thresholds(tmp_path: Path) -> None:
    """Cross-validation, then zept calibrate: nnU-Net's copies of plans.json lack its thresholds."""
    model = make_model_folder(tmp_path, folds=(0,))
    write_thresholds(model, {"liver_tumor": {"logit": 1.5}})
    added = add_tumors(model, [PANCREAS])
    write_thresholds(added.folder, {"liver_tumor": {"logit": 1.5}, "pancreas tumor": {"logit": 0.5}})
    back = remove_tumors(added.folder, ["pancreas tumor"], tmp_path / "back")
    assert json_files(back.folder) == json_files(model)


def test_a_2d_model(tmp_path: Path) -> None:
    model = make_model_folder(tmp_path, dimensions=2)
    added = add_tumors(model, [PANCREAS, TumorRequest("spleen cyst", ("spleen",))])
    assert added.folder.name == "ZePTTrainer__nnUNetPlans_plus__2d"
    left = remove_tumors(added.folder, ["pancreas tumor"], tmp_path / "left")
    assert left.tumors == (("spleen cyst", 6, ("spleen",)),)
    back = remove_tumors(left.folder, ["spleen cyst"], tmp_path / "back")
    assert json_files(back.folder) == json_files(model)
    assert (
        sorted(p.name for p in back.folder.glob("fold_*/*.pth"))
        == ["checkpoint_best.pth"] * 2 + ["checkpoint_final.pth"] * 2
    )


def test_regions_keep_their_labels_and_moves_are_told(tmp_path: Path) -> None:
    model = make_model_folder(tmp_path, REGIONS, folds=(0,))
    requests = [TumorRequest("spleen lesion", label=7), TumorRequest("liver cyst", label=9)]
    added = add_tumors(model, requests, tmp_path / "A__Odd__3d_fullres")
    left = remove_tumors(added.folder, ["spleen lesion"])
    assert left.folder.name == "A__Odd_minus__3d_fullres" and left.tumors == (("liver cyst", 9, ("liver",)),)
    assert read_json(left.folder / "dataset.json")["labels"]["ignore"] == 10
    back = remove_tumors(left.folder, ["liver cyst"], tmp_path / "back")  # plans of another name
    assert json_files(back.folder) == json_files(model)
    assert any("ignore label moved from 10 to 4" in note for note in back.notes)
    plain = make_model_folder(tmp_path / "plain", folds=(0,))
    both = add_tumors(plain, [PANCREAS, TumorRequest("spleen cyst")])
    notes = remove_tumors(both.folder, ["pancreas tumor"]).notes
    assert any("'spleen cyst' moved from label 7 to 6" in note for note in notes)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no tumor to remove"),
        (["liver_tumor"], "was trained, and only added tumors can be removed"),
        (["liver"], "was trained"),
        (["odd"], r"'odd' is no class of the model; added are: \['pancreas tumor'\]"),
    ],
)
def test_bad_requests_write_nothing(tmp_path: Path, names: list[str], message: str) -> None:
    plus = add_tumors(make_model_folder(tmp_path, folds=(0,)), [PANCREAS]).folder
    before = sorted(p.name for p in plus.parent.iterdir())
    with pytest.raises(ZePTError, match=message):
        remove_tumors(plus, names, tmp_path / "back")
    assert sorted(p.name for p in plus.parent.iterdir()) == before and not (tmp_path / "back").exists()


def test_a_trained_model_has_nothing_to_remove(tmp_path: Path) -> None:
    with pytest.raises(ZePTError, match="added are: none"):
        remove_tumors(make_model_folder(tmp_path, folds=(0,)), ["liver_tumor"], tmp_path / "back")
