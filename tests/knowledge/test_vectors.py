from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from zept_nnunet.errors import ZePTError
from zept_nnunet.knowledge.vectors import read_vectors, text_key, write_vectors


def file_of(tmp_path: Path, texts: list[str], width: int = 4) -> Path:
    path = tmp_path / "v.safetensors"
    write_vectors(path, "some-encoder", "7", texts, np.random.default_rng(0).normal(size=(len(texts), width)))
    return path


def test_round_trip(tmp_path: Path) -> None:
    texts = ["a liver", "a spleen"]
    file = read_vectors(file_of(tmp_path, texts))
    assert (file.encoder, file.revision, file.width) == ("some-encoder", "7", 4)
    wanted = np.random.default_rng(0).normal(size=(2, 4))[1]
    found = file.find("anything", "  a  spleen\n", is_own_text=True)
    assert found is not None
    np.testing.assert_allclose(found, wanted / np.linalg.norm(wanted), atol=1e-6)
    assert file.find("a spleen", "a spleen, edited", is_own_text=False) is None
    assert not list(tmp_path.glob(".*"))


def test_vectors_of_ones_own_by_class_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    save_file({"Kidney_L": np.array([3.0, 4.0], dtype=np.float16)}, path)
    file = read_vectors(path)
    assert (file.encoder, file.width) == ("mine", 2)
    found = file.find("left kidney", "whatever text", is_own_text=False)
    assert found is not None and found.tolist() == pytest.approx([0.6, 0.8])
    assert file.find("left kidney", "the user's text", is_own_text=True) is None  # nobody encoded that text


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": np.ones(3), "b": np.ones(4)}, "same width"),
        ({"a": np.ones((2, 2))}, "same width"),
        ({}, "same width"),
        ({"a": np.array([1.0, np.nan])}, r"\['a'\] are not finite"),
        ({"a": np.zeros(3)}, "all zeros"),
        ({"a": np.array([1.0, np.inf])}, r"\['a'\] are not finite"),
        ({"a": np.ones(0)}, r"\['a'\]"),
    ],
)
def test_bad_vectors(tmp_path: Path, tensors: dict[str, np.ndarray], message: str) -> None:
    save_file({k: v.astype(np.float32) for k, v in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ZePTError, match=message):
        read_vectors(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("scale", "dtype"), [(1e-30, np.float32), (1e30, np.float32), (1e-300, np.float64), (1e300, np.float64)]
)
def test_vectors_whose_squares_overflow_are_made_unit(tmp_path: Path, scale: float, dtype: type) -> None:
    save_file({"a": (np.array([3.0, 4.0]) * scale).astype(dtype)}, tmp_path / "x.safetensors")
    found = read_vectors(tmp_path / "x.safetensors").find("a", "", is_own_text=False)
    assert found is not None and found.dtype == np.float32
    assert found.tolist() == pytest.approx([0.6, 0.8])


def test_damaged_files(tmp_path: Path) -> None:
    path = file_of(tmp_path, ["a liver"])
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x40  # one bit of one number
    path.write_bytes(content)
    with pytest.raises(ZePTError, match="checksum"):
        read_vectors(path)
    path.write_bytes(content[:-3])
    with pytest.raises(ZePTError, match="no readable safetensors file"):
        read_vectors(path)
    path.write_bytes(b"")
    with pytest.raises(ZePTError, match="no readable safetensors file"):
        read_vectors(path)
    with pytest.raises(ZePTError, match="no file of knowledge vectors"):
        read_vectors(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("key", ["encoder", "revision"])
def test_the_checksum_covers_who_made_the_vectors(tmp_path: Path, key: str) -> None:
    path = file_of(tmp_path, ["a liver"])
    with safe_open(path, framework="numpy") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, dict(file.metadata())  # noqa: SIM118
    save_file(tensors, path, metadata | {key: "another"})
    with pytest.raises(ZePTError, match="encoder and revision do not have the checksum"):
        read_vectors(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file_of(tmp_path, ["a liver"])
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zept_nnunet.knowledge.vectors.save_file", full)
    with pytest.raises(OSError, match="No space"):
        write_vectors(path, "e", "1", ["b"], np.ones((1, 4)))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_keys_tell_texts_apart_but_not_their_white_space() -> None:
    assert text_key("a  liver\n") == text_key("a liver") != text_key("a Liver")
