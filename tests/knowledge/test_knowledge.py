from __future__ import annotations

import json
import pickle
from copy import deepcopy
from typing import Any

import numpy as np
import pytest

from tests.small_plans import DATASET_JSON
from zept_nnunet.errors import ZePTError
from zept_nnunet.knowledge import KnowledgeBank, KnowledgeSource, QuietVector, built_in, describe, describe_all
from zept_nnunet.knowledge.catalog import catalog
from zept_nnunet.knowledge.texts import describe_abnormal
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
    added = {"pancreas tumor": describe("pancreas tumor", ("pancreas",))}
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
    assert describe("kidney_tumour").text == catalog().entries["kidney tumor"].text
    assert describe("cancer", ("Liver",)).origin == "built-in (liver tumor)"
    assert describe("cancer", ("femur_left",)).text == "tumor in the left femur"
    assert describe("odd_growth", ("liver", "spleen")).text == "odd growth in the liver and the spleen"
    assert describe("tumor").text == "tumor" and describe("liver", (), "mine").is_own
    assert describe_abnormal("kidney_l").text == "abnormal tissue in the left kidney, unlike the left kidney around it"


def test_two_classes_that_nothing_tells_apart_are_refused() -> None:
    taxonomy = Taxonomy.from_dataset_json(labels("kidney", "renal tumor", "kidney cancer"))
    with pytest.raises(ZePTError, match="'renal tumor' and 'kidney cancer' have the same description"):
        describe_all(taxonomy, {})
    assert len(describe_all(taxonomy, {"kidney cancer": "a solid mass"})) == 3


def test_the_same_text_in_two_places_is_two_classes() -> None:
    taxonomy = Taxonomy.from_dataset_json(
        labels("liver", "spleen", "a", "b")
        | {"zept": {"tumors": {"a": {"hosts": ["liver"]}, "b": {"hosts": ["spleen"]}}}}
    )
    assert len(describe_all(taxonomy, {"a": "dark mass", "b": "dark mass"})) == 4
