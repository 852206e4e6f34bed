"""The phantom: reproducible, without leaks, with the patients and healthy cases that it promises."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from zept_nnunet import cli
from zept_nnunet.datasets import phantom
from zept_nnunet.datasets.lesions import DEVELOPMENT, FINAL, LESION_TYPES, SEEN, of_role
from zept_nnunet.datasets.phantom import LABELS, SIZES, draw_phantom_case, lesions_of_case, write_phantom_dataset
from zept_nnunet.datasets.phantom_lookalikes import TEST_ONLY
from zept_nnunet.datasets.phantom_parameters import ORGANS, PHASES, TISSUE_HU
from zept_nnunet.errors import ZePTError
from zept_nnunet.taxonomy import Taxonomy, declared_unseen

UNSEEN = [t.name for t in (*of_role(DEVELOPMENT), *of_role(FINAL))]
UNSEEN_LABELS = [LABELS[name] for name in UNSEEN]
TINY = SIZES["tiny"]
FewCases = Callable[[int, int], None]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom_dataset(tmp_path_factory.mktemp("raw"), 910, "tiny", 5)


@pytest.fixture(scope="module")
def supervised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom_dataset(tmp_path_factory.mktemp("raw"), 911, "tiny", 5, supervised=True)


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> FewCases:
    """Make `tiny` smaller still."""

    def change(train: int, test: int) -> None:
        monkeypatch.setitem(SIZES, "tiny", replace(TINY, cases_train=train, cases_test=test))  # type: ignore[arg-type]

    return change


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def contents(folder: Path, *patterns: str) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for p in patterns for f in sorted(folder.glob(p))}


def away_from(lesion: np.ndarray) -> np.ndarray:
    """Voxels that hold no part of a lesion: its border takes a part of the neighbours, and may take their majority."""
    return ~ndimage.binary_dilation(lesion, np.ones((3, 3, 3)))


def dataset_json(folder: Path) -> dict:
    return json.loads((folder / "dataset.json").read_text())


# --- reproducible ---


def test_equal_seeds_give_equal_bytes_and_more_cases_change_none(
    tmp_path: Path, plain: Path, few_cases: FewCases
) -> None:
    few_cases(2, 2)
    again = write_phantom_dataset(tmp_path, 910, "tiny", 5)
    files = contents(again, "*/*.nii.gz")
    assert len(files) == 8
    all_files = contents(plain, "*/*.nii.gz")
    assert all(all_files[name] == content for name, content in files.items())
    other = write_phantom_dataset(tmp_path, 912, "tiny", 6)
    assert all(content != files[name] for name, content in contents(other, "images*/*.nii.gz").items())


def test_lesions_change_nothing_but_their_surroundings() -> None:
    healthy = draw_phantom_case(TINY, (), (0, 0, 1))
    ill = draw_phantom_case(TINY, ("spleen tumor",), (0, 0, 1))
    assert (ill.labels == LABELS["spleen tumor"]).any()
    changed = np.argwhere(ill.image_hu != healthy.image_hu)
    lesion = np.argwhere(ill.labels == LABELS["spleen tumor"])
    assert (changed.min(axis=0) >= lesion.min(axis=0) - 4).all() and (
        changed.max(axis=0) <= lesion.max(axis=0) + 4
    ).all()
    elsewhere = away_from(ill.labels == LABELS["spleen tumor"])
    np.testing.assert_array_equal(ill.labels[elsewhere], healthy.labels[elsewhere])


# --- no leaks ---


def test_training_shows_no_unseen_type_in_labels_or_records(plain: Path) -> None:
    for file in (plain / "labelsTr").iterdir():
        assert not np.isin(read(file), UNSEEN_LABELS).any()
    seen = {t.name for t in of_role(SEEN)}
    cases = dataset_json(plain)["zept_phantom"]["cases"]
    training = {k: v for k, v in cases.items() if "test" not in k}
    assert len(training) == TINY.cases_train
    for case in training.values():
        assert {lesion["class"] for lesion in case["lesions"]} <= seen
        assert not set(case["look_alikes"]) & set(TEST_ONLY)
        assert "unlabeled" not in case


def test_a_training_image_is_the_same_whatever_the_unseen_types_are(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = lesions_of_case("Tr", 0)
    before = draw_phantom_case(TINY, classes, (0, 0, 0))
    only_seen = {name: LESION_TYPES[name] for name in classes}
    monkeypatch.setattr(phantom, "LESION_TYPES", {**only_seen, **dict.fromkeys(UNSEEN)})
    np.testing.assert_array_equal(before.image_hu, draw_phantom_case(TINY, classes, (0, 0, 0)).image_hu)


def test_every_unseen_type_is_in_the_references_and_in_the_images(plain: Path) -> None:
    found = {int(v) for file in (plain / "labelsTs").iterdir() for v in np.unique(read(file))}
    assert set(UNSEEN_LABELS) <= found
    cases = dataset_json(plain)["zept_phantom"]["cases"]
    kinds = {lesion["class"]: lesion["kind"] for k, v in cases.items() if "test" in k for lesion in v["lesions"]}
    assert kinds["stomach tumor"] == "hyperdense" and kinds["pancreas tumor"] == "infiltrating"


def test_unlabeled_unseen_hides_lesions_under_their_hosts(tmp_path: Path, few_cases: FewCases) -> None:
    few_cases(2, 0)
    folder = write_phantom_dataset(tmp_path, 910, "tiny", 5, unlabeled_unseen=True)
    record = dataset_json(folder)["zept_phantom"]["cases"]["phantom_001"]
    assert record["unlabeled"] == ["spleen tumor"]
    assert "spleen tumor" in {lesion["class"] for lesion in record["lesions"]}
    labels = read(folder / "labelsTr" / "phantom_001.nii.gz")
    assert not np.isin(labels, UNSEEN_LABELS).any()
    shown = draw_phantom_case(TINY, (*lesions_of_case("Tr", 1), "spleen tumor"), (5, 0, 1))
    assert (labels[shown.labels == LABELS["spleen tumor"]] == ORGANS["spleen"]).all()
    np.testing.assert_array_equal(shown.image_hu, read(folder / "imagesTr" / "phantom_001_0000.nii.gz"))


def test_the_supervised_dataset_has_the_same_test_set_and_patients_and_labels_the_rest(
    plain: Path, supervised: Path
) -> None:
    tests = contents(plain, "*Ts/*.nii.gz")
    assert len(tests) == 2 * TINY.cases_test
    assert tests == contents(supervised, "*Ts/*.nii.gz")
    found: set[int] = set()
    for file in sorted((plain / "labelsTr").iterdir()):
        ours, theirs = read(file), read(supervised / "labelsTr" / file.name)
        assert ours.shape == theirs.shape
        found |= {int(v) for v in np.unique(theirs)}
        same = away_from(np.isin(theirs, UNSEEN_LABELS))
        np.testing.assert_array_equal(ours[same], theirs[same])
    assert set(UNSEEN_LABELS) <= found
    content = dataset_json(supervised)
    assert content["labels"] == LABELS and "unseen" not in content["zept"]


# --- what it promises ---


def test_dataset_json_is_understood(plain: Path) -> None:
    content = dataset_json(plain)
    taxonomy = Taxonomy.from_dataset_json(content)
    assert [o.name for o in taxonomy.organs] == list(ORGANS)
    assert {t.name: t.hosts for t in taxonomy.tumors} == {t.name: t.hosts for t in of_role(SEEN)}
    assert {u.name: (u.hosts, u.label) for u in declared_unseen(content)} == {
        name: (LESION_TYPES[name].hosts, LABELS[name]) for name in UNSEEN
    }
    assert content["zept_phantom"]["final_unseen"] == [t.name for t in of_role(FINAL)]
    assert content["numTraining"] == len(list((plain / "labelsTr").iterdir()))


@pytest.mark.parametrize(("size", "healthy"), [("tiny", 4), ("small", 30), ("full", 30)])
def test_healthy_test_cases(size: str, healthy: int) -> None:
    classes = [lesions_of_case("Ts", i) for i in range(SIZES[size].cases_test)]
    assert classes.count(()) >= healthy
    for name in LESION_TYPES:
        assert sum(name in c for c in classes) >= len(classes) // 8


def test_healthy_cases_have_no_lesion(plain: Path) -> None:
    for i in range(0, TINY.cases_test, 2):
        assert read(plain / "labelsTs" / f"phantom_test_{i:03d}.nii.gz").max() <= max(ORGANS.values())


def test_training_composition() -> None:
    classes = [lesions_of_case("Tr", i) for i in range(24)]
    assert () in classes
    assert all(set(c) <= {"liver tumor", "kidney tumor"} for c in classes)
    labeled = [lesions_of_case("Tr", i, supervised=True) for i in range(24)]
    assert all(set(a) <= set(b) for a, b in zip(classes, labeled, strict=True))
    assert all(sum(name in c for c in labeled) == 16 for name in UNSEEN)


def test_records_state_the_drawn_lesions(plain: Path) -> None:
    cases = dataset_json(plain)["zept_phantom"]["cases"]
    lesions = [(case, lesion) for case in cases.values() for lesion in case["lesions"]]
    assert len(lesions) > 8
    for case, lesion in lesions:
        looks = {a.kind: a for a in LESION_TYPES[lesion["class"]].appearances}
        look = looks[lesion["kind"]]
        assert case["phase"] in PHASES
        assert (
            round(look.contrast_hu[case["phase"]].low, 2)
            <= lesion["contrast_hu"]
            <= look.contrast_hu[case["phase"]].high
        )
        assert look.radius_mm.low <= lesion["radius_mm"] <= look.radius_mm.high
        assert lesion["cnr"] == pytest.approx(abs(lesion["contrast_hu"]) / lesion["noise_hu"], abs=0.01)
        assert lesion["host"] in LESION_TYPES[lesion["class"]].hosts and lesion["volume_ml"] > 0


@pytest.mark.parametrize("phase", PHASES)
def test_anatomy(phase: str) -> None:
    case = draw_phantom_case(TINY, (), (1, 0, 0), phase=phase)
    assert set(np.unique(case.labels)) == {0, *ORGANS.values()}
    voxel_ml = float(np.prod(case.spacing_mm)) / 1000
    volume = {name: (case.labels == label).sum() * voxel_ml for name, label in ORGANS.items()}
    assert 500 < volume["liver"] < 2500 and 60 < volume["spleen"] < 500
    assert all(70 < volume[f"kidney {side}"] < 300 for side in ("left", "right"))
    assert 30 < volume["pancreas"] < 180
    middle = {name: np.argwhere(case.labels == label).mean(axis=0) for name, label in ORGANS.items()}
    assert middle["kidney left"][2] > middle["kidney right"][2] and middle["spleen"][2] > middle["liver"][2]
    for organ in ("liver", "spleen"):
        expected = TISSUE_HU[organ][phase]
        inside = np.median(case.image_hu[case.labels == ORGANS[organ]])
        assert expected.low - 15 < inside < expected.high + 15
    assert case.image_hu.min() < -900 and case.image_hu.max() > 250


def test_lesions_have_the_drawn_contrast() -> None:
    size = replace(TINY, shape=(24, 48, 64), slice_mm=SIZES["small"].slice_mm)
    for name, sign in (("spleen tumor", -1), ("stomach tumor", 1)):
        case = draw_phantom_case(size, (name,), (4, 1, 0), phase="portal")
        (record, *_) = case.record["lesions"]  # type: ignore[misc]
        inside = np.median(case.image_hu[case.labels == LABELS[name]])
        host = TISSUE_HU["spleen" if name == "spleen tumor" else "stomach wall"]["portal"]
        assert sign * (inside - (host.low + host.high) / 2) > 0
        assert sign * record["contrast_hu"] > 0


def test_nifti_header_says_synthetic(plain: Path) -> None:
    image = sitk.ReadImage(str(plain / "imagesTs" / "phantom_test_000_0000.nii.gz"))
    assert image.GetMetaData("descrip") == "synthetic CT phantom"


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, "tiny", 0), "1 to 999"),
        ((910, "huge", 0), "tiny, demo, small, full"),
        ((910, "tiny", -1), "seed"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: tuple[int, str, int], message: str) -> None:
    with pytest.raises(ZePTError, match=message):
        write_phantom_dataset(tmp_path, *arguments)
    assert not list(tmp_path.iterdir())


def test_both_conditions_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ZePTError, match="choose one"):
        write_phantom_dataset(tmp_path, 910, "tiny", 0, supervised=True, unlabeled_unseen=True)


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_cases: FewCases) -> None:
    few_cases(1, 0)
    folder = write_phantom_dataset(tmp_path, 910, "tiny", 0)
    before = contents(folder, "**/*.*")

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(phantom, "write_image", fail)
    with pytest.raises(OSError, match="disk full"):
        write_phantom_dataset(tmp_path, 910, "tiny", 1, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    assert contents(folder, "**/*.*") == before


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], few_cases: FewCases
) -> None:
    few_cases(1, 0)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    assert cli.main(["phantom", "-d", "910", "--size", "tiny", "--supervised-id", "911"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Dataset910_ZePTPhantom", "Dataset911_ZePTPhantomSupervised"]
    capsys.readouterr()
    assert cli.main(["phantom", "-d", "910", "--size", "tiny"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main(["phantom", "-d", "912", "--size", "tiny", "--supervised-id", "910"]) == 1  # before any image
    assert "taken by" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 2
    assert cli.main(["phantom", "-d", "910", "--supervised-id", "910"]) == 1
    monkeypatch.delenv("nnUNet_raw")
    assert cli.main(["phantom", "-d", "910"]) == 1
    assert "nnUNet_raw" in capsys.readouterr().err


def test_gas_in_the_stomach_has_no_label(plain: Path) -> None:
    """nnU-Net normalizes by the labeled voxels: gas among them would hide the lesions' contrast."""
    gas = 0
    for path in sorted((plain / "labelsTr").glob("*.nii.gz")):
        labels, image = read(path), read(plain / "imagesTr" / path.name.replace(".nii.gz", "_0000.nii.gz"))
        assert not ((labels == ORGANS["stomach"]) & (image < -200)).any()
        around = ndimage.binary_dilation(labels == ORGANS["stomach"], iterations=2)
        gas += int((around & (image < -500)).sum())
    assert gas > 0
