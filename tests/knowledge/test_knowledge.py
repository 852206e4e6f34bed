from __future__ import annotations

import json
import pickle
from copy import deepcopy
from typing import Any

import numpy as np
import pytest

from tests.small_plans import DATASET_JSON
from zept_nnunet.errors import ZePTError
from zept_nnunet.knowledge import (
    KnowledgeBank,
    KnowledgeSource,
    QuietVector,
    built_in,
    describe_all,
    describe_organ,
    describe_tumor,
)
from zept_nnunet.knowledge.catalog import catalog
from zept_nnunet.knowledge.texts import describe_abnormal
from zept_nnunet.plans_block import build_block, check_planned_texts
from zept_nnunet.taxonomy import Taxonomy


def bank(**descriptions: str) -> KnowledgeBank:
    return KnowledgeBank.build(describe_all(Taxonomy.from_dataset_json(DATASET_JSON), descriptions), built_in())


class OtherEncoder:
    name, revision, width = "other", "2", 384

    def encode(self, texts: list[str]) -> np.ndarray:
        return np.ones((len(texts), 384), np.float32)


def test_round_trip_through_json_and_pickle_and_quiet_print() -> None:
    built = bank()
    again = KnowledgeBank.from_dict(json.loads(json.dumps(built.to_dict())))
    names = [*built.vectors]
    assert np.array_equal(built.matrix(names), again.matrix(names))
    vector = built.to_dict()["vectors"]["liver"]
    for copy in (vector, deepcopy(vector), pickle.loads(pickle.dumps(vector))):
        assert isinstance(copy, QuietVector) and str({"liver": copy}) == "{'liver': <vector of 384>}"
        assert list(copy) == list(vector)


def test_a_description_replaces_the_built_in_one_by_normalized_name() -> None:
    plain, described = bank(), bank(**{"Liver Tumour": "a hyperdense mass"})
    assert plain.vectors["liver_tumor"] != described.vectors["liver_tumor"]
    assert plain.vectors["liver"] == described.vectors["liver"]


@pytest.mark.parametrize(("name", "text", "word"), [("brain", "soft", "brain"), ("liver", "  ", "empty")])
def test_bad_descriptions_are_refused(name: str, text: str, word: str) -> None:
    with pytest.raises(ZePTError, match=word):
        bank(**{name: text})


def test_a_class_is_added_only_by_the_encoder_of_the_others() -> None:
    added = {"pancreas tumor": describe_tumor("pancreas tumor", ("pancreas",))}
    grown = bank().with_classes(added, built_in())
    assert grown.matrix(["pancreas tumor"]).shape == (1, 384)
    with pytest.raises(ZePTError, match=r"made by sentence-transformers/all-MiniLM-L6-v2.*got other \(revision 2"):
        bank().with_classes(added, KnowledgeSource(encoder=OtherEncoder))
    with pytest.raises(ZePTError, match="no knowledge vector"):
        bank().matrix(["colon"])


# ---------------------------------------------------------------------------------------------------- texts
def labels(*names: str) -> dict[str, Any]:
    return {"labels": {"background": 0, **{n: i + 1 for i, n in enumerate(names)}}}


def test_which_text_describes_a_class() -> None:
    assert describe_tumor("kidney_tumour").text == catalog().entries["kidney tumor"].text
    assert describe_tumor("cancer", ("Liver",)).origin == "built-in (liver tumor)"
    assert describe_tumor("cancer", ("femur_left",)).text == "tumor in the left femur"
    assert describe_tumor("odd_growth", ("liver", "spleen")).text == "odd growth in the liver and the spleen"
    assert describe_tumor("tumor").text == "tumor" and describe_organ("liver", "mine").is_own
    assert describe_abnormal("kidney_l").text == "abnormal tissue in the left kidney, unlike the left kidney around it"


def test_an_organ_is_never_described_as_a_tumor() -> None:
    assert describe_organ("kidney and tumor").origin == "built-in (kidney)"
    assert describe_organ("kidney tumor").origin == "name" and describe_tumor("kidney").origin == "name"
    assert describe_tumor("tumor", ("liver and tumor",)).origin == "built-in (liver tumor)"


def test_two_classes_that_nothing_tells_apart_are_refused() -> None:
    taxonomy = Taxonomy.from_dataset_json(labels("kidney", "renal tumor", "kidney cancer"))
    with pytest.raises(ZePTError, match="'renal tumor' and 'kidney cancer' have the same description"):
        describe_all(taxonomy, {})
    assert len(describe_all(taxonomy, {"kidney cancer": "a solid mass"})) == 3
    with pytest.raises(ZePTError, match="'renal tumor' and 'kidney' have the same description"):
        describe_all(taxonomy, {"kidney": "x", "renal tumor": "x", "kidney cancer": "y"})
    with pytest.raises(ZePTError, match="'Kidney_Cancer' twice"):
        describe_all(taxonomy, {"kidney cancer": "y", "Kidney_Cancer": "z"})


def test_the_same_text_in_two_places_is_two_classes() -> None:
    tumors = {"a": {"hosts": ["liver"]}, "b": {"hosts": ["spleen"]}}
    taxonomy = Taxonomy.from_dataset_json(labels("liver", "spleen", "a", "b") | {"zept": {"tumors": tumors}})
    assert len(describe_all(taxonomy, {"a": "dark mass", "b": "dark mass"})) == 4


WHOLE_DATASETS = {  # as their dataset.json has them
    "KiTS23 (regions)": (
        {"background": 0, "kidney": [1, 2, 3], "masses": [2, 3], "tumor": 2},
        {"regions_class_order": [1, 3, 2]},
    ),
    "KiTS23": ({"background": 0, "kidney": 1, "tumor": 2, "cyst": 3}, {}),
    "LiTS": ({"background": 0, "liver": 1, "tumor": 2}, {}),
    "MSD Task03 Liver": ({"background": 0, "liver": 1, "cancer": 2}, {}),
    "MSD Task07 Pancreas": ({"background": 0, "pancreas": 1, "cancer": 2}, {}),
    "MSD Task10 Colon": ({"background": 0, "colon cancer primaries": 1}, {}),
    "metastases": ({"background": 0, "liver": 1, "liver cancer": 2, "metastasis": 3}, {}),
    "lobes": (
        {"background": 0, "lung_upper_lobe_left": 1, "lung_lower_lobe_left": 2, "nodule": 3},
        {"zept": {"tumors": {"nodule": {"hosts": ["lung_upper_lobe_left", "lung_lower_lobe_left"]}}}},
    ),
    "glued": ({"background": 0, "KidneyLeft": 1, "RightKidney": 2, "right kidney tumor": 3}, {}),
}


@pytest.mark.parametrize("name", WHOLE_DATASETS)
@pytest.mark.filterwarnings("ignore:.*the whole body:UserWarning")
def test_whole_datasets_need_no_encoder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object, missing: dict) -> None:
        raise AssertionError(f"no vector for {[*missing]}")

    monkeypatch.setattr(KnowledgeSource, "_checked_encoder", refuse)
    names, more = WHOLE_DATASETS[name]
    block = build_block({"labels": names, **more})
    vectors = [tuple(v) for v in block["knowledge"]["vectors"].values()]
    assert len(set(vectors)) == len(vectors)


# ---------------------------------------------------------------------------------------------------- planned texts
def test_a_description_edited_after_planning_is_refused_and_nothing_is_encoded_for_it() -> None:
    described = {**DATASET_JSON, "zept": {"knowledge": {"liver_tumor": {"like": "HCC"}, "spleen": "a soft organ"}}}
    planned = build_block(described)
    check_planned_texts(planned, described, "plans.json")
    for changed in ("a bright ring", None):
        edited = deepcopy(described)
        if changed is None:
            del edited["zept"]["knowledge"]["spleen"]
        else:
            edited["zept"]["knowledge"]["spleen"] = changed
        with pytest.raises(ZePTError, match=r"descriptions of \['spleen'\].*plan again"):
            check_planned_texts(planned, edited, "plans.json")
    with pytest.raises(ZePTError, match="no built-in description"):
        build_block({**DATASET_JSON, "zept": {"knowledge": {"liver": {"like": "zzz"}}}})
    with pytest.raises(ZePTError, match="must be a description or"):
        build_block({**DATASET_JSON, "zept": {"knowledge": {"liver": {"as": "HCC"}}}})


def test_queries_for_abnormal_tissue_keep_their_names() -> None:
    taken = {"background": 0, "liver": 1, "spleen": 2, "liver tumor": 3, "abnormal spleen": 4}
    with pytest.raises(ZePTError, match="abnormal spleen"):
        build_block({"labels": taken, "zept": {"organs": ["abnormal spleen"]}})
