"""Whole label tables of public datasets, as their dataset.json or their folders have them, from planning's view."""

from __future__ import annotations

from typing import Any

import pytest

from tests.knowledge.dataset_label_names import DATASETS, TOTALSEGMENTATOR
from zept_nnunet.errors import ZePTError
from zept_nnunet.knowledge import KnowledgeSource
from zept_nnunet.knowledge.dataset import class_texts
from zept_nnunet.plans_block import build_block
from zept_nnunet.public_datasets import dataset_labels, label_readings
from zept_nnunet.taxonomy import Taxonomy

pytestmark = pytest.mark.filterwarnings("ignore:.*the whole body:UserWarning")


def labels(*names: str, **more: Any) -> dict[str, Any]:
    return {"labels": {"background": 0, **{n: i for i, n in enumerate(names, start=1)}}, **more}


IRCAD_ORGANS = """bone skin spleen leftkidney rightkidney leftlung rightlung gallbladder pancreas heart stomach bladder
smallintestin colon leftsurrenalgland rightsurrenalgland biliarysystem uterus portalvein1 venoussystem artery metal
stones metastasectomie""".split()
ABBREVIATED = "spleen rkid lkid gall eso liver sto aorta IVC PVSV pancreas rad lad".split()
WHOLE = {
    **{
        n: labels(*DATASETS[n], name=n)
        for n in ("WORD", "AbdomenCT-1K", "AMOS22", "BTCV", "FLARE22", "CT-ORG", "CHAOS")
    },
    "Pancreas-CT": labels("pancreas"),
    "TotalSegmentator": labels(*TOTALSEGMENTATOR),
    "LiTS": labels("liver", "tumor", name="LiTS"),
    "KiTS23": labels("kidney", "tumor", "cyst", name="KiTS23"),
    "KiTS23 by nnU-Net": {
        "labels": {"background": 0, "kidney": [1, 2, 3], "masses": [2, 3], "tumor": 2},
        "regions_class_order": [1, 3, 2],
        "name": "KiTS2023",
    },
    "Task03": labels("liver", "cancer", name="Liver"),
    "Task06": labels("cancer", name="Lung"),
    "Task07": labels("pancreas", "cancer", name="Pancreas"),
    "Task08": labels("Vessel", "Tumour", name="HepaticVessel"),
    "Task09": labels("spleen", name="Spleen"),
    "Task10": labels("colon cancer primaries", name="Colon"),
    "3D-IRCADb": labels("liver", "livertumor01", "livercyst1", *IRCAD_ORGANS, name="3D-IRCADb-01"),
    "3D-IRCADb, plain": labels("liver", "tumor", "cyst", "portalvein", "bone", name="3Dircadb1"),
    "BTCV, abbreviated": labels(*ABBREVIATED, zept={"dataset": "BTCV"}),
}


@pytest.mark.parametrize("name", WHOLE)
def test_every_label_of_a_whole_dataset_has_a_description_and_needs_no_encoder(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object, missing: dict) -> None:
        raise AssertionError(f"no vector for {[*missing]}")

    monkeypatch.setattr(KnowledgeSource, "_checked_encoder", refuse)
    found = class_texts(WHOLE[name])
    assert {n: d.origin for n, d in found.items() if not d.origin.startswith("built-in")} == {}
    block = build_block(WHOLE[name])
    vectors = [tuple(v) for v in block["knowledge"]["vectors"].values()]
    assert len(set(vectors)) == len(vectors)


@pytest.mark.parametrize(
    ("dataset", "label", "entry", "hosts"),
    [
        ("Task06", "cancer", "lung tumor", ()),
        ("Task08", "Tumour", "liver tumor", ()),
        ("Task08", "Vessel", "hepatic vessels", None),
        ("KiTS23 by nnU-Net", "masses", "kidney cyst", ("kidney",)),
        ("KiTS23 by nnU-Net", "tumor", "kidney tumor", ("kidney",)),
        ("3D-IRCADb", "livertumor01", "liver tumor", ("liver",)),
        ("3D-IRCADb", "portalvein1", "portal vein", None),
        ("3D-IRCADb, plain", "tumor", "liver tumor", ("liver",)),
        ("BTCV, abbreviated", "lad", "left adrenal gland", None),
        ("BTCV, abbreviated", "gall", "gallbladder", None),
    ],
)
def test_labels_mean_what_their_dataset_means(
    dataset: str, label: str, entry: str, hosts: tuple[str, ...] | None
) -> None:
    assert class_texts(WHOLE[dataset])[label].origin == f"built-in ({entry})"
    taxonomy = Taxonomy.from_dataset_json(WHOLE[dataset])
    assert {t.name: t.hosts for t in taxonomy.tumors}.get(label) == hosts


def test_the_dataset_is_named_by_its_file_or_by_the_zept_block() -> None:
    assert label_readings({"name": "hepatic-vessel"})["vessel"] == "hepatic vessels"
    assert label_readings({"name": "mine", "zept": {"dataset": "MSD Task06 Lung"}}) == {"cancer": "lung tumor"}
    assert label_readings({"name": "Lung", "zept": {"dataset": "msd_task07_pancreas"}}) == {"cancer": "pancreas tumor"}
    assert label_readings({"name": "mine"}) == label_readings({}) == label_readings({"name": 3}) == {}
    with pytest.raises(ZePTError, match=r"my\.json: zept\.dataset wants .*MSD Task06 Lung.*found 'Lungs of mine'"):
        Taxonomy.from_dataset_json(labels("cancer", zept={"dataset": "Lungs of mine"}), "my.json")
    assert all(dataset_labels().values())


def test_what_the_zept_block_says_goes_before_the_table() -> None:
    zept = {"knowledge": {"cancer": {"like": "SCLC"}}, "tumors": {"cancer": {"hosts": ["lungs"]}}}
    dataset_json = labels("lungs", "cancer", name="Lung", zept=zept)
    assert "small cell" in class_texts(dataset_json)["cancer"].text
    assert Taxonomy.from_dataset_json(dataset_json).tumors[0].hosts == ("lungs",)
    assert Taxonomy.from_dataset_json(labels("lungs", "cancer", name="Lung")).tumors[0].hosts == ("lungs",)


def test_numbered_classes_of_one_kind_stay_apart() -> None:
    found = class_texts(labels("liver", "livertumor1", "livertumor2", "livertumor3"))
    assert len({d.text for d in found.values()}) == 4
    assert found["livertumor1"].origin == "built-in (liver tumor)"
    regions = {"labels": {"background": 0, "liver": [1, 2, 3], "tumor": 3}, "regions_class_order": [1, 2]}
    found = class_texts(regions)
    assert len({d.text for d in found.values()}) == 3  # "liver 1", "liver 2" and "tumor"
