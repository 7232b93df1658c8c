"""Masked-language models of transformers: their logits, there and back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import cpu, foreign

from tfcli.errors import UserError
from tfcli.formats.hf import directory as hf
from tfcli.formats.hf import heads
from tfcli.model import heads as task_heads
from tfcli.text.tokenizers.json import JsonTokenizer

SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("modernbert", {}),
    ("modernbert", {"local_attention": 6, "num_hidden_layers": 4, "classifier_bias": True, "norm_bias": True}),
    ("modernbert", {"decoder_bias": False, "classifier_activation": "silu", "layer_types": ["full_attention"] * 3}),
    ("bert", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}),
]
CLASSES = {"modernbert": "ModernBertForMaskedLM", "bert": "BertForMaskedLM"}


def saved(directory: Path, family: str, **changes: Any) -> Any:
    """A model of transformers, and its directory, with a tokenizer of one piece."""
    from tokenizers import Tokenizer, models

    made = foreign(family, architecture=CLASSES[family], **changes)
    made.save_pretrained(directory)
    text = Tokenizer(models.WordLevel({"</s>": 0}, unk_token="</s>")).to_str()
    (directory / "tokenizer.json").write_text(text)
    return made


def tokens() -> torch.Tensor:
    return torch.randint(0, 90, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("family", "changes"), SHAPES)
@torch.no_grad()
def test_logits_are_those_of_transformers_there_and_back(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    """Would catch a part of the head left out, another activation, and a name that transformers does not find."""
    import transformers

    theirs, ids = saved(tmp_path / "theirs", family, **changes), tokens()
    loaded = heads.load(tmp_path / "theirs", runtime=cpu())
    assert loaded.kind == "masked"
    mine = task_heads.masked_logits(loaded.model, loaded.model(ids))
    torch.testing.assert_close(mine, theirs(ids).logits, atol=1e-4, rtol=1e-4)
    assert isinstance(loaded.codec, JsonTokenizer)
    hf.save(tmp_path / "ours", loaded.model, loaded.codec)
    back = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "ours").eval()
    assert type(back).__name__ == CLASSES[family]
    torch.testing.assert_close(back(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
    again = heads.load(tmp_path / "ours", runtime=cpu())
    for (name, a), (_, b) in zip(again.model.named_parameters(), loaded.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0, msg=name)


def test_the_loss_and_its_gradient_are_those_of_transformers(tmp_path: Path) -> None:
    """Would catch a bias without a gradient, and a mean where a sum is meant."""
    theirs, ids = saved(tmp_path, "modernbert"), tokens().clamp(min=1)  # transformers does not train its padding
    model = heads.load(tmp_path, runtime=cpu()).model
    labels = torch.where(torch.arange(24) % 3 == 0, ids, -100)
    there = labels >= 0
    loss = task_heads.masked_loss(model, model(ids)[there], labels[there]) / int(there.sum())
    wanted = theirs(ids, labels=labels).loss
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-5)
    loss.backward()
    wanted.backward()
    head = task_heads.MaskedHead.of(model)
    transform = head.transform
    pairs = [
        (transform.dense.weight, theirs.head.dense.weight),
        (transform.norm.weight, theirs.head.norm.weight),
        (head.bias, theirs.decoder.bias),
        (model.embed.weight, theirs.decoder.weight),
    ]
    for mine, parameter in pairs:
        assert mine is not None
        torch.testing.assert_close(mine.grad, parameter.grad, atol=1e-5, rtol=1e-4)


def test_a_head_that_is_not_whole(tmp_path: Path) -> None:
    """config.json names a class whose head the weights lack."""
    from safetensors.torch import load_file, save_file

    saved(tmp_path, "modernbert")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["head.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks head\.dense\.weight"):
        heads.load(tmp_path, runtime=cpu())


TASKS = [
    ("sequence", "ModernBertForSequenceClassification", {"num_labels": 3}),
    ("sequence", "ModernBertForSequenceClassification", {"num_labels": 3, "classifier_pooling": "mean"}),
    ("token", "ModernBertForTokenClassification", {"num_labels": 5, "classifier_bias": True}),
    ("span", "ModernBertForQuestionAnswering", {"norm_bias": True}),
]


@pytest.mark.parametrize(("kind", "architecture", "changes"), TASKS)
@torch.no_grad()
def test_other_heads_of_modernbert(tmp_path: Path, kind: str, architecture: str, changes: dict[str, Any]) -> None:
    """Read, and made anew from a masked-language model with the transform of its pretraining."""
    import transformers

    theirs = foreign("modernbert", architecture=architecture, **changes)
    theirs.save_pretrained(tmp_path / "theirs")
    theirs_masked = saved(tmp_path / "masked", "modernbert")
    (tmp_path / "theirs" / "tokenizer.json").write_text((tmp_path / "masked" / "tokenizer.json").read_text())
    ids, real = tokens(), torch.arange(24) < torch.tensor([[24], [7]])

    def logits(model: Any) -> torch.Tensor:
        out = model(ids, attention_mask=real.long())
        found = torch.stack([out.start_logits, out.end_logits], dim=-1) if kind == "span" else out.logits
        return found if kind == "sequence" else found[real]

    def ours(model: Any) -> torch.Tensor:
        head = task_heads.of(model)
        assert head is not None
        found = head(model(ids, mask_BT=real), real)
        return found if kind == "sequence" else found[real]

    loaded = heads.load(tmp_path / "theirs", runtime=cpu())
    assert loaded.kind == kind
    torch.testing.assert_close(ours(loaded.model), logits(theirs), atol=1e-4, rtol=1e-4)
    hf.save(tmp_path / "ours", loaded.model, loaded.codec, about={"num_labels": changes.get("num_labels", 2)})
    back = getattr(transformers, architecture).from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(logits(back), logits(theirs), atol=1e-5, rtol=1e-5)

    masked = heads.load(tmp_path / "masked", runtime=cpu())
    head = task_heads.fresh(masked.model, kind, changes.get("num_labels", 2), seed=1)
    assert torch.equal(head.get_parameter("transform.dense.weight"), theirs_masked.head.dense.weight)
    hf.save(tmp_path / "new", masked.model, masked.codec, about={"num_labels": changes.get("num_labels", 2)})
    new = getattr(transformers, architecture).from_pretrained(tmp_path / "new").eval()
    torch.testing.assert_close(ours(masked.model), logits(new), atol=1e-4, rtol=1e-4)
