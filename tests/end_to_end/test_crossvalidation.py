"""Plan → train five folds → find best configuration → predict → ensemble → postprocess → evaluate → export."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from tests.commands import Workspace
from tests.conftest import read_json
from tests.small_ct import UNSEEN_HOSTS, UNSEEN_TUMOR
from tests.test_jobs import kill_first

pytestmark = pytest.mark.slow
PREDICT = ("-device", "cpu", "-npp", "1", "-nps", "1", "--disable_progress_bar")


def _voxels(folder: Path) -> dict[str, np.ndarray]:
    return {p.name: sitk.GetArrayFromImage(sitk.ReadImage(str(p))) for p in sorted(folder.glob("*.nii.gz"))}


@pytest.fixture(scope="module")
def predictions(workspace: Workspace, trained: Path) -> dict[str, Path]:
    """Test images predicted with all five folds, per configuration."""
    folders = {}
    for configuration in ("2d", "3d_fullres"):
        out = folders[configuration] = workspace.root / f"pred_{configuration}"
        workspace.run(
            "nnUNetv2_predict", "-i", trained / "imagesTs", "-o", out, "-d", "901", "-tr", "ZePTTrainerTest",
            "-c", configuration, "--save_probabilities", *PREDICT,
        )  # fmt: skip
    return folders


@pytest.fixture(scope="module")
def best(workspace: Workspace, trained: Path) -> dict[str, str]:
    """What nnUNetv2_find_best_configuration says of the best model or ensemble."""
    workspace.run(
        "nnUNetv2_find_best_configuration", "901", "-tr", "ZePTTrainerTest", "-c", "2d", "3d_fullres", "-np", "1"
    )
    information = read_json(workspace.results / trained.name / "inference_information.json")
    return information["best_model_or_ensemble"]


def test_a_fold_leaves_what_nnunet_leaves(workspace: Workspace, trained: Path) -> None:
    for configuration in ("2d", "3d_fullres"):
        model = workspace.model(trained.name, configuration)
        plans = read_json(model / "plans.json")
        assert set(plans["zept"]) >= {"version", "taxonomy", "knowledge", "decoder"}
        for fold in range(5):
            folder = model / f"fold_{fold}"
            for name in ("checkpoint_final.pth", "checkpoint_best.pth", "progress.png", "validation/summary.json"):
                assert (folder / name).is_file(), f"{folder / name}"
            assert list((folder / "validation").glob("*.npz"))
            log = next(folder.glob("training_log_*.txt")).read_text()
            assert "Stage I: organs" in log and "Stage II: organs and tumors" in log
            for term in ("organ_support", "organ_healthy", "tumor", "query_to_knowledge", "query_to_query"):
                assert term in log
            for written in (log, (folder / "debug.json").read_text()):
                assert "vector of 384" in written or "vectors" not in written
                assert len(written) < 200_000  # knowledge vectors stay out of log and debug.json


def test_left_and_right_switch_off_mirroring_along_x(workspace: Workspace, trained: Path) -> None:
    import torch

    axes = {}
    for configuration in ("2d", "3d_fullres"):
        file = workspace.model(trained.name, configuration) / "fold_0" / "checkpoint_final.pth"
        axes[configuration] = torch.load(file, weights_only=False)["inference_allowed_mirroring_axes"]
    transpose = read_json(workspace.model(trained.name, "2d") / "plans.json")["transpose_forward"]
    x = transpose.index(2)
    assert axes["3d_fullres"] == tuple(a for a in range(3) if a != x)
    assert axes["2d"] == tuple(a - 1 for a in (1, 2) if a != x)


def test_best_configuration_with_ensembling_then_postprocessing_and_evaluation(
    workspace: Workspace, trained: Path, predictions: dict[str, Path], best: dict[str, str]
) -> None:
    assert Path(best["postprocessing_file"]).is_file()  # which model or ensemble is best is the training's business
    ensembled, final = workspace.root / "ensembled", workspace.root / "postprocessed"
    workspace.run("nnUNetv2_ensemble", "-i", *predictions.values(), "-o", ensembled, "-np", "1")
    model = workspace.model(trained.name, "3d_fullres")
    workspace.run(
        "nnUNetv2_apply_postprocessing", "-i", ensembled, "-o", final, "-np", "1",
        "-pp_pkl_file", best["postprocessing_file"], "-plans_json", best["some_plans_file"],
        "-dataset_json", model / "dataset.json",
    )  # fmt: skip
    workspace.run(
        "nnUNetv2_evaluate_folder", trained / "labelsTs", final, "-np", "1",
        "-djfile", model / "dataset.json", "-pfile", model / "plans.json",
    )  # fmt: skip
    assert read_json(final / "summary.json")["metric_per_case"]


def test_export_and_install_predict_the_same_voxels(
    workspace: Workspace, trained: Path, predictions: dict[str, Path], tmp_path: Path
) -> None:
    archive = tmp_path / "model.zip"
    workspace.run(
        "nnUNetv2_export_model_to_zip", "-d", "901", "-o", archive, "-c", "3d_fullres", "-tr", "ZePTTrainerTest",
    )  # fmt: skip
    empty = Workspace(tmp_path / "elsewhere")
    empty.run("nnUNetv2_install_pretrained_model_from_zip", archive)
    empty.run(
        "nnUNetv2_predict", "-i", trained / "imagesTs", "-o", tmp_path / "again", "-d", trained.name,
        "-tr", "ZePTTrainerTest", "-c", "3d_fullres", *PREDICT,
    )  # fmt: skip
    before, after = _voxels(predictions["3d_fullres"]), _voxels(tmp_path / "again")
    assert before.keys() == after.keys() and before
    for name in before:
        assert np.array_equal(before[name], after[name])


def test_add_tumor_for_all_folds_then_predict_export_and_install(
    workspace: Workspace, trained: Path, predictions: dict[str, Path], tmp_path: Path
) -> None:
    model = workspace.model(trained.name, "3d_fullres")
    before = {p: p.stat().st_mtime_ns for p in sorted(model.rglob("*"))}
    workspace.run("zept", "add-tumor", model, "--declared")
    assert {p: p.stat().st_mtime_ns for p in sorted(model.rglob("*"))} == before, "the old folder stays untouched"
    plus = workspace.model(trained.name, "3d_fullres", plans="nnUNetPlans_plus")
    labels = read_json(plus / "dataset.json")["labels"]
    predict = ("-d", trained.name, "-tr", "ZePTTrainerTest", "-p", "nnUNetPlans_plus", "-c", "3d_fullres", *PREDICT)
    workspace.run("nnUNetv2_predict", "-i", trained / "imagesTs", "-o", tmp_path / "plus", *predict)
    old, new = _voxels(predictions["3d_fullres"]), _voxels(tmp_path / "plus")
    for name in old:
        _assert_changes_its_host_alone(old[name], new[name], labels)

    archive, empty = tmp_path / "plus.zip", Workspace(tmp_path / "elsewhere")
    workspace.run(
        "nnUNetv2_export_model_to_zip", "-d", "901", "-o", archive, "-c", "3d_fullres", "-tr", "ZePTTrainerTest",
        "-p", "nnUNetPlans_plus",
    )  # fmt: skip
    empty.run("nnUNetv2_install_pretrained_model_from_zip", archive)
    empty.run("nnUNetv2_predict", "-i", trained / "imagesTs", "-o", tmp_path / "again", *predict)
    again = _voxels(tmp_path / "again")
    for name in new:
        assert np.array_equal(new[name], again[name])
    shutil.rmtree(plus)


def _assert_changes_its_host_alone(before: np.ndarray, after: np.ndarray, labels: dict[str, int]) -> None:
    """But for voxels that it wins: its hosts are lowered, so another class, almost as sure, may have theirs."""
    changed = (after != before) & (after != labels[UNSEEN_TUMOR])
    assert set(np.unique(before[changed])) <= {labels[host] for host in UNSEEN_HOSTS}


def _json_files(*folders: Path) -> list[bytes]:
    """With their copies in cross-validation's results."""
    names = [f"{parent}{name}" for parent in ("", "crossval_results_*/") for name in ("plans.json", "dataset.json")]
    return [p.read_bytes() for folder in folders for name in names for p in sorted(folder.glob(name))]


def test_add_tumor_to_an_ensemble_of_2d_and_3d_then_ensemble_and_postprocess(
    workspace: Workspace, trained: Path, predictions: dict[str, Path], best: dict[str, str], tmp_path: Path
) -> None:
    results = workspace.results / trained.name
    (ensemble,) = (results / "ensembles").iterdir()
    if not (ensemble / "postprocessing.pkl").is_file():  # which is best is the training's business
        workspace.run(
            "nnUNetv2_determine_postprocessing", "-i", ensemble, "-np", "1",
            "-ref", workspace.preprocessed / trained.name / "gt_segmentations",
            "-plans_json", ensemble / "plans.json", "-dataset_json", ensemble / "dataset.json",
        )  # fmt: skip
    before = {p: p.stat().st_mtime_ns for p in sorted(results.rglob("*")) if p.is_file()}
    workspace.run("zept", "add-tumor", ensemble, "--declared")
    assert {p: p.stat().st_mtime_ns for p in before} == before
    grown = ensemble.with_name(ensemble.name.replace("nnUNetPlans", "nnUNetPlans_plus"))
    labels = read_json(grown / "dataset.json")["labels"]
    folders = []
    for configuration, old in predictions.items():
        folders.append(tmp_path / configuration)
        workspace.run(
            "nnUNetv2_predict", "-i", trained / "imagesTs", "-o", folders[-1], "-d", trained.name,
            "-tr", "ZePTTrainerTest", "-p", "nnUNetPlans_plus", "-c", configuration, "--save_probabilities", *PREDICT,
        )  # fmt: skip
        new = _voxels(folders[-1])
        for name, voxels in _voxels(old).items():
            _assert_changes_its_host_alone(voxels, new[name], labels)
    ensembled, final = tmp_path / "ensembled", tmp_path / "postprocessed"
    workspace.run("nnUNetv2_ensemble", "-i", *folders, "-o", ensembled, "-np", "1")
    workspace.run(
        "nnUNetv2_apply_postprocessing", "-i", ensembled, "-o", final, "-np", "1",
        "-pp_pkl_file", grown / "postprocessing.pkl",
        "-plans_json", grown / "plans.json", "-dataset_json", grown / "dataset.json",
    )  # fmt: skip
    found = _voxels(final)
    assert found.keys() == _voxels(predictions["2d"]).keys()
    assert all(set(np.unique(v)) <= set(labels.values()) for v in found.values())

    workspace.run("zept", "remove-tumor", grown, "--name", UNSEEN_TUMOR, "-o", tmp_path / "back")
    models = [workspace.model(trained.name, c) for c in ("2d", "3d_fullres")]
    back = [next((tmp_path / "back").glob(f"*__{c}")) for c in ("2d", "3d_fullres")]
    (ensemble_back,) = (tmp_path / "back" / "ensembles").iterdir()
    assert _json_files(*back, ensemble_back) == _json_files(*models, ensemble)
    assert len(_json_files(*models, ensemble)) == 10  # of two models, their cross-validations, and the ensemble
    for folder in (grown, *(workspace.model(trained.name, c, plans="nnUNetPlans_plus") for c in ("2d", "3d_fullres"))):
        shutil.rmtree(folder)


def test_a_benchmark_by_dataset_id_through_jobs_of_which_one_is_killed(
    workspace: Workspace, trained: Path, tmp_path: Path
) -> None:
    """Two models on one dataset, by submitit's local executor."""
    out = tmp_path / "benchmark"
    models = [f"{c}={workspace.model(trained.name, c)}" for c in ("2d", "3d_fullres")]
    flags = ("-f", "0", "-device", "cpu", "--disable_tta", "--bootstrap", "20")
    killer = threading.Thread(target=kill_first, args=(out, f"predict_2d_{trained.name}"))
    killer.start()
    said = workspace.run("zept", "benchmark", "-m", *models, "-d", "901", "-o", out, *flags, "--cluster", "local")
    killer.join()
    assert "once more" in said
    status = read_json(out / "status.json")
    assert {e["state"] for e in status.values()} == {"done"} and len(status) == 4
    assert status[f"predict_2d_{trained.name}"]["attempts"] == 2
    table = pd.read_csv(out / "benchmark.csv")
    assert set(table["class"]) >= {"liver", "liver tumor"} and {"2d", "3d_fullres"} <= set(table.columns)
    again = workspace.run("zept", "benchmark", "-m", *models, "-d", "901", "-o", out, *flags)  # nothing is left to do
    assert "===" not in again and "4 done" in workspace.run("zept", "benchmark", "-o", out, "--status")
