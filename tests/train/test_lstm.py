"""The baseline: as large as the GPT, learns more than frequencies, resumes to the bit, is scored and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import facts, resume, start, text, timeless
from tiny_models import cpu

from tfcli.cli.main import main
from tfcli.config.options import ModelOptions
from tfcli.errors import Interrupted, UserError
from tfcli.formats.hf.stored import read_data
from tfcli.infer.score import evaluate
from tfcli.model.cost import parameters
from tfcli.objectives import lstm
from tfcli.objectives.lstm import Lstm
from tfcli.objectives.table import objective
from tfcli.text.corpus.shards import Shard
from tfcli.train.events import Event, Saved

SETTINGS: dict[str, Any] = {"model.arch": "lstm", "train.steps": 60, "optim.lr": 0.02, "train.checkpoint_every": 20}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus and the unbroken run "whole"."""
    folder = tmp_path_factory.mktemp("room")
    start(text(folder), folder / "whole", settings=SETTINGS)
    return folder


def shards(room: Path) -> tuple[Shard, Shard]:
    record = json.loads((room / "whole" / "run.json").read_text())
    folder = room / record["shards"]
    return Shard.open(folder / "train.bin"), Shard.open(folder / "val.bin")


@pytest.mark.parametrize("depth", [2, 4, 6, 8])
@pytest.mark.parametrize("vocabulary", [512, 8192])
def test_as_many_parameters_as_the_gpt(depth: int, vocabulary: int) -> None:
    """Would catch a count that forgets a bias, or a comparison of unequal models."""
    gpt = objective("gpt").shape(ModelOptions(), depth=depth, vocab_size=vocabulary)
    with torch.device("meta"):
        made = Lstm(lstm.like(gpt))
    count = sum(parameter.numel() for parameter in made.parameters())
    assert count == lstm.size(vocabulary, made.config.width)
    assert abs(count / parameters(gpt).total - 1) < 0.01


def test_it_is_the_lstm_of_torch() -> None:
    """Against torch's two-layer LSTM on the same weights; no row sees what another holds, nor what follows."""
    made = Lstm(lstm.shape(vocab_size=50, context=16, width=12))
    made.initialize(0)
    twin = torch.nn.LSTM(12, 12, num_layers=2, batch_first=True)
    named = {f"{k[:-1]}{n}": v for n, layer in enumerate(made.layers) for k, v in layer.state_dict().items()}
    twin.load_state_dict(named)
    tokens = torch.randint(50, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(made(tokens), twin(made.embed(tokens))[0])
        torch.testing.assert_close(made(tokens[1:2, :4]), made(tokens)[1:2, :4])


def test_it_learns_more_than_frequencies(room: Path) -> None:
    """Would catch a state that is not carried from token to token."""
    train, val = shards(room)
    counts = np.bincount(np.asarray(train.ids), minlength=400) + 1.0
    unigram = float(-np.log(counts / counts.sum())[np.asarray(val.ids)].mean())
    best = min(line["val_loss"] for line in timeless(room / "whole") if "val_loss" in line)
    assert best < unigram - 0.3


def test_stopped_and_resumed(room: Path) -> None:
    """Would catch anything that a checkpoint forgets."""
    out = room / "stopped"

    def listen(event: Event) -> None:
        if isinstance(event, Saved) and event.step == 20:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        start(room / "corpus.txt", out, settings=SETTINGS, listen=listen)
    resume(out)
    assert facts(out) == facts(room / "whole")


def test_the_directory_scores_as_training_did(room: Path) -> None:
    """The saved model is the best one, and scored by the same rule."""
    _, val = shards(room)
    model, tokenizer = lstm.OBJECTIVE.load(room / "whole", read_data(room / "whole"), cpu())
    again = evaluate(model, val.ids, text_bytes=val.bytes, codec=tokenizer, runtime=cpu())
    lines = [line for line in timeless(room / "whole") if "val_bits_per_byte" in line]
    best = min(lines, key=lambda line: line["val_bits_per_byte"])
    assert again.bits_per_byte == pytest.approx(best["val_bits_per_byte"], abs=1e-6)
    assert again.loss == pytest.approx(best["val_loss"], abs=1e-6)


def test_commands(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """evaluate and inspect take it; what writes text says that it does not."""
    run = str(room / "whole")
    machine = ["--device", "cpu", "--precision", "fp32", "--threads", "1"]
    assert main(["evaluate", run, str(room / "corpus.txt"), "--json", *machine]) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_byte"] > 0
    assert main(["inspect", run, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["architecture"] == "lstm" and printed["shape"]["layers"] == 2
    assert printed["stored"]["numbers"] == lstm.size(400, printed["shape"]["width"])
    for command in (["generate", "--model", run, "--prompt", "x"], ["convert", run, str(room / "out")]):
        assert main(command) == 2
        assert "which can only be scored" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mlm.rate": 0.2}, "mlm.rate does nothing in an LSTM"),
        ({"spans.rate": 0.2}, "spans.rate does nothing in an LSTM"),
        ({"optim.muon_lr": 0.01}, "optim.muon_lr does nothing in an LSTM"),
        ({"train.compile": "on"}, "train.compile does nothing in an LSTM"),
    ],
)
def test_refused(room: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """Settings without effect are refused before anything is written."""
    with pytest.raises(UserError) as error:
        start(room / "corpus.txt", tmp_path / "run", settings={**SETTINGS, **settings})
    assert message in error.value.message
    assert not (tmp_path / "run").exists()


def test_a_damaged_directory(room: Path, tmp_path: Path) -> None:
    """Errors name the file."""
    broken = shutil.copytree(room / "whole", tmp_path / "broken")
    about = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**about, "width": "x"}))
    with pytest.raises(UserError, match="width is 'x'"):
        lstm.OBJECTIVE.load(broken, read_data(broken), cpu())
    (broken / "config.json").write_text(json.dumps(about))
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        lstm.OBJECTIVE.load(broken, read_data(broken), cpu())
