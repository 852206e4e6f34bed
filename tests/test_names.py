"""What a label's name says."""

from __future__ import annotations

import pytest

from zept_nnunet.names import infer_hosts, infer_is_tumor, is_lateral, normalize_name

ABDOMEN = ["liver", "spleen", "pancreas", "left kidney", "kidney_right", "Colon", "gallbladder", "adrenal gland left"]
LUNG = ["lung upper lobe left", "lung_lower_lobe_left", "lung upper lobe right"]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("Liver_Tumour", "liver tumor"),
        ("  kidney--cyst ", "kidney cyst"),
        ("lung_-_nodule", "lung nodule"),
        ("TUMOURS", "tumors"),
    ],
)
def test_normalize_name(name: str, wanted: str) -> None:
    assert normalize_name(name) == wanted
    assert normalize_name(wanted) == wanted


@pytest.mark.parametrize(
    "name",
    [
        "liver_tumor",
        "kidney cyst",
        "Pancreas lesion",
        "lung_nodule",
        "tumour",
        "colon cancer primaries",
        "hepatocellular carcinoma",
        "adenomas",
        "liver metastases",
        "renal masses",
        "HCC",
        "lymphoma",
        "enhancing tumor",
        "liver and spleen lesion",
        "livertumor01",
        "livercyst1",
        "tumor2",
        "liver mets",
        "Klatskin",
        "AML",
        "FNH",
        "HGG",
        "pancreatic NET",
        "linitis plastica",
        "enlarged lymph nodes",
        "pathological left pelvic lymph node",
        "omental cake",
        "peritoneal implants",
    ],
)
def test_tumor_names(name: str) -> None:
    assert infer_is_tumor(name)


@pytest.mark.parametrize(
    "name",
    [
        "liver",
        "lymph node",
        "lymph_nodes_pelvic",
        "dental implants",
        "enlarged liver",
        "stoma",
        "soma",
        "stomach",
        "hepatic vessel",
        "portalvein1",
        "metal",
        "metastasectomie",
        "stones",
        "rkid",
        "portal vein and splenic vein",
        "kidney and tumor",
        "liver_with_tumor",
        "kidney including masses",
    ],
)
def test_organ_names(name: str) -> None:
    assert not infer_is_tumor(name)


@pytest.mark.parametrize(
    ("tumor", "organs", "wanted"),
    [
        ("liver_tumor", ABDOMEN, ("liver",)),
        ("hepatic-lesion", ABDOMEN, ("liver",)),
        ("HCC", ABDOMEN, ("liver",)),
        ("Pancreatic tumour", ABDOMEN, ("pancreas",)),
        ("kidney tumor", ABDOMEN, ("left kidney", "kidney_right")),
        ("renal cyst", ABDOMEN, ("left kidney", "kidney_right")),
        ("left renal cyst", ABDOMEN, ("left kidney",)),
        ("colorectal cancer", ABDOMEN, ("Colon",)),
        ("adrenal nodule", ABDOMEN, ("adrenal gland left",)),
        ("gall bladder polyp", ABDOMEN, ("gallbladder",)),
        ("lesion of liver and spleen", ABDOMEN, ("liver", "spleen")),
        ("lung nodule", LUNG, tuple(LUNG)),
        ("pulmonary nodule left", LUNG, tuple(LUNG[:2])),
        ("left upper lung lobe tumor", LUNG, (LUNG[0],)),
        ("lung nodule", ABDOMEN, ()),  # an anatomy that is not labeled
        ("tumor", ABDOMEN, ()),  # no anatomy, several organs
        ("tumor", ["kidney"], ("kidney",)),
        ("cyst", ["left kidney", "right kidney"], ("left kidney", "right kidney")),
        ("nodule", LUNG, tuple(LUNG)),
        ("lung nodule", ["liver"], ()),  # the only organ, but not the one that the name says
        ("liver tumor", ["hepatic vessel", "liver"], ("liver",)),
        ("tumor", ["Vessel"], ()),
        ("liver tumor", [], ()),
        ("AML", ["liver", "left kidney", "right kidney"], ("left kidney", "right kidney")),
        ("hepatic AML", ["liver", "kidney"], ("liver",)),
        ("oncocytoma", ["liver", "kidney"], ("kidney",)),
        ("livertumor01", ["liver", "kidney"], ("liver",)),
        ("large bowel tumor", ["colon", "bowel"], ("colon",)),
        ("colorectal liver metastases", ["liver", "colon", "rectum"], ("liver",)),
        ("breast cancer liver metastasis", ["breast", "liver"], ("liver",)),
        ("lung metastasis of colon cancer", ["lung", "colon"], ("lung",)),
        ("liver and lung metastases", ["lung", "liver", "colon"], ("lung", "liver")),
        ("metastasis of the liver", ["lung", "liver"], ("liver",)),
        ("metastases in left kidney", ["left kidney", "right kidney"], ("left kidney",)),
        ("left kidney mets", ["left kidney", "right kidney"], ("left kidney",)),
        (
            "left breast cancer liver metastasis",
            ["liver right lobe", "liver left lobe"],
            ("liver right lobe", "liver left lobe"),
        ),
        ("left and right kidney metastases", ["left kidney", "right kidney"], ("left kidney", "right kidney")),
        ("lung metastasis", ["liver", "spleen"], ()),
        (
            "cervical lymph node metastasis",
            ["cervix", "lymph nodes", "cervical lymph nodes"],
            ("lymph nodes", "cervical lymph nodes"),
        ),
        ("cervical cancer", ["cervix", "lymph nodes"], ("cervix",)),
    ],
)
def test_infer_hosts(tumor: str, organs: list[str], wanted: tuple[str, ...]) -> None:
    assert infer_hosts(tumor, organs) == wanted


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("left kidney", True),
        ("kidney_R", True),
        ("Lung-Left", True),
        ("RightAtrium", True),
        ("liver", False),
        ("vertebra L1", False),
        ("bright spot", False),
    ],
)
def test_is_lateral(name: str, wanted: bool) -> None:
    assert is_lateral(name) is wanted
