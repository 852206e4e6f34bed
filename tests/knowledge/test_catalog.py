from __future__ import annotations

from pathlib import Path

import pytest

from tests.knowledge.dataset_label_names import DATASETS, TOTALSEGMENTATOR
from zept_nnunet.errors import ZePTError
from zept_nnunet.knowledge.catalog import Catalog, Entry, catalog, read_catalog, read_entries
from zept_nnunet.names import infer_hosts, infer_is_tumor, name_key
from zept_nnunet.public_datasets import dataset_labels

ORGAN = """
entries:
  liver:
    kind: organ
    synonyms: [hepar]
    location: Upper right abdomen.
    shape: A large wedge.
    structure: Homogeneous tissue.
    ct: About 55 HU.
"""
TUMOR = """
sources: {book: "Somebody. A book of tumors. 2019."}
entries:
  liver tumor:
    kind: tumor
    hosts: [HOST]
    location: Anywhere in it.
    shape: A round nodule.
    structure: Solid tissue.
    ct: About 40 HU.
    healthy: Darker than the liver.
    mimics: Vessels are longer.
    sources: [book]
"""


def entry(name: str, *synonyms: str, kind: str = "organ", hosts: tuple[str, ...] = ()) -> Entry:
    return Entry(name, kind, {"location": "Somewhere."}, hosts, synonyms)


# ---------------------------------------------------------------------------------------------------- what is built in
def test_every_class_of_totalsegmentator_is_described_and_no_two_share_a_description() -> None:
    assert len(TOTALSEGMENTATOR) == len(set(TOTALSEGMENTATOR)) == 117
    assert [name for name in TOTALSEGMENTATOR if catalog().find(name) is None] == []
    assert len({e.name for n in TOTALSEGMENTATOR if (e := catalog().find(n)) is not None}) == 117


@pytest.mark.parametrize("dataset", DATASETS)
def test_each_label_name_of_the_public_datasets_resolves(dataset: str) -> None:
    table = dataset_labels().get(dataset, {})
    found = {name: catalog().find(table.get(name, name)) for name in DATASETS[dataset]}
    assert [name for name, e in found.items() if e is None] == []
    for name, e in found.items():
        assert e is not None and (e.kind == "tumor") == infer_is_tumor(name)


def test_no_class_without_a_whole_description_and_each_tumor_cites_a_source() -> None:
    for e in catalog():
        assert 40 <= len(e.text.split()) <= 200, e.name
        assert len(set(e.sections.values())) == len(e.sections) == (6 if e.kind == "tumor" else 4), e.name
        assert e.text.isascii(), e.name
        assert (e.kind == "tumor") == bool(e.hosts) == bool(e.sources), e.name
    assert len({e.text for e in catalog()}) == len(catalog())
    in_datasets = {e for d, names in DATASETS.items() for n in names if (e := dataset_labels().get(d, {}).get(n, n))}
    named = {e.name for n in in_datasets if (e := catalog().find(n)) is not None}
    assert sum(e.kind == "tumor" and e.name not in named for e in catalog()) >= 40


def test_tumors_and_organs_are_called_so_by_the_rules_for_names() -> None:
    """What the package calls a tumor, the taxonomy must not take for an organ, and the other way round."""
    names = [(name, e.kind) for e in catalog() for name in (e.name, *e.synonyms)]
    assert [name for name, kind in names if infer_is_tumor(name) != (kind == "tumor")] == []


def test_each_tumor_is_found_in_the_plural_too() -> None:
    plurals = {"oma": "omas", "mass": "masses", "metastasis": "metastases", "abscess": "abscesses"}
    singular = [n for e in catalog() if e.kind == "tumor" for n in (e.name, *e.synonyms) if n.endswith(tuple(plurals))]
    assert len(singular) > 100
    for name in singular:
        ending = next(end for end in plurals if name.endswith(end))
        assert catalog().find(name.removesuffix(ending) + plurals[ending]) is catalog().find(name), name


def test_a_metastasis_of_the_catalog_sits_where_its_entry_says() -> None:
    """Of each name, with its hosts and other organs labeled, no other organ is taken for a host."""
    organs = [
        e.name for e in catalog() if e.kind == "organ" and e.name in ("liver", "lung", "colon", "rectum", "brain")
    ]
    for entry in catalog():
        for name in (entry.name, *entry.synonyms):
            if entry.kind == "tumor" and "metasta" in name:
                labeled = list(dict.fromkeys([*entry.hosts, *organs]))
                assert set(infer_hosts(name, labeled)) <= set(entry.hosts), name


def test_dataset_tables_point_at_entries() -> None:
    assert [v for table in dataset_labels().values() for v in table.values() if v not in catalog().entries] == []


# ---------------------------------------------------------------------------------------------------- finding
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("renal tumor", "kidney tumor"),
        ("kidney_tumour", "kidney tumor"),
        ("KiTS tumor", "kidney tumor"),
        ("Kidneys", "kidney"),
        ("Lung_Upper_Lobe_L", "left upper lung lobe"),
        ("right-kidney", "right kidney"),
        ("HCC", "hepatocellular carcinoma"),
        ("liver mets", "liver metastasis"),
        ("cholangiocarcinoma", "intrahepatic cholangiocarcinoma"),
        ("Klatskin", "perihilar cholangiocarcinoma"),
        ("oncocytoma", "renal oncocytoma"),
        ("AML", "renal angiomyolipoma"),
        ("livertumor01", "liver tumor"),
        ("liver hemangiomas", "hepatic hemangioma"),
        ("renal masses", "kidney tumor"),
        ("HGG", "glioma"),
        ("rib_left_01", "left rib 1"),
        ("large bowel", "colon"),
        ("soft tissue mass", None),  # most are benign, and no entry describes them all
        ("RAG", "right adrenal gland"),
        ("lad", None),  # a coronary artery elsewhere: dataset_labels.yaml
        ("flux capacitor", None),
    ],
)
def test_names_as_found_in_the_wild(name: str, wanted: str | None) -> None:
    found = catalog().find(name)
    assert (found.name if found else None) == wanted


@pytest.mark.parametrize(
    ("name", "hosts", "wanted"),
    [
        ("cancer", ("liver",), "liver tumor"),
        ("Tumour", ("kidney left", "kidney right"), "kidney tumor"),
        ("cyst", ("kidney",), "kidney cyst"),
        ("cyst", ("left_kidney",), "left kidney cyst"),
        ("lesion", ("liver", "spleen"), None),  # which of both it describes cannot be told
        ("lesion", (), None),
    ],
)
def test_a_tumor_without_a_name_of_its_own_is_found_by_its_host(
    name: str, hosts: tuple[str, ...], wanted: str | None
) -> None:
    found = catalog().find(name, hosts)
    assert (found.name if found else None) == wanted


def test_key_of_a_name() -> None:
    assert name_key("Left_Upper-Lobe") == name_key("upper lobe L") == ("left", "lobe", "upper")
    assert name_key("metastasis") == name_key("metastases") and name_key("pancreas") == ("pancreas",)
    assert name_key("rib_left_1") == name_key("left_rib_01") != name_key("rib_left_10")


def test_nearest_names() -> None:
    assert catalog().nearest("spleem tumor")[0] == "spleen tumor" and catalog().nearest("zzzz") == []


def test_a_name_stands_for_one_description() -> None:
    with pytest.raises(ZePTError, match=r"'hepar' \('liver' and 'bowel'\)"):
        Catalog([entry("liver", "hepar"), entry("bowel", "hepar")])
    with pytest.raises(ZePTError, match="'Lungs'"):
        Catalog([entry("lung"), entry("Lungs")])
    Catalog([entry("lung", "lungs")])  # of one entry it may


# ---------------------------------------------------------------------------------------------------- files
def write(folder: Path, text: str, name: str = "x.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_file_that_fits(tmp_path: Path) -> None:
    found = read_catalog([write(tmp_path, ORGAN), write(tmp_path, TUMOR.replace("HOST", "liver"), "y.yaml")])
    liver, tumor = found
    assert liver.text == "liver. Upper right abdomen. A large wedge. Homogeneous tissue. About 55 HU."
    assert tumor.sources == ("Somebody. A book of tumors. 2019.",) and tumor.file == "y.yaml"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ORGAN.replace("    ct: About 55 HU.\n", ""), "liver: 'ct' is a required property"),
        (ORGAN.replace("kind: organ", "kind: vessel"), "liver > kind"),
        (ORGAN.replace("wedge.", "wedge"), "liver > shape"),
        (ORGAN + "  liver:\n    kind: organ\n", "twice"),
        (ORGAN.replace("synonyms", "synonym"), "'synonym' was unexpected"),
        ("entries: {", "no valid YAML"),
        ("- a\n", "the file"),
        (TUMOR.replace("sources: [book]", "sources: [other]").replace("HOST", "liver"), r"cites \['other'\]"),
        (TUMOR.replace("    mimics: Vessels are longer.\n", ""), "'mimics' is a required property"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ZePTError, match=message):
        read_entries(write(tmp_path, text))


def test_hosts_must_be_described(tmp_path: Path) -> None:
    with pytest.raises(ZePTError, match=r"hosts \['moon'\] are no described organs"):
        read_catalog([write(tmp_path, ORGAN), write(tmp_path, TUMOR.replace("HOST", "moon"), "y.yaml")])
    with pytest.raises(ZePTError, match="cannot read"):
        read_entries(tmp_path / "nowhere.yaml")
