"""Pretraining an encoder: it learns, resumes to the bit, and leaves what transformers reads."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import facts, resume, start, text, timeless
from tiny_models import cpu

from tfcli.errors import Interrupted, UserError
from tfcli.formats.hf import directory as hf
from tfcli.formats.hf import heads
from tfcli.model.heads import masked_logits
from tfcli.train.events import Event, Saved
from tfcli.train.finetune import finetune

BERT: dict[str, Any] = {"model.arch": "bert", "model.width": 32, "model.heads": 2}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus and the unbroken run "whole"."""
    folder = tmp_path_factory.mktemp("room")
    start(text(folder), folder / "whole", settings=BERT)
    return folder


def test_an_encoder_learns(room: Path) -> None:
    """Would catch targets that do not belong to their inputs, and a head that gets no gradient."""
    lines = timeless(room / "whole")
    scores = [line["val_loss"] for line in lines if "val_loss" in line]
    assert scores[-1] < scores[0] - 0.1
    assert all(0 <= line["val_accuracy"] <= 1 for line in lines if "val_loss" in line)


def test_stopped_and_resumed(room: Path) -> None:
    """Would catch masks that depend on anything but the seed and the step, and a head that a checkpoint forgets."""
    out = room / "stopped"

    def listen(event: Event) -> None:
        if isinstance(event, Saved) and event.step == 6:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        start(room / "corpus.txt", out, settings=BERT, listen=listen)
    resume(out)
    assert facts(out) == facts(room / "whole")


def test_an_encoder_goes_on_with_the_optimizer_that_made_it(room: Path) -> None:
    """Catches AdamW at a large model's rate, under which a small encoder learns less than one from scratch."""
    (room / "labels.tsv").write_text("text\tlabel\n" + "".join(f"{w} {n}\t{w}\n" for n in range(8) for w in ("a", "b")))
    machine = {"device": "cpu", "precision": "fp32", "threads": 1}
    settings = {"train.steps": 1, "train.batch_size": 4}
    finetune(room / "whole", room / "labels.tsv", task="classify", out=room / "c", settings=settings, **machine)
    planned = json.loads((room / "c" / "run.json").read_text())["plan"]
    assert (planned["lr"], planned["muon_lr"]) == (1.5e-3, pytest.approx(0.01))
    about = json.loads((room / "c" / "config.json").read_text())
    assert about["classifier_pooling"] == "mean", "[CLS] was taught nothing"


@torch.no_grad()
def test_transformers_reads_the_directory(room: Path) -> None:
    """The same ids, [MASK] among them, and the same logits."""
    transformers = pytest.importorskip("transformers")
    loaded = heads.load(room / "whole", runtime=cpu())
    tokenizer = transformers.AutoTokenizer.from_pretrained(room / "whole")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(room / "whole").eval()
    assert type(theirs).__name__ == "ModernBertForMaskedLM"
    codec = loaded.codec
    text = "Once upon a [MASK] there was a   king\n[MASK]. 从 🎉"
    ids = [*codec.prefix_ids, *codec.encode_special(text), *codec.suffix_ids]
    assert tokenizer(text).input_ids == ids
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "[CLS]"
    assert (ids.count(tokenizer.mask_token_id), tokenizer.sep_token_id, tokenizer.cls_token_id) == (2, ids[-1], ids[0])
    assert tokenizer.pad_token == "[PAD]"
    tokens = torch.tensor([ids[:16]])
    mine = masked_logits(loaded.model, loaded.model(tokens))
    torch.testing.assert_close(mine, theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_a_tokenizer_is_taken_along(room: Path, tmp_path: Path) -> None:
    """Another run may use the tokenizer of the first; one without [MASK] is refused before any text is read."""
    small = {"tokenizer.vocab_size": None, "train.steps": 2, **BERT}
    start(room / "corpus.txt", tmp_path / "again", settings=small, tokenizer=room / "whole")
    assert hf.load(tmp_path / "again", runtime=cpu())[1].prefix_ids
    start(room / "corpus.txt", tmp_path / "gpt", settings={"train.steps": 2})
    with pytest.raises(UserError, match=r"has no \[MASK\]"):
        start(room / "corpus.txt", tmp_path / "other", settings=small, tokenizer=tmp_path / "gpt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mlm.rate": 0.2}, "mlm.rate does nothing in a GPT"),
        ({"model.arch": "bert", "mlm.rate": 1.0}, "mlm.rate is 1.0"),
        ({"model.arch": "bert", "mlm.mask_share": 0.95}, "mlm.mask_share is 0.95"),
        ({"model.arch": "bert", "model.tied": False}, "model.tied is false"),
        ({"model.arch": "bert", "model.heads": 2, "model.width": 32, "model.kv_heads": 1}, "model.kv_heads is 1"),
        ({"model.arch": "bert", "model.context": 4}, "model.context is 4"),
        ({"model.arch": "brt"}, "model.arch"),
    ],
)
def test_refused(room: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """Impossible settings are refused before anything is written."""
    with pytest.raises(UserError) as error:
        start(room / "corpus.txt", tmp_path / "run", settings=settings)
    assert message in error.value.message
    assert not (tmp_path / "run").exists()


def test_the_run_says_what_it_is(room: Path) -> None:
    """run.json and config.json have what a reader needs."""
    about = json.loads((room / "whole" / "config.json").read_text())
    assert about["architectures"] == ["ModernBertForMaskedLM"]
    assert json.loads((room / "whole" / "run.json").read_text())["config"]["model"]["arch"] == "bert"
    assert 'fill "' in (room / "whole" / "README.md").read_text()
