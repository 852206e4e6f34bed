"""Which class of a merge is which: names, hosts, left-out tumors, descriptions and vectors that carry over."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from tests.datasets.test_merge import KIDNEYS, LITS, ORGANS, SHAPE, make, merged, write_image
from zept_nnunet.cli import main
from zept_nnunet.declarations import annotated_patterns
from zept_nnunet.taxonomy import Taxonomy, annotated_for

LIVER = {"background": 0, "liver": 1}


def run(*flags: str, datasets: tuple[str, ...] = ("101", "102")) -> int:
    return main(["merge", "-d", *datasets, "-o", "110", "--no-content-check", *flags])


def with_map(raw: Path, text: str) -> tuple[str, str]:
    path = raw.parent / "map.yaml"
    path.write_text(text)
    return "--map", str(path)


def hosts_of(raw: Path) -> dict[str, tuple[str, ...]]:
    return {t.name: t.hosts for t in Taxonomy.from_dataset_json(merged(raw)[1]).tumors}


def test_a_tumor_that_is_left_out_belongs_to_the_nearest_of_its_hosts(raw: Path) -> None:
    make(raw, "Dataset101_Organs", ORGANS)
    folder = make(raw, "Dataset102_Kidneys", KIDNEYS)
    label = np.zeros(SHAPE, np.uint8)  # left kidney, a tumor beside it, a gap, a tumor beside the right kidney
    label[:, :, 0:2], label[:, :, 2:4], label[:, :, 8:10], label[:, :, 10:12] = 1, 3, 3, 2
    write_image(folder / "labelsTr" / "case0.nii.gz", label)
    assert run(*with_map(raw, "labels: {102: {kidney_tumour: null}}")) == 0
    target, content = merged(raw)
    result = sitk.GetArrayFromImage(sitk.ReadImage(str(target / "labelsTr" / "d102_case0.nii.gz")))
    left, right = content["labels"]["left_kidney"], content["labels"]["right_kidney"]
    assert (result[:, :, 0:4] == left).all() and (result[:, :, 8:12] == right).all() and not result[:, :, 4:8].any()
    assert set(annotated_for("d102_case0", annotated_patterns(content)) or ()) == {"left_kidney", "right_kidney"}


def test_a_number_tells_classes_apart_that_share_a_description(raw: Path) -> None:
    make(raw, "Dataset101_A", {"background": 0, "rib 3": 1})
    make(raw, "Dataset102_B", {"background": 0, "rib 4": 1, "rib_3": 2})
    assert run() == 0
    assert set(merged(raw)[1]["labels"]) == {"background", "rib 3", "rib 4"}


NAMES = {
    "two classes of one name": ("{101: {liver tumor: tumor}, 102: {spleen tumor: tumor}}", "two classes.*'tumor'"),
    "background": ("{101: {liver: background}}", "'background' is not a name for a class"),
    "ignore": ("{101: {liver: Ignore}}", "'Ignore' is not a name for a class"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dry", [True, False])
def test_names_that_no_dataset_could_have_are_refused(raw: Path, name: str, dry: bool, capsys: Any) -> None:
    make(raw, "Dataset101_A", {"background": 0, "liver": 1, "liver tumor": 2}, cases=2)
    make(raw, "Dataset102_B", {"background": 0, "spleen": 1, "spleen tumor": 2}, cases=2)
    text, words = NAMES[name]
    assert run(*with_map(raw, f"labels: {text}"), *(["--dry-run"] if dry else [])) == 1
    assert re.search(words, capsys.readouterr().err)
    assert not list(raw.glob("Dataset110*"))


WHOLE_BODY = {"tumors": {"lesion": {"hosts": []}}}


def test_declared_hosts_of_the_whole_body_stay(raw: Path) -> None:
    make(raw, "Dataset101_A", LIVER)
    make(raw, "Dataset102_B", {"background": 0, "lesion": 1}, zept=WHOLE_BODY)
    assert run() == 0
    assert hosts_of(raw) == {"lesion": ()}


def test_a_tumor_that_names_its_organ_gets_it_where_its_own_dataset_has_none(raw: Path) -> None:
    make(raw, "Dataset101_A", {"background": 0, "liver": 1, "spleen": 2})
    zept = {"tumors": {"hepatic lesion": {"hosts": []}}}
    make(raw, "Dataset102_B", {"background": 0, "hepatic lesion": 1}, zept=zept)
    assert run() == 0
    assert hosts_of(raw) == {"hepatic lesion": ("liver",)}


def test_a_lesion_of_nowhere_in_two_datasets_is_a_conflict_that_a_map_settles(raw: Path, capsys: Any) -> None:
    make(raw, "Dataset101_A", LIVER)
    make(raw, "Dataset102_B", {"background": 0, "lesion": 1}, zept=WHOLE_BODY)
    make(raw, "Dataset103_C", {"background": 0, "lesion": 1}, zept=WHOLE_BODY)
    three = ("101", "102", "103")
    assert run(datasets=three) == 1
    error = capsys.readouterr().err
    assert "'lesion' of Dataset103_C" in error and "--map" in error
    settled = with_map(raw, "labels: {102: {lesion: liver tumor}, 103: {lesion: lesion}}")
    assert run(*settled, datasets=three) == 0
    assert hosts_of(raw) == {"liver tumor": ("liver",), "lesion": ()}


@pytest.mark.filterwarnings("ignore:.*the whole body:UserWarning")
def test_a_generic_tumor_whose_dataset_says_nothing_of_organs_is_a_conflict(raw: Path, capsys: Any) -> None:
    make(raw, "Dataset101_A", LIVER)
    make(raw, "Dataset102_B", {"background": 0, "tumor": 1})
    assert run() == 1
    assert "'tumor' of Dataset102_B" in capsys.readouterr().err
    assert run(*with_map(raw, "labels: {102: {tumor: liver tumor}}")) == 0
    assert hosts_of(raw) == {"liver tumor": ("liver",)}


def test_descriptions_of_unseen_tumors_and_the_vectors_carry_over(raw: Path) -> None:
    unseen = {"spleen tumor": {"hosts": ["spleen"]}}
    zept = {"unseen": unseen, "knowledge": {"Spleen_Tumor": "A dark spot."}, "vectors": "/v/own.safetensors"}
    make(raw, "Dataset101_A", {"background": 0, "liver": 1, "spleen": 2}, zept=zept)
    make(raw, "Dataset102_LiTS", LITS)
    assert run() == 0
    block = merged(raw)[1]["zept"]
    assert block["unseen"] == unseen and block["knowledge"] == {"spleen tumor": "A dark spot."}
    assert block["vectors"] == "/v/own.safetensors"


KNOWLEDGE = {
    "vectors": ({"vectors": "/v/a.safetensors"}, {"vectors": "/v/b.safetensors"}, "different files of vectors"),
    "descriptions": ({"knowledge": {"liver": "Red."}}, {"knowledge": {"Liver": "Brown."}}, "describe 'liver'"),
}


@pytest.mark.parametrize("name", KNOWLEDGE)
def test_knowledge_that_differs_is_refused_before_anything_is_written(raw: Path, name: str, capsys: Any) -> None:
    first, second, words = KNOWLEDGE[name]
    make(raw, "Dataset101_A", LIVER, zept=first)
    make(raw, "Dataset102_B", LITS, zept=second)
    for flags in (["--dry-run"], []):
        assert run(*flags) == 1 and words in capsys.readouterr().err
    assert not list(raw.glob(".zept*")) and not list(raw.glob("Dataset110*"))


def test_an_organ_of_the_dataset_that_is_left_out_leaves_the_models_organ(raw: Path) -> None:
    make(raw, "Dataset101_LiTS", {"background": 0, "liver": 1, "tumor": 2}, cases=5)
    mask = np.zeros(SHAPE, np.uint8)
    mask[:4] = 1
    for i in range(5):
        write_image(raw.parent / "organs" / f"case{i}" / "liver.nii.gz", mask)
    flags = ["--organs-from", str(raw.parent / "organs"), *with_map(raw, "labels: {101: {liver: null}}")]
    assert run(*flags, datasets=("101",)) == 0
    target, content = merged(raw)
    assert content["labels"] == {"background": 0, "liver": 1, "liver tumor": 2}
    assert hosts_of(raw) == {"liver tumor": ("liver",)}
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(target / "labelsTr" / "d101_case0.nii.gz")))
    tumor = np.zeros(SHAPE, bool)
    tumor[2, 2:8, 2:10] = True
    assert np.array_equal(label, np.where(tumor, 2, mask))


SIDES = {
    "kidney tumor": ("kidney tumor", ["kidney_left", "kidney_right"]),
    "lung tumor": (
        "lung tumor",
        [f"lung_{lobe}" for lobe in ("lower_lobe_left", "lower_lobe_right", "middle_lobe_right")]
        + [f"lung_upper_lobe_{side}" for side in ("left", "right")],
    ),
}


@pytest.mark.parametrize("name", SIDES)
def test_organs_of_a_model_are_the_sides_and_lobes_of_the_host(raw: Path, name: str) -> None:
    tumor, structures = SIDES[name]
    make(raw, "Dataset101_T", {"background": 0, tumor: 1}, zept={"tumors": {tumor: {"hosts": []}}})
    for i in range(5):
        for n, structure in enumerate(structures):
            mask = np.zeros(SHAPE, np.uint8)
            mask[n + 2] = 1
            write_image(raw.parent / "organs" / f"case{i}" / f"{structure}.nii.gz", mask)
    assert run("--organs-from", str(raw.parent / "organs"), datasets=("101",)) == 0
    record = merged(raw)[1]["zept_merge"]["sources"]["Dataset101_T"]["organs_from"]
    assert sorted(record["structures"]) == structures
    assert {n: sorted(h) for n, h in hosts_of(raw).items()} == {tumor: structures}


def test_patterns_that_fit_no_case_are_refused_by_name(raw: Path, capsys: Any) -> None:
    make(raw, "Dataset101_A", LIVER, zept={"annotated": {"cse*": ["liver"], "test*": ["liver"]}})
    make(raw, "Dataset102_B", LITS)
    write_image(raw / "Dataset101_A" / "imagesTs" / "test0_0000.nii.gz", np.zeros(SHAPE, np.float32))
    assert run() == 1
    error = capsys.readouterr().err
    assert "'cse*'" in error and "'test*'" not in error and "Dataset101_A" in error


def test_patterns_that_disagree_are_refused_in_the_dry_run(raw: Path, capsys: Any) -> None:
    make(raw, "Dataset101_A", LITS, zept={"annotated": {"case*": ["liver"], "*0": ["liver", "tumor"]}})
    make(raw, "Dataset102_B", LIVER)
    assert run("--dry-run") == 1
    assert "disagree" in capsys.readouterr().err


def test_the_merged_labels_have_no_gap(raw: Path) -> None:
    make(raw, "Dataset101_A", LITS)
    make(raw, "Dataset102_B", KIDNEYS)
    assert run() == 0
    labels = json.loads((merged(raw)[0] / "dataset.json").read_text())["labels"]
    assert sorted(labels.values()) == list(range(len(labels)))
