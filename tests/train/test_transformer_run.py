"""Pretraining an encoder-decoder: it learns, resumes to the bit, leaves what transformers reads, and is finetuned."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import facts, resume, start, text, timeless
from tiny_models import cpu

from tfcli.config.options import ModelOptions
from tfcli.errors import Interrupted, UserError
from tfcli.formats.hf import directory as hf
from tfcli.model.cost import parameters
from tfcli.model.transformer import Transformer
from tfcli.objectives.table import objective
from tfcli.tasks.translate import new_model
from tfcli.tasks.translate.options import NewModel
from tfcli.text.tokenizers.sentencepiece import Tokenizer
from tfcli.train import optim
from tfcli.train.events import Event, Saved
from tfcli.train.finetune import finetune

SETTINGS: dict[str, Any] = {"model.arch": "transformer", "model.width": 32, "model.heads": 2}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus and the unbroken run "whole"."""
    folder = tmp_path_factory.mktemp("room")
    start(text(folder), folder / "whole", settings=SETTINGS)
    return folder


def test_it_learns(room: Path) -> None:
    """Would catch a side that gets no gradient."""
    scores = [line["val_loss"] for line in timeless(room / "whole") if "val_loss" in line]
    assert scores[-1] < scores[0] - 0.1


def test_stopped_and_resumed(room: Path) -> None:
    """Catches spans that depend on more than the seed and the step, and an encoder missing from a checkpoint."""
    out = room / "stopped"

    def listen(event: Event) -> None:
        if isinstance(event, Saved) and event.step == 6:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        start(room / "corpus.txt", out, settings=SETTINGS, listen=listen)
    resume(out)
    assert facts(out) == facts(room / "whole")


@torch.no_grad()
def test_transformers_reads_the_directory(room: Path) -> None:
    """The same ids and the same logits; a text that names a sentinel is text."""
    transformers = pytest.importorskip("transformers")
    model, codec = hf.load(room / "whole", runtime=cpu())
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(room / "whole").eval()
    assert type(theirs).__name__ == "MBartForConditionalGeneration"
    tokenizer = transformers.AutoTokenizer.from_pretrained(room / "whole")
    text = "Once upon a <extra_id_0> time"
    ids = [*codec.encode(text), codec.eos_id]
    assert tokenizer(text).input_ids == ids
    source, target = torch.tensor([ids[:12]]), torch.tensor([[codec.eos_id, *ids[:6]]])
    mine = model.logits(model(target, memory=model.encode(source)))
    torch.testing.assert_close(mine, theirs(input_ids=source, decoder_input_ids=target).logits, atol=1e-4, rtol=1e-4)


def test_it_is_finetuned_with_its_tokenizer(room: Path, tmp_path: Path) -> None:
    """finetune --task translate takes the directory as it is."""
    (tmp_path / "pairs.tsv").write_text("".join(f"a king {n}\ta well {n}\n" for n in range(20)))
    settings = {"train.steps": 2, "train.batch_size": 4, "data.context": 16}
    done = finetune(
        room / "whole", tmp_path / "pairs.tsv", task="translate", out=tmp_path / "run", settings=settings, device="cpu"
    )
    assert Tokenizer.load(done.directory).hash == Tokenizer.load(room / "whole").hash


def test_a_tokenizer_is_taken_along(room: Path, tmp_path: Path) -> None:
    """Another run may use the tokenizer of the first; one without sentinels is refused before any text is read."""
    small = {"tokenizer.vocab_size": None, "train.steps": 2, **SETTINGS}
    start(room / "corpus.txt", tmp_path / "again", settings=small, tokenizer=room / "whole")
    start(room / "corpus.txt", tmp_path / "gpt", settings={"train.steps": 2})
    with pytest.raises(UserError, match="no sentinel tokens for masked spans"):
        start(room / "corpus.txt", tmp_path / "other", settings=small, tokenizer=tmp_path / "gpt")


@pytest.mark.parametrize(("depth", "pairs"), [(3, 1000), (6, 1_000_000)])
def test_it_is_the_model_that_pairs_get(depth: int, pairs: int) -> None:
    """Would catch two architectures or sizes under one name, and matrices of the encoder that Muon leaves out."""
    made = objective("transformer").shape(ModelOptions(arch="transformer", context=256), depth=depth, vocab_size=512)
    assert made == new_model.shape(NewModel(), vocab_size=512, pairs=pairs)
    with torch.device("meta"):
        model = Transformer(made)
    matrices = sum(p.numel() for name, p in model.named_parameters() if optim.rule(name, p) == optim.MUON)
    assert matrices == parameters(made).matrices


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**SETTINGS, "mlm.rate": 0.2}, "mlm.rate does nothing in an encoder-decoder"),
        ({"spans.rate": 0.2}, "spans.rate does nothing in a GPT"),
        ({**SETTINGS, "model.arch": "bert", "spans.rate": 0.2}, "spans.rate does nothing in an encoder"),
        ({**SETTINGS, "spans.rate": 0.0}, "spans.rate is 0.0"),
        ({**SETTINGS, "spans.mean_length": 0.5}, "spans.mean_length is 0.5"),
        ({**SETTINGS, "model.tied": False}, "model.tied is false"),
        ({**SETTINGS, "model.kv_heads": 1}, "model.kv_heads is 1"),
        ({**SETTINGS, "model.context": 8}, "model.context is 8"),
    ],
)
def test_refused(room: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """Impossible settings are refused before anything is written."""
    with pytest.raises(UserError) as error:
        start(room / "corpus.txt", tmp_path / "run", settings=settings)
    assert message in error.value.message
    assert not (tmp_path / "run").exists()
