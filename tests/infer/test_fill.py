"""Filling in, against transformers' own pipeline."""

from pathlib import Path
from typing import Any

import pytest
from tiny_models import cpu, model, tokenizer

from tfcli.errors import UserError
from tfcli.formats.hf import heads
from tfcli.infer.fill import Filler

TEXTS = ["the [MASK] a", "[MASK]", "a b c the king [MASK]ing the [MASK] of time", "time [MASK]"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BertForMaskedLM with a WordPiece tokenizer, as transformers saves them."""
    from tiny_models import foreign

    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "the", "king", "##s", "time"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    (directory / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(vocab=str(directory / "vocab.txt"), model_max_length=64).save_pretrained(directory)
    foreign("bert", architecture="BertForMaskedLM", vocab_size=len(words)).save_pretrained(directory)
    return directory


def test_probabilities_equal_transformers_pipeline(bert: Path) -> None:
    """Would catch padding that is attended to, a head left out, and answers that lose their order by length."""
    import transformers

    pipeline: Any = transformers.pipeline("fill-mask", str(bert), top_k=60, device="cpu")
    loaded = heads.load(bert, runtime=cpu())
    answers = Filler(loaded.model, loaded.codec).fill(TEXTS, top=3)
    for text, masks in zip(TEXTS, answers, strict=True):
        theirs = pipeline(text)
        theirs = theirs if isinstance(theirs[0], list) else [theirs]
        assert len(theirs) == len(masks)
        for mine, listed in zip(masks, theirs, strict=True):
            allowed = [entry for entry in listed if not entry["token_str"].startswith("[")]
            assert [guess.word for guess in mine] == [entry["token_str"] for entry in allowed[:3]]
            assert [guess.probability for guess in mine] == pytest.approx([e["score"] for e in allowed[:3]], abs=1e-5)


def test_refused(bert: Path) -> None:
    """A text without a mask, one that is too long, and models that do not fill in."""
    loaded = heads.load(bert, runtime=cpu())
    filler = Filler(loaded.model, loaded.codec)
    with pytest.raises(UserError, match=r"there is no \[MASK\]"):
        filler.fill(["the king"])
    with pytest.raises(UserError, match="more than the 64"):
        filler.fill(["the [MASK]" * 40])
    with pytest.raises(UserError, match=r"it lacks \[MASK\]"):
        Filler(model(), tokenizer())
    heads_off = heads.load(bert, runtime=cpu())
    del heads_off.model.task_head
    with pytest.raises(UserError, match="it lacks a masked-language head"):
        Filler(heads_off.model, heads_off.codec)
