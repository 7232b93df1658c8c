"""Texts as vectors, against transformers' model and sentence-transformers' pooling written out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import cpu, model, tokenizer

import tfcli
from tfcli.infer.embed import embed
from tfcli.infer.engine import Engine

TEXTS = ["the king", "", "once upon a time there was a king who had three daughters", "从前 🎉", "a" * 400]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT with a WordPiece tokenizer, as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "the", "king", "##s", "time"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    (directory / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(vocab=str(directory / "vocab.txt"), model_max_length=64).save_pretrained(directory)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(directory)
    return directory


def test_vectors_equal_transformers_mean_pooling(bert: Path) -> None:
    """Would catch padding in the mean, a missing [CLS] or [SEP], a text cut elsewhere, and order lost by length."""
    import transformers

    pieces = transformers.AutoTokenizer.from_pretrained(bert)
    theirs = transformers.AutoModel.from_pretrained(bert).eval()
    batch = pieces(TEXTS, padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        hidden = theirs(**batch).last_hidden_state
    kept = batch.attention_mask[..., None].float()
    expected = torch.nn.functional.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1)
    ours = tfcli.load(bert, precision="fp32").embed(TEXTS)
    assert np.abs(ours - expected.numpy()).max() < 1e-5
    assert np.allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)


def test_a_vector_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches, one alone, and all at once: the same to the last digits."""
    engine = Engine(model(context=64), tokenizer(), cpu())
    together = engine.embed(TEXTS)
    monkeypatch.setattr("tfcli.infer.batches.POSITIONS", {"cpu": 40})
    assert np.allclose(engine.embed(TEXTS), together, atol=1e-6)
    assert np.allclose(engine.embed(TEXTS[0]), together[0], atol=1e-6)
    assert embed(engine.model, [[5]]).shape == (1, 32)


def test_what_is_cut_off_is_known() -> None:
    """Never in silence: the command counts what ``fitted`` says."""
    engine = Engine(model(context=8), tokenizer(), cpu())
    long = "the king " * 20
    fitted = engine.fitted(long)
    assert len(fitted.ids) == 8
    assert fitted.cut == len(engine.tokenizer.encode(long)) - 8
    assert engine.fitted("a").cut == 0
