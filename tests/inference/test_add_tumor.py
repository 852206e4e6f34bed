from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from safetensors.numpy import save_file

from tests.inference.model_folder import make_model_folder, read_json, write_checkpoint
from tests.knowledge.small_bert import save_small_bert
from tests.small_plans import DATASET_JSON, make_network
from zept_nnunet.cli import main
from zept_nnunet.commands import add_tumor as command
from zept_nnunet.errors import ZePTError
from zept_nnunet.inference.add_tumor import TumorRequest, add_tumors, declared_requests
from zept_nnunet.inference.remove_tumor import remove_tumors
from zept_nnunet.inference.unchanged import check_unchanged
from zept_nnunet.knowledge import KnowledgeSource
from zept_nnunet.knowledge.vectors import read_vectors
from zept_nnunet.taxonomy import Taxonomy

PANCREAS = TumorRequest("pancreas tumor", ("pancreas",))
REGIONS: dict[str, Any] = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": [1, 2], "ignore": 4, "liver_tumor": [2], "spleen": [3]},
    "regions_class_order": [1, 2, 3],
    "numTraining": 5,
    "file_ending": ".nii.gz",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model_folder(tmp_path)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()
    }


def json_files(folder: Path) -> dict[str, bytes]:
    """plans.json and dataset.json, and their copies in crossval_results_*."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for name in ("plans.json", "dataset.json")
        for p in folder.rglob(name)
    }


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())
    return parser.parse_args(["add-tumor", *argv])


# ---------------------------------------------------------------------------------------------------- what is written
def test_default_output_is_a_sibling_that_holds_what_export_asks_for(model: Path) -> None:
    before = tree(model)
    added = add_tumors(model, [PANCREAS])
    assert tree(model) == before
    assert added.folder == model.parent / "ZePTTrainer__nnUNetPlans_plus__3d_fullres"
    assert added.tumors == (("pancreas tumor", 6, ("pancreas",)),)
    per_fold = ("checkpoint_best.pth", "checkpoint_final.pth", "debug.json", "progress.png", "validation/summary.json")
    assert set(tree(added.folder)) == {
        "dataset.json",
        "plans.json",
        "dataset_fingerprint.json",
        *(f"fold_{f}/{name}" for f in (0, 1) for name in per_fold),
        *(
            f"crossval_results_folds_0_1/{name}"
            for name in ("summary.json", "postprocessing.pkl", "postprocessing.json", "plans.json", "dataset.json")
        ),
    }
    plans, dataset_json = read_json(added.folder / "plans.json"), read_json(added.folder / "dataset.json")
    assert plans["plans_name"] == "nnUNetPlans_plus"
    assert plans["zept"]["added"]["pancreas tumor"]["unseen"] is True
    assert dataset_json["labels"] == {**DATASET_JSON["labels"], "pancreas tumor": 6}
    assert dataset_json["zept"] == {"tumors": {"pancreas tumor": {"hosts": ["pancreas"]}}}
    assert read_json(added.folder / "crossval_results_folds_0_1" / "dataset.json") == dataset_json
    assert not list(model.parent.glob(".*"))
    checkpoint = added.folder / "fold_0" / "checkpoint_final.pth"
    assert os.path.samefile(checkpoint, model / "fold_0" / "checkpoint_final.pth")
    assert any("hard links" in note for note in added.notes)


def test_copies_share_nothing(model: Path, tmp_path: Path) -> None:
    added = add_tumors(model, [PANCREAS], tmp_path / "out", copy_checkpoints=True)
    assert added.folder == tmp_path / "out"
    assert not os.path.samefile(added.folder / "fold_0/checkpoint_final.pth", model / "fold_0/checkpoint_final.pth")
    assert added.notes == ()


def test_new_network_loads_the_old_weights_and_changes_no_channel_but_its_hosts(model: Path) -> None:
    added = add_tumors(model, [PANCREAS])
    x = torch.randn(1, 1, 16, 24, 16)
    outputs = []
    for folder in (model, added.folder):
        network = make_network(block=read_json(folder / "plans.json")["zept"], deep_supervision=False).eval()
        weights = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
        network.load_state_dict(weights)
        with torch.inference_mode():
            outputs.append(network(x))
    heads = (
        PlansManager(read_json(added.folder / "plans.json"))
        .get_label_manager(read_json(added.folder / "dataset.json"))
        .num_segmentation_heads
    )
    assert outputs[1].shape[1] == heads == 7
    host = 1 + [o.name for o in network.taxonomy.organs].index("pancreas")  # its channel
    wanted = outputs[0].clone()
    wanted[:, host] = torch.minimum(wanted[:, host], -outputs[1][:, 6])
    torch.testing.assert_close(outputs[1][:, :6], wanted, rtol=0, atol=1e-4)


def test_region_dataset_with_ignore_between(tmp_path: Path) -> None:
    model = make_model_folder(tmp_path, REGIONS)
    added = add_tumors(model, [TumorRequest("spleen lesion"), TumorRequest("liver cyst", ("liver",), "thin wall")])
    dataset_json = read_json(added.folder / "dataset.json")
    assert added.tumors == (("spleen lesion", 4, ("spleen",)), ("liver cyst", 5, ("liver",)))
    assert dataset_json["labels"] == {**REGIONS["labels"], "ignore": 6, "spleen lesion": 4, "liver cyst": 5}
    assert dataset_json["regions_class_order"] == [1, 2, 3, 4, 5]
    assert dataset_json["zept"]["knowledge"] == {"liver cyst": "thin wall"}
    assert any("moved from 4 to 6" in note for note in added.notes)
    plans = read_json(added.folder / "plans.json")
    manager = PlansManager(plans).get_label_manager(dataset_json)
    assert manager.ignore_label == 6
    assert manager.num_segmentation_heads == 5 == len(Taxonomy.from_dict(plans["zept"]["taxonomy"]).channels)


def test_a_region_may_leave_a_gap(tmp_path: Path) -> None:
    added = add_tumors(make_model_folder(tmp_path, REGIONS), [TumorRequest("spleen lesion", label=7)])
    dataset_json = read_json(added.folder / "dataset.json")
    assert added.tumors == (("spleen lesion", 7, ("spleen",)),)
    manager = PlansManager(read_json(added.folder / "plans.json")).get_label_manager(dataset_json)
    assert (manager.ignore_label, manager.num_segmentation_heads) == (8, 4)


def test_declared_tumors_get_their_labels_and_stop_being_unseen(tmp_path: Path) -> None:
    declared = {
        "kidney cyst": {"hosts": ["spleen"]},
        "pancreas tumor": {"hosts": ["pancreas"], "label": 7},
        "spleen cyst": {"hosts": ["spleen"], "label": 6},
    }
    dataset_json = {**DATASET_JSON, "zept": {"unseen": declared, "knowledge": {"spleen cyst": "round, fluid"}}}
    model = make_model_folder(tmp_path, dataset_json)
    added = add_tumors(model, declared_requests(model))
    assert [t[:2] for t in added.tumors] == [("spleen cyst", 6), ("pancreas tumor", 7), ("kidney cyst", 8)]
    zept = read_json(added.folder / "dataset.json")["zept"]
    assert "unseen" not in zept
    assert set(zept["tumors"]) == set(declared)
    assert zept["knowledge"] == {"spleen cyst": "round, fluid"}
    with pytest.raises(ZePTError, match=r"nothing is listed"):
        declared_requests(added.folder)


def test_another_tumor_may_get_the_label_that_one_was_declared_with(tmp_path: Path) -> None:
    """Labels are consecutive: which tumor is added first gets the next one, and removing it gives the file back."""
    unseen = {"odd growth": {"hosts": ["spleen"], "label": 6}, "spleen cyst": {"hosts": ["spleen"], "label": 7}}
    model = make_model_folder(tmp_path, dataset_json={**DATASET_JSON, "zept": {"unseen": unseen}})
    added = add_tumors(model, [TumorRequest("pancreas tumor")])
    assert added.tumors == (("pancreas tumor", 6, ("pancreas",)),)
    left = {"odd growth": {"hosts": ["spleen"]}, "spleen cyst": unseen["spleen cyst"]}
    assert read_json(added.folder / "dataset.json")["zept"]["unseen"] == left
    more = add_tumors(added.folder, declared_requests(added.folder), tmp_path / "more")
    assert {name: label for name, label, _ in more.tumors} == {"odd growth": 8, "spleen cyst": 7}
    back = remove_tumors(more.folder, ["pancreas tumor", "odd growth", "spleen cyst"], tmp_path / "back")
    assert json_files(back.folder) == json_files(model)


def test_a_declared_tumor_by_name_takes_its_declaration(tmp_path: Path) -> None:
    dataset_json = {**DATASET_JSON, "zept": {"unseen": {"odd growth": {"hosts": ["spleen"], "label": 6}}}}
    added = add_tumors(make_model_folder(tmp_path, dataset_json), [TumorRequest("Odd_growth")])
    assert added.tumors == (("Odd_growth", 6, ("spleen",)),)
    assert "unseen" not in read_json(added.folder / "dataset.json")["zept"]


@pytest.mark.parametrize(
    ("request_", "hosts", "said"),
    [
        (TumorRequest("insulinoma"), ("pancreas",), "pancreatic neuroendocrine tumor"),
        (TumorRequest("odd growth", like="PDAC"), ("pancreas",), "pancreatic ductal adenocarcinoma"),
        (TumorRequest("spleen growth", like="PDAC"), ("spleen",), None),  # what the name says goes before
    ],
)
def test_hosts_that_the_description_knows(
    model: Path, request_: TumorRequest, hosts: tuple[str, ...], said: str | None
) -> None:
    added = add_tumors(model, [request_])
    assert added.tumors[0][2] == hosts
    told = [note for note in added.notes if note.startswith("host of")]
    assert len(told) == (said is not None) and all(str(said) in note and "--host" in note for note in told)


def test_hosts_that_the_description_knows_and_the_model_lacks(model: Path) -> None:
    with pytest.raises(ZePTError, match=r"'meningioma' says brain, and that is no organ of the model; give --host"):
        add_tumors(model, [TumorRequest("growth", like="meningioma")])


def test_a_tumor_can_be_added_to_a_model_that_has_an_added_one(model: Path) -> None:
    first = add_tumors(model, [PANCREAS])
    second = add_tumors(first.folder, [TumorRequest("pancreas cyst", ("pancreas",))])
    assert second.folder.name == "ZePTTrainer__nnUNetPlans_plus_plus__3d_fullres"
    taxonomy = Taxonomy.from_dict(read_json(second.folder / "plans.json")["zept"]["taxonomy"])
    assert [(t.name, t.label, t.added) for t in taxonomy.tumors[-2:]] == [
        ("pancreas tumor", 6, True),
        ("pancreas cyst", 7, True),
    ]


def test_a_fold_without_checkpoint_is_left_out(model: Path) -> None:
    (model / "fold_2").mkdir()
    added = add_tumors(model, [PANCREAS])
    assert not (added.folder / "fold_2").exists()
    assert any("fold_2" in note for note in added.notes)


# ---------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([TumorRequest("Liver-Tumour", ("liver",))], "'liver_tumor' already"),
        ([TumorRequest("background", ("liver",))], "keeps for itself"),
        ([TumorRequest(" ", ("liver",))], "needs a name"),
        ([TumorRequest("odd growth", ("kidney",))], "'kidney'"),
        ([TumorRequest("odd growth", ("liver_tumor",))], "is a tumor"),
        ([TumorRequest("odd growth")], "give --host"),
        ([TumorRequest("liver cyst", ("liver",), " ")], "description is empty"),
        ([TumorRequest("liver cyst", ("liver",), label=3)], "label 3 belongs to"),
        ([TumorRequest("liver cyst", ("liver",), label=8)], "leaves a gap"),
        ([TumorRequest("a b cyst", ("liver",)), TumorRequest("a_b cyst", ("spleen",))], "added twice"),
        ([], "no tumor to add"),
    ],
)
def test_bad_requests_write_nothing(model: Path, requests: list[TumorRequest], message: str) -> None:
    with pytest.raises(ZePTError, match=message):
        add_tumors(model, requests)
    assert [p.name for p in model.parent.iterdir()] == [model.name]


def test_bad_outputs(model: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for output, message in (
        (model, "no model is changed in place"),
        (tmp_path / "there", "exists already"),
        (model / "inside", "inside each other"),
        (model.parent, "inside each other"),
    ):
        with pytest.raises(ZePTError, match=message):
            add_tumors(model, [PANCREAS], output)
    add_tumors(model, [PANCREAS])
    with pytest.raises(ZePTError, match="exists already"):
        add_tumors(model, [PANCREAS])
    renamed = model.rename(model.parent / "my_model")
    with pytest.raises(ZePTError, match="give one with -o"):
        add_tumors(renamed, [PANCREAS])


@pytest.mark.parametrize("below", ["x", "deep/x"])
@pytest.mark.parametrize("count", [1, 2])
def test_an_output_below_a_file(model: Path, capsys: pytest.CaptureFixture[str], below: str, count: int) -> None:
    models = [model, second_model(model)][:count]
    file = model.parent / "file"
    file.touch()
    before = sorted(model.parent.rglob("*"))
    argv = ["add-tumor", *map(str, models), "--name", "pancreas tumor", "-o", str(file / below)]
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert f"the output {file / below}" in error and f"{file} is no folder" in error and "-o" in error
    assert sorted(model.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is no valid JSON"),
        (b'{"labels": "M\xfcller"}', "is no valid JSON.*UTF-8"),
        (b"[]", "holds list where"),
        (b"7", "holds int where"),
        (b"null", "holds NoneType where"),
    ],
)
@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
def test_json_files_that_cannot_be_read(model: Path, name: str, content: bytes, message: str) -> None:
    (model / name).write_bytes(content)
    with pytest.raises(ZePTError, match=f"{model / name} {message}.*restore"):
        add_tumors(model, [PANCREAS])


def test_folders_that_are_no_zept_model(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ZePTError, match="not a model folder"):
        add_tumors(tmp_path / "nowhere", [PANCREAS])
    plans, dataset_json = read_json(model / "plans.json"), read_json(model / "dataset.json")
    write_checkpoint(model, 1, plans, dataset_json, network_weights={"w": torch.zeros(1)}, trainer_name="nnUNetTrainer")
    with pytest.raises(ZePTError, match="trained by nnUNetTrainer"):
        add_tumors(model, [PANCREAS])
    (model / "fold_1" / "checkpoint_final.pth").write_bytes(b"broken")
    with pytest.raises(ZePTError, match="no readable checkpoint"):
        add_tumors(model, [PANCREAS])
    (model / "plans.json").write_text(json.dumps({k: v for k, v in plans.items() if k != "zept"}))
    with pytest.raises(ZePTError, match="'zept' block"):
        add_tumors(model, [PANCREAS])
    (model / "plans.json").write_text("{")
    with pytest.raises(ZePTError, match="no valid JSON"):
        add_tumors(model, [PANCREAS])
    assert [p.name for p in model.parent.iterdir()] == [model.name]


def test_no_trained_fold(tmp_path: Path) -> None:
    with pytest.raises(ZePTError, match="no trained fold"):
        add_tumors(make_model_folder(tmp_path, folds=()), [PANCREAS])


def test_a_fold_with_other_classes(model: Path) -> None:
    other = deepcopy(DATASET_JSON)
    other["labels"] = {**other["labels"], "pancreas_cyst": 6}
    from zept_nnunet.plans_block import build_block

    write_checkpoint(model, 1, {**read_json(model / "plans.json"), "zept": build_block(other)}, other)
    with pytest.raises(ZePTError, match=r"fold_1.*other classes.*differs in: taxonomy"):
        add_tumors(model, [PANCREAS])


def test_learned_queries(tmp_path: Path) -> None:
    with pytest.raises(ZePTError, match="one query per class"):
        add_tumors(make_model_folder(tmp_path, variant="paper"), [PANCREAS])


def test_second_stage_of_a_cascade(model: Path) -> None:
    plans = read_json(model / "plans.json")
    plans["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"
    (model / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(ZePTError, match="one input channel per"):
        add_tumors(model, [PANCREAS])


def test_interrupted_writing_leaves_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zept_nnunet.inference.model_folder as module

    def fail(*_: Any) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_link", fail)
    with pytest.raises(KeyboardInterrupt):
        add_tumors(model, [PANCREAS])
    assert [p.name for p in model.parent.iterdir()] == [model.name]


@contextmanager
def disk_of(bytes_a_file: int) -> Iterator[None]:
    """The system refuses to write a file beyond this size, as a full disk does; Python ignores the signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def between(small: Path, large: Path) -> int:
    """A size that the first file has room in, with some added, and the second has not."""
    low, high = small.stat().st_size, large.stat().st_size
    assert 2 * low < high
    return (low + high) // 2


@pytest.mark.parametrize("is_copy", [False, True], ids=["links", "copies"])
def test_a_full_disk_leaves_nothing(model: Path, capsys: pytest.CaptureFixture[str], is_copy: bool) -> None:
    file = "fold_0/checkpoint_final.pth" if is_copy else "plans.json"
    limit = between(model / "plans.json", model / file) if is_copy else 4096
    argv = ["add-tumor", str(model), "--name", "pancreas tumor", "-o", str(model.parent / "new" / "deep")]
    with disk_of(limit):
        assert main([*argv, "--copy"] if is_copy else argv) == 1
    assert f"File too large ({model.parent / 'new' / 'deep' / file})" in capsys.readouterr().err
    assert [p.name for p in model.parent.iterdir()] == [model.name]


def test_a_full_disk_when_a_tumor_is_removed(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plus = add_tumors(model, [PANCREAS]).folder
    back = model.parent / "new" / "back"
    with disk_of(4096):
        assert main(["remove-tumor", str(plus), "--name", "pancreas tumor", "-o", str(back)]) == 1
    assert f"File too large ({back / 'plans.json'})" in capsys.readouterr().err
    assert sorted(p.name for p in model.parent.iterdir()) == sorted([model.name, plus.name])


# ---------------------------------------------------------------------------------------------------- descriptions
def vector(folder: Path, name: str) -> list[float]:
    return read_json(folder / "plans.json")["zept"]["knowledge"]["vectors"][name]


def test_like_takes_a_built_in_description(model: Path) -> None:
    added = add_tumors(model, [TumorRequest("odd growth", ("spleen",), like="Hepatic metastases")])
    again = add_tumors(added.folder, [TumorRequest("liver metastasis", ("liver",))])
    assert vector(again.folder, "odd growth") == vector(again.folder, "liver metastasis")
    text = read_json(added.folder / "dataset.json")["zept"]["knowledge"]["odd growth"]
    assert text.startswith("liver metastasis.")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (TumorRequest("odd growth", ("liver",), like="liver metastasys"), "did you mean 'liver metastasis'"),
        (TumorRequest("odd growth", like="liver metastasys"), "did you mean 'liver metastasis'"),
        (TumorRequest("odd growth", like="liver"), "that is the organ 'liver'"),
        (TumorRequest("odd growth", ("liver",), "dark", like="HCC"), "give one of both"),
        (TumorRequest("odd growth", ("liver",), "dark " * 20_000), "20000 words"),
        (TumorRequest("odd growth", ("liver",), "unscharf begrenzte Raumforderung in der Milz"), "wanted English"),
    ],
)
def test_descriptions_that_are_refused(model: Path, request_: TumorRequest, message: str) -> None:
    with pytest.raises(ZePTError, match=message):
        add_tumors(model, [request_])
    assert [p.name for p in model.parent.iterdir()] == [model.name]


def test_an_encoder_of_another_width(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bert = save_small_bert(tmp_path / "bert")
    assert main(["add-tumor", str(model), "--name", "pancreas tumor", "--encoder", str(bert)]) == 1
    assert "width 384); got bert" in capsys.readouterr().err
    damaged = tmp_path / "v.safetensors"
    damaged.write_bytes(b"damaged")
    assert main(["add-tumor", str(model), "--name", "pancreas tumor", "--vectors", str(damaged)]) == 1
    assert "no readable safetensors file" in capsys.readouterr().err
    assert [p.name for p in model.parent.iterdir()] == [model.name]


def test_a_model_of_another_encoder_takes_tumors_by_that_encoder(tmp_path: Path) -> None:
    bert, path = save_small_bert(tmp_path / "bert"), tmp_path / "v.safetensors"
    assert main(["knowledge", "encode", "--encoder", str(bert), "-o", str(path)]) == 0
    model = make_model_folder(tmp_path, DATASET_JSON | {"zept": {"vectors": str(path)}})
    name = ["--name", "pancreas tumor", "--description", "a dark mass"]
    with pytest.raises(ZePTError, match="no vector for the text of"):
        add_tumors(model, [TumorRequest("pancreas tumor", None, "a dark mass")])
    assert main(["add-tumor", str(model), *name, "--encoder", str(bert)]) == 0
    assert len(vector(model.parent / "ZePTTrainer__nnUNetPlans_plus__3d_fullres", "pancreas tumor")) == 16


def test_a_model_on_vectors_of_ones_own_takes_a_file_with_one_more(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [n for n in DATASET_JSON["labels"] if n != "background"] + ["abnormal pancreas"]
    vectors = {n: rng.normal(size=8).astype(np.float32) for n in names}
    save_file(vectors, tmp_path / "mine.safetensors")
    model = make_model_folder(tmp_path, DATASET_JSON | {"zept": {"vectors": str(tmp_path / "mine.safetensors")}})
    with pytest.raises(ZePTError, match=r"mine.safetensors: no vector .*add a tensor of each of these names"):
        add_tumors(model, [PANCREAS])
    argv = ["add-tumor", str(model), "--name", "pancreas tumor", "--vectors", str(tmp_path / "more.safetensors")]
    save_file(vectors | {"pancreas tumor": rng.normal(size=8).astype(np.float32)}, tmp_path / "more.safetensors")
    assert main(argv) == 0
    shutil.rmtree(model.parent / "ZePTTrainer__nnUNetPlans_plus__3d_fullres")
    save_file(vectors | {"liver cyst": vectors["liver_tumor"]}, tmp_path / "twin.safetensors")
    message = r"'liver_tumor' and 'liver cyst' have the same vector in .*twin.safetensors: nothing tells them apart"
    with pytest.raises(ZePTError, match=message):
        source = KnowledgeSource(read_vectors(tmp_path / "twin.safetensors"))
        add_tumors(model, [TumorRequest("liver cyst")], knowledge=source)
    others = {n: v[::-1].copy() for n, v in vectors.items()} | {"pancreas tumor": vectors["liver"]}
    save_file(others, tmp_path / "more.safetensors")  # not the model's
    assert main(argv) == 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (TumorRequest("hepatic tumor", ("liver",)), "'liver_tumor' and 'hepatic tumor' have the same description"),
        (TumorRequest("odd growth", ("liver",), like="liver tumor"), "'liver_tumor' and 'odd growth'"),
        (TumorRequest("odd growth", ("liver",), like="liver"), "that is the organ 'liver'"),
        (TumorRequest("abnormal pancreas", ("pancreas",)), "query for abnormal pancreas"),
    ],
)
def test_tumors_that_nothing_would_tell_from_another_class(model: Path, request_: TumorRequest, message: str) -> None:
    with pytest.raises(ZePTError, match=message):
        add_tumors(model, [request_])
    assert [p.name for p in model.parent.iterdir()] == [model.name]


def test_a_stage_one_model_reports_no_tumor(model: Path) -> None:
    plans, dataset_json = read_json(model / "plans.json"), read_json(model / "dataset.json")
    write_checkpoint(model, 1, plans, dataset_json, trainer_name="ZePTTrainerStageI")
    with pytest.raises(ZePTError, match="is a stage I model"):
        add_tumors(model, [PANCREAS])


def test_checkpoints_that_are_relative_links_and_folders_made_on_the_way(model: Path, tmp_path: Path) -> None:
    path = model / "fold_0" / "checkpoint_final.pth"
    path.rename(model / "store.pth")
    path.symlink_to("../store.pth")
    added = add_tumors(model, [PANCREAS], tmp_path / "a" / "b" / "out")
    assert os.path.samefile(added.folder / "fold_0" / "checkpoint_final.pth", model / "store.pth")
    shutil.rmtree(tmp_path / "a")
    (model / "fold_1" / "checkpoint_final.pth").write_bytes(b"broken")
    with pytest.raises(ZePTError, match="no readable checkpoint"):
        add_tumors(model, [PANCREAS], tmp_path / "a" / "b" / "out")
    assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------------------------------------------- the check
def test_a_tumor_that_would_change_the_others_is_not_written(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zept_nnunet.network.zept import ZePT

    everything = lambda self, is_added: ZePT_visibility(self, [False] * len(is_added))  # noqa: E731
    ZePT_visibility = ZePT._visibility
    monkeypatch.setattr(ZePT, "_visibility", everything)  # as if trained queries attended to an added one
    with pytest.raises(ZePTError, match="would come out differently"):
        add_tumors(model, [PANCREAS])
    assert [p.name for p in model.parent.iterdir()] == [model.name]


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = read_json(path)
    edit(content)
    path.write_text(json.dumps(content))


def set_thresholds(folder: Path, **logits: float) -> None:
    edit_json(
        folder / "plans.json", lambda p: p["zept"].update(thresholds={n: {"logit": v} for n, v in logits.items()})
    )


def swap_labels(dataset_json: dict[str, Any]) -> None:
    labels = dataset_json["labels"]
    labels["liver"], labels["spleen"] = labels["spleen"], labels["liver"]


def paint_in_another_order(dataset_json: dict[str, Any]) -> None:
    dataset_json["regions_class_order"] = [2, 1, 3, 4]


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_threshold_that_changed_is_noticed(tmp_path: Path, dimensions: int) -> None:
    model = make_model_folder(tmp_path, dimensions=dimensions, folds=(0,))
    set_thresholds(model, liver_tumor=1.5)
    plus = add_tumors(model, [PANCREAS]).folder  # it has the threshold too
    configuration = model.name.split("__")[2]
    set_thresholds(plus, **{"liver_tumor": 1.5, "pancreas tumor": -3.0})  # that of the added tumor says nothing
    check_unchanged(model, plus, configuration)
    check_unchanged(plus, model, configuration)
    set_thresholds(plus, liver_tumor=1.0)
    with pytest.raises(ZePTError, match="would come out differently"):
        check_unchanged(model, plus, configuration)


@pytest.mark.parametrize(
    ("dataset_json", "spoil"),
    [(DATASET_JSON, swap_labels), (REGIONS, paint_in_another_order)],
    ids=["plain", "regions"],
)
def test_labels_that_changed_are_noticed(
    tmp_path: Path, dataset_json: dict[str, Any], spoil: Callable[[dict[str, Any]], None]
) -> None:
    """No channel differs: it is what nnU-Net makes of them."""
    model = make_model_folder(tmp_path, dataset_json, folds=(0,))
    plus = add_tumors(model, [TumorRequest("liver cyst")]).folder
    edit_json(plus / "dataset.json", spoil)
    with pytest.raises(ZePTError, match=r"another label in \d+ of 4096 voxels"):
        check_unchanged(model, plus, "3d_fullres")


def test_every_checkpoint_of_a_fold_is_run(model: Path) -> None:
    path = model / "fold_1" / "checkpoint_best.pth"
    checkpoint = torch.load(path, weights_only=False)
    next(v for k, v in checkpoint["network_weights"].items() if k.startswith("support_heads.2")).fill_(float("nan"))
    path.unlink()
    torch.save(checkpoint, path)
    with pytest.raises(ZePTError, match=r"fold_1/checkpoint_best\.pth: with the change"):
        add_tumors(model, [PANCREAS])
    assert [p.name for p in model.parent.iterdir()] == [model.name]


# ---------------------------------------------------------------------------------------------------- several folders
def make_ensemble(model: Path, other: Path) -> Path:
    """As nnUNetv2_find_best_configuration leaves it, where it is the best."""
    ensemble = model.parent / "ensembles" / f"ensemble___{model.name}___{other.name}___0_1"
    ensemble.mkdir(parents=True)
    for name in ("plans.json", "dataset.json"):
        shutil.copyfile(model / name, ensemble / name)
    (ensemble / "postprocessing.pkl").write_bytes(b"pkl")
    return ensemble


def test_a_full_disk_when_an_ensemble_is_written(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ensemble = make_ensemble(model, second_model(model))
    (ensemble / "postprocessing.pkl").write_bytes(bytes(4 * (model / "plans.json").stat().st_size))
    before = sorted(model.parent.rglob("*"))
    for flags in ([], ["-o", str(model.parent / "new" / "deep")]):
        with disk_of(between(model / "plans.json", ensemble / "postprocessing.pkl")):
            assert main(["add-tumor", str(ensemble), "--name", "pancreas tumor", *flags]) == 1
        error = capsys.readouterr().err
        assert "File too large" in error and "_plus__3d_lowres___0_1/postprocessing.pkl)" in error
        assert sorted(model.parent.rglob("*")) == before


def second_model(model: Path, name: str = "ZePTTrainer__nnUNetPlans__3d_lowres") -> Path:
    other = model.parent / name
    shutil.copytree(model, other)
    return other


def test_several_folders_all_or_none(model: Path) -> None:
    other = second_model(model)
    argv = ["add-tumor", str(model), str(other), "--name", "pancreas tumor"]
    (other / "fold_1" / "checkpoint_final.pth").write_bytes(b"broken")
    assert main(argv) == 1
    assert sorted(p.name for p in model.parent.iterdir()) == [model.name, other.name]
    shutil.copyfile(model / "fold_1" / "checkpoint_final.pth", other / "fold_1" / "checkpoint_final.pth")
    assert main(argv) == 0
    assert len(list(model.parent.glob("*nnUNetPlans_plus__3d_*"))) == 2
    assert main([*argv, "-o", str(model.parent / "elsewhere")]) == 0
    assert len(list((model.parent / "elsewhere").glob("*nnUNetPlans_plus__3d_*"))) == 2


def test_a_broken_model_leaves_no_folder_that_was_made_on_the_way(model: Path) -> None:
    other = second_model(model)
    (other / "fold_1" / "checkpoint_final.pth").write_bytes(b"broken")
    argv = ["add-tumor", str(model), str(other), "--name", "pancreas tumor", "-o"]
    (model.parent / "there").mkdir()
    assert main([*argv, str(model.parent / "new" / "deep")]) == 1
    assert main([*argv, str(model.parent / "there" / "deep")]) == 1
    assert not (model.parent / "new").exists() and not list((model.parent / "there").iterdir())


def test_an_ensemble_with_a_cascade_is_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = second_model(model, "ZePTTrainer__nnUNetPlans__3d_cascade_fullres")
    ensemble = make_ensemble(model, other)
    edit_json(other / "plans.json", lambda p: p["configurations"]["3d_fullres"].update(previous_stage="3d_lowres"))
    before = sorted(model.parent.rglob("*"))
    assert main(["add-tumor", str(ensemble), "--name", "pancreas tumor"]) == 1
    assert f"{other} is the second stage of a cascade" in capsys.readouterr().err
    assert sorted(model.parent.rglob("*")) == before


def test_an_ensembles_folder(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = second_model(model)
    ensemble = make_ensemble(model, other)
    assert main(["add-tumor", str(ensemble), "--name", "pancreas tumor"]) == 0
    out = capsys.readouterr().out
    assert out.count("--save_probabilities") == 2 and "nnUNetv2_ensemble" in out
    plus = [f.name.replace("nnUNetPlans", "nnUNetPlans_plus") for f in (model, other)]
    grown = ensemble.parent / f"ensemble___{plus[0]}___{plus[1]}___0_1"
    assert (grown / "postprocessing.pkl").read_bytes() == b"pkl"
    assert read_json(grown / "dataset.json")["labels"]["pancreas tumor"] == 6
    capsys.readouterr()
    removal = ["remove-tumor", str(grown), "--name", "pancreas tumor"]
    assert main(removal) == 1  # the trained members stand there
    assert "the model as it was trained; give -o FOLDER" in capsys.readouterr().err
    back = model.parent / "back"
    assert main([*removal, "-o", str(back)]) == 0
    assert len(list((back / "ensembles").iterdir())) == 1 and len(list(back.glob("ZePT*"))) == 2
    assert json_files(next(back.glob("*lowres"))) == json_files(other)
    assert json_files(next((back / "ensembles").iterdir())) == json_files(ensemble)
    shutil.rmtree(other)
    assert main(["add-tumor", str(ensemble), "--name", "pancreas cyst"]) == 1
    assert "not there" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- command line
def test_options_bind_to_the_name_before_them(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = parse(
        str(model),
        *("--name", "abdominal mass", "--host", "liver", "--host", "spleen", "--description", "large", "--label", "7"),
        *("--name", "pancreas tumor", "--host", "pancreas"),
    )
    assert args.tumors == [
        {"name": "abdominal mass", "hosts": ["liver", "spleen"], "description": "large", "label": 7},
        {"name": "pancreas tumor", "hosts": ["pancreas"]},
    ]
    assert args.func(args) == 0
    out = capsys.readouterr().out
    assert "added 'abdominal mass': label 7, host liver, spleen" in out
    assert "next: nnUNetv2_predict -d Dataset999_Small -tr ZePTTrainer -p nnUNetPlans_plus -c 3d_fullres" in out
    assert parse(str(model)).tumors == []  # one call leaves nothing to the next


@pytest.mark.parametrize(
    "argv", [("--host", "liver"), ("--name", "a", "--label", "6", "--label", "7"), ("--name", "a", "--label", "x")]
)
def test_options_that_bind_to_nothing(argv: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit):
        parse("model", *argv)


@pytest.mark.parametrize("argv", [(), ("--declared", "--name", "a")])
def test_name_or_declared(argv: tuple[str, ...]) -> None:
    args = parse("model", *argv)
    with pytest.raises(ZePTError, match="either --name"):
        args.func(args)
