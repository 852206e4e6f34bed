"""A BERT of two layers with random weights and a vocabulary of a few words, saved as Hugging Face saves it."""

from __future__ import annotations

from pathlib import Path

WORDS = "a the in of dark bright mass round liver spleen tumor organ x , .".split()


def save_small_bert(folder: Path, width: int = 16, seed: int = 0) -> Path:
    import torch
    import transformers

    folder.mkdir(parents=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    transformers.BertTokenizerFast(vocab=str(vocabulary), model_max_length=32).save_pretrained(folder)
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=32,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder
