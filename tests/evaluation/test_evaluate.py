"""`zept evaluate`, in this process: figures against the libraries, and everything that can be wrong with files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from tests.evaluation.small_folders import (
    PREDICTION_JSON,
    RAW_JSON,
    SPACING_MM,
    TUMORS,
    draw_prediction,
    draw_references,
    write_labels,
    write_predictions,
    write_references,
    write_scores,
)
from tests.evaluation.test_overlap import library_surface_dice
from zept_nnunet.cli import main
from zept_nnunet.evaluation.lesions import match_lesions


class Folders:
    """References and predictions of three cases with tumors and two without."""

    def __init__(self, root: Path):
        self.root = root
        self.cases = draw_references()
        self.references = write_references(root / "references", self.cases)
        self.predictions = write_predictions(root / "predictions", self.cases)
        self.out = root / "out"

    def run(self, *flags: str | Path, predictions: Path | None = None) -> int:
        command = ["-r", self.references, "-i", predictions or self.predictions, "-o", self.out, *flags]
        return main(["evaluate", *map(str, command), "--disable_progress_bar", "--bootstrap", "100"])

    def metrics(self, name: str = "metrics.csv") -> pd.DataFrame:
        return pd.read_csv(self.out / name)

    def summary(self) -> dict[str, Any]:
        return json.loads((self.out / "summary.json").read_text())

    def value(self, case: str, c: str, metric: str, scope: str = "volume") -> float:
        m = self.metrics()
        rows = m[(m["case"] == case) & (m["class"] == c) & (m["metric"] == metric) & (m["scope"] == scope)]
        assert len(rows) == 1, (case, c, metric, scope)
        return float(rows["value"].iloc[0])


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path)


def test_every_figure_of_a_case_equals_the_libraries(folders: Folders) -> None:
    assert folders.run() == 0
    for index, (case, reference) in enumerate(folders.cases.items()):
        labels, logits = draw_prediction(reference, index)
        for k, (name, value, host) in enumerate(zip(TUMORS, (3, 4), (1, 2), strict=True)):
            truth, prediction, score = reference == value, labels == value, logits[k].astype(float)
            in_host = np.isin(reference, (value, host))
            counts = match_lesions(truth, prediction, 0.1)
            assert folders.value(case, name, "false_positives") == counts.false_positives
            assert folders.value(case, name, "max_score") == score.max()
            if not truth.any():
                for metric in ("dsc", "nsd", "auroc", "aupr", "fpr95"):  # a clean scan is no Dice of 1
                    assert np.isnan(folders.value(case, name, metric))
                continue
            for scope, where in (("volume", np.ones_like(truth)), ("host", in_host)):
                fpr, tpr, _ = roc_curve(truth[where], score[where], drop_intermediate=False)
                inside = prediction & where
                expected = {
                    "dsc": 2 * (truth & inside).sum() / (truth.sum() + inside.sum()),
                    "nsd": library_surface_dice(truth, inside, SPACING_MM, 3.0),
                    "auroc": roc_auc_score(truth[where], score[where]),
                    "aupr": average_precision_score(truth[where], score[where]),
                    "fpr95": fpr[tpr >= 0.95].min(),
                }
                for metric, number in expected.items():
                    assert folders.value(case, name, metric, scope) == pytest.approx(number, abs=1e-6), (metric, scope)
            assert folders.value(case, name, "lesion_recall") == pytest.approx(counts.matched / counts.reference)
        for name, value in (("liver", 1), ("pancreas", 2)):
            truth, prediction = reference == value, labels == value
            expected_dice = 2 * (truth & prediction).sum() / (truth.sum() + prediction.sum())
            assert folders.value(case, name, "dsc") == pytest.approx(expected_dice, abs=1e-6)


def test_pooled_figures_are_over_all_voxels(folders: Folders) -> None:
    assert folders.run() == 0
    drawn = [(r, draw_prediction(r, i)[1][1]) for i, r in enumerate(folders.cases.values())]
    reference = np.concatenate([r.ravel() for r, _ in drawn])
    scores = np.concatenate([s.ravel() for _, s in drawn]).astype(float)
    assert folders.value("pooled", "pancreas tumor", "auroc") == pytest.approx(
        roc_auc_score(reference == 4, scores), abs=1e-6
    )
    inside = np.isin(reference, (2, 4))
    assert folders.value("pooled", "pancreas tumor", "aupr", "host") == pytest.approx(
        average_precision_score(reference[inside] == 4, scores[inside]), abs=1e-6
    )


def test_the_report(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    assert folders.run("--overwrite") == 0
    m = folders.metrics()
    assert list(m.columns)[:9] == "case class seen scope metric value unit ci_low ci_high".split()
    mean = m[(m["case"] == "mean") & (m["metric"] == "dsc") & (m["scope"] == "volume")].set_index("class")
    assert mean["seen"].to_dict() == {
        "liver": True,
        "pancreas": True,
        "liver tumor": True,
        "pancreas tumor": False,
        "(organs)": True,
        "(seen tumors)": True,
        "(unseen tumors)": False,
    }
    assert mean.loc["(organs)", "value"] == pytest.approx(mean.loc[["liver", "pancreas"], "value"].mean())
    holding = [folders.value(c, "liver tumor", "dsc") for c in folders.cases if c.startswith("case")]
    assert mean.loc["liver tumor", "value"] == pytest.approx(np.mean(holding))
    assert mean.loc["liver tumor", "ci_low"] <= mean.loc["liver tumor", "value"] <= mean.loc["liver tumor", "ci_high"]
    assert mean.loc["liver tumor", "cases"] == 3
    froc = m[(m["case"] == "mean") & (m["class"] == "liver tumor") & m["metric"].str.startswith("froc_sensitivity")]
    assert len(froc) == 7
    assert folders.value("mean", "liver tumor", "froc_score") == pytest.approx(froc["value"].mean())
    assert not m["metric"].str.contains("_at_fp_").any()
    summary = folders.summary()
    assert summary["complete"] and summary["healthy_scans"] == {"liver tumor": 2, "pancreas tumor": 2}
    assert summary["classes"]["pancreas tumor"]["host_values"] == [2, 4]
    printed = capsys.readouterr().out
    assert "no --calibration" in printed and "fewer than 30 healthy scans" in printed and "AUROC host" in printed


def test_shuffled_test_labels_bring_auroc_to_a_half(folders: Folders) -> None:
    rng = np.random.default_rng(0)
    for case, reference in folders.cases.items():
        shuffled = reference.copy()
        for host, value in ((1, 3), (2, 4)):
            inside = np.isin(reference, (host, value))
            shuffled[inside] = rng.permutation(reference[inside])
        write_labels(folders.references / f"{case}.nii.gz", shuffled)
    assert folders.run() == 0
    for name in TUMORS:
        assert folders.value("pooled", name, "auroc", "host") == pytest.approx(0.5, abs=0.06)
        assert folders.value("pooled", name, "auroc", "volume") > 0.6  # it only measures where the organ is


def test_thresholds_at_a_matched_rate(folders: Folders) -> None:
    cases = {f"val_{k}": v for k, v in draw_references(healthy=3, with_tumors=1).items()}
    references = write_references(folders.root / "val_references", cases)
    validation = write_predictions(folders.root / "val", cases, seed=7)
    flags = ("--calibration", validation, "--calibration-references", references, "--fp-rate", "1", "0.34")
    assert folders.run(*flags) == 0
    thresholds = folders.summary()["thresholds_logit"][0]
    assert folders.summary()["calibration_healthy_scans"] == [{"liver tumor": 3, "pancreas tumor": 3}]
    healthy = [draw_prediction(r, 700 + i)[1] for i, (n, r) in enumerate(cases.items()) if "healthy" in n]
    for k, name in enumerate(TUMORS):
        for rate, threshold in thresholds[name].items():
            below = np.nextafter(np.float16(threshold), np.float16(-np.inf))
            empty = np.zeros_like(healthy[0][k], dtype=bool)
            at = [match_lesions(empty, s[k] >= np.float16(threshold)).predicted for s in healthy]
            under = [match_lesions(empty, s[k] >= below).predicted for s in healthy]
            assert sum(at) <= float(rate) * 3 < sum(under)
            reference = folders.cases["case_000"]
            scores = draw_prediction(reference, 0)[1][k]
            truth, prediction = reference == (3, 4)[k], scores >= np.float16(threshold)
            dice = 2 * (truth & prediction).sum() / (truth.sum() + prediction.sum())
            assert folders.value("case_000", name, f"dsc_at_fp_{rate}") == pytest.approx(dice, abs=1e-6)
            counts = match_lesions(truth, prediction)
            assert folders.value("case_000", name, f"false_positives_at_fp_{rate}") == counts.false_positives
            recall = folders.value("case_000", name, f"lesion_recall_at_fp_{rate}")
            assert recall == pytest.approx(counts.matched / counts.reference)
    assert np.isfinite(folders.value("mean", "(unseen tumors)", "dsc_at_fp_1"))


def test_thresholds_never_come_from_the_test_set(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--calibration", folders.predictions, "--calibration-references", folders.references)
    assert folders.run(*flags) == 1
    assert "never from the test set" in capsys.readouterr().err
    assert not folders.out.exists()


def test_validation_cases_must_include_healthy_ones(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    cases = draw_references(healthy=0)
    references = write_references(folders.root / "val_references", cases)
    validation = write_predictions(folders.root / "val", cases)
    assert folders.run("--calibration", validation) == 1
    assert "--calibration-references" in capsys.readouterr().err
    assert folders.run("--calibration", validation, "--calibration-references", references) == 1
    assert "no healthy scan" in capsys.readouterr().err


def test_seeds_and_a_paired_comparison(folders: Folders) -> None:
    seeds = [write_predictions(folders.root / f"good{s}", folders.cases, s, quality=3.0) for s in range(2)]
    worse = [write_predictions(folders.root / f"bad{s}", folders.cases, 9 + s, quality=1.0) for s in range(2)]
    command = ["-r", folders.references, "-o", folders.out, "-i", *seeds, "--versus", *worse, "--bootstrap", "200"]
    assert main(["evaluate", *map(str, command), "--disable_progress_bar", "-np", "2"]) == 0
    m = folders.metrics()
    rows = m[(m["metric"] == "dsc") & (m["class"] == "liver tumor") & (m["scope"] == "volume")]
    assert sorted(rows[rows["case"] == "case_000"]["seed"]) == [0, 1]
    ours = rows[rows["case"] == "mean"]["value"].item()
    assert ours == pytest.approx(rows[rows["case"].str.startswith("case")]["value"].mean())
    c = folders.metrics("comparison.csv")
    row = c[(c["metric"] == "auroc") & (c["class"] == "(unseen tumors)") & (c["scope"] == "host")]
    assert row["value"].item() > 0.1 and row["ci_low"].item() > 0
    versus = folders.metrics("metrics_versus.csv")
    theirs = versus[(versus["metric"] == "auroc") & (versus["class"] == "(unseen tumors)") & (versus["case"] == "mean")]
    mine = m[(m["metric"] == "auroc") & (m["class"] == "(unseen tumors)") & (m["case"] == "mean")]
    host = (mine[mine["scope"] == "host"]["value"].item(), theirs[theirs["scope"] == "host"]["value"].item())
    assert row["value"].item() == pytest.approx(host[0] - host[1])

    def files() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in folders.out.iterdir()}

    before = files()
    assert main(["evaluate", *map(str, command), "--disable_progress_bar", "--overwrite"]) == 0
    assert files() == before  # one process or two: the same bytes


def test_strata(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    strata = folders.root / "strata.csv"
    strata.write_text("case,class,stratum\ncase_000,Pancreas tumor,low\ncase_001,pancreas tumor,high\n")
    assert folders.run("--strata", strata) == 0
    assert folders.value("mean", "pancreas tumor [low]", "dsc") == folders.value("case_000", "pancreas tumor", "dsc")
    strata.write_text("case,class,stratum\ncase_009,pancreas tumor,low\n")
    assert folders.run("--strata", strata, "--overwrite") == 1
    assert "line 2: there is no case 'case_009'" in capsys.readouterr().err


def test_by_dataset_id(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = folders.root / "raw" / "Dataset931_Small"
    write_references(raw / "labelsTs", folders.cases)
    (raw / "dataset.json").write_text(json.dumps(RAW_JSON))
    for module in ("paths", "utilities.dataset_name_id_conversion"):
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            target = _Path(str(folders.root / "raw")) if variable == "nnUNet_raw" else _Path(str(folders.root / "none"))
            monkeypatch.setattr(f"nnunetv2.{module}.{variable}", target)
    (folders.predictions / "plans.json").unlink()  # the raw dataset.json says alone who is unseen
    command = ["evaluate", "-d", "931", "-i", str(folders.predictions), "-o", str(folders.out), "--bootstrap", "5"]
    assert main([*command, "--disable_progress_bar"]) == 0
    assert [n for n, c in folders.summary()["classes"].items() if not c["seen"]] == ["pancreas tumor"]


class _Path(str):
    """As nnU-Net's own path variables."""

    def is_set(self) -> bool:
        return True


# --- what can be wrong ---


def incomplete(folders: Folders, capsys: pytest.CaptureFixture[str], message: str) -> None:
    assert folders.run() == 1
    error = capsys.readouterr().err
    assert message in error and "INCOMPLETE" in error
    summary = folders.summary()
    assert not summary["complete"] and any(message in p for p in summary["problems"])


def test_a_missing_prediction(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    assert folders.run() == 0
    names = {(r["class"], r["scope"], r["metric"]) for _, r in folders.metrics().iterrows() if r["case"] == "case_001"}
    for path in folders.out.iterdir():
        path.unlink()
    (folders.predictions / "case_001.nii.gz").unlink()
    incomplete(folders, capsys, "case_001.nii.gz is missing")
    m = folders.metrics()
    rows = m[m["case"] == "case_001"]
    assert rows["value"].isna().all()
    assert {(r["class"], r["scope"], r["metric"]) for _, r in rows.iterrows()} == names  # every row says so
    others = [folders.value(c, "liver tumor", "dsc") for c in ("case_000", "case_002")]
    assert folders.value("mean", "liver tumor", "dsc") == pytest.approx(np.mean(others))


def test_another_grid(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    write_labels(folders.predictions / "case_001.nii.gz", folders.cases["case_001"], origin=(0, 0, 0))
    incomplete(folders, capsys, "stands on another grid")
    assert np.isnan(folders.value("case_001", "liver", "dsc"))


def test_an_unknown_value(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    changed = folders.cases["case_001"].copy()
    changed[0, 0, 0] = 7
    write_labels(folders.predictions / "case_001.nii.gz", changed)
    incomplete(folders, capsys, "holds the values [7], which are no class")


def test_an_unknown_value_in_a_reference(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    changed = folders.cases["healthy_000"].copy()
    changed[0, 0, 0] = 9
    write_labels(folders.references / "healthy_000.nii.gz", changed)
    incomplete(folders, capsys, "holds the values [9], which are no class")
    assert folders.summary()["healthy_scans"]["liver tumor"] == 1  # it is not known to be healthy


def test_nan_scores(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    logits = draw_prediction(folders.cases["case_001"], 1)[1]
    logits[1, 2, 3, 4:6] = np.nan
    write_scores(folders.predictions / "case_001_scores.npz", logits)
    incomplete(folders, capsys, "2 scores of 'pancreas tumor' are NaN")
    assert np.isnan(folders.value("case_001", "pancreas tumor", "auroc"))
    assert np.isfinite(folders.value("case_001", "liver tumor", "auroc"))
    assert np.isfinite(folders.value("case_001", "pancreas tumor", "dsc"))  # the segmentation is not concerned


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("liver tumor", "brain tumor"), "'brain tumor', which is no tumor"),
        (("liver tumor", "pancreas"), "'pancreas', which is no tumor"),
    ],
)
def test_scores_of_an_unknown_class(
    names: tuple[str, str], message: str, folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scores(folders.predictions / "case_001_scores.npz", draw_prediction(folders.cases["case_001"], 1)[1], names)
    incomplete(folders, capsys, message)
    assert np.isnan(folders.value("case_001", "pancreas tumor", "auroc"))


def test_scores_that_are_missing_or_of_another_shape(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    write_scores(folders.predictions / "case_001_scores.npz", np.zeros((2, 3, 4, 5), dtype=np.float16))
    (folders.predictions / "case_002_scores.npz").unlink()
    incomplete(folders, capsys, "scores of shape (3, 4, 5)")
    assert any("case_002_scores.npz is missing" in p for p in folders.summary()["problems"])


def test_no_scores_at_all_is_said_and_complete(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    for path in folders.predictions.glob("*_scores.npz"):
        path.unlink()
    assert folders.run() == 0
    assert "no AUROC" in capsys.readouterr().out
    assert not folders.metrics()["metric"].str.contains("auroc|froc").any()


def test_a_class_that_the_model_does_not_report(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    (folders.predictions / "dataset.json").write_text(json.dumps(RAW_JSON))
    for case, reference in folders.cases.items():
        write_labels(folders.predictions / f"{case}.nii.gz", np.where(reference == 4, 2, reference))
    incomplete(folders, capsys, "does not report ['pancreas tumor']")
    assert np.isnan(folders.value("case_000", "pancreas tumor", "dsc"))
    assert folders.value("case_000", "liver tumor", "dsc") == 1


def test_a_reference_without_the_class_is_no_dice(folders: Folders) -> None:
    assert folders.run() == 0
    assert np.isnan(folders.value("healthy_000", "liver tumor", "dsc"))
    assert folders.value("healthy_000", "liver tumor", "false_positives") >= 0


def test_ignored_voxels_count_nowhere(folders: Folders) -> None:
    dataset_json = {**PREDICTION_JSON, "labels": {**PREDICTION_JSON["labels"], "ignore": 5}}
    (folders.predictions / "dataset.json").write_text(json.dumps(dataset_json))
    for case, reference in folders.cases.items():
        changed = reference.copy()
        changed[:, :, 13:] = 5
        write_labels(folders.references / f"{case}.nii.gz", changed)
    assert folders.run() == 0
    reference = folders.cases["case_000"][:, :, :13]
    labels, logits = (a[..., :13] for a in draw_prediction(folders.cases["case_000"], 0))
    truth, prediction = reference == 3, labels == 3
    dice = 2 * (truth & prediction).sum() / (truth.sum() + prediction.sum())
    assert folders.value("case_000", "liver tumor", "dsc") == pytest.approx(dice, abs=1e-6)
    auroc = roc_auc_score(truth.ravel(), logits[0].astype(float).ravel())
    assert folders.value("case_000", "liver tumor", "auroc") == pytest.approx(auroc, abs=1e-6)
    assert folders.value("case_000", "pancreas tumor", "false_positives") == 0


def test_what_a_case_does_not_annotate_is_left_out_and_listed(folders: Folders) -> None:
    dataset_json = {**PREDICTION_JSON, "zept": {"annotated": {"case_000": ["liver", "pancreas", "liver tumor"]}}}
    (folders.predictions / "dataset.json").write_text(json.dumps(dataset_json))
    assert folders.run() == 0
    assert folders.summary()["not_annotated"] == {"case_000": ["pancreas tumor"]}
    m = folders.metrics()
    assert not ((m["case"] == "case_000") & (m["class"] == "pancreas tumor")).any()


def test_an_earlier_report_is_kept(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    folders.out.mkdir()
    (folders.out / "comparison.csv").write_text("old")
    assert folders.run() == 1
    assert "--overwrite" in capsys.readouterr().err
    assert [p.name for p in folders.out.iterdir()] == ["comparison.csv"]
    assert folders.run("--overwrite") == 0
    assert sorted(p.name for p in folders.out.iterdir()) == ["curves.csv", "metrics.csv", "summary.json"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fp-rate", "-1"], "--fp-rate"),
        (["--lesion-iou", "0"], "--lesion-iou"),
        (["-np", "0"], "-np"),
        (["--calibration", "a", "b"], "one folder for each of -i (1)"),
        (["--versus", "nowhere"], "nowhere is no folder"),
        (["--strata", "nowhere.csv"], "nowhere.csv is no file"),
        (["--unseen", "brain tumor"], "'brain tumor'"),
    ],
)
def test_wrong_flags(flags: list[str], message: str, folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    assert folders.run(*flags) == 1
    assert message in capsys.readouterr().err
    assert not folders.out.exists()
