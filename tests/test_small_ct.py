"""The synthetic CT dataset: what its files hold, and that nnU-Net accepts them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from tests.small_ct import (
    FIELD_OF_VIEW_MM,
    LABEL_VARIANTS,
    LABELS,
    SEEN_HOSTS,
    UNSEEN_LABEL,
    draw_demo_case,
    tumors_of_case,
    write_demo_dataset,
)
from zept_nnunet.errors import ZePTError

TINY = (12, 24, 24)
TUMORS = (*SEEN_HOSTS, "pancreas tumor")


def read_labels(folder: Path) -> dict[str, np.ndarray]:
    return {file.name: sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in sorted(folder.glob("*.nii.gz"))}


@pytest.mark.parametrize("shape", [(12, 24, 24), (16, 40, 48), (24, 32, 32)])
def test_every_class_is_there_in_every_case(shape: tuple[int, int, int]) -> None:
    for seed in range(20):
        case = draw_demo_case(shape, TUMORS, np.random.default_rng(seed))
        assert case.image_hu.shape == case.labels.shape == shape
        assert set(np.unique(case.labels)) == {*LABELS.values(), UNSEEN_LABEL}
        np.testing.assert_allclose(np.multiply(case.spacing_mm, shape), FIELD_OF_VIEW_MM)


def test_tumors_only_replace_voxels_of_their_hosts() -> None:
    shape = (16, 40, 48)
    for seed in range(20):
        healthy = draw_demo_case(shape, (), np.random.default_rng(seed)).labels
        labels = draw_demo_case(shape, TUMORS, np.random.default_rng(seed)).labels
        hosts = {LABELS["liver tumor"]: [1], LABELS["kidney tumor"]: [3, 4], UNSEEN_LABEL: [5]}
        for value, host_values in hosts.items():
            assert np.isin(healthy[labels == value], host_values).all()
        untouched = ~np.isin(labels, list(hosts))
        np.testing.assert_array_equal(labels[untouched], healthy[untouched])


def test_a_tumor_is_darker_than_its_host() -> None:
    case = draw_demo_case((24, 64, 64), TUMORS, np.random.default_rng(3))
    for tumor, host in (("liver tumor", "liver"), ("kidney tumor", "kidney left"), ("pancreas tumor", "pancreas")):
        value = LABELS.get(tumor, UNSEEN_LABEL)
        inside, around = case.image_hu[case.labels == value], case.image_hu[case.labels == LABELS[host]]
        assert np.median(inside) < np.median(around) - 30


def test_left_is_at_larger_x_and_the_liver_on_the_right() -> None:
    labels = draw_demo_case((16, 40, 48), (), np.random.default_rng(0)).labels
    middle = {name: np.argwhere(labels == value).mean(axis=0) for name, value in LABELS.items() if value in range(1, 6)}
    assert middle["kidney left"][2] > middle["kidney right"][2]
    assert middle["spleen"][2] > middle["liver"][2]


def test_training_labels_hold_no_unseen_tumor_and_test_references_do(tmp_path: Path) -> None:
    folder = write_demo_dataset(tmp_path, 901, cases_train=5, cases_test=4, shape=TINY)
    training, references = read_labels(folder / "labelsTr"), read_labels(folder / "labelsTs")
    assert len(training) == 5 and len(references) == 4
    assert all(labels.max() <= max(LABELS.values()) for labels in training.values())
    assert [bool((labels == UNSEEN_LABEL).any()) for labels in references.values()] == [True, True, True, False]
    for index, labels in enumerate(training.values()):
        shown = {name for name in SEEN_HOSTS if (labels == LABELS[name]).any()}
        assert shown == set(tumors_of_case("Tr", index))


def test_the_same_seed_gives_the_same_arrays_whatever_the_number_of_cases(tmp_path: Path) -> None:
    first = write_demo_dataset(tmp_path / "a", 901, cases_train=3, cases_test=1, shape=TINY, seed=7)
    second = write_demo_dataset(tmp_path / "b", 901, cases_train=2, cases_test=1, shape=TINY, seed=7)
    other = write_demo_dataset(tmp_path / "c", 901, cases_train=2, cases_test=1, shape=TINY, seed=8)
    for sub in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        arrays, again, differing = (read_labels(folder / sub) for folder in (first, second, other))
        for name in again:
            assert arrays[name].tobytes() == again[name].tobytes()
            assert arrays[name].tobytes() != differing[name].tobytes()


@pytest.mark.parametrize("labels", LABEL_VARIANTS)
def test_nnunet_accepts_the_dataset(tmp_path: Path, labels: str) -> None:
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    folder = write_demo_dataset(tmp_path, 902, cases_train=2, cases_test=1, shape=TINY, labels=labels)
    verify_dataset_integrity(str(folder), num_processes=1)
    description = json.loads((folder / "dataset.json").read_text())
    assert "pancreas tumor" not in description["labels"]
    assert description["zept"]["unseen"]["pancreas tumor"]["hosts"] == ["pancreas"]
    if labels == "regions":
        assert description["labels"]["liver"] == [LABELS["liver"], LABELS["liver tumor"]]
        assert len(description["regions_class_order"]) == len(description["labels"]) - 1
    if labels == "ignore":
        ignored = [bool((array == 8).any()) for array in read_labels(folder / "labelsTr").values()]
        assert ignored == [False, True]


def test_an_existing_folder_is_refused_and_replaced_only_on_request(tmp_path: Path) -> None:
    folder = write_demo_dataset(tmp_path, 903, cases_train=1, cases_test=0, shape=TINY)
    (folder / "kept.txt").write_text("mine")
    with pytest.raises(ZePTError, match="exists already"):
        write_demo_dataset(tmp_path, 903, cases_train=1, cases_test=0, shape=TINY)
    assert (folder / "kept.txt").is_file()
    write_demo_dataset(tmp_path, 903, cases_train=1, cases_test=0, shape=TINY, overwrite=True)
    assert not (folder / "kept.txt").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == [folder.name]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(sitk, "WriteImage", fail)
    with pytest.raises(OSError, match="disk full"):
        write_demo_dataset(tmp_path, 904, cases_train=1, cases_test=0, shape=TINY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": "onehot"}, "one of plain, regions, ignore"),
        ({"shape": (4, 24, 24)}, "at least"),
        ({"shape": (32, 32)}, "at least"),
        ({"cases_train": 0}, "at least 1 training case"),
        ({"dataset_id": 0}, "1 to 999"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ZePTError, match=message):
        write_demo_dataset(tmp_path, **arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_an_id_that_another_dataset_has_is_refused(tmp_path: Path) -> None:
    (tmp_path / "Dataset905_Other").mkdir()
    with pytest.raises(ZePTError, match="is taken by"):
        write_demo_dataset(tmp_path, 905, cases_train=1, shape=TINY)
