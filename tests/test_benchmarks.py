"""The ablation covers every switch, by settings that the plans accept; each mutation still finds its place."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from tests.commands import Workspace
from tests.evaluation.small_folders import RAW_JSON, draw_references, write_predictions, write_references
from tests.small_plans import DATASET_JSON
from zept_nnunet.plans_block import DECODER_SETTINGS, TRAINING_SETTINGS, build_block
from zept_nnunet.taxonomy import Taxonomy, annotated_for, annotated_patterns, declared_unseen
from zept_nnunet.training.trainer import ZePTTrainer

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SIZES = {"width", "heads", "grouping_scales", "advanced_layers", "prompt_probability"}


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A script of benchmarks/, imported."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module(request.param)
    for name in (request.param, "zero_shot"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("script", ["mutations"], indirect=True)
def test_every_mutation_has_its_place_and_its_tests(script: ModuleType) -> None:
    assert {m.row for m in script.MUTATIONS} >= set(range(1, 11))
    for mutation in script.MUTATIONS:
        text = (BENCHMARKS.parent / mutation.file).read_text(encoding="utf-8")
        assert (mutation.what, text.count(mutation.old)) == (mutation.what, 1)
        assert all((BENCHMARKS.parent / test).is_file() for test in mutation.tests)


@pytest.mark.parametrize("script", ["ablation"], indirect=True)
def test_every_switch_has_a_variant_that_changes_it(script: ModuleType) -> None:
    default = build_block(deepcopy(DATASET_JSON))
    switched = set()
    for name, settings in script.VARIANTS.items():
        block = build_block(deepcopy(DATASET_JSON), settings=settings)
        changed = {k for part in ("decoder", "training") for k, v in block[part].items() if v != default[part][k]}
        assert changed == set(settings), name
        switched |= changed
    switches = set(DECODER_SETTINGS["zept"]) | set(TRAINING_SETTINGS["zept"])
    # the published score is more than a switch: its maps have no healthy logit (ZePTTrainerPaper)
    assert switches - SIZES - {"score"} == switched - SIZES


@pytest.mark.parametrize("script", ["ablation"], indirect=True)
def test_a_variant_keeps_the_settings_of_the_plans_that_it_varies(script: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "nnUNet_preprocessed" / "Dataset900_P"
    folder.mkdir(parents=True)
    plans = {"plans_name": script.PLANS, "zept": build_block(deepcopy(DATASET_JSON), settings={"width": 64})}
    (folder / f"{script.PLANS}.json").write_text(json.dumps(plans))
    dataset = tmp_path / "nnUNet_raw" / "Dataset900_P"
    dataset.mkdir(parents=True)
    (dataset / "dataset.json").write_text(json.dumps(DATASET_JSON))
    workspace = SimpleNamespace(folder=tmp_path)
    assert script.write_plans(workspace, dataset, "zept") == script.PLANS  # as planned: trained once for all benchmarks
    name = script.write_plans(workspace, dataset, "no_grouping")
    decoder = json.loads((folder / f"{name}.json").read_text())["zept"]["decoder"]
    assert decoder == plans["zept"]["decoder"] | {"grouping": False}


@pytest.mark.parametrize("script", ["descriptions"], indirect=True)
def test_descriptions_are_ranked_on_the_unseen_tumor_within_its_host(script: ModuleType, tmp_path: Path) -> None:
    """Two wordings: one whose scores find the tumor, one whose scores find the rest of the spleen."""
    raw, predictions = tmp_path / "raw", tmp_path / "predictions"
    for folder in (raw / "labelsTs", predictions):
        folder.mkdir(parents=True)
    content = {"labels": {"spleen": 1}, "zept": {"unseen": {"spleen tumor": {"hosts": ["spleen"], "label": 2}}}}
    (raw / "dataset.json").write_text(json.dumps(content))
    reference = np.zeros((4, 4, 4), dtype=np.uint8)
    reference[1:3], reference[1, :2] = 1, 2
    logits = np.where(reference == 2, 3.0, -3.0) + np.where(reference == 0, 100.0, 0.0)  # outside the host: no matter
    sitk.WriteImage(sitk.GetImageFromArray(reference), str(raw / "labelsTs" / "a.nii.gz"))
    names = [f"spleen tumor ({n})" for n in ("short", "generic")]
    np.savez(predictions / "a_scores.npz", logits=np.stack([logits, -logits]).astype(np.float16), classes=names)
    table = script.rank(raw, predictions, "spleen tumor", {"short": "", "generic": ""}).set_index("wording")
    assert table["AUROC in host"].tolist() == [1.0, 0.0] and table["is_right"].tolist() == [True, False]
    found, tumor = (logits > 0).sum(), (reference == 2).sum()
    assert table.loc["short", "DSC"] == pytest.approx(2 * tumor / (found + tumor))


@pytest.mark.parametrize("script", ["descriptions"], indirect=True)
def test_final_unseen_types_are_described_rightly_generically_and_wrongly(script: ModuleType, tmp_path: Path) -> None:
    record = {"development_unseen": ["spleen tumor"], "final_unseen": ["pancreas tumor", "stomach tumor"]}
    (tmp_path / "dataset.json").write_text(json.dumps({"zept_phantom": record}))
    assert set(script.wordings(tmp_path, final=False)) == {"spleen tumor"}
    final = script.wordings(tmp_path, final=True)
    assert set(final) == set(record["final_unseen"])
    own = {tumor: texts["built-in"] for tumor, texts in final.items()}
    assert "pancreas" in own["pancreas tumor"].lower() and "antrum" in own["stomach tumor"].lower()
    assert {texts["generic"] for texts in final.values()} == {"a tumor"}
    others = [texts["another unseen tumor's"] for texts in final.values()]
    assert others == [own["stomach tumor"], script.RIGHT["built-in"]]
    assert {name for texts in final.values() for name in texts if name in script.RIGHT} == {"built-in"}


@pytest.mark.parametrize("script", ["zero_shot"], indirect=True)
def test_final_unseen_types_stay_out_of_the_table_until_they_are_asked_for(script: ModuleType, tmp_path: Path) -> None:
    record = {"version": 2, "final_unseen": ["pancreas tumor"]}
    (tmp_path / "dataset.json").write_text(json.dumps({"zept_phantom": record}))
    names = [
        "liver tumor",
        "pancreas tumor",
        "pancreas tumor [CNR < 7]",
        "pancreas",
        "(unseen tumors)",
        "(seen tumors)",
    ]
    report = pd.DataFrame({"case": "mean", "class": names, "seen": True, "scope": "host", "metric": "auroc"})
    report = report.assign(value=0.5, unit="fraction", ci_low=0.4, ci_high=0.6)
    args = argparse.Namespace(size="tiny", configuration="2d", epochs=1, iterations=1, minutes=None, test_cases=None,
                              seeds=2, jobs=1, device="cpu")  # fmt: skip
    workspace = SimpleNamespace(args=args, evaluate=lambda method, seed: report)
    runs: list[tuple[str, int]] = []

    def one(method: str, seed: int) -> float:
        runs.append((method, seed))
        return 1.0

    found = {}
    for final in (False, True, False):
        out = tmp_path / f"{final}.csv"
        found[final] = script.measure(workspace, tmp_path, ["a", "b"], one, out, final=final)
    assert runs == [("a", 0), ("b", 0), ("a", 1), ("b", 1)] * 2  # the third time its rows were there
    assert set(found[False]["class"]) == {"liver tumor", "pancreas", "(seen tumors)"} and len(found[False]) == 12
    assert set(found[True]["class"]) == {"pancreas tumor", "pancreas tumor [CNR < 7]", "(unseen tumors)"}


@pytest.mark.parametrize("script", ["zero_shot"], indirect=True)
def test_rows_of_a_run_are_written_all_or_none(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, path = pd.DataFrame({"method": ["a", "a"], "value": [0.1234567, np.nan]}), tmp_path / "results" / "r.csv"
    script.append_rows(rows, path)
    script.append_rows(rows.assign(method="b"), path)
    text = path.read_text()
    assert text == "method,value\na,0.12346\na,\nb,0.12346\nb,\n"

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        script.append_rows(rows, path)
    assert path.read_text() == text


@pytest.mark.parametrize("script", ["paired"], indirect=True)
def test_two_methods_are_compared_over_the_same_seeds_and_cases(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the real `zept evaluate`: a method that finds the tumors, and one that mostly does not."""
    folder = tmp_path / "tiny"
    raw = folder / "nnUNet_raw" / "Dataset900_P"
    cases, validation = draw_references(healthy=2, with_tumors=4), draw_references(healthy=2, with_tumors=1)
    write_references(raw / "labelsTs", cases)
    write_references(raw / "labelsTr", {f"v_{case}": array for case, array in validation.items()})
    record = {"version": 2, "final_unseen": ["pancreas tumor"]}
    (raw / "dataset.json").write_text(json.dumps({**RAW_JSON, "zept_phantom": record}))
    monkeypatch.setattr(script.Workspace, "prepare", lambda self: raw)
    monkeypatch.setattr(script.Workspace, "can_calibrate", lambda self: True)
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results" / "paired.csv")
    monkeypatch.setattr(script, "SAMPLES", 50)
    flags = ["--size", "tiny", "--seeds", "2", "--epochs", "1", "--device", "cpu", "--workspace", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["paired.py", *flags, "--methods", "supervised"])
    with pytest.raises(SystemExit, match=r"no predictions in .*zept/seed0/test.*--methods zept first"):
        script.main()
    for method, quality in (("zept", 4.0), ("supervised", 1.0)):
        for seed in range(2):
            out = folder / "runs" / "3d_fullres_1x50" / method / f"seed{seed}"
            write_predictions(out / "test", cases, seed, quality)
            write_predictions(out / "validation", {f"v_{c}": a for c, a in validation.items()}, seed + 5, quality)
    for _ in range(2):  # the second time its rows are replaced
        script.main()
    table = pd.read_csv(tmp_path / "results" / "paired.csv").set_index(["class", "scope", "metric"])
    assert table.index.is_unique and set(table["versus"]) == {"supervised"} and set(table["seeds"]) == {2}
    assert "pancreas tumor" not in table.index.get_level_values("class")  # --final was not given
    ours = table.loc["liver tumor", "host", "auroc"]
    assert 0 < ours["ci_low"] < ours["difference"] < ours["ci_high"]
    assert ours["ratio"] == pytest.approx(ours["ours"] / (ours["ours"] - ours["difference"]), rel=1e-3)
    assert ("liver tumor", "volume", "lesion_recall_at_fp_1") in table.index
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--final"])
    script.main()
    final = pd.read_csv(tmp_path / "results" / "paired_final.csv")
    assert set(final["class"]) >= {"pancreas tumor"} and "liver tumor" not in set(final["class"])
    assert "AUROC in host" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["real_tumors"], indirect=True)
def test_the_real_tumors_are_unseen(script: ModuleType) -> None:
    """The dataset can be planned; no training label or lesion is a liver tumor, and the test cases label it."""
    taxonomy = Taxonomy.from_dataset_json(script.CONTENT)
    assert {t.name for t in taxonomy.tumors} == set(script.SEEN) and script.UNSEEN not in script.LABELS
    assert {name for i in range(40) for name in script.classes_of(i)} == set(script.SEEN)
    test = [script.test_classes_of(i) for i in range(16)]
    assert test.count(()) == 8 and test.count((script.UNSEEN,)) == 4
    assert {name for names in test for name in names} == {*script.SEEN, script.UNSEEN}
    (unseen,) = declared_unseen(script.CONTENT)
    assert (unseen.name, unseen.hosts, unseen.label) == ("liver tumor", ("liver",), 9)
    named = annotated_for(script.TEST_CASE, annotated_patterns(script.CONTENT))
    assert named == ("liver", "liver tumor")
    assert annotated_for("phantom_000", annotated_patterns(script.CONTENT)) is None
    assert "liver" in build_block(deepcopy(script.CONTENT))["anomalies"].values()


@pytest.mark.parametrize("script", ["zero_shot"], indirect=True)
def test_equal_iterations_and_equal_wall_clock_stand_side_by_side(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "zero_shot.py --methods any_tumor zept --seeds 2 --epochs 3 --iterations 250 --minutes 10 --device cpu"
    results = str(tmp_path / "results.csv")
    monkeypatch.setattr(sys, "argv", [*command.split(), "--workspace", str(tmp_path), "--results", results])
    monkeypatch.setattr(script.Workspace, "prepare", lambda self: tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps({"zept_phantom": {"version": 2, "final_unseen": ["none"]}}))
    runs: list[tuple[str, str, int]] = []
    monkeypatch.setattr(
        script.Workspace,
        "train_and_predict",
        lambda self, method, seed, dataset: runs.append((self.budget, method, seed)),
    )

    def report(self: Any, method: str, seed: int) -> pd.DataFrame:
        value = 0.1 * seed + (0.5 if self.args.minutes else 0.7)
        row = {"case": "pooled", "class": "spleen tumor", "seen": False, "scope": "host", "metric": "auroc"}
        return pd.DataFrame([row | {"value": value, "unit": "fraction", "ci_low": 0.0, "ci_high": 1.0}])

    monkeypatch.setattr(script.Workspace, "evaluate", report)
    for _ in range(2):  # the second time everything is there
        script.main()
    assert runs == [(b, m, s) for b in ("3d_fullres_3x250", "3d_fullres_10min") for s in (0, 1)
                    for m in ("any_tumor", "zept")]  # fmt: skip
    shown = capsys.readouterr().out
    assert shown.count("zept") == shown.count("any_tumor") == 2  # one table a run
    assert re.findall("equal iterations: 3x250 +equal wall-clock: 10min", shown)
    assert len(re.findall("0.750 ± 0.071 +0.550 ± 0.071", shown)) == 2 * 2


@pytest.mark.parametrize("script", ["zero_shot"], indirect=True)
def test_some_test_cases_are_as_many_of_each_kind_and_none_of_final_types(script: ModuleType) -> None:
    holds = {f"healthy{i:02d}": set() for i in range(20)}
    holds |= {f"liver{i}": {"liver tumor", "kidney tumor"} for i in range(8)}
    holds |= {f"spleen{i}": {"spleen tumor"} for i in range(3)} | {f"pancreas{i}": {"pancreas tumor"} for i in range(8)}
    drawn = script.draw_cases(holds, ["pancreas tumor", "stomach tumor"], 15)
    assert drawn == script.draw_cases(dict(reversed(holds.items())), ["stomach tumor", "pancreas tumor"], 15)
    counts = {kind: sum(case.startswith(kind) for case in drawn) for kind in ("healthy", "liver", "spleen", "pancreas")}
    assert counts == {"healthy": 5, "liver": 5, "spleen": 3, "pancreas": 0} and len(set(drawn)) == 13


@pytest.mark.parametrize("script", ["iteration_time"], indirect=True)
def test_steps_of_each_stage_and_of_nnunet_take_turns(
    script: ModuleType, planned: Path, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"nnUNet_raw": workspace.raw, "nnUNet_preprocessed": workspace.preprocessed, "nnUNet_results": tmp_path}
    for name, folder in folders.items():
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    stages: list[int] = []
    step = ZePTTrainer.train_step

    def watched(self: ZePTTrainer, batch: dict[str, Any]) -> dict[str, Any]:
        result = step(self, batch)
        stages.append(self._zept().stage)
        return result

    monkeypatch.setattr(ZePTTrainer, "train_step", watched)
    args = argparse.Namespace(configuration="3d_fullres", device="cpu", rounds=2, steps=1)
    rows = pd.DataFrame(script.measure(args, planned.name, "nnUNetPlans"))
    assert stages == [1] * script.WARM_UP + [2] * script.WARM_UP + [1, 2] * 2
    taken = rows.pivot(index="round", columns="step", values="seconds")
    assert (taken > 0).all(axis=None) and (rows["seconds_to_draw"] > 0).all()
    assert np.allclose(taken["zept"], 0.2 * taken["zept, stage I"] + 0.8 * taken["zept, stage II"])


@pytest.mark.parametrize("script", ["iteration_time"], indirect=True)
def test_a_step_is_compared_with_nnunets_of_its_own_round(script: ModuleType) -> None:
    rows = [
        {"step": step, "round": number, "seconds": base * factor, "seconds_to_draw": 0.1}
        for run in (1.0, 3.0)  # the machine was three times slower when the script ran again
        for number, base in enumerate((run, 2 * run))
        for step, factor in (("nnU-Net", 1.0), ("zept", 1.5))
    ]
    table = script.summary(pd.DataFrame(rows))
    assert table["ratio"].to_dict() == {"nnU-Net": "1.000 ± 0.000", "zept": "1.500 ± 0.000"}
    assert table.loc["nnU-Net", "seconds"].startswith("3.000 ± ")
