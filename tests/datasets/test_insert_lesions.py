"""Synthetic lesions in a dataset of organ labels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from zept_nnunet import cli
from zept_nnunet.datasets.insert_lesions import (
    SUFFIX,
    Insertion,
    insert_lesions,
    nearest_phase,
    paint_into,
    plan_insertions,
    target_name,
)
from zept_nnunet.datasets.lesions import LESION_TYPES
from zept_nnunet.datasets.phantom import SIZES, draw_phantom_case, write_image
from zept_nnunet.datasets.phantom_parameters import TISSUE_HU
from zept_nnunet.errors import ZePTError
from zept_nnunet.taxonomy import declared_unseen

LABELS = {"background": 0, "Liver": 1, "spleen": 2, "left_kidney": 3, "kidney_right": 4}


@pytest.fixture(scope="module")
def organs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One training and one test case of the phantom's anatomy, four organs labeled under other names."""
    folder = tmp_path_factory.mktemp("raw") / "Dataset012_Abdomen"
    for split, index in (("Tr", 0), ("Ts", 1)):
        case = draw_phantom_case(SIZES["tiny"], (), (7, 0, index), phase="portal")
        (folder / f"images{split}").mkdir(parents=True)
        (folder / f"labels{split}").mkdir()
        labels = np.where(case.labels > 4, 0, case.labels).astype(np.uint8)
        write_image(case.image_hu, case.spacing_mm, folder / f"images{split}" / f"case_{index}_0000.nii.gz", "")
        write_image(labels, case.spacing_mm, folder / f"labels{split}" / f"case_{index}.nii.gz", "")
    write_json(folder, {"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": 1, "file_ending": ".nii.gz"})
    return folder


def write_json(folder: Path, content: dict) -> None:
    (folder / "dataset.json").write_text(json.dumps(content))


def read_json(folder: Path) -> dict:
    return json.loads((folder / "dataset.json").read_text())


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_lesions_lie_in_their_hosts_and_everything_says_so(organs: Path, tmp_path: Path) -> None:
    target = insert_lesions(organs, tmp_path / "Dataset912_AbdomenSynthetic", ["spleen tumor", "kidney tumor"], seed=3)
    content = read_json(target)
    assert content["labels"] == {**LABELS, "spleen tumor": 5, "kidney tumor": 6}
    assert content["zept"]["tumors"]["kidney tumor"] == {"hosts": ["left_kidney", "kidney_right"]}
    assert "synthetic lesions" in content["description"]
    for split, case in (("Tr", "case_0"), ("Ts", "case_1")):
        name = case + SUFFIX
        labels, before = (
            read(target / f"labels{split}" / f"{name}.nii.gz"),
            read(organs / f"labels{split}" / f"{case}.nii.gz"),
        )
        image = read(target / f"images{split}" / f"{name}_0000.nii.gz")
        original = read(organs / f"images{split}" / f"{case}_0000.nii.gz")
        assert image.dtype == original.dtype
        for value, hosts in ((5, [2]), (6, [3, 4])):
            assert (labels == value).any()
            assert np.isin(before[labels == value], [0, *hosts]).all()
            assert np.isin(before[labels == value], hosts).mean() > 0.5
            assert np.median(image[labels == value]) < np.median(original[np.isin(before, hosts)]) - 10
        lesion = labels >= 5
        np.testing.assert_array_equal(labels[~lesion], before[~lesion])
        assert (image != original).sum() < 6 * lesion.sum() + 400
        for path in (target / f"images{split}" / f"{name}_0000.nii.gz", target / f"labels{split}" / f"{name}.nii.gz"):
            header = sitk.ReadImage(str(path))
            assert header.GetMetaData("descrip") == "synthetic lesion: spleen tumor, kidney tumor"
        origin = sitk.ReadImage(str(organs / f"labels{split}" / f"{case}.nii.gz")).GetOrigin()
        assert header.GetOrigin() == origin
        records = content["zept_synthetic_lesions"]["cases"][name]
        assert [r["class"] for r in records] == ["spleen tumor", "kidney tumor"]
        for record in records:
            looks = [a for a in LESION_TYPES[record["class"]].appearances if a.kind == record["kind"]]
            assert looks[0].radius_mm.low <= record["radius_mm"] <= looks[0].radius_mm.high


def test_the_same_seed_gives_the_same_bytes(organs: Path, tmp_path: Path) -> None:
    targets = [
        insert_lesions(organs, tmp_path / f"Dataset91{i}_Synthetic", ["liver tumor"], seed=seed)
        for i, seed in enumerate((1, 1, 2))
    ]
    images = [(t / "imagesTr" / f"case_0{SUFFIX}_0000.nii.gz").read_bytes() for t in targets]
    assert images[0] == images[1] != images[2]


def test_test_only_declares_new_types_as_unseen(organs: Path, tmp_path: Path) -> None:
    target = insert_lesions(organs, tmp_path / "Dataset912_Synthetic", ["spleen tumor"], test_only=True, per_case=2)
    content = read_json(target)
    assert content["labels"] == LABELS
    (unseen,) = declared_unseen(content)
    assert (unseen.name, unseen.hosts, unseen.label) == ("spleen tumor", ("spleen",), 5)
    assert (target / "imagesTr" / "case_0_0000.nii.gz").read_bytes() == (
        organs / "imagesTr" / "case_0_0000.nii.gz"
    ).read_bytes()
    assert (read(target / "labelsTs" / f"case_1{SUFFIX}.nii.gz") == 5).any()


def test_the_texture_of_the_original_stays(organs: Path, tmp_path: Path) -> None:
    target = insert_lesions(organs, tmp_path / "Dataset912_Synthetic", ["liver tumor"], seed=1)
    labels = read(target / "labelsTr" / f"case_0{SUFFIX}.nii.gz")
    image = read(target / "imagesTr" / f"case_0{SUFFIX}_0000.nii.gz").astype(float)
    original = read(organs / "imagesTr" / "case_0_0000.nii.gz").astype(float)
    inside = labels == 5
    assert np.corrcoef(image[inside], original[inside])[0, 1] > 0.2


def test_a_hollow_organ_is_compared_by_its_wall_and_gas_does_not_show_through() -> None:
    distance = np.sqrt(sum(a**2 for a in np.meshgrid(*[np.arange(-30, 31, 2.0)] * 3, indexing="ij")))
    labels = (distance < 26).astype(np.uint8)
    image = np.where(distance < 20, -950, np.where(distance < 26, 60, -100)).astype(np.float32)
    insertion = Insertion("stomach tumor", 2, {"stomach": 1})
    record = paint_into(image, labels, insertion, (2.0, 2.0, 2.0), "portal", np.random.default_rng(0))
    assert record is not None
    inside = image[labels == 2]
    assert np.median(inside) == pytest.approx(60 + float(str(record["contrast_hu"])), abs=25)
    assert inside.min() > -600  # half gas at the margin at most


def test_phase_is_judged_by_the_host() -> None:
    for phase in ("non-contrast", "portal"):
        span = TISSUE_HU["liver"][phase]
        assert nearest_phase("Liver", (span.low + span.high) / 2) == phase
    span = TISSUE_HU["kidney"]["non-contrast"]
    assert nearest_phase("left_kidney", (span.low + span.high) / 2) == "non-contrast"
    assert nearest_phase("gallbladder", 10) == "portal"


def test_labels_that_are_there_or_reserved_are_kept() -> None:
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1, "spleen": 2, "Liver_Tumour": 3},
        "zept": {"unseen": {"spleen tumor": {"label": 4}}},
        "file_ending": ".nii.gz",
    }
    plan = plan_insertions(content, ["liver tumor", "spleen-tumor"], "dataset.json")
    assert [(i.name, i.label, dict(i.hosts)) for i in plan] == [
        ("liver tumor", 3, {"liver": 1}),
        ("spleen tumor", 4, {"spleen": 2}),
    ]


@pytest.mark.parametrize(
    ("change", "types", "message"),
    [
        ({}, ["pancreas tumor"], "no labeled organ hosts 'pancreas tumor'"),
        ({}, ["brain tumor"], "Wanted lesion types"),
        ({}, [], "Wanted lesion types"),
        ({"channel_names": {"0": "T1"}}, ["liver tumor"], "must be CT"),
        ({"zept": {"unseen": {"spleen tumor": {"label": 5}}}}, ["liver tumor"], "leave no gaps.*'spleen tumor'"),
        ({"labels": {**LABELS, "all": [1, 2]}, "regions_class_order": [1, 3, 4, 2, 1]}, ["liver tumor"], "regions"),
    ],
)
def test_refusals(organs: Path, tmp_path: Path, change: dict, types: list[str], message: str) -> None:
    source = tmp_path / "Dataset013_Other"
    source.mkdir()
    write_json(source, {**read_json(organs), **change})
    with pytest.raises(ZePTError, match=message):
        insert_lesions(source, tmp_path / "Dataset912_Synthetic", types)
    assert [p.name for p in tmp_path.iterdir()] == [source.name]


def test_no_room(organs: Path, tmp_path: Path) -> None:
    source = tmp_path / "Dataset013_Other"
    for folder in ("imagesTr", "labelsTr"):
        (source / folder).mkdir(parents=True)
    write_json(source, read_json(organs))
    image = sitk.ReadImage(str(organs / "imagesTr" / "case_0_0000.nii.gz"))
    sitk.WriteImage(image, str(source / "imagesTr" / "case_0_0000.nii.gz"))
    sitk.WriteImage(sitk.Cast(image * 0, sitk.sitkUInt8), str(source / "labelsTr" / "case_0.nii.gz"))
    with pytest.raises(ZePTError, match="no case has room"):
        insert_lesions(source, tmp_path / "Dataset912_Synthetic", ["liver tumor"])
    assert [p.name for p in tmp_path.iterdir()] == [source.name]


def test_target_names() -> None:
    assert target_name("912", "Dataset012_Abdomen") == "Dataset912_AbdomenSyntheticLesions"
    assert target_name("Dataset912_Mine", "x") == "Dataset912_MineSyntheticLesions"
    assert target_name("Dataset912_MySynthetic", "x") == "Dataset912_MySynthetic"
    for wrong in ("0", "1000", "Mine", "../Dataset912_A"):
        with pytest.raises(ZePTError, match="dataset ID"):
            target_name(wrong, "x")


def test_command(
    organs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    command = ["insert-lesions", "-d", str(organs), "-o", "912", "--types", "spleen tumor", "--test-only"]
    assert cli.main(command) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["Dataset912_AbdomenSyntheticLesions"]
    capsys.readouterr()
    assert cli.main(command) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite"]) == 0
    assert cli.main(["insert-lesions", "-d", str(organs), "-o", "913", "--types", "pancreas tumor"]) == 1
    assert "no labeled organ hosts" in capsys.readouterr().err
