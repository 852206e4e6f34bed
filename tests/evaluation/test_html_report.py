"""`zept report`: one page, complete, without any request, and what it says where input is wrong."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from tests.evaluation.small_folders import SHAPE, draw_references, write_labels, write_predictions, write_references
from zept_nnunet.cli import main
from zept_nnunet.evaluation import html_viewer
from zept_nnunet.evaluation.html_methods import parse_method, read_results
from zept_nnunet.evaluation.html_report import table_columns
from zept_nnunet.evaluation.retrieval import SUMMARY_COLUMNS, plot_embeddings, retrieval_table, summarize, swapped
from zept_nnunet.inference.embeddings import CaseEmbeddings

VOID = {"meta", "img", "input", "br", "link", "hr", "use", "path"}
NASTY = '<b onclick="x()">$a_b$ & "co"</b>'


class Page(HTMLParser):
    """Checks that tags nest, and gathers what a test asks for."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.ids: list[str] = []
        self.text = ""
        self.raw = text
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action", "data", "xlink:href")]
        self.ids += [v or "" for k, v in attrs if k == "id"]
        assert not any(k.startswith("on") for k in given)
        if tag == "img":
            self.images.append(given)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


class Folders:
    """References, images, two methods' predictions and their evaluations; copied for each test."""

    def __init__(self, root: Path):
        self.root = root
        self.references, self.images = root / "references", root / "images"
        self.ours, self.theirs = root / "ours", root / "theirs"
        self.page = root / "report.html"

    def make(self) -> None:
        cases = draw_references(healthy=3, with_tumors=3)
        write_references(self.references, cases)
        rng = np.random.default_rng(0)
        for case, reference in cases.items():
            image = 40 + 20 * (reference > 0) + rng.normal(0, 5, SHAPE)
            write_image(self.images / f"{case}_0000.nii.gz", image.astype(np.int16), self.references / f"{case}.nii.gz")
        validation = draw_references(healthy=2, with_tumors=1)
        write_references(self.root / "validation_references", validation)
        for seed, (folder, quality) in enumerate(((self.ours, 4.0), (self.theirs, 1.0))):
            write_predictions(folder, cases, seed, quality)
            write_predictions(folder / "validation", validation, seed + 5, quality)
            command = ["evaluate", "-r", self.references, "-i", folder, "-o", folder / "evaluation"]
            command += ["--calibration", folder / "validation", "--calibration-references"]
            command += [self.root / "validation_references", "--bootstrap", 50, "--disable_progress_bar"]
            assert main([*map(str, command)]) == 0
        score = np.where(cases["case_000"] == 4, 6.0, -6.0).astype(np.float32)
        like = self.references / "case_000.nii.gz"
        write_image(self.ours / "case_000_anomaly_pancreas.nii.gz", score, like)
        write_image(self.ours / "case_000_prompt_pancreas.nii.gz", (score > 0).astype(np.uint8), like)

    def run(self, *flags: str | Path, ours: str = "ours", cases: bool = True) -> int:
        command = ["report", "-o", self.page, "--method", f"{ours}={self.ours / 'evaluation'}:{self.ours}"]
        command += ["--method", f"theirs={self.theirs / 'evaluation'}"]
        command += ["-r", self.references, "--images", self.images] if cases else []
        return main([*map(str, command), *map(str, flags)])

    def read(self) -> Page:
        return Page(self.page.read_text(encoding="utf-8"))


def write_image(path: Path, array: np.ndarray, like: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.CopyInformation(sitk.ReadImage(str(like)))
    sitk.WriteImage(image, str(path))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folders = Folders(tmp_path_factory.mktemp("made"))
    folders.make()
    return folders


@pytest.fixture
def folders(made: Folders, tmp_path: Path) -> Folders:
    shutil.copytree(made.root, tmp_path / "copy")
    return Folders(tmp_path / "copy")


@pytest.fixture
def with_viewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page has a viewer, whatever is installed."""
    script = html_viewer.Script("bW9kdWxl", "ipyniivue 0", "Copyright <somebody>")
    monkeypatch.setattr("zept_nnunet.evaluation.html_report.find_script", lambda: script)


@pytest.fixture
def without_viewer(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.distribution

    def missing(name: str) -> metadata.Distribution:
        if name == "ipyniivue":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr("importlib.metadata.distribution", missing)


def aggregate(folder: Path, name: str, scope: str, metric: str) -> float:
    m = pd.read_csv(folder / "evaluation" / "metrics.csv")
    rows = m[(m["case"] == "mean") & (m["class"] == name) & (m["scope"] == scope) & (m["metric"] == metric)]
    return float(rows["value"].iloc[0])


def test_the_page_is_complete_and_holds_the_figures(folders: Folders, with_viewer: None) -> None:
    assert folders.run() == 0
    page = folders.read()
    assert page.raw.startswith("<!DOCTYPE html>") and page.raw.rstrip().endswith("</html>")
    for column in table_columns(1.0):
        for folder in (folders.ours, folders.theirs):
            for name in ("liver tumor", "pancreas tumor"):
                value = aggregate(folder, name, *column.key)
                assert f"{value:.{column.digits}f} " in page.text, (column.title, name)
                assert f'data-label="{column.title}"' in page.raw
    assert "Research use only" in page.text and "synthetic" not in page.text.lower()
    assert page.text.index("pancreas tumor unseen in training") < page.text.index("liver tumor seen in training")
    assert page.raw.count("<svg viewBox") == 6  # ROC, FROC and healthy scans of two tumors
    assert len(page.ids) == len(set(page.ids))
    assert all(image["alt"] for image in page.images)
    assert all(str(image["src"]).startswith("data:image/png;base64,iVBOR") for image in page.images)
    titles = re.findall(r"<figcaption>([^<]*)</figcaption></figure>", page.raw)
    ours = {"ours", "ours: anomaly score", "ours: visual prompts"}
    assert {"image", "reference", *ours} <= set(titles) and "theirs" not in titles
    assert "healthy scan in which ours reports most false lesions" in page.text


def test_nothing_is_fetched(folders: Folders, with_viewer: None) -> None:
    assert folders.run() == 0
    page = folders.read()
    assert all(a.startswith(("data:", "#")) for a in page.addresses)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\((?!#)", page.raw)
    assert "default-src 'none'" in page.raw


def test_the_viewer_holds_the_volumes(folders: Folders, with_viewer: None, tmp_path: Path) -> None:
    assert folders.run("--cases", "case_000") == 0
    page = folders.read()
    data = re.search(r'id="viewer-data">(.*?)</script>', page.raw, re.DOTALL)
    assert data is not None
    (case,) = json.loads(data.group(1))
    assert [layer["name"] for layer in case["layers"]] == ["image", "reference", "ours", "ours: anomaly score"]
    reference = sitk.ReadImage(str(folders.references / "case_000.nii.gz"))
    expected = sitk.GetArrayFromImage(reference)
    for layer, values in zip(case["layers"][1:3], (expected, None), strict=True):
        path = tmp_path / "layer.nii.gz"
        path.write_bytes(base64.b64decode(layer["data"]))
        image = sitk.ReadImage(str(path))
        assert image.GetSize() == reference.GetSize() and image.GetOrigin() == pytest.approx(reference.GetOrigin())
        if values is not None:
            shown = sitk.GetArrayFromImage(image)
            assert ((shown == 1) == (values == 4)).all() and ((shown == 2) == (values == 3)).all()
    assert case["classes"] == ["pancreas tumor", "liver tumor"] and case["shrunk"] == 1
    x, y, z = case["crosshair"]
    index = reference.TransformPhysicalPointToIndex((-x, -y, z))
    assert all(0 <= i < n for i, n in zip(index, reference.GetSize(), strict=True))


def test_a_large_volume_is_shrunk(monkeypatch: pytest.MonkeyPatch, folders: Folders, with_viewer: None) -> None:
    monkeypatch.setattr(html_viewer, "_MOST_VOXELS", 1000)
    assert folders.run("--cases", "case_000") == 0
    assert '"shrunk": 2' in folders.read().raw


def test_names_are_escaped(folders: Folders, with_viewer: None) -> None:
    assert folders.run("--title", NASTY, ours=NASTY.replace("=", "≔")) == 0
    page = folders.read()
    assert NASTY in page.text and "<b " not in page.raw
    assert page.text.count(NASTY.replace("=", "≔")) > 10


def test_without_ipyniivue(folders: Folders, without_viewer: None) -> None:
    assert folders.run() == 0
    page = folders.read()
    assert 'pip install "zept-nnunet[report]"' in page.text and "<script" not in page.raw
    assert sum('class="montage"' in part for part in page.raw.split("<img")) == 2


def test_another_bundle_of_ipyniivue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ipyniivue" / "static").mkdir(parents=True)
    bundle = tmp_path / "ipyniivue" / "static" / "widget.js"

    class Installed:
        version = "9"
        files = ()

        def locate_file(self, name: str) -> Path:
            return tmp_path / name

    monkeypatch.setattr("importlib.metadata.distribution", lambda _: Installed())
    bundle.write_text("export{a as default};")
    assert "ipyniivue 9 holds no niivue" in str(html_viewer.find_script())
    bundle.write_text('console.log("Creating new Niivue instance");let B={};x=new $t(B)};export{a as default};')
    script = html_viewer.find_script()
    assert isinstance(script, html_viewer.Script)
    assert gzip.decompress(base64.b64decode(script.module)).decode().endswith("export{$t as Niivue};\n")


def test_the_installed_ipyniivue_serves() -> None:
    try:
        metadata.distribution("ipyniivue")
    except metadata.PackageNotFoundError:
        pytest.skip("ipyniivue is not installed")
    script = html_viewer.find_script()
    assert isinstance(script, html_viewer.Script) and "Redistribution" in script.license


def test_only_the_wanted_classes_and_cases(folders: Folders, without_viewer: None) -> None:
    assert folders.run("--classes", "Liver_Tumor", "--cases", "case_001", "healthy_000") == 0
    page = folders.read()
    assert "pancreas tumor" not in page.raw
    assert re.findall(r"<small>(\w+_\d+)</small>", page.raw) == ["case_001", "healthy_000"]


def test_a_committed_table_adds_rows(folders: Folders, without_viewer: None) -> None:
    rows = [
        {"size": "small", "configuration": "3d", "epochs": 20, "iterations": 50, "minutes": None, "method": "entropy",
         "seed": seed, "case": case, "class": "liver tumor", "scope": "host", "metric": "auroc", "value": value}
        for seed, case, value in ((0, "mean", 0.2), (1, "mean", 0.4), (0, "pooled", 0.9), (1, "pooled", 0.9))
    ]  # fmt: skip
    table = folders.root / "results" / "zero_shot.csv"
    table.parent.mkdir()
    pd.DataFrame(rows).to_csv(table, index=False)
    assert folders.run("--results", table) == 0
    page = folders.read()
    assert "entropy (zero_shot.csv)" in page.text and "results/zero_shot.csv, 2 seeds" in page.text
    assert "20 × 50 iterations" in page.text and "score: entropy of the softmax" in page.text
    assert "0.300 ± 0.141" in page.text


def test_rows_of_other_test_cases_stay_apart(tmp_path: Path) -> None:
    settings = [
        {"phantom": 1, "test_cases": None},
        {"phantom": 2, "test_cases": None},
        {"phantom": 2, "test_cases": 48},
    ]
    row = {
        "size": "small",
        "method": "zept",
        "seed": 0,
        "case": "mean",
        "class": "a",
        "scope": "host",
        "metric": "auroc",
    }
    pd.DataFrame([s | row | {"value": i / 10} for i, s in enumerate(settings)]).to_csv(tmp_path / "r.csv", index=False)
    methods = read_results(tmp_path / "r.csv", {})
    assert [m.cells["a"]["host", "auroc"].value for m in methods] == [0.0, 0.1, 0.2]
    assert ["48 test cases" in m.note for m in methods] == [False, False, True]


@pytest.mark.parametrize(
    ("zept", "note"),
    [
        (None, "reports a tumor by nnU-Net's decoding"),
        ({"thresholds": {}}, "reports a tumor by nnU-Net's decoding"),
        (
            {"thresholds": {"a": {"false_positives_per_scan": 0.5}}},
            "calibrated to 0.5 false positives per healthy scan",
        ),
    ],
)
def test_the_list_of_methods_says_where_each_reports_a_tumor(
    folders: Folders, without_viewer: None, zept: dict[str, Any] | None, note: str
) -> None:
    (folders.root / "ours" / "plans.json").write_text(json.dumps({"zept": zept}))
    assert folders.run() == 0
    assert note in folders.read().text


def write_retrieval(folder: Path) -> None:
    """As zept knowledge retrieve does, of a model that finds an unseen tumor in no scan."""
    found = CaseEmbeddings("a", "0", ("liver", "spleen", NASTY), np.eye(3, 4, dtype=np.float32))
    missing = replace(found, embeddings=np.where(np.eye(3)[:, :1] == 1, found.embeddings, np.nan))
    candidates, unseen = {"model's classes": dict(zip(found.names, np.eye(4), strict=False))}, (NASTY,)
    tables = [retrieval_table([missing], candidates, unseen), retrieval_table(swapped([found]), candidates, unseen)]
    blank = retrieval_table([missing] * 5, candidates, unseen, keep_missing=True)
    folder.mkdir(parents=True)
    summarize(*tables, blank).to_csv(folder / "summary.csv", float_format="%.4f")
    plot_embeddings([found], candidates["model's classes"], unseen, folder / "embeddings.png")


def test_retrieval_table_and_plot(folders: Folders, without_viewer: None) -> None:
    both = [folders.root / name for name in ("ours_texts", "theirs_texts")]
    for folder in both:
        write_retrieval(folder)
    (both[1] / "embeddings.png").unlink()
    assert folders.run("--retrieval", *both, cases=False) == 0
    page = folders.read()
    assert page.text.index("ours_texts") < page.text.index("theirs_texts") < page.text.index("No plot")
    assert NASTY in page.text and "<b " not in page.raw and "in place of the class's own" in page.text
    for title in SUMMARY_COLUMNS.values():
        assert page.raw.count(f'data-label="{title}"') == 2 * (3 + 2)  # three classes, seen ones, unseen ones
    liver = re.search(r">liver <small>seen</small></th>(.*)</tr>", page.raw)
    assert liver is not None
    assert re.findall(r">([^<]*)</td>", liver.group(1)) == [
        *("1.000", "1.000", "0.333", "1.000", "0.000", "1.000", "1.000", "1.000", "1.0", "1", "1", "5", "5")
    ]
    (image,) = page.images
    assert base64.b64decode(str(image["src"]).partition(",")[2]) == (both[0] / "embeddings.png").read_bytes()
    assert len(page.ids) == len(set(page.ids)) and all(a.startswith(("data:", "#")) for a in page.addresses)


def test_without_cases_and_curves(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    (folders.ours / "evaluation" / "curves.csv").unlink()
    (folders.theirs / "evaluation" / "curves.csv").unlink()
    assert folders.run(cases=False) == 0
    page = folders.read()
    assert "No evaluation holds curves" in page.text and not page.images and "Volumes" not in page.text
    printed = capsys.readouterr().out
    assert "no cases are shown" in printed and "no curves.csv" in printed


def test_synthetic_images_are_called_that(folders: Folders, without_viewer: None) -> None:
    path = folders.ours / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"zept_phantom": {"version": 2}}))
    assert folders.run() == 0
    assert "synthetic CT" in folders.read().text


def test_an_incomplete_evaluation_says_so(folders: Folders) -> None:
    path = folders.ours / "evaluation" / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps(summary | {"problems": ["case_001: <it> is missing"]}))
    assert folders.run(cases=False) == 0
    text = folders.read().text
    assert "incomplete: 1 problems" in text and "<it> is missing" in text


def test_a_page_is_kept_unless_told(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    folders.page.write_text("mine")
    assert folders.run(cases=False) == 1
    assert "--overwrite" in capsys.readouterr().err and folders.page.read_text() == "mine"
    assert folders.run("--overwrite", cases=False) == 0
    assert folders.page.read_text() != "mine"


def break_summary(folders: Folders) -> None:
    (folders.ours / "evaluation" / "summary.json").write_text("{}")


def remove_metrics(folders: Folders) -> None:
    (folders.ours / "evaluation" / "metrics.csv").unlink()


def spoil_curves(folders: Folders) -> None:
    (folders.ours / "evaluation" / "curves.csv").write_text("class,x\nliver tumor,0\n")


def spoil_retrieval(folders: Folders) -> None:
    (folders.ours / "evaluation" / "summary.csv").write_text("class,top1\nliver,0\n")


def remove_image(folders: Folders) -> None:
    for path in folders.images.iterdir():
        path.unlink()


def spoil_prediction(folders: Folders) -> None:
    for case in ("case_000", "case_001", "case_002"):
        write_labels(folders.ours / f"{case}.nii.gz", np.zeros((2, 3, 4)))


def other_cases(folders: Folders) -> None:
    path = folders.theirs / "evaluation" / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps(summary | {"cases": summary["cases"][1:]}))


def nothing(folders: Folders) -> None:
    pass


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (break_summary, [], "summary.json is damaged"),
        (remove_metrics, [], "metrics.csv is missing"),
        (spoil_curves, [], "curves.csv cannot be read: no column ci_high"),
        (remove_image, [], "_0000.nii.gz is missing"),
        (spoil_prediction, [], "not the same case"),
        (other_cases, [], "different cases (such as case_000)"),
        (nothing, ["--method", "ours=."], "holds no summary.json"),
        (nothing, ["--method", "alone"], "--method wants NAME=EVALUATION_FOLDER"),
        (nothing, ["--method", "x=no/such/folder"], "is no folder"),
        (nothing, ["--method", "ours={ours}"], "'ours' twice"),
        (nothing, ["--cases", "case_999"], "'case_999' was not evaluated"),
        (nothing, ["--classes", "bone tumor"], "'bone tumor' is no tumor"),
        (nothing, ["--results", "no.csv"], "no.csv is no file"),
        (nothing, ["--results", "{metrics}"], "Wanted the columns"),
        (nothing, ["--retrieval", "{ours}"], "holds no summary.csv; give a folder that zept knowledge retrieve"),
        (spoil_retrieval, ["--retrieval", "{ours}"], "summary.csv cannot be read: no column candidates"),
        (nothing, ["-o", "."], "is a folder"),
    ],
)
def test_bad_input(
    folders: Folders,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Folders], None],
    flags: list[str],
    message: str,
) -> None:
    spoil(folders)
    places = {"ours": folders.ours / "evaluation", "metrics": folders.ours / "evaluation" / "metrics.csv"}
    assert folders.run(*(flag.format(**places) for flag in flags)) == 1
    assert message in capsys.readouterr().err
    assert not [p for p in folders.root.iterdir() if p.name.startswith((".report", "report"))]


def test_references_and_images_belong_together(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    assert folders.run("-r", folders.references, cases=False) == 1
    assert "-r and --images belong together" in capsys.readouterr().err
    assert folders.run("--cases", "case_000", cases=False) == 1
    assert "--cases wants the references" in capsys.readouterr().err


def test_names_of_methods(tmp_path: Path) -> None:
    evaluation, predictions = tmp_path / "evaluation", tmp_path / "predictions"
    evaluation.mkdir()
    predictions.mkdir()
    assert parse_method(f" a method ={evaluation}") == ("a method", evaluation, None)
    assert parse_method(f"a={evaluation}:{predictions}") == ("a", evaluation, predictions)
    odd = tmp_path / "with:colon"
    odd.mkdir()
    assert parse_method(f"a={odd}") == ("a", odd, None)
