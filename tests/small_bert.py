"""A small random BERT of transformers, with a WordPiece tokenizer whose words are lower-case letters."""

from pathlib import Path
from typing import Any

import pytest

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", *"0123456789", *".,?!'-()"]
WORDS += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]


def save(directory: Path, *, architecture: str = "BertModel", words: tuple[str, ...] = (), **changes: Any) -> Any:
    """Write the model directory as transformers does, and return the model; ``words`` are further pieces."""
    transformers = pytest.importorskip("transformers")
    import tiny_models

    directory.mkdir(parents=True, exist_ok=True)
    vocab = [*WORDS, *words]
    (directory / "vocab.txt").write_text("\n".join(vocab))
    transformers.BertTokenizerFast(vocab=str(directory / "vocab.txt"), model_max_length=64).save_pretrained(directory)
    sizes = {"vocab_size": len(vocab), "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
    made = tiny_models.foreign("bert", architecture=architecture, **{**sizes, **changes})
    made.save_pretrained(directory)
    return made
