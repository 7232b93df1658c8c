"""Task heads in directories: transformers' logits from what tfcli wrote, tfcli's from what transformers wrote."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import cpu, foreign

from tfcli.errors import UserError
from tfcli.formats.hf import directory as hf
from tfcli.formats.hf import heads as formats
from tfcli.model import heads
from tfcli.model.heads import Head
from tfcli.model.transformer import Transformer
from tfcli.text.tokenizers.json import JsonTokenizer

BERT = [
    ("sequence", "BertForSequenceClassification"),
    ("token", "BertForTokenClassification"),
    ("span", "BertForQuestionAnswering"),
]
DECODERS = [
    ("qwen3", "Qwen3ForSequenceClassification", {}),
    ("qwen2", "Qwen2ForSequenceClassification", {"tie_word_embeddings": True}),
    ("llama", "LlamaForSequenceClassification", {}),
    ("mistral", "MistralForSequenceClassification", {}),
    ("gpt2", "GPT2ForSequenceClassification", {"bos_token_id": 3, "eos_token_id": 3}),
    ("gemma3_text", "Gemma3TextForSequenceClassification", {}),
]
IDS = torch.tensor([[5, 9, 11, 3, 7], [8, 2, 6, 0, 0]])
REAL = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()


def tokenizer() -> JsonTokenizer:
    vocab = {piece: id for id, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefg"])}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
    return JsonTokenizer(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))


def theirs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(input_ids=IDS, attention_mask=REAL.long())
    return torch.stack([out.start_logits, out.end_logits], dim=-1) if hasattr(out, "start_logits") else out.logits


def ours(model: Transformer) -> torch.Tensor:
    head = heads.of(model)
    assert isinstance(head, Head)
    with torch.no_grad():
        return head(model(IDS, mask_BT=REAL), REAL)


def close(kind: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """1e-4 of logits near 1: fp32 sums in another order, through three blocks. Padding is compared by nobody."""
    if kind in ("token", "span"):
        got, expected = got[REAL], expected[REAL]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def write(directory: Path, made: Any) -> Path:
    made.save_pretrained(directory)
    (directory / "tokenizer.json").write_text(tokenizer().text)
    (directory / "tokenizer_config.json").write_text('{"eos_token": "[SEP]", "pad_token": "[PAD]"}')
    return directory


@pytest.mark.parametrize(("kind", "architecture"), BERT)
def test_heads_of_bert_there_and_back(kind: str, architecture: str, tmp_path: Path) -> None:
    """Catches a pooler that is forgotten, a wrong prefix, labels that are lost: read, written, read by transformers."""
    import transformers

    labels = {} if kind == "span" else {"num_labels": 5}
    made = foreign("bert", architecture=architecture, **labels)
    loaded = formats.load(write(tmp_path / "a", made), runtime=cpu())
    assert loaded.kind == kind
    close(kind, ours(loaded.model), theirs(made))
    named = {"id2label": {str(i): f"L{i}" for i in range(5)}, "label2id": {f"L{i}": i for i in range(5)}}
    about: dict[str, Any] = {} if kind == "span" else named
    hf.save(tmp_path / "b", loaded.model, tokenizer(), about={**about, "tfcli": {"task": "classify"}})
    again, info = getattr(transformers, architecture).from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(info.values()), info
    close(kind, ours(loaded.model), theirs(again.eval()))
    back = formats.load(tmp_path / "b", runtime=cpu())
    assert torch.equal(ours(back.model), ours(loaded.model))
    assert back.hf_config["tfcli"]["task"] == "classify"
    if kind != "span":
        assert again.config.id2label == {i: f"L{i}" for i in range(5)}


@pytest.mark.parametrize(("family", "architecture", "settings"), DECODERS)
def test_sequence_heads_of_decoders(family: str, architecture: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Catches the wrong token (the last is before the padding), and a head of the vocabulary that is demanded."""
    import transformers

    made = foreign(family, architecture=architecture, num_labels=4, pad_token_id=0, **settings)
    loaded = formats.load(write(tmp_path / "a", made), runtime=cpu())
    close("sequence", ours(loaded.model), theirs(made))
    hf.save(tmp_path / "b", loaded.model, tokenizer(), about={"id2label": {str(i): str(i) for i in range(4)}})
    again, info = getattr(transformers, architecture).from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(info.values()), info
    again.config.pad_token_id = 0
    close("sequence", ours(loaded.model), theirs(again.eval()))


def test_a_bare_encoder_keeps_its_pooler(tmp_path: Path) -> None:
    """Catches a classifier that starts from a new pooler although the encoder was pretrained with one."""
    made = foreign("bert")
    loaded = formats.load(write(tmp_path, made), runtime=cpu())
    assert loaded.kind is None
    head = heads.fresh(loaded.model, "sequence", 3, seed=1)
    pooler = dict(head.named_parameters())
    assert torch.equal(pooler["pooler.weight"], made.pooler.dense.weight)
    assert torch.equal(pooler["pooler.bias"], made.pooler.dense.bias)
    assert pooler["classifier.weight"].std() > 0
    assert heads.fresh(loaded.model, "sequence", 3, seed=2) is head, "a head that fits is kept"
    assert heads.fresh(loaded.model, "token", 3, seed=2) is not head
    heads.detach(loaded.model)
    assert heads.of(loaded.model) is None


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Catches a decoder written under a class that transformers does not have, and a head that is not there."""
    made = foreign("llama")
    loaded = formats.load(write(tmp_path / "a", made), runtime=cpu())
    heads.fresh(loaded.model, "token", 3, seed=0)
    with pytest.raises(UserError, match=r"no head of kind 'token'.*bert"):
        hf.save(tmp_path / "b", loaded.model, tokenizer())
    bert = write(tmp_path / "c", foreign("bert"))
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "architectures": ["BertForTokenClassification"]}))
    with pytest.raises(UserError, match=r"lacks classifier.weight, which a BertForTokenClassification has"):
        formats.load(bert, runtime=cpu())
