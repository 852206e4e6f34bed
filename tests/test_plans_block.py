from __future__ import annotations

import json
from copy import deepcopy

import pytest

from tests.small_plans import DATASET_JSON
from zept_nnunet.errors import ZePTError
from zept_nnunet.plans_block import add_tumor_to_block, build_block, differences, fingerprint, read_block


def block(variant: str = "zept", **zept: object) -> dict:
    return build_block(deepcopy(DATASET_JSON) | ({"zept": zept} if zept else {}), variant)


def test_round_trip_through_json() -> None:
    made = block()
    read = read_block(json.loads(json.dumps({"zept": made})))
    assert read == made and fingerprint(read) == fingerprint(made) and not differences(read, made)


def test_fingerprint_follows_the_trained_classes_and_nothing_else() -> None:
    base = fingerprint(block())
    assert fingerprint(add_tumor_to_block(block(), "pancreas tumor", ("pancreas",), 6)) == base
    assert fingerprint(block(knowledge={"liver": "another text"})) != base
    assert fingerprint(block("paper")) != base
    assert len(base) == 32


def test_differences_are_named() -> None:
    assert differences(block(), block(knowledge={"liver": "another text"})) == ["knowledge"]
    assert differences(block(), block("paper")) == [
        "decoder",
        "training",
        "set of organs with a query for abnormal tissue",
    ]


def test_unseen_tumors_and_their_descriptions_stay_out_of_training() -> None:
    made = block(
        unseen={"pancreas tumor": {"hosts": ["pancreas"]}}, knowledge={"pancreas tumor": "a mass", "liver": "an organ"}
    )
    assert "pancreas tumor" not in made["knowledge"]["vectors"]


def test_an_added_tumor_is_marked_and_learned_queries_refuse_it() -> None:
    grown = add_tumor_to_block(block(), "pancreas tumor", ("pancreas",), 6, "a mass")
    assert grown["added"]["pancreas tumor"]["unseen"] is True
    with pytest.raises(ZePTError, match="learned one query per class"):
        add_tumor_to_block(block("paper"), "pancreas tumor", ("pancreas",), 6)


def test_queries_for_abnormal_tissue_follow_the_settings() -> None:
    def organs(**settings: object) -> list[str]:
        return list(build_block(deepcopy(DATASET_JSON), settings=settings)["anomalies"].values())

    assert organs() == ["pancreas"]  # liver and spleen have labeled tumors
    assert organs(synthetic_anomalies=False) == []
    assert organs(hiding_probability=0.3) == ["liver", "spleen", "pancreas"]
    assert organs(hiding_probability=0.3, synthetic_anomalies=False) == ["liver", "spleen"]
    with pytest.raises(ZePTError, match="unknown settings \\['hiding'\\]"):
        organs(hiding=True)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda p: p.pop("zept"), "no 'zept' block"),
        (lambda p: p["zept"].update(version=99), "version"),
        (lambda p: p["zept"].pop("decoder"), "decoder"),
        (lambda p: p["zept"]["decoder"].pop("width"), "width"),
        (lambda p: p["zept"]["decoder"].update(widht=64), "widht"),
        (lambda p: p["zept"]["decoder"].update(width=0), "1 or more, got 0"),
        (lambda p: p["zept"]["decoder"].update(queries="copied"), "one of generated, learned, got 'copied'"),
        (lambda p: p["zept"]["decoder"].update(relative="no"), "true or false, got 'no'"),
        (lambda p: p["zept"]["decoder"].update(score="minmax"), "score_range 'patch'"),
        (lambda p: p["zept"]["training"].update(hiding_probability=1.5), "from 0 to 1, got 1.5"),
        (lambda p: p["zept"]["training"].update(unlabeled_host_weight=True), "from 0 to 1, got True"),
        (lambda p: p["zept"]["knowledge"]["vectors"].pop("liver"), "liver"),
        (lambda p: p["zept"]["knowledge"]["vectors"].update(liver=[0.0]), "width"),
    ],
)
def test_broken_plans_are_refused(change: object, word: str) -> None:
    plans = {"zept": block()}
    change(plans)  # type: ignore[operator]
    with pytest.raises(ZePTError, match=word):
        read_block(plans, "plans.json")


@pytest.mark.parametrize(
    "thresholds",
    [{"spleen cyst": {"logit": 0.0}}, {"liver_tumor": {"logit": float("nan")}}, {"liver_tumor": 3.0}, {"liver": {}}],
)
def test_a_threshold_that_no_tumor_can_have_is_refused(thresholds: dict) -> None:
    with pytest.raises(ZePTError, match="a threshold wants a tumor of the model and a number as its 'logit'"):
        read_block({"zept": block() | {"thresholds": thresholds}})


def test_thresholds_do_not_make_another_model() -> None:
    calibrated = block() | {"thresholds": {"liver_tumor": {"logit": -2.0}}}
    assert read_block({"zept": calibrated}) == calibrated
    assert fingerprint(calibrated) == fingerprint(block()) and not differences(calibrated, block())
