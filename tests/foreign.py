"""Small tokenizers of other makers, trained here by the tokenizers library, as their tokenizer.json."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from text_samples import prose
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tfcli.formats.hf.tokenizer_json import tokenizer_json
from tfcli.text.tokenizers.sentencepiece import Tokenizer as SentencePiece

HARD = [
    "", " ", "\n", "hello world", " hello", "  two  spaces   ", " " * 77, "a" * 300, "tab\there\r\nCRLF\n\n\nend",
    "\0\x01\x7f", "emoji 🎉👩‍👩‍👧 \U0001f3f4\u200d", "从前有一个国王，中文测试", "שלום مرحبا \u202ertl",
    "e\u0301\u0302\u0327 ﬁ Å A\u030a", "<unk> <|endoftext|> <pad> <0x41> </s> <s>", "\ufeffbom \u00a0 \u2028 \u3000",
    "\U0010ffff\uffff", "abababa aabaab  aaaa", "I'LL don't 'S 've 12345 1234567 ½ ² ٣", "x\n \n  \n\ty", "한국어",
    "Привет, мир!!! ...", "def f(x):\n    return x ** 2  # it's\n", "$3.50 + 20% <= 100~`^|", "नमस्ते", "HELLO FooBAR",
    "[CLS] a [MASK] [SEP] [UNK]", "<|im_start|>user\nhi<|im_end|>\n", "a<think>b</think>", "İı ß ẞ",
]  # fmt: skip
CORPUS = [*prose(400).splitlines(keepends=True), *HARD * 8, *(f"{n} {n * 37 % 1000}, it's\n\n" for n in range(300))]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _level(use_regex: bool = True) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _bpe(
    pre: Any, normalizer: Any = None, *, train_with: Any = None, whole: bool = False, size: int = 700
) -> Tokenizer:
    made = Tokenizer(models.BPE(ignore_merges=whole))
    made.pre_tokenizer, made.decoder = train_with or pre, decoders.ByteLevel()
    if normalizer:
        made.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    made.pre_tokenizer = pre
    return made


def gpt2() -> Tokenizer:
    """Train a tokenizer like GPT-2's, across words, so that a text split differently has other ids."""
    made = _bpe(_level(), train_with=_level(use_regex=False))
    made.add_special_tokens(["<|endoftext|>"])
    return made


def llama3() -> Tokenizer:
    """Words by a regular expression, whole words first, a beginning of text."""
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    made = _bpe(pre_tokenizers.Sequence([split, _level(use_regex=False)]), whole=True)
    made.add_special_tokens(["<s>", "</s>"])
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    return made


def qwen() -> Tokenizer:
    """NFC, single digits, special pieces and others that are found but have a text."""
    split = pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated")
    made = _bpe(pre_tokenizers.Sequence([split, _level(use_regex=False)]), normalizers.NFC())
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    made.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return made


def smollm() -> Tokenizer:
    """Digits apart, then GPT-2's words."""
    made = _bpe(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _level()]))
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return made


@functools.cache
def llama_pieces(kind: str = "bpe", normalization: str = "identity", prefix: bool = True) -> SentencePiece:
    """A SentencePiece model with <s> and </s>."""
    out = io.BytesIO()
    lossy = normalization != "identity"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prose(600).splitlines() + [text for text in HARD if "\0" not in text]), model_writer=out,
        model_type=kind, vocab_size=420, minloglevel=2, byte_fallback=not lossy, normalization_rule_name=normalization,
        remove_extra_whitespaces=lossy, add_dummy_prefix=prefix, hard_vocab_limit=False, character_coverage=0.99,
        user_defined_symbols=["<sep>"], num_threads=1,
    )  # fmt: skip
    return SentencePiece(out.getvalue())


def llama2() -> Tokenizer:
    """SentencePiece's BPE with byte fallback: a space before the text and each part of it, <s> at its beginning."""
    made = Tokenizer.from_str(json.dumps(tokenizer_json(llama_pieces())))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def unigram() -> Tokenizer:
    """Train a tokenizer like T5's: Metaspace, no bytes, </s> at the end."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return made


def bert() -> Tokenizer:
    """WordPiece, with the truncation and padding that sentence-transformers leaves in the file."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.enable_truncation(8)
    made.enable_padding(length=8)
    return made


MAKERS = {maker.__name__: maker for maker in (gpt2, llama3, qwen, smollm, llama2, unigram, bert)}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    "llama3": {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True}},
    "qwen": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False},
    "smollm": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
    "llama2": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True},
    "unigram": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "bert": {
        "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]",
    },
}  # fmt: skip


@functools.cache
def text_of(name: str) -> str:
    """The tokenizer.json."""
    text: str = MAKERS[name]().to_str()
    return text


def write(folder: Path, name: str, **config: Any) -> Path:
    """A directory with tokenizer.json and tokenizer_config.json."""
    (folder / "tokenizer.json").write_text(text_of(name), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **CONFIGS[name]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | config), encoding="utf-8")
    return folder
