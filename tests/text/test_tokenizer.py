"""Tokenization is lossless: every string is restored from its ids, however it is split, batched or streamed."""

from __future__ import annotations

import errno
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from text_samples import prose, trained

from tfcli.errors import UserError
from tfcli.text.read.sources import CHUNK, cut_point
from tfcli.text.tokenizers.sentencepiece import Tokenizer

HARD = [
    "", " ", "  two  spaces  ", "\n", "\n\n\n", "a\r\nb\r\n", "\r", "\t\tindent", "a\0b", "\0",
    "".join(map(chr, range(32))), "\u2581", "x\u2581\u2581y \u2581 z", "\u2585\u2047", "\ufffd\ufeff",
    "\u2028\u2029\x85\x0b\x0c", "e\u0301 \u0301", "👩\u200d👩\u200d👧 🏳\ufe0f\u200d🌈", "漢字 и кириллица",
    "<unk> <s> </s> <pad> <|endoftext|> <0x41>", "\U0010ffff\ue000", "the" * 3000, " " * 5000,
]  # fmt: skip


@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_hard_strings_come_back(tokenizer: Tokenizer, text: str) -> None:
    """Catches normalization, dummy prefixes, lost spaces, U+2581 read as a space, special pieces matched in text."""
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back(bpe: Tokenizer, text: str) -> None:
    """Catches what the list of hard strings misses."""
    assert bpe.decode(bpe.encode(text)) == text


def test_ten_thousand_random_strings_come_back(tokenizer: Tokenizer) -> None:
    """Catches rare characters without a piece; all in one threaded batch."""
    draw = random.Random(1)
    ranges = (range(128), range(0xD800), range(0xE000, 0x110000))
    texts = ["".join(chr(draw.choice(draw.choice(ranges))) for _ in range(draw.randrange(40))) for _ in range(10_000)]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts, threads=2)] == texts


def test_batched_threaded_and_by_line_are_equal(tokenizer: Tokenizer) -> None:
    """Catches a segmentation that depends on where the text is cut or how many threads there are."""
    text = prose(3000, seed=5)
    whole = tokenizer.encode(text)
    lines = text.splitlines(keepends=True)
    assert [id for ids in tokenizer.encode_batch(lines, threads=2) for id in ids] == whole
    assert [id for line in lines for id in tokenizer.encode(line)] == whole
    assert tokenizer.encode_batch([text, text], threads=2) == [whole, whole]


def test_bpe_in_groups_is_sentencepiece_on_the_whole(bpe: Tokenizer) -> None:
    """Catches a cut that a merge would have crossed: the oracle is SentencePiece on the uncut text."""
    oracle = sentencepiece.SentencePieceProcessor(model_proto=bpe.model_bytes)
    for text in (prose(3000, seed=6), "the cat " * 20_000, "x" * 70_000 + " y"):
        assert bpe.encode(text) == oracle.encode(text)


def test_user_symbols_with_line_breaks_stay_whole() -> None:
    """Catches cutting at every line break if a piece spans several."""
    tokenizer = trained("bpe", user_symbols=("\n\n", "<turn>"))
    text = ("the of\n\nand" * 9 + "\n") * 100
    oracle = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    assert tokenizer.encode(text) == oracle.encode(text)
    assert tokenizer.pieces("<turn>") == ["<turn>"]


@given(cuts=st.lists(st.integers(1, 400), max_size=5))
@settings(max_examples=100, deadline=None)
def test_encoding_the_parts_of_a_cut_text_is_encoding_it_whole(bpe: Tokenizer, cuts: list[int]) -> None:
    """Catches a chunk boundary that changes the ids, which would make them depend on the reader's buffer."""
    text = rest = prose(20, seed=len(cuts))
    parts: list[str] = []
    for cut in cuts:
        if cut < len(rest):
            at = cut_point(rest, cut)
            if rest[at - 1] != "\n" and (rest[at] != " " or rest[at - 1] == " "):
                continue  # neither a line break nor a space: cut anywhere, lossless all the same
            parts.append(rest[:at])
            rest = rest[at:]
    parts.append(rest)
    assert [id for part in parts for id in bpe.encode(part)] == bpe.encode(text)


def test_a_cut_never_falls_within_line_breaks() -> None:
    """Catches cutting inside a run, where some tokenizers have one piece for the run."""
    assert cut_point("ab\n\n\ncd", 4) == 4  # no better place before it
    assert cut_point("a\nb\n\n\ncd", 5) == 2
    assert cut_point("ab cd  ef", 7) == 5
    assert cut_point("abcdef", 3) == 3
    assert CHUNK > 1000


@given(ids=st.lists(st.integers(0, 399), max_size=60))
@settings(max_examples=300, deadline=None)
def test_streaming_is_decoding(bpe: Tokenizer, ids: list[int]) -> None:
    """Catches half characters returned, or bytes lost at the end, for any ids that a model may sample."""
    stream = bpe.stream()
    assert "".join([*(stream.push(id) for id in ids), stream.flush()]) == bpe.decode(ids)


def test_streaming_never_splits_a_character(bpe: Tokenizer) -> None:
    """Catches U+FFFD returned too early."""
    text = "é漢👩 end"
    stream = bpe.stream()
    shown = [stream.push(id) for id in bpe.encode(text)]
    assert "".join(shown) == text
    assert not any("\ufffd" in part for part in shown)
    assert stream.flush() == ""
    stream.push(bpe.encode("漢")[0])
    assert stream.flush() == "\ufffd"


def test_control_pieces_have_no_text(bpe: Tokenizer) -> None:
    assert (bpe.unk_id, bpe.eos_id, bpe.pad_id, bpe.bos_id) == (0, 1, 2, None)
    assert bpe.id_bytes(bpe.eos_id) == b""
    assert bpe.decode([bpe.eos_id, *bpe.encode("a"), bpe.pad_id]) == "a"
    assert bpe.decode(np.array(bpe.encode("numpy"))) == "numpy"


@pytest.mark.parametrize("id", [-1, 400, 10**9])
def test_ids_out_of_range_are_refused(bpe: Tokenizer, id: int) -> None:
    """Catches Python's negative indexing."""
    with pytest.raises(UserError, match="not an id"):
        bpe.decode([5, id])
    with pytest.raises(UserError, match="not an id"):
        bpe.stream().push(id)


def test_a_lone_surrogate_is_refused(bpe: Tokenizer) -> None:
    with pytest.raises(UserError, match="surrogate"):
        bpe.encode("a\ud800")
    with pytest.raises(UserError, match="surrogate"):
        bpe.encode_batch(["fine", "a\udfff"])


def test_save_load_and_pickle(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path / "tokenizer.model")
    for again in (
        Tokenizer.load(tmp_path),
        Tokenizer.load(tmp_path / "tokenizer.model"),
        Tokenizer(bpe.model_bytes),
        pickle.loads(pickle.dumps(bpe)),
    ):
        assert again.hash == bpe.hash
        assert again.encode("hello there") == bpe.encode("hello there")


@pytest.mark.parametrize("content", [b"", b"hello", b'{"model": {}}', bytes(range(256)), b"\0" * 100])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    """Catches protobuf's leniency, and a crash in SentencePiece."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match="SentencePiece model"):
        Tokenizer.load(path)


def test_a_truncated_model_is_refused(bpe: Tokenizer) -> None:
    with pytest.raises(UserError):
        Tokenizer(bpe.model_bytes[: len(bpe.model_bytes) // 2])


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer in"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="no such tokenizer"):
        Tokenizer.load(tmp_path / "x.model")


def foreign(**normalizer: bool) -> Tokenizer:
    """A model as Llama's: with a dummy prefix, <s> and </s>."""
    trainer = {"bos_id": 1, "eos_id": 2, "pad_id": -1, "eos_piece": "</s>", **normalizer}
    return trained("bpe", trainer=trainer)


def test_a_model_with_a_dummy_prefix_gives_sentencepieces_ids() -> None:
    """Catches a prefix that is missing, doubled at each part, or left in the text."""
    tokenizer = foreign(add_dummy_prefix=True)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    text = prose(1000, seed=9)
    assert tokenizer.dummy_prefix and tokenizer.lossless
    assert tokenizer.encode(text) == oracle.encode(text)
    for text in HARD:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    ids = tokenizer.encode("the one")
    assert tokenizer.decode(ids) == "the one"
    assert tokenizer.decode(ids, continuing=True) == " the one"
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == "the one"


def test_a_lossy_model_is_used_as_it_is() -> None:
    """Catches our splitting changing the ids of a model with its own normalization."""
    tokenizer = foreign(remove_extra_whitespaces=True, byte_fallback=False, add_dummy_prefix=True)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    text = prose(300) + "漢字"
    assert not tokenizer.lossless
    assert tokenizer.encode(text) == oracle.encode(text)
    assert tokenizer.unk_id in tokenizer.encode("漢")


def test_a_failing_save_changes_nothing(tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a model that is cut short, or lost, by a full disk."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"the old one")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            bpe.save(path)
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]
    bpe.save(path)
    assert Tokenizer.load(path).hash == bpe.hash
    assert list(tmp_path.iterdir()) == [path]
