"""Windows over long contexts, against transformers' own; answers in pieces and back; offsets of every tokenizer."""

import itertools

import foreign
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st

from tfcli.errors import UserError
from tfcli.tasks.answer.windows import Layout, pieces_of, text_of
from tfcli.text.tokenizers.codec import Codec
from tfcli.text.tokenizers.json import JsonTokenizer, Roles
from tfcli.text.tokenizers.offsets import Located, locate

TEXT = "Once upon a time there was a king, who had 3 daughters; 从前有一个国王 — été\u00a0naïve 🎉.  The end"


def codec(name: str) -> Codec:
    """Of each kind: other makers' by their tokenizer.json, and our own."""
    if name == "ours":
        return tiny_models.tokenizer()
    if name == "llama":
        return foreign.llama_pieces()
    settings = foreign.CONFIGS[name]
    return JsonTokenizer(foreign.text_of(name), roles=Roles(eos=settings.get("eos_token", settings.get("sep_token"))))


@pytest.mark.parametrize("name", ["bert", "gpt2", "unigram", "ours", "llama"])
def test_pieces_lie_where_their_text_is(name: str) -> None:
    """Every word's pieces, put together, cover that word and no other: spaces, bytes of characters, prefixes."""
    coder = codec(name)
    for text in (TEXT, "", " \n ", "🎉", "x" * 50, "a\r\n\tb"):
        (found,) = locate(coder, [text])
        assert list(found.ids) == coder.encode(text)
        assert all(0 <= start <= end <= len(text) for start, end in found.spans)
        assert [start for start, _ in found.spans] == sorted(start for start, _ in found.spans)
        covered = {index for start, end in found.spans for index in range(start, end)}
        assert covered == {index for index, char in enumerate(text) if not char.isspace()}
    (found,) = locate(coder, [TEXT])
    for answer in ("king", "daughters", "从前", "naïve", "🎉", "The end", "Once"):
        start = TEXT.index(answer)
        pieces = pieces_of(found, start, start + len(answer))
        assert pieces is not None
        first, last = text_of(found, *pieces)
        assert first <= start
        assert last >= start + len(answer)
        if name == "bert":
            assert TEXT[first:last] == answer


def test_offsets_of_a_tokenizer_that_changes_its_text() -> None:
    with pytest.raises(UserError, match="changes its text"):
        locate(foreign.llama_pieces(normalization="nmt_nfkc"), ["ﬁne  text"])


@pytest.mark.parametrize("overlap", [0, 3, 8])
def test_windows_equal_transformers(overlap: int) -> None:
    """Ids, segments, where each window begins: its stride is our overlap."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer

    coder = codec("bert")
    backend = Tokenizer.from_str(foreign.text_of("bert"))
    backend.no_truncation()
    backend.no_padding()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]")
    question = "Who had daughters?"
    batch = theirs(
        question, TEXT, truncation="only_second", max_length=40, stride=overlap, return_overflowing_tokens=True,
        return_token_type_ids=True, return_offsets_mapping=True,
    )  # fmt: skip
    layout = Layout.of(coder, length=40, overlap=overlap, question=20)
    (context,) = locate(coder, [TEXT])
    windows = layout.windows(tuple(coder.encode(question)), context)
    assert len(windows) > 1
    assert [list(window.ids) for window in windows] == batch["input_ids"]
    assert [list(window.types) for window in windows] == batch["token_type_ids"]
    for window, offsets in zip(windows, batch["offset_mapping"], strict=True):
        assert [tuple(pair) for pair in offsets[window.at : window.at + window.count]] == list(
            context.spans[window.first : window.first + window.count]
        )


@given(st.integers(0, 60), st.integers(14, 40), st.integers(0, 40), st.integers(0, 9))
def test_windows_cover_the_context(pieces: int, length: int, overlap: int, question: int) -> None:
    """Each is within its length, goes forward, and no piece is left out; an answer is found where it is whole."""
    layout = Layout(prefix=(1,), separator=(2,), length=length, overlap=overlap, question=3)
    context = Located(ids=tuple(range(100, 100 + pieces)), spans=tuple((i, i + 1) for i in range(pieces)))
    windows = layout.windows(tuple(range(10, 10 + question)), context)
    assert all(len(window.ids) == len(window.types) <= length for window in windows)
    covered = [index for window in windows for index in range(window.first, window.first + window.count)]
    assert set(covered) == set(range(pieces))
    assert all(a.first < b.first for a, b in itertools.pairwise(windows))
    for window in windows:
        for index in range(window.first, window.first + window.count):
            start, end = window.target((index, index))
            assert start == end > 0
            assert window.ids[start] == context.ids[index]
        assert window.target((window.first, window.first + window.count)) == (0, 0), "its end is cut off"
        assert window.target(None) == (0, 0)


def test_answers_between_and_within_pieces() -> None:
    context = Located(ids=(1, 2, 3, 4), spans=((0, 3), (4, 4), (4, 9), (9, 10)))
    assert pieces_of(context, 0, 3) == (0, 0)
    assert pieces_of(context, 5, 6) == (2, 2), "within a piece: all of it"
    assert pieces_of(context, 2, 10) == (0, 3)
    assert pieces_of(context, 3, 4) is None
    assert text_of(context, 0, 2) == (0, 9)


def test_a_window_without_room_is_said() -> None:
    with pytest.raises(UserError, match="leave 0 for the context"):
        Layout.of(codec("bert"), length=16, overlap=4, question=16)
