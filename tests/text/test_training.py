"""Training a tokenizer: nothing is skipped, sizes are as requested, options are SentencePiece's own."""

from __future__ import annotations

from typing import Literal

import pytest
from text_samples import prose

from tfcli.config.options import TokenizerOptions
from tfcli.errors import UserError
from tfcli.text.read.sources import Chunk
from tfcli.text.tokenizers.sentencepiece import Tokenizer
from tfcli.text.tokenizers.training import train


def fit(text: str, *, notes: list[str] | None = None, default_size: int | None = None, **settings: object) -> Tokenizer:
    on_note = notes.append if notes is not None else None
    options = TokenizerOptions(**settings)  # type: ignore[arg-type]
    return train([Chunk(text, True)], options, threads=2, vocab_size=default_size, on_note=on_note)


def test_the_size_asked_for_is_the_size_and_training_is_deterministic() -> None:
    one, two = fit(prose(500), vocab_size=350), fit(prose(500), default_size=350)
    assert one.vocab_size == 350
    assert one.hash == two.hash


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_threads_do_not_change_the_tokenizer(kind: Literal["bpe", "unigram"]) -> None:
    """Catches a model, and thus a cache key, that depends on the machine."""
    options = TokenizerOptions(type=kind, vocab_size=330)
    one, two = (train([Chunk(prose(800), True)], options, threads=threads) for threads in (1, 2))
    assert one.hash == two.hash


def test_training_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Catches SentencePiece's chatter, which goes past Python to the file descriptor."""
    fit(prose(200), vocab_size=300)
    assert capfd.readouterr() == ("", "")


def test_small_text_shrinks_the_default_and_refuses_the_explicit() -> None:
    notes: list[str] = []
    tokenizer = fit("hello there\nhello", default_size=4096, notes=notes)
    assert 259 < tokenizer.vocab_size < 300
    assert any("the text is too small for" in note for note in notes)
    with pytest.raises(UserError, match=f"too small.*room for {tokenizer.vocab_size}"):
        fit("hello there\nhello", vocab_size=4096)
    assert fit("hello there\nhello", vocab_size=tokenizer.vocab_size).hash


def train_chinese(size: int, notes: list[str]) -> Tokenizer:
    text = "\n".join("".join(chr(0x4E00 + (i * i + j * 7) % 3000) for j in range(20)) for i in range(500))
    return fit(text, notes=notes, default_size=size)


def test_more_characters_than_pieces_become_bytes_with_a_note() -> None:
    """Catches SentencePiece's refusal of a vocabulary that is smaller than the alphabet."""
    notes: list[str] = []
    tokenizer = train_chinese(1024, notes)
    assert tokenizer.vocab_size == 1024
    assert any("are encoded as bytes" in note for note in notes)
    assert tokenizer.decode(tokenizer.encode("一丁丂")) == "一丁丂"


def test_nothing_is_skipped_for_being_long_or_reserved() -> None:
    """Catches lines dropped for their length (SentencePiece: 4192 bytes), NUL, U+2585 or U+2581."""
    for text in ("banana " * 20_000, "banana\0" * 3000, "banana\u2585" * 3000, "banana\u2581" * 3000, "b" * 200_000):
        tokenizer = fit(text, vocab_size=264)
        assert len(tokenizer.encode("bbbbbb" if text[1] == "b" else "banana")) < 6


def test_user_symbols_are_one_piece() -> None:
    tokenizer = fit(prose(300), vocab_size=320, user_symbols=("<|user|>", "a b,c"))
    assert tokenizer.pieces("<|user|>") == ["<|user|>"]
    assert len(tokenizer.encode("a b,c")) == 1
    assert tokenizer.decode(tokenizer.encode("x a b,c")) == "x a b,c"


def test_trainer_options_pass_through() -> None:
    text = "in 1984 and 1985 and 1986 " * 200
    joined = fit(text, default_size=290)
    split = fit(text, default_size=290, trainer={"split_digits": True})
    assert any(piece.lstrip("▁").isdigit() and len(piece.lstrip("▁")) > 1 for piece in joined.pieces(text[:50]))
    assert not any(piece.lstrip("▁").isdigit() and len(piece.lstrip("▁")) > 1 for piece in split.pieces(text[:50]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainer": {"split_digitz": True}}, "unknown SentencePiece option 'split_digitz'"),
        ({"trainer": {"vocab_size": 3}}, "its own flag"),
        ({"trainer": {"split_digits": "maybe"}}, "cannot train"),
        ({"vocab_size": 100}, "too small"),
        ({"character_coverage": 0.5}, "coverage"),
        ({"user_symbols": ("",)}, "user symbol"),
        ({"user_symbols": ("a\u2581b",)}, "user symbol"),
        ({"user_symbols": ("x", "x")}, "twice"),
        ({"trainer": {"eos_id": -1}}, "end-of-text"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit(prose(200), **settings)


def test_no_text_is_refused() -> None:
    with pytest.raises(UserError, match="no text"):
        fit(" \n ")


@pytest.mark.parametrize("settings", [{"vocab_size": 0}, {"vocab_size": -3}, {"default_size": 0}])
def test_no_vocabulary_at_all_is_refused(settings: dict[str, int]) -> None:
    """Catches 0 taken for "the default"."""
    with pytest.raises(UserError, match=r"a vocabulary of (0|-3) pieces"):
        fit(prose(50), **settings)  # type: ignore[arg-type]
