"""Derived datasets: labels voxel by voxel, images by reference, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from tests.small_ct import LABELS, write_demo_dataset
from zept_nnunet.datasets.derived import ANY_TUMOR, KEY, Source, derive_dataset, derived_labels, read_derived, relabel
from zept_nnunet.errors import ZePTError

TINY = (12, 24, 24)


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
        (tmp_path / name).mkdir()
    return tmp_path / "raw"


def make_source(raw: Path, labels: str = "plain", **changes: Any) -> Source:
    folder = write_demo_dataset(raw, 1, cases_train=2, cases_test=1, shape=TINY, labels=labels)
    if changes:
        path = folder / "dataset.json"
        content = json.loads(path.read_text())
        content["zept"] |= changes
        path.write_text(json.dumps(content))
    return Source.read(folder)


def read(path: str | Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_any_tumor_merges_the_tumors_and_leaves_the_organs(raw: Path) -> None:
    source = make_source(raw)
    folder = derive_dataset(source, "any_tumor", raw)
    derived = json.loads((folder / "dataset.json").read_text())
    assert folder.name == "Dataset999_ZePTDemoAnyTumor"
    assert derived["labels"] == {**{n: v for n, v in LABELS.items() if "tumor" not in n}, ANY_TUMOR: 6}
    assert derived[KEY]["unlabeled_hosts"] == ["spleen", "pancreas"]
    assert derived["zept"]["tumors"] == {ANY_TUMOR: {"hosts": ["liver", "kidney left", "kidney right"]}}
    for case, files in source.cases().items():
        old, new = read(files["label"]), read(folder / "labelsTr" / f"{case}.nii.gz")
        assert (old == 7).any()
        np.testing.assert_array_equal(new, np.where(old >= 6, 6, old))
    assert not list(folder.rglob("*_0000.nii.gz"))


def test_nnunet_finds_the_images_of_the_source(raw: Path) -> None:
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    source = make_source(raw)
    folder = derive_dataset(source, "organs", raw)
    found = get_filenames_of_train_images_and_targets(str(folder))
    for case, files in source.cases().items():
        assert [Path(i) for i in found[case]["images"]] == [Path(i) for i in files["images"]]
        assert Path(found[case]["label"]) == folder / "labelsTr" / f"{case}.nii.gz"
        assert sitk.ReadImage(found[case]["label"]).GetSpacing() == sitk.ReadImage(files["label"]).GetSpacing()


def test_organs_hold_their_tumors_and_the_nearest_of_two_kidneys_does(raw: Path) -> None:
    source = make_source(raw)
    labels = derived_labels(source, "organs")
    assert list(labels) == ["background", "liver", "spleen", "kidney left", "kidney right", "pancreas"]
    old = np.zeros((1, 1, 12), dtype=np.uint8)
    old[0, 0] = [1, 6, 6, 0, 3, 7, 7, 0, 7, 7, 4, 0]
    expected = np.array([1, 1, 1, 0, 3, 3, 3, 0, 4, 4, 4, 0])
    np.testing.assert_array_equal(relabel(old, source, "organs", (1, 1, 1))[0, 0], expected)
    # with the rows far apart, the nearest kidney is the one in the same row
    rows = np.array([[[3, 0, 0, 0, 7]], [[0, 0, 0, 0, 4]]])
    assert relabel(rows, source, "organs", (1, 1, 1))[0, 0, 4] == 4
    assert relabel(rows, source, "organs", (100, 1, 1))[0, 0, 4] == 3


def test_a_loop_gives_the_same_hosts(raw: Path) -> None:
    source = make_source(raw)
    rng = np.random.default_rng(0)
    old = rng.choice([0, 3, 4, 7], size=(4, 6, 7), p=[0.7, 0.1, 0.1, 0.1])
    new = relabel(old, source, "organs", (5.0, 1.5, 1.0))
    hosts = np.argwhere((old == 3) | (old == 4))
    for voxel in np.argwhere(old == 7):
        distances = np.linalg.norm((hosts - voxel) * (5.0, 1.5, 1.0), axis=1)
        nearest = {int(old[tuple(h)]) for h in hosts[np.isclose(distances, distances.min())]}
        assert int(new[tuple(voxel)]) in nearest


def test_the_ignore_label_stays_the_last(raw: Path) -> None:
    source = make_source(raw, "ignore")
    old = np.array([[[0, 1, 6, 7, 8]]])
    assert derived_labels(source, "any_tumor")["ignore"] == 7
    np.testing.assert_array_equal(relabel(old, source, "any_tumor", (1, 1, 1))[0, 0], [0, 1, 6, 6, 7])
    np.testing.assert_array_equal(relabel(old, source, "declared", (1, 1, 1))[0, 0], [0, 1, 6, 7, 9])


def test_declared_keeps_the_labels_and_annotates_no_unseen_tumor(raw: Path) -> None:
    source = make_source(raw)
    folder = derive_dataset(source, "declared", raw)
    derived = json.loads((folder / "dataset.json").read_text())
    assert derived["labels"] == {**LABELS, "pancreas tumor": 8}
    assert derived["zept"]["annotated"] == {"*": [n for n in LABELS if n != "background"]}
    assert not (folder / "labelsTr").exists()
    for case, files in source.cases().items():
        assert (folder / derived["dataset"][case]["label"]).resolve() == Path(files["label"]).resolve()


def test_it_is_reused_and_a_change_of_the_source_is_noticed(raw: Path) -> None:
    source = make_source(raw)
    folder = derive_dataset(source, "organs", raw)
    assert derive_dataset(source, "organs", raw) == folder
    assert derive_dataset(source, "any_tumor", raw).name.startswith("Dataset998_")
    label = next((source.folder / "labelsTr").glob("*.nii.gz"))
    image = sitk.ReadImage(str(label))
    array = sitk.GetArrayFromImage(image)
    array[0, 0, 0] = 1
    changed = sitk.GetImageFromArray(array)
    changed.CopyInformation(image)
    sitk.WriteImage(changed, str(label))
    with pytest.raises(ZePTError, match="have changed"):
        derive_dataset(source, "organs", raw)
    assert read_derived(folder) is not None and read_derived(source.folder) is None


def test_an_unknown_value_is_an_error_that_names_the_file_and_leaves_nothing(raw: Path) -> None:
    source = make_source(raw)
    label = sorted((source.folder / "labelsTr").glob("*.nii.gz"))[1]
    image = sitk.ReadImage(str(label))
    array = sitk.GetArrayFromImage(image)
    array[0, 0, 0] = 77
    sitk.WriteImage(sitk.GetImageFromArray(array), str(label))
    with pytest.raises(ZePTError, match=rf"{label.name}: the values \[77\] are no labels"):
        derive_dataset(source, "any_tumor", raw)
    assert sorted(p.name for p in raw.iterdir() if p.is_dir()) == [source.name]


def test_regions_and_partly_labeled_cases_are_refused(raw: Path) -> None:
    with pytest.raises(ZePTError, match="regions"):
        make_source(raw, "regions")
    for folder in raw.glob("Dataset*"):
        for file in sorted(folder.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        folder.rmdir()
    with pytest.raises(ZePTError, match=r"demo_001' does not label \['kidney left'"):
        make_source(raw, annotated={"demo_001": ["liver", "liver tumor"]})


def test_a_gap_among_the_unseen_labels_is_refused(raw: Path) -> None:
    source = make_source(raw, unseen={"pancreas tumor": {"label": 10}})
    with pytest.raises(ZePTError, match="leave a gap"):
        source.output_labels()
    source = Source(source.folder, source.dataset_json | {"zept": {"unseen": {"spleen tumor": {}}}}, source.taxonomy)
    assert source.output_labels()["spleen tumor"] == 8
