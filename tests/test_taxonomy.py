"""dataset.json → taxonomy: roles, hosts, channels, and every refusal."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from typing import Any

import pytest
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from zept_nnunet.errors import ZePTError
from zept_nnunet.taxonomy import (
    Organ,
    Taxonomy,
    Tumor,
    Unseen,
    annotated_for,
    annotated_patterns,
    declared_unseen,
)

PLAIN = {"background": 0, "liver": 1, "left kidney": 2, "right kidney": 3, "liver_tumor": 4, "Kidney Cyst": 5}
REGIONS = {"background": 0, "kidney": [1, 2, 3], "masses": [2, 3], "tumor": [2], "spleen": 4}


def dataset(labels: dict[str, Any], zept: Any = None, **more: Any) -> dict[str, Any]:
    """A dataset.json. Regions get an order of the right length."""
    found: dict[str, Any] = {"labels": dict(labels), "channel_names": {"0": "CT"}, **more}
    if any(isinstance(v, list) and len(v) > 1 for v in labels.values()):
        found.setdefault(
            "regions_class_order", list(range(1, sum(n not in ("background", "ignore") for n in labels) + 1))
        )
    return found if zept is None else {**found, "zept": zept}


def read(labels: dict[str, Any], zept: Any = None, **more: Any) -> Taxonomy:
    return Taxonomy.from_dataset_json(dataset(labels, zept, **more))


# --- plain labels ---


def test_plain() -> None:
    taxonomy = read(PLAIN)
    assert taxonomy.organs == (Organ("liver", 1), Organ("left kidney", 2), Organ("right kidney", 3))
    assert taxonomy.tumors == (
        Tumor("liver_tumor", 4, ("liver",)),
        Tumor("Kidney Cyst", 5, ("left kidney", "right kidney")),
    )
    assert taxonomy.channels == (
        (),
        ("liver",),
        ("left kidney",),
        ("right kidney",),
        ("liver_tumor",),
        ("Kidney Cyst",),
    )
    assert taxonomy.host_indices() == ((0,), (1, 2))
    assert taxonomy.channel_indices() == (((), ()), ((0,), ()), ((1,), ()), ((2,), ()), ((), (0,)), ((), (1,)))
    assert not taxonomy.has_regions
    assert taxonomy.ignore_label is None
    assert taxonomy.trained_tumors == taxonomy.tumors


def test_channels_follow_label_values_not_the_order_in_the_file() -> None:
    taxonomy = read({"tumor": 2, "background": 0, "pancreas": 1})
    assert taxonomy.channels == ((), ("pancreas",), ("tumor",))
    assert taxonomy.tumors == (Tumor("tumor", 2, ("pancreas",)),)


def test_a_list_of_one_value_is_a_plain_label_as_in_nnunet() -> None:
    assert read({"background": 0, "liver": [1], "liver tumor": 2}) == read(
        {"background": 0, "liver": 1, "liver tumor": 2}
    )


@pytest.mark.parametrize(
    ("labels", "order"),
    [(PLAIN, None), (REGIONS, [1, 3, 2, 4]), ({**PLAIN, "ignore": 6}, None), ({**REGIONS, "ignore": 5}, [1, 3, 2, 4])],
)
def test_as_many_channels_as_nnunet_has_heads(labels: dict[str, Any], order: list[int] | None) -> None:
    taxonomy = read(labels, regions_class_order=order) if order else read(labels)
    manager = LabelManager(labels, order)
    assert len(taxonomy.channels) == manager.num_segmentation_heads
    assert taxonomy.has_regions == manager.has_regions
    assert taxonomy.ignore_label == manager.ignore_label
    atoms = {c.name: c.label for c in taxonomy.classes}
    if manager.has_regions:
        for names, region in zip(taxonomy.channels, manager.foreground_regions, strict=True):
            assert {atoms[n] for n in names} == set(region if isinstance(region, tuple) else (region,))
    else:
        assert [atoms[n] if n else 0 for (n,) in [names or ("",) for names in taxonomy.channels]] == manager.all_labels


def test_organs_only_and_one_organ() -> None:
    assert read({"background": 0, "liver": 1, "spleen": 2}).tumors == ()
    taxonomy = read({"background": 0, "liver": 1})
    assert taxonomy.organs == (Organ("liver", 1),)
    assert taxonomy.channels == ((), ("liver",))
    assert taxonomy.host_indices() == ()


def test_a_tumor_without_any_organ_has_the_whole_body_as_host_and_says_so() -> None:
    with pytest.warns(UserWarning, match=r"my\.json labels no organ: the whole body .*'colon cancer primaries'"):
        taxonomy = Taxonomy.from_dataset_json(dataset({"background": 0, "colon cancer primaries": 1}), "my.json")
    assert taxonomy.tumors == (Tumor("colon cancer primaries", 1, ()),)
    assert taxonomy.host_indices() == ((),)
    assert "(whole body)" in taxonomy.table()


def test_the_whole_body_as_declared_host_needs_no_warning() -> None:
    labels = {"background": 0, "liver": 1, "lymphoma": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(labels, {"tumors": {"lymphoma": {"hosts": []}}}).tumors == (Tumor("lymphoma", 2, ()),)
        read({"background": 0, "tumor": 1}, {"tumors": {"tumor": {"hosts": []}}})


def test_ignore_label_is_no_class() -> None:
    taxonomy = read({"background": 0, "liver": 1, "tumor": 2, "ignore": 3})
    assert taxonomy.ignore_label == 3
    assert [c.name for c in taxonomy.classes] == ["liver", "tumor"]
    assert len(taxonomy.channels) == 3
    assert "ignore" in taxonomy.table()


# --- regions ---


def test_a_label_is_called_after_the_smallest_region_that_holds_it() -> None:
    taxonomy = read({"background": 0, "liver": [1, 2], "liver tumor": [2]})
    assert taxonomy.organs == (Organ("liver", 1),)
    assert taxonomy.tumors == (Tumor("liver tumor", 2, ("liver",)),)
    assert taxonomy.channels == (("liver", "liver tumor"), ("liver tumor",))
    assert taxonomy.channel_indices() == (((0,), (0,)), ((), (0,)))
    assert taxonomy.has_regions


def test_the_organ_region_around_a_tumor_is_its_host() -> None:
    taxonomy = read(REGIONS)
    assert taxonomy.organs == (Organ("kidney", 1), Organ("spleen", 4))
    assert taxonomy.tumors == (Tumor("tumor", 2, ("kidney",)), Tumor("masses", 3, ("kidney",)))
    assert taxonomy.channels == (("kidney", "tumor", "masses"), ("tumor", "masses"), ("tumor",), ("spleen",))


def test_the_smallest_organ_region_hosts() -> None:
    taxonomy = read({"background": 0, "abdomen": [1, 2, 3, 4], "liver": [2, 3], "lesion": [3], "spleen": [4]})
    assert taxonomy.tumors == (Tumor("lesion", 3, ("liver",)),)


def test_labels_that_share_their_smallest_region_are_numbered() -> None:
    taxonomy = read({"background": 0, "kidneys": [1, 2, 3], "tumor": [3]})
    assert taxonomy.organs == (Organ("kidneys 1", 1), Organ("kidneys 2", 2))
    assert taxonomy.tumors == (Tumor("tumor", 3, ("kidneys 1", "kidneys 2")),)
    declared = read({"background": 0, "kidneys": [1, 2, 3], "x": [3]}, {"tumors": {"x": {"hosts": ["Kidneys"]}}})
    assert declared.tumors == (Tumor("x", 3, ("kidneys 1", "kidneys 2")),)


def test_nested_tumor_regions_without_organ() -> None:
    labels = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]}
    with pytest.warns(UserWarning, match="whole body"):
        taxonomy = read(labels)
    assert [t.name for t in taxonomy.tumors] == ["whole tumor", "tumor core", "enhancing tumor"]
    assert taxonomy.channels[0] == ("whole tumor", "tumor core", "enhancing tumor")


def test_a_region_named_after_organ_and_tumor_is_the_organ() -> None:
    taxonomy = read({"background": 0, "kidney_and_tumor": [1, 2], "tumor": 2})
    assert taxonomy.organs == (Organ("kidney_and_tumor", 1),)
    assert taxonomy.tumors == (Tumor("tumor", 2, ("kidney_and_tumor",)),)


def test_a_declared_tumor_region_makes_all_of_it_tumor() -> None:
    labels = {"background": 0, "brain": [1, 2, 3], "abnormal": [2, 3], "core": [3]}
    taxonomy = read(labels, {"tumors": {"abnormal": {"hosts": ["brain"]}}})
    assert taxonomy.organs == (Organ("brain", 1),)
    assert taxonomy.tumors == (Tumor("abnormal", 2, ("brain",)), Tumor("core", 3, ("brain",)))


# --- the zept block ---


def test_declared_hosts_roles_and_origin() -> None:
    labels = {"background": 0, "liver": 1, "spleen": 2, "thing": 3, "cyst duct": 4}
    taxonomy = read(labels, {"tumors": {"Thing": {"hosts": ["SPLEEN", "liver"]}}, "organs": ["cyst_duct"]})
    assert taxonomy.organs == (Organ("liver", 1), Organ("spleen", 2), Organ("cyst duct", 4))
    assert taxonomy.tumors == (Tumor("thing", 3, ("spleen", "liver")),)
    assert taxonomy.host_indices() == ((1, 0),)
    lines = {line.split()[1]: line for line in taxonomy.table().splitlines()[2:]}
    assert lines["thing"].split() == ["3", "thing", "tumor", "spleen,", "liver", "3", "declared"]
    assert lines["liver"].endswith("inferred")
    assert lines["cyst"].endswith("declared")


def test_a_declared_tumor_without_hosts_is_inferred() -> None:
    taxonomy = read({"background": 0, "liver": 1, "spleen": 2, "liver spot": 3}, {"tumors": {"liver spot": {}}})
    assert taxonomy.tumors == (Tumor("liver spot", 3, ("liver",)),)


def refused(labels: dict[str, Any], zept: Any = None, **more: Any) -> str:
    with pytest.raises(ZePTError) as caught:
        Taxonomy.from_dataset_json(dataset(labels, zept, **more), "raw/my.json")
    assert "raw/my.json" in str(caught.value)
    return str(caught.value)


TWO = {"background": 0, "liver": 1, "spleen": 2, "tumor": 3}


def test_undeterminable_host_names_file_and_remedy() -> None:
    message = refused(TWO)
    assert "'tumor'" in message
    assert "['liver', 'spleen']" in message
    assert '"zept": {"tumors": {"tumor": {"hosts": ["ORGAN"]}}}' in message


def test_an_anatomy_that_is_not_labeled_is_undeterminable() -> None:
    assert "'lung nodule'" in refused({"background": 0, "liver": 1, "lung nodule": 2})


@pytest.mark.parametrize(
    ("zept", "words"),
    [
        ({"tumors": {"tumor": {"hosts": ["livr"]}}}, ["'livr' is no label", "liver", "spleen"]),
        ({"tumors": {"tumor": {"hosts": ["tumor"]}}}, ["'tumor' is a tumor", "liver"]),
        ({"tumors": {"tumor": {"hosts": "liver"}}}, ["list of names", "'liver'"]),
        ({"tumors": {"tumor": {"host": ["liver"]}}}, ["['hosts']", "host"]),
        ({"tumors": {"nodule": {"hosts": ["liver"]}}}, ["'nodule' is no label", "zept.unseen"]),
        ({"tumors": ["tumor"]}, ["zept.tumors must be a dictionary"]),
        ({"tumor": {}}, ["['tumor']", "'tumors'"]),
        (["tumors"], ["'zept' block"]),
    ],
)
def test_a_wrong_tumor_entry(zept: Any, words: list[str]) -> None:
    message = refused(TWO, zept)
    for word in words:
        assert word in message


OK = {"tumors": {"tumor": {"hosts": ["liver"]}}}


@pytest.mark.parametrize(
    ("zept", "words"),
    [
        ({"unseen": {"Tumor": {"hosts": ["liver"]}}}, ["that name is a label", "remove"]),
        ({"unseen": {"cyst": {"hosts": ["kidney"]}}}, ["'kidney' is no label"]),
        ({"unseen": {"cyst": {}}}, ["which organ hosts 'cyst'", '"unseen"']),
        ({"unseen": {"kidney cyst": {}}}, ["which organ hosts 'kidney cyst'"]),
        ({"unseen": {"liver cyst": {"label": 3}}}, ["3 is the value of 'tumor'"]),
        ({"unseen": {"liver cyst": {"label": 4}, "spleen cyst": {"label": 4}}}, ["4 is the value of 'liver cyst'"]),
        ({"unseen": {"liver cyst": {"label": "4"}}}, ["integer above 0"]),
        ({"unseen": {"liver cyst": {"value": 4}}}, ["['hosts', 'label']"]),
        ({"unseen": {"liver cyst": {}, "Liver_Cyst": {}}}, ["twice"]),
        ({"unseen": {"background": {"hosts": ["liver"]}}}, ["name is a label"]),
        ({"organs": ["kidney"]}, ["zept.organs", "'kidney' is no label"]),
        ({"organs": {"liver": 1}}, ["zept.organs must be a list"]),
        ({"organs": ["tumor"]}, ["zept.organs and in zept.tumors"]),
        ({"knowledge": {"kidney": "text"}}, ["zept.knowledge", "'kidney' is no class"]),
        ({"knowledge": {"liver": "  "}}, ["must be a description"]),
        ({"annotated": {"a_*": ["kidney"]}}, ["zept.annotated['a_*']", "'kidney' is no label"]),
        ({"annotated": {"a_*": "liver"}}, ["list of names"]),
    ],
)
def test_a_wrong_block(zept: dict[str, Any], words: list[str]) -> None:
    message = refused(TWO, {**OK, **zept})
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"liver": 1}, ["background"]),
        ({"0": "background", "1": "liver"}, ["background"]),
        ({"background": 1, "liver": 2}, ['"background" must be 0']),
        ({"background": 0}, ["no label besides background"]),
        ({"background": 0, "liver": 1, "Liver": 2}, ["'liver' and 'Liver'"]),
        ({"background": 0, "liver": 1, "tumor": 3}, ["without gaps"]),
        ({"background": 0, "liver": 1, "tumor": 1}, ["without gaps or repeats"]),
        ({"background": 0, "liver": "1"}, ["'liver' must be an integer"]),
        ({"background": 0, "liver": True}, ["'liver' must be an integer"]),
        ({"background": 0, "liver": []}, ["'liver' must be an integer"]),
        ({"background": 0, "liver": 1, "ignore": 3}, ["2; found 3"]),
        ({"background": 0, "liver": [1, 2], "tumor": 2, "ignore": [3, 4]}, ["one integer"]),
        ({"background": 0, "liver": [0, 1]}, ["hold background"]),
        ({"background": 0, "Background": 1}, ["not a name"]),
    ],
)
def test_wrong_labels(labels: dict[str, Any], words: list[str]) -> None:
    message = refused(labels)
    for word in words:
        assert word in message


def test_regions_need_an_order_of_their_length() -> None:
    assert "regions_class_order" in refused(REGIONS, regions_class_order=[1, 2])
    assert "regions_class_order" in refused(REGIONS, regions_class_order=None)


def test_declared_unseen_in_the_order_in_which_they_can_be_added() -> None:
    unseen = {"liver cyst": {}, "renal cyst": {"label": 7}, "Spot": {"hosts": ["Left_Kidney"], "label": 6}}
    assert declared_unseen(dataset(PLAIN, {"unseen": unseen})) == (
        Unseen("Spot", ("left kidney",), 6),
        Unseen("renal cyst", ("left kidney", "right kidney"), 7),
        Unseen("liver cyst", ("liver",), None),
    )
    assert declared_unseen(dataset(PLAIN)) == ()
    assert read(PLAIN, {"unseen": unseen}) == read(PLAIN)  # training does not know them


def test_an_unseen_label_may_be_the_ignore_label_which_moves_up() -> None:
    zept = {"unseen": {"liver cyst": {"label": 6}}}
    (unseen,) = declared_unseen(dataset({**PLAIN, "ignore": 6}, zept))
    assert read({**PLAIN, "ignore": 6}, zept).with_tumor(unseen.name, 6, unseen.hosts).ignore_label == 7


def test_knowledge_may_describe_an_unseen_tumor() -> None:
    zept = {"unseen": {"liver cyst": {}}, "knowledge": {"Liver_Cyst": "a fluid-filled cavity", "liver": "an organ"}}
    assert len(read(PLAIN, zept).tumors) == 2


# --- annotated ---


def test_annotated_patterns_and_cases() -> None:
    patterns = annotated_patterns(
        dataset(
            PLAIN, {"annotated": {"lits_*": ["liver", "Liver Tumor"], "*_03": ["liver_tumor", "liver"], "word_*": []}}
        )
    )
    assert patterns == {
        "lits_*": ("liver", "liver_tumor"),
        "*_03": ("liver_tumor", "liver"),
        "word_*": (),
    }
    assert annotated_for("lits_01", patterns) == ("liver", "liver_tumor")
    assert set(annotated_for("lits_03", patterns) or ()) == {"liver", "liver_tumor"}  # two patterns that agree
    assert annotated_for("word_1", patterns) == ()
    assert annotated_for("kits_1", patterns) is None
    with pytest.raises(ZePTError, match=r"my\.json.*'\*_03', 'word_\*'.*'word_03'.*exclusive"):
        annotated_for("word_03", patterns, "my.json")


def test_a_case_can_label_a_tumor_that_training_never_sees() -> None:
    zept = {"unseen": {"Liver metastasis": {"hosts": ["liver"]}}, "annotated": {"a_*": ["liver", "liver_metastasis"]}}
    assert annotated_patterns(dataset(PLAIN, zept)) == {"a_*": ("liver", "Liver metastasis")}


def test_annotated_region_stands_for_the_classes_called_after_it() -> None:
    assert annotated_patterns(dataset(REGIONS, {"annotated": {"a": ["kidney"], "b": ["kidney", "tumor"]}})) == {
        "a": ("kidney",),
        "b": ("kidney", "tumor"),
    }
    inside = {"background": 0, "kidney": [1, 2, 3], "masses": [2, 3], "tumor": [2], "cyst": [3]}
    assert annotated_patterns(dataset(inside, {"annotated": {"a": ["masses"]}})) == {"a": ("tumor", "cyst")}


# --- a model's taxonomy ---


@pytest.mark.parametrize("labels", [PLAIN, REGIONS, {**PLAIN, "ignore": 6}])
def test_round_trip(labels: dict[str, Any]) -> None:
    taxonomy = read(labels).with_tumor("new tumor", 6 if labels is not REGIONS else 9, ())
    stored = json.loads(json.dumps(taxonomy.to_dict()))
    assert Taxonomy.from_dict(stored) == taxonomy
    assert Taxonomy.from_dict(stored).to_dict() == taxonomy.to_dict()


def test_damaged_plans() -> None:
    stored = read(PLAIN).to_dict()
    for broken in (
        {k: v for k, v in stored.items() if k != "channels"},
        {**stored, "tumors": [{"name": "x", "label": 9, "hosts": ["heart"], "added": False}]},
        {**stored, "channels": [["heart"]]},
    ):
        with pytest.raises(ZePTError, match="taxonomy in the plans"):
            Taxonomy.from_dict(broken)


def test_with_tumor_plain() -> None:
    before = read(PLAIN)
    after = before.with_tumor("spot", before.next_label, ["LEFT_kidney"])
    assert after.tumors[:-1] == before.tumors
    assert after.tumors[-1] == Tumor("spot", 6, ("left kidney",), added=True)
    assert after.channels == (*before.channels, ("spot",))
    assert len(after.channels) - 1 == 6  # argmax paints the label that is the channel's index
    assert after.trained_tumors == before.tumors
    assert after.organs == before.organs
    assert before.next_label == 6
    assert "added" in after.table()


def test_with_tumor_regions() -> None:
    before = read({**REGIONS, "ignore": 5})
    after = before.with_tumor("cyst", 8, ("spleen", "spleen"))
    assert after.tumors[-1] == Tumor("cyst", 8, ("spleen",), added=True)
    assert after.channels == (*before.channels, ("cyst",))
    assert after.channel_indices()[-1] == ((), (2,))
    assert after.ignore_label == 9
    assert before.ignore_label == 5


@pytest.mark.parametrize(
    ("name", "label", "hosts", "words"),
    [
        ("Liver Tumor", 6, ("liver",), "class of that name"),
        ("left_kidney", 6, ("liver",), "class of that name"),
        ("background", 6, ("liver",), "choose one"),
        ("spot", 4, ("liver",), "that is 'liver_tumor'; 6 is free"),
        ("spot", 0, ("liver",), "that is 'background'; 6 is free"),
        ("spot", 7, ("liver",), "the next one is 6"),
        ("spot", 6, ("heart",), r"host \['heart'\]: the model's organs are"),
        ("spot", 6, ("liver_tumor",), "the model's organs are"),
    ],
)
def test_with_tumor_refuses(name: str, label: int, hosts: tuple[str, ...], words: str) -> None:
    with pytest.raises(ZePTError, match=words):
        read(PLAIN).with_tumor(name, label, hosts)


def test_laterality() -> None:
    assert read(PLAIN).is_lateral
    assert not read({"background": 0, "liver": 1, "liver tumor": 2}).is_lateral
    assert read({"background": 0, "kidney": 1, "tumor right": 2}).is_lateral


def test_no_torch() -> None:
    code = "import sys, zept_nnunet.taxonomy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
