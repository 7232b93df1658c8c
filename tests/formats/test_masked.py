"""Masked-language models of transformers: their logits, there and back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import cpu, foreign

from tfcli.errors import UserError
from tfcli.formats import heads, hf
from tfcli.model import masked_head
from tfcli.text.json_tokenizer import JsonTokenizer

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
    mine = masked_head.logits(loaded.model, loaded.model(ids))
    torch.testing.assert_close(mine, theirs(ids).logits, atol=1e-4, rtol=1e-4)
    assert isinstance(loaded.codec, JsonTokenizer)
    extra = {key: loaded.about[key] for key in ("classifier_bias", "decoder_bias", "classifier_activation")
             if key in loaded.about}  # fmt: skip
    hf.save(tmp_path / "ours", loaded.model, loaded.codec, about=extra)
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
    loss = masked_head.loss(model, model(ids)[there], labels[there]) / int(there.sum())
    wanted = theirs(ids, labels=labels).loss
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-5)
    loss.backward()
    wanted.backward()
    head = masked_head.attached(model)
    for mine, parameter in ((head.dense.weight, theirs.head.dense.weight), (head.norm.weight, theirs.head.norm.weight),
                            (head.bias, theirs.decoder.bias), (model.embed.weight, theirs.decoder.weight)):  # fmt: skip
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
