"""A description that no longer is what a model's vector was made from: refused where it counts, and nowhere else."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

import zept_nnunet.trainers
from tests.inference.model_folder import make_model_folder, read_json
from tests.small_plans import DATASET_JSON, make_plans
from zept_nnunet.errors import ZePTError
from zept_nnunet.inference.add_tumor import TumorRequest, add_tumors
from zept_nnunet.inference.predict import ZePTPredictor
from zept_nnunet.inference.remove_tumor import remove_tumors
from zept_nnunet.knowledge.catalog import catalog
from zept_nnunet.plans_block import build_block, check_own_texts, check_planned_texts, differences, read_block
from zept_nnunet.training.trainer import ZePTTrainer

OWN = {**DATASET_JSON, "zept": {"knowledge": {"liver_tumor": {"like": "HCC"}, "spleen": "a soft organ"}}}
PANCREAS = TumorRequest("pancreas tumor", ("pancreas",), "a dark mass")


@pytest.fixture(autouse=True)
def trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", str(Path(zept_nnunet.trainers.__path__[0])))


def edit(monkeypatch: pytest.MonkeyPatch, entry: str) -> None:
    """As a radiologist or an upgrade edits the package's YAML."""
    monkeypatch.setitem(catalog().entries[entry].sections, "ct", "Edited.")  # type: ignore[arg-type]


def older(block: dict[str, Any]) -> dict[str, Any]:
    """The block as earlier versions wrote it: keys of the user's own texts alone."""
    knowledge = dict(block["knowledge"])
    texts = knowledge.pop("texts")
    own = {n: t["key"] for n, t in texts.items() if t["origin"] == "own" or t["origin"].startswith("like (")}
    return {**block, "knowledge": {**knowledge, "own_texts": own}}


def described(folder: Path, **texts: Any) -> None:
    """Edit a model's dataset.json."""
    content = read_json(folder / "dataset.json")
    zept = content.setdefault("zept", {})
    zept["knowledge"] = {**zept.get("knowledge", {}), **texts}
    zept["knowledge"] = {n: t for n, t in zept["knowledge"].items() if t is not None}
    (folder / "dataset.json").write_text(json.dumps(content))


# ---------------------------------------------------------------------------------------------------- planned
def test_plans_hold_the_key_of_every_text() -> None:
    knowledge = build_block(OWN)["knowledge"]
    assert set(knowledge["texts"]) == set(knowledge["vectors"]) >= {"abnormal pancreas"}
    origins = {name: text["origin"] for name, text in knowledge["texts"].items()}
    assert origins["spleen"] == "own" and origins["liver_tumor"] == "like (hepatocellular carcinoma)"
    assert origins["liver"] == "built-in (liver)" and origins["abnormal pancreas"] == "name"


def test_a_built_in_description_edited_after_planning_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = build_block(OWN)
    check_planned_texts(planned, OWN, "plans.json")
    edit(monkeypatch, "liver")
    edit(monkeypatch, "hepatocellular carcinoma")
    message = (
        r"descriptions of \['liver_tumor'\] in dataset.json and the package's descriptions of \['liver'\] are others "
        r"than plans.json was planned with: plan again \(zept plan -d 7\)"
    )
    with pytest.raises(ZePTError, match=message):
        check_planned_texts(planned, OWN, "plans.json", "zept plan -d 7")


@pytest.mark.parametrize("removed", ["spleen", "liver_tumor"])  # own words, and a {"like": …}
def test_a_description_that_the_user_removed_is_theirs(removed: str) -> None:
    kept = {name: text for name, text in OWN["zept"]["knowledge"].items() if name != removed}
    with pytest.raises(ZePTError, match=rf"^the descriptions of \['{removed}'\] in dataset.json are others"):
        check_planned_texts(build_block(OWN), {**OWN, "zept": {"knowledge": kept}}, "plans.json")


def test_the_trainer_refuses_it_and_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = {**make_plans(), "zept": build_block(DATASET_JSON)}
    monkeypatch.delenv("nnUNet_results", raising=False)
    edit(monkeypatch, "spleen")
    with pytest.raises(ZePTError, match=r"package's descriptions of \['spleen'\].*zept plan -d Dataset999_Small"):
        ZePTTrainer(plans, "3d_fullres", 0, deepcopy(DATASET_JSON), torch.device("cpu"))


def test_plans_by_an_earlier_version_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    new = build_block(OWN)
    old = older(new)
    assert differences(old, new) == []
    read = read_block({"zept": old})
    for block in (old, read):
        check_planned_texts(block, OWN, "plans.json")
        check_own_texts(block, OWN, "model")
    edit(monkeypatch, "liver")  # they do not say what it was
    check_planned_texts(read, OWN, "plans.json")
    changed = {**OWN, "zept": {"knowledge": {**OWN["zept"]["knowledge"], "spleen": "another"}}}
    with pytest.raises(ZePTError, match=r"\['spleen'\] in dataset.json"):
        check_planned_texts(read, changed, "plans.json")
    with pytest.raises(ZePTError, match=r"\['spleen'\] in model/dataset.json"):
        check_own_texts(read, changed, "model")


# ---------------------------------------------------------------------------------------------------- trained
def test_an_upgrade_of_the_package_ends_no_trained_model(monkeypatch: pytest.MonkeyPatch) -> None:
    block = build_block(OWN)
    for entry in ("liver", "spleen tumor", "hepatocellular carcinoma"):
        edit(monkeypatch, entry)
    check_own_texts(block, OWN, "model")


@pytest.mark.parametrize(
    ("texts", "name"),
    [
        ({"spleen": "a hard organ"}, "spleen"),
        ({"liver_tumor": {"like": "FNH"}}, "liver_tumor"),
        ({"liver_tumor": None}, "liver_tumor"),
        ({"liver": "something new"}, "liver"),
    ],
)
def test_an_edit_in_the_models_own_dataset_json_is_refused(texts: dict[str, Any], name: str) -> None:
    block = build_block(OWN)
    given = {n: t for n, t in {**OWN["zept"]["knowledge"], **texts}.items() if t is not None}
    with pytest.raises(ZePTError, match=rf"of \['{name}'\] in model/dataset.json.*plan .* and train again"):
        check_own_texts(block, {**OWN, "zept": {"knowledge": given}}, "model")


def test_the_own_text_of_an_added_tumor(tmp_path: Path) -> None:
    model = make_model_folder(tmp_path, folds=(0,))
    plus = add_tumors(model, [PANCREAS]).folder
    described(plus, **{"pancreas tumor": "a bright ring"})
    message = r"\['pancreas tumor'\].*zept remove-tumor .*_plus__3d_fullres --name 'pancreas tumor', then zept add"
    with pytest.raises(ZePTError, match=message):
        add_tumors(plus, [TumorRequest("spleen cyst")])
    predictor = ZePTPredictor(device=torch.device("cpu"))
    with pytest.raises(ZePTError, match=message):
        predictor.initialize_from_trained_model_folder(str(plus), (0,))
    minus = remove_tumors(plus, ["pancreas tumor"], tmp_path / "minus").folder
    requests = [TumorRequest("pancreas tumor", ("pancreas",), "a bright ring"), TumorRequest("spleen cyst")]
    again = add_tumors(minus, requests, tmp_path / "again").folder
    predictor.initialize_from_trained_model_folder(str(again), (0,))
    described(again, **{"pancreas tumor": "edited again"})
    with pytest.raises(ZePTError, match="remove-tumor"):
        remove_tumors(again, ["spleen cyst"], tmp_path / "no")  # the other one would be left
    remove_tumors(again, ["pancreas tumor"], tmp_path / "yes")


def test_adding_to_a_model_that_the_package_describes_otherwise_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model_folder(tmp_path, folds=(0,))
    edit(monkeypatch, "spleen")
    with pytest.raises(ZePTError, match=r"package's descriptions of \['spleen'\].*--keep-vectors"):
        add_tumors(model, [TumorRequest("pancreas tumor", ("pancreas",))])
    added = add_tumors(model, [TumorRequest("pancreas tumor", ("pancreas",))], keep_vectors=True)
    old, new = (read_json(f / "plans.json")["zept"]["knowledge"]["vectors"] for f in (model, added.folder))
    assert {n: new[n] for n in old} == old
    ZePTPredictor(device=torch.device("cpu")).initialize_from_trained_model_folder(str(added.folder), (0,))


# ---------------------------------------------------------------------------------------------------- shuffled
@pytest.mark.parametrize(
    "names",
    [
        {"liver": 1, "liver_tumor": 2},
        {"liver": 1, "spleen": 2, "liver_tumor": 3},
        {"liver": 1, "spleen": 2, "pancreas": 3, "a": 4, "b": 5},
    ],
)
def test_shuffled_descriptions_leave_none_its_own(names: dict[str, int]) -> None:
    zept: dict[str, Any] = {}
    if "a" in names:  # two tumors of one text in two places: exchanging them would change nothing
        zept = {
            "tumors": {"a": {"hosts": ["liver"]}, "b": {"hosts": ["spleen"]}},
            "knowledge": {"a": {"like": "HCC"}, "b": {"like": "HCC"}},
        }
    dataset_json = {**DATASET_JSON, "labels": {"background": 0, **names}, "zept": zept}
    own, other = (build_block(dataset_json, settings={"descriptions": d})["knowledge"] for d in ("own", "shuffled"))
    assert [n for n, v in own["vectors"].items() if list(v) == list(other["vectors"][n])] == []
    assert set(own["vectors"]) == set(other["vectors"])


def test_vectors_by_name_cannot_be_shuffled(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    names = [*DATASET_JSON["labels"], "abnormal pancreas"]
    rng = np.random.default_rng(0)
    save_file({n: rng.normal(size=8).astype(np.float32) for n in names}, tmp_path / "v.safetensors")
    dataset_json = {**DATASET_JSON, "zept": {"vectors": str(tmp_path / "v.safetensors")}}
    assert build_block(dataset_json)["knowledge"]["texts"] == {}
    with pytest.raises(ZePTError, match="'descriptions: shuffled' exchanges texts"):
        build_block(dataset_json, settings={"descriptions": "shuffled"})
