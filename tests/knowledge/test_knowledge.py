from __future__ import annotations

import json
import pickle
from copy import deepcopy

import numpy as np
import pytest

from tests.small_plans import DATASET_JSON
from zept_nnunet.errors import ZePTError
from zept_nnunet.knowledge import KnowledgeBank, PlaceholderEncoder, QuietVector
from zept_nnunet.taxonomy import Taxonomy


def bank(**descriptions: str) -> KnowledgeBank:
    return KnowledgeBank.build(Taxonomy.from_dataset_json(DATASET_JSON), descriptions)


def test_placeholder_is_named_as_such_deterministic_and_of_unit_length() -> None:
    encoder = PlaceholderEncoder()
    assert "placeholder" in encoder.name
    a, b = encoder.encode(["a hypodense tumor", "a hypodense tumor"])
    assert np.array_equal(a, b) and np.linalg.norm(a) == pytest.approx(1, abs=1e-6)
    assert a[:3] == pytest.approx([0.03975, -0.03138, -0.01680], abs=1e-4)  # the same on every machine


def test_placeholder_texts_that_share_words_are_closer() -> None:
    liver, hepatic, spleen = PlaceholderEncoder().encode(["tumor in liver", "cyst in liver", "vessel of spleen"])
    assert liver @ hepatic > liver @ spleen + 0.2


def test_round_trip_through_json_and_pickle_and_quiet_print() -> None:
    built = bank()
    again = KnowledgeBank.from_dict(json.loads(json.dumps(built.to_dict())))
    names = [*built.vectors]
    assert np.array_equal(built.matrix(names), again.matrix(names))
    vector = built.to_dict()["vectors"]["liver"]
    for copy in (vector, deepcopy(vector), pickle.loads(pickle.dumps(vector))):
        assert isinstance(copy, QuietVector) and str({"liver": copy}) == "{'liver': <vector of 384>}"
        assert list(copy) == list(vector)


def test_a_description_replaces_the_generated_text_by_normalized_name() -> None:
    plain, described = bank(), bank(**{"Liver Tumour": "a hyperdense mass"})
    assert plain.vectors["liver_tumor"] != described.vectors["liver_tumor"]
    assert plain.vectors["liver"] == described.vectors["liver"]


@pytest.mark.parametrize(("name", "text", "word"), [("brain", "soft", "brain"), ("liver", "  ", "empty")])
def test_bad_descriptions_are_refused(name: str, text: str, word: str) -> None:
    with pytest.raises(ZePTError, match=word):
        bank(**{name: text})


def test_a_class_is_added_only_by_the_encoder_of_the_others() -> None:
    grown = bank().with_class("pancreas tumor", "a tumor in the pancreas")
    assert grown.matrix(["pancreas tumor"]).shape == (1, 384)

    class Other(PlaceholderEncoder):
        revision = "2"

    with pytest.raises(ZePTError, match="revision 2"):
        bank().with_class("x", "y", Other())
    with pytest.raises(ZePTError, match="no knowledge vector"):
        bank().matrix(["colon"])
