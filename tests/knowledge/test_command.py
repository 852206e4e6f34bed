"""`zept knowledge`, in this process; once as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.knowledge.small_bert import save_small_bert
from tests.small_plans import DATASET_JSON
from zept_nnunet.cli import main
from zept_nnunet.errors import ZePTError
from zept_nnunet.knowledge.catalog import catalog, descriptions_folder
from zept_nnunet.knowledge.vectors import read_vectors
from zept_nnunet.plans_block import build_block


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnUNet_raw with dataset 999, whose liver tumor is described by the user."""
    folder = tmp_path / "raw" / "Dataset999_Small"
    folder.mkdir(parents=True)
    unseen = {"unseen": {"pancreas tumor": {"hosts": ["pancreas"]}}, "knowledge": {"liver_tumor": "a dark mass"}}
    (folder / "dataset.json").write_text(json.dumps(DATASET_JSON | {"zept": unseen}))
    monkeypatch.setattr("zept_nnunet.commands.taxonomy.find_dataset_json", lambda _: folder / "dataset.json")
    return folder


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["knowledge", "list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(catalog())
    assert main(["knowledge", "list", "--kind", "tumor", "--host", "renal"]) == 1
    assert main(["knowledge", "list", "--host", "Kidneys"]) == 0
    out = capsys.readouterr().out
    assert "tumor  clear cell renal cell carcinoma  [kidney]" in out and "hepato" not in out


@pytest.mark.parametrize("host", ["liver tumor", "HCC", "nowhere", "tumor"])
def test_list_of_a_host_that_is_no_organ(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["knowledge", "list", "--host", host]) == 1
    out, error = capsys.readouterr()
    assert out == "" and f"--host {host!r}: no described organ" in error and "--kind organ" in error


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["knowledge", "show", "cancer", "--host", "liver"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("liver tumor (tumor;") and "mimics: " in out and "source: " in out
    assert main(["knowledge", "show", "spleem", "tumor"]) == 1
    assert "did you mean 'spleen tumor'" in capsys.readouterr().err


def test_check(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["knowledge", "check"]) == 0
    assert "schema, names and vectors in order" in capsys.readouterr().out
    (tmp_path / "more.yaml").write_text("entries: {liver: {kind: organ}}")
    assert main(["knowledge", "check", str(tmp_path / "more.yaml")]) == 1
    assert "'location' is a required property" in capsys.readouterr().err
    monkeypatch.setitem(catalog().entries["liver"].sections, "ct", "Edited.")  # type: ignore[arg-type]
    assert main(["knowledge", "check"]) == 1
    assert "zept knowledge encode -o" in capsys.readouterr().err


def test_check_of_a_dataset(capsys: pytest.CaptureFixture[str], dataset: Path) -> None:
    assert main(["knowledge", "check", "-d", "999"]) == 0
    out = capsys.readouterr().out
    assert "liver_tumor: own: a dark mass" in out and "pancreas tumor: built-in (pancreas tumor)" in out


def test_encode_by_another_encoder_and_train_with_it(
    capsys: pytest.CaptureFixture[str], dataset: Path, tmp_path: Path
) -> None:
    bert, out = save_small_bert(tmp_path / "bert"), tmp_path / "out" / "v.safetensors"
    assert main(["knowledge", "encode", "--encoder", str(bert), "-d", "999", "--text", "odd", "-o", str(out)]) == 0
    assert f'"vectors": "{out}"' in capsys.readouterr().out
    file = read_vectors(out)
    assert (file.encoder, file.width) == ("bert", 16) and len(file.by_text) > 800
    content = json.loads((dataset / "dataset.json").read_text())
    content["zept"]["vectors"] = str(out)
    knowledge = build_block(content)["knowledge"]
    assert (knowledge["encoder"], knowledge["width"]) == ("bert", 16)
    content["zept"]["knowledge"]["liver_tumor"] = "a dark mass, edited"
    with pytest.raises(ValueError, match=r"encode them by bert.*--text 'a dark mass, edited'"):
        build_block(content)
    content["zept"]["vectors"] = "v.safetensors"
    with pytest.raises(ValueError, match="absolute path"):
        build_block(content)


def test_encode_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["knowledge", "encode", "-o", str(tmp_path / "v.npz")]) == 1
    assert ".safetensors" in capsys.readouterr().err
    assert main(["knowledge", "encode", "--encoder", str(tmp_path), "-o", str(tmp_path / "v.safetensors")]) == 1
    assert capsys.readouterr().err.startswith("zept knowledge: cannot use the text encoder")
    (tmp_path / "d.safetensors").mkdir()
    (tmp_path / "file").touch()
    for out in ("d.safetensors", "file/v.safetensors"):
        assert main(["knowledge", "encode", "-o", str(tmp_path / out)]) == 1
        assert "cannot be written there" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.safetensors", "file"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--text", "a dark mass", "--text", "..."], "--text: a description needs at least one word"),
        (["--encoder", "bert", "--text", "..."], "--text: a description needs at least one word"),
        (["--text", "unscharf begrenzte Raumforderung in der Milz"], "--text: wanted English"),
        (["-d", "999"], "dataset.json: the description of 'spleen': wanted English"),
        (["-d", "999", "--encoder", "bert"], "dataset.json: the description of 'liver_tumor': a description of 20000"),
    ],
)
def test_encode_checks_every_text_before_it_encodes_one(
    argv: list[str],
    message: str,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def too_late(*_: object) -> None:
        raise AssertionError("a text is encoded")

    monkeypatch.setattr("zept_nnunet.knowledge.source.encode", too_late)
    texts = {"liver_tumor": "dark " * 20_000} if "--encoder" in argv else {"spleen": "dunkle Masse der Milz"}
    (dataset / "dataset.json").write_text(json.dumps(DATASET_JSON | {"zept": {"knowledge": texts}}))
    argv = [str(save_small_bert(tmp_path / "bert")) if word == "bert" else word for word in argv]
    assert main(["knowledge", "encode", *argv, "-o", str(tmp_path / "v.safetensors")]) == 1
    assert message in capsys.readouterr().err


def test_a_dataset_whose_organs_nothing_describes(
    capsys: pytest.CaptureFixture[str], dataset: Path, tmp_path: Path
) -> None:
    """What `encode -d` writes is all that planning needs, the queries for abnormal tissue too."""
    content = {"labels": {"background": 0, "flux organ": 1, "liver": 2, "liver tumor": 3}}
    (dataset / "dataset.json").write_text(json.dumps(content))
    bert, out = save_small_bert(tmp_path / "bert"), tmp_path / "v.safetensors"
    assert main(["knowledge", "encode", "--encoder", str(bert), "-d", "999", "-o", str(out)]) == 0
    content["zept"] = {"vectors": str(out)}
    (dataset / "dataset.json").write_text(json.dumps(content))
    assert main(["knowledge", "check", "-d", "999"]) == 0
    assert "abnormal flux organ" in build_block(content)["knowledge"]["vectors"]


def test_files_of_the_package_and_odd_names(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["knowledge", "check", str(descriptions_folder() / "organs.yaml")]) == 0
    text = "Somewhere in the body."
    entry = {"kind": "organ", **dict.fromkeys(("location", "shape", "structure", "ct"), text)}
    for name, more, message in (
        (False, {}, "put them in quotes"),
        ("flux organ", {"synonyms": ["--"]}, "holds no word"),
        ("flux organ", {"synonyms": ["Liver"]}, "'Liver'"),
    ):
        (tmp_path / "more.yaml").write_text(yaml.safe_dump({"entries": {name: entry | more}}))
        assert main(["knowledge", "check", str(tmp_path / "more.yaml")]) == 1
        assert message in capsys.readouterr().err


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """The system refuses to write more than 4 kB, as a full disk does."""
    bert = save_small_bert(tmp_path / "bert")
    out = tmp_path / "v.safetensors"
    code = (
        "import resource, signal, sys; from zept_nnunet.cli import main; import transformers, safetensors;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); sys.exit(main(sys.argv[1:]))"
    )
    argv = ["knowledge", "encode", "--encoder", str(bert), "-o", str(out)]
    done = subprocess.run([sys.executable, "-B", "-c", code, *argv], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert str(out) in done.stderr and "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bert"]


def test_vectors_of_ones_own(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    names = [n for n in DATASET_JSON["labels"] if n != "background"]
    rng = np.random.default_rng(0)
    path = tmp_path / "mine.safetensors"
    save_file({n: rng.normal(size=8).astype(np.float32) for n in names}, path)
    dataset_json = DATASET_JSON | {"zept": {"vectors": str(path)}}
    with pytest.raises(ValueError, match="abnormal pancreas"):  # the query for abnormal tissue needs one too
        build_block(dataset_json)
    save_file({n: rng.normal(size=8).astype(np.float32) for n in [*names, "abnormal pancreas"]}, path)
    assert build_block(dataset_json)["knowledge"]["width"] == 8


@pytest.mark.parametrize(
    ("first", "second", "is_twin"),
    [
        ("liver_tumor", "liver cyst", True),  # two tumors of one host
        ("liver", "spleen", True),
        ("liver", "liver_tumor", True),
        ("spleen", "liver_tumor", True),
        ("liver_tumor", "spleen_tumor", False),  # of two hosts
    ],
)
@pytest.mark.parametrize("factor", [1, 2])
def test_classes_of_one_place_with_the_same_vector(
    first: str,
    second: str,
    is_twin: bool,
    factor: int,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from safetensors.numpy import save_file

    labels = DATASET_JSON["labels"] | {"liver cyst": 6}
    rng = np.random.default_rng(0)
    vectors = {n: rng.normal(size=8).astype(np.float32) for n in [*labels, "abnormal pancreas"] if n != "background"}
    path = tmp_path / "mine.safetensors"
    save_file(vectors | {second: factor * vectors[first]}, path)
    dataset_json = DATASET_JSON | {"labels": labels, "zept": {"vectors": str(path)}}
    (dataset / "dataset.json").write_text(json.dumps(dataset_json))
    assert main(["knowledge", "check", "-d", "999"]) == int(is_twin)
    message = f"{first!r} and {second!r} have the same vector in {path}: nothing tells them apart"
    if is_twin:
        assert message in capsys.readouterr().err
        with pytest.raises(ZePTError, match=message):
            build_block(dataset_json)
    else:
        assert len(build_block(dataset_json)["knowledge"]["vectors"]) == 7


def test_an_unseen_tumor_with_the_vector_of_another(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    names = [*DATASET_JSON["labels"], "abnormal pancreas"]
    vectors = {n: rng.normal(size=8).astype(np.float32) for n in names if n != "background"}
    vectors["liver cyst"] = vectors["liver_tumor"].copy()
    save_file(vectors, tmp_path / "mine.safetensors")
    zept = {"vectors": str(tmp_path / "mine.safetensors"), "unseen": {"liver cyst": {"hosts": ["liver"]}}}
    (dataset / "dataset.json").write_text(json.dumps(DATASET_JSON | {"zept": zept}))
    assert main(["knowledge", "check", "-d", "999"]) == 1
    assert "'liver_tumor' and 'liver cyst' have the same vector in" in capsys.readouterr().err


def test_texts_that_the_encoder_reads_alike(dataset: Path) -> None:
    texts = {"liver_tumor": "a dark mass", "liver cyst": "A dark mass"}
    labels = DATASET_JSON["labels"] | {"liver cyst": 6}
    with pytest.raises(ZePTError, match=r"'liver_tumor' and 'liver cyst' have the same description \(own\)"):
        build_block(DATASET_JSON | {"labels": labels, "zept": {"knowledge": texts}})
