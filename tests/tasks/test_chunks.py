"""Words to pieces and rows: against transformers' alignment, and that every word is tagged exactly once."""

import foreign
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st

from tfcli.errors import UserError
from tfcli.tasks.tag.chunks import Cutter, spans
from tfcli.tasks.tag.words import joined, split
from tfcli.text.tokenizers.json import JsonTokenizer, Roles

WORDS = ["The", "king's", "daughters", "\u200d", "été", "从前", "12345", "#x", "(", "🎉", "Normandy", "."]


def bert() -> JsonTokenizer:
    return JsonTokenizer(foreign.text_of("bert"), roles=Roles(eos="[SEP]"))


def test_words_and_pieces_as_transformers_aligns_them() -> None:
    """Same ids, and the first piece of each word where its word_ids have it; a word without pieces has no place."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(foreign.text_of("bert"))
    backend.no_truncation()
    backend.no_padding()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)(WORDS, is_split_into_words=True)
    word_ids = theirs.word_ids()
    cutter = Cutter(bert(), length=128)
    (chunk,) = cutter.chunks([joined(WORDS)])
    assert list(chunk.ids) == theirs["input_ids"]
    expected = {word: word_ids.index(word) for word in range(len(WORDS)) if word in word_ids}
    assert dict(zip(chunk.words, chunk.at, strict=True)) == expected
    assert cutter.without_pieces == len(WORDS) - len(expected)


def test_words_of_raw_text_give_the_ids_of_the_text() -> None:
    """Spaces stay with their words, so that a model sees what it was pretrained on."""
    text = "The king's  daughters, (12345)\nfrom Normandy."
    for codec in (bert(), JsonTokenizer(foreign.text_of("gpt2"), roles=Roles(eos="<|endoftext|>"))):
        (chunk,) = Cutter(codec, length=128).chunks([(text.replace("  ", " ").replace("\n", " "), [])])
        assert chunk.ids == (*codec.prefix_ids, *codec.suffix_ids)
        plain = "The king of Normandy"
        (chunk,) = Cutter(codec, length=128).chunks([(plain, split(plain))])
        assert list(chunk.ids) == [*codec.prefix_ids, *codec.encode(plain), *codec.suffix_ids]
    ours = tiny_models.tokenizer()
    plain = "a king who had daughters"
    (chunk,) = Cutter(ours, length=64).chunks([(plain, split(plain))])
    assert ours.decode(chunk.ids) == plain


@given(st.lists(st.integers(0, 9), max_size=40), st.integers(9, 20), st.integers(0, 30))
def test_every_word_is_in_one_row_as_its_own(lengths: list[int], room: int, overlap: int) -> None:
    rows = spans(lengths, room=room, overlap=overlap)
    own = [word for _, _, start, end in rows for word in range(start, end)]
    assert own == list(range(len(lengths)))
    for first, last, start, end in rows:
        assert first <= start <= end <= last
        assert sum(lengths[first:last]) <= room


def test_a_long_sentence_keeps_every_word() -> None:
    """Rows no longer than the model, words in the middle with context before them, a word longer than a row cut."""
    cutter = Cutter(bert(), length=40)
    (text, words) = joined(["king"] * 50 + ["x" * 90] + ["Normandy"] * 5)
    chunks = cutter.chunks([(text, words), joined(["a"])])
    assert all(len(chunk.ids) <= 40 for chunk in chunks)
    assert [word for chunk in chunks[:-1] for word in chunk.words] == list(range(56))
    assert (cutter.long, cutter.cut_words, cutter.cut) == (1, 1, [0])
    assert chunks[1].at[0] > 1, "the first own word has context"
    assert chunks[-1].index == 1
    with pytest.raises(UserError, match="no room for words"):
        Cutter(bert(), length=5)
