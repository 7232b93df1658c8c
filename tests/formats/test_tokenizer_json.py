"""tokenizer.json gives the ids that SentencePiece gives, by transformers itself."""

import functools
import io
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TEXT, model, tokenizer

from tfcli.formats.hf import directory as hf
from tfcli.text.tokenizers.sentencepiece import Tokenizer

HARD = [
    "", " ", "\n", "hello world", "  two  spaces   ", " " * 77, "a" * 300, "tab\there\r\nCRLF\n\n\nend", "\0\x01\x7f",
    "emoji 🎉👩‍👩‍👧 \U0001f3f4\u200d", "从前有一个国王，中文测试", "שלום مرحبا \u202ertl", "e\u0301\u0302\u0327 ﬁ Å",
    "<unk> <|endoftext|> <pad> <0x41> <0x0A> </s> <s>", "<0x41", "\ufeffbom \u00a0 \u2028 \u3000", "\U0010ffff\uffff",
    TEXT[:2000], "abababa aabaab  aaaa", "<sep>x<sep> <sep><sep", "two words two words",
]  # fmt: skip
KINDS = {
    "bpe": ("bpe", ()),
    "unigram": ("unigram", ()),
    "bpe with symbols": ("bpe", ("<sep>", "two words")),
    "unigram with symbols": ("unigram", ("<sep>", "two words")),
}


def llama_like() -> Tokenizer:
    """Like Llama's and Mistral's: a space is put before a text."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=out, model_type="bpe", vocab_size=400, minloglevel=2,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True,
        hard_vocab_limit=False,
    )  # fmt: skip
    return Tokenizer(out.getvalue())


@functools.cache
def pair(kind: str) -> tuple[Tokenizer, Any]:
    """Our tokenizer and what AutoTokenizer makes of its directory."""
    import tempfile

    from transformers import AutoTokenizer

    pieces = llama_like() if kind == "dummy prefix" else tokenizer(KINDS[kind][0], 340, KINDS[kind][1])
    with tempfile.TemporaryDirectory() as folder:
        hf.save(folder, model(vocab_size=pieces.vocab_size, context=1 << 20), pieces)
        return pieces, AutoTokenizer.from_pretrained(folder)


def same(kind: str, text: str) -> None:
    ours, theirs = pair(kind)
    ids = ours.encode(text)
    assert theirs(text).input_ids == ids
    assert theirs.decode(ids) == ours.decode(ids)


@pytest.mark.parametrize("kind", [*KINDS, "dummy prefix"])
@pytest.mark.parametrize("text", HARD, ids=ascii)
def test_hard_strings(kind: str, text: str) -> None:
    """Would catch merges out of order, spaces lost, bytes missing, and names of control pieces found in text."""
    same(kind, text)


@pytest.mark.parametrize("kind", [*KINDS, "dummy prefix"])
@settings(max_examples=60, deadline=None)
@given(
    text=st.one_of(
        st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"]), max_size=60),
        st.text("abn \n.Thekig<>0x41", max_size=60),
        st.lists(st.sampled_from([*HARD, " ", "a", "the", " king", "  "]), max_size=6).map("".join),
    )
)
def test_any_string(kind: str, text: str) -> None:
    """The law: the same ids and the same text back, U+2581 apart."""
    same(kind, text)


@pytest.mark.parametrize("alphabet", ["a", "ab", "aab"])
def test_pieces_that_overlap_themselves(alphabet: str) -> None:
    """aba is ab + a and a + ba: SentencePiece takes the leftmost of the two, a merge list ranks them."""
    import json
    import random

    from tokenizers import Tokenizer as Backend

    from tfcli.config.options import TokenizerOptions
    from tfcli.formats.hf.tokenizer_json import tokenizer_json
    from tfcli.text.read.sources import Chunk
    from tfcli.text.tokenizers.training import train

    rng = random.Random(0)
    words = ["".join(rng.choices(alphabet + " ", k=rng.randint(1, 40))) for _ in range(400)]
    trained = train([Chunk("\n".join(words), True)], TokenizerOptions(), vocab_size=330)
    backend = Backend.from_str(json.dumps(tokenizer_json(trained)))
    for _ in range(400):
        text = "".join(rng.choices(alphabet + " ", weights=[9] * len(alphabet) + [1], k=rng.randint(1, 60)))
        assert backend.encode(text).ids == trained.encode(text), text


def test_what_transformers_is_told() -> None:
    """No tokens of its own, a pad that is not eos, and the model's length."""
    ours, theirs = pair("bpe")
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id) == (ours.eos_id, ours.pad_id, ours.unk_id)
    assert theirs.model_max_length == 1 << 20
    assert theirs.decode([*ours.encode("end"), ours.eos_id], skip_special_tokens=True) == "end"
    assert len(theirs) == ours.vocab_size
