"""A fifth objective and a seventh task: one file (this one) and a line of a table each, from command to answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny_models
import torch
from small_runs import SETTINGS, facts, start, text
from torch import Tensor

import tfcli
from tfcli.cli.main import main
from tfcli.config.model import ModelConfig
from tfcli.config.options import PretrainConfig
from tfcli.errors import UserError
from tfcli.formats.hf import directory as hf
from tfcli.model import heads
from tfcli.model.transformer import Transformer
from tfcli.objectives import table
from tfcli.objectives.base import Objective
from tfcli.runtime import Runtime
from tfcli.tasks import applications
from tfcli.tasks.common.batch import Batch, mask, pad
from tfcli.tasks.common.options import FinetuneConfig
from tfcli.tasks.lm.task import LanguageModeling
from tfcli.tasks.task import Application, Finetuning, Headline, Predictor, Start
from tfcli.text.corpus.prepare import Corpus
from tfcli.text.tokenizers.codec import Codec
from tfcli.train.finetune import finetune

MACHINE: dict[str, Any] = {"device": "cpu", "precision": "fp32", "threads": 1}


class Again(Objective):
    """Next-token prediction once more."""

    name = "again"
    called = "a second GPT"
    score, unit = "loss", "nats per token"

    def task(self, config: PretrainConfig, shape: ModelConfig, corpus: Corpus, runtime: Runtime) -> LanguageModeling:
        return LanguageModeling(
            train=corpus.train, val=corpus.val, tokenizer=corpus.tokenizer, context=shape.context, runtime=runtime
        )

    def next_step(self, directory: Path) -> str:
        return f"look at {directory}"


OBJECTIVE = Again()


def rows_of(codec: Codec, texts: Sequence[str]) -> list[list[int]]:
    return [ids or [codec.eos_id] for ids in codec.encode_batch(list(texts))]


def logits(model: Transformer, rows: Batch) -> Tensor:
    head = heads.of(model)
    assert head is not None
    found: Tensor = head(model(rows["tokens_BT"], mask_BT=rows["mask_BT"]), rows["mask_BT"], 0.0)
    return found


def batch(rows: Sequence[list[int]], more: Mapping[str, Tensor]) -> Batch:
    return Batch({"tokens_BT": pad(rows), "mask_BT": mask(rows), **more})


@dataclass(frozen=True, kw_only=True)
class Asking(Finetuning):
    """A task: is a line a question? Scored on its training data."""

    ids: list[list[int]]
    targets: Tensor
    data_report: dict[str, Any] = field(default_factory=lambda: {"content_hash": "none", "split": {"rule": "given"}})

    @property
    def size(self) -> int:
        return len(self.ids)

    @property
    def evaluation_tokens(self) -> int:
        return sum(map(len, self.ids))

    def rows(self, indices: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> Batch:
        return batch([self.ids[i] for i in indices], {"targets": self.targets[torch.from_numpy(indices)]})

    def count(self, rows: Batch) -> int:
        return len(rows)

    def tokens(self, rows: Batch) -> int:
        return rows.real_tokens

    def loss(self, model: Transformer, rows: Batch, *, dtype: torch.dtype, dropout: float) -> tuple[Tensor, int]:
        return torch.nn.functional.cross_entropy(logits(model, rows), rows["targets"], reduction="sum"), len(rows)

    @torch.no_grad()
    def evaluate(self, model: Transformer) -> dict[str, float]:
        right = logits(model, batch(self.ids, {})).argmax(dim=-1) == self.targets
        return {"val_right": float(right.float().mean())}

    def headline(self, scores: Mapping[str, float]) -> Headline:
        return Headline.share("right", scores["val_right"], self.size)

    def report(self, model: Transformer) -> tuple[dict[str, Any], list[str]]:
        return {**self.evaluate(model)}, ["done"]


class Asker(Predictor):
    key = "line"

    def __init__(self, model: Transformer, codec: Codec) -> None:
        self.model, self.codec = model, codec

    def plain(self, line: str) -> str:
        return line

    def parse(self, row: dict[str, Any]) -> str:
        return str(row[self.key])

    def predict(self, inputs: Sequence[str]) -> list[dict[str, Any]]:
        found = logits(self.model, batch(rows_of(self.codec, inputs), {})).argmax(dim=-1)
        return [{"line": line, "asks": bool(asks)} for line, asks in zip(inputs, found.tolist(), strict=True)]

    def show(self, answer: Mapping[str, Any]) -> str:
        return str(answer["asks"])


class Ask(Application):
    name = "ask"
    config = FinetuneConfig

    def prepare(self, start: Start) -> Asking:
        lines = Path(start.data[0]).read_text().splitlines()
        heads.fresh(start.model, "sequence", 2, seed=0)
        return Asking(
            ids=rows_of(start.codec, lines), targets=torch.tensor([line.endswith("?") for line in lines]).long()
        )

    def predictor(self, model: Transformer, codec: Codec, hf_config: Mapping[str, Any], runtime: Runtime) -> Asker:
        return Asker(model, codec)


APPLICATION = Ask()


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line in each table."""
    monkeypatch.setitem(table.OBJECTIVES, "again", table.Line(__name__, "continues text, once more"))
    monkeypatch.setitem(
        applications.APPLICATIONS, "ask", applications.Line(__name__, FinetuneConfig, "lines into whether they ask")
    )


@pytest.mark.usefixtures("lines")
def test_an_objective_is_a_file_and_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a place besides the table that knows the objectives; what the toy learns is what a GPT learns."""
    corpus, short = text(tmp_path), {**SETTINGS, "train.steps": 3}
    made = tfcli.pretrain(corpus, out=tmp_path / "a", settings={**short, "model.arch": "again"}, **MACHINE)
    assert (made.steps, made.arch, made.bits_per_byte) == (3, "again", None)
    assert made.score_name == "loss" and made.score is not None
    hf.load(tmp_path / "a", runtime=tiny_models.cpu())
    start(corpus, tmp_path / "gpt", settings={"train.steps": 3})
    assert facts(tmp_path / "a")["weights"] == facts(tmp_path / "gpt")["weights"]
    with pytest.raises(UserError, match=r"mlm\.rate does nothing in a second GPT"):
        tfcli.pretrain(corpus, out=tmp_path / "b", settings={**short, "model.arch": "again", "mlm.rate": 0.2})
    sizes = ["--depth", "1", "--context", "16", "--vocab-size", "400", "--batch-size", "4", "--threads", "1"]
    command = ["pretrain", str(corpus), "--arch", "again", "--steps", "3", "--out", str(tmp_path / "c"), *sizes]
    assert main([*command, "--device", "cpu", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"model", "steps", "val_loss", "seconds"}


@pytest.mark.usefixtures("lines")
def test_a_task_is_a_file_and_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a member of the contract without a default, and a place besides the table that knows the tasks."""
    tiny_models.save(tmp_path / "base")
    (tmp_path / "lines.txt").write_text("who is the king?\nthe king was old\n" * 4)
    settings = {"train.steps": 3, "train.batch_size": 4}
    made = finetune(
        tmp_path / "base", tmp_path / "lines.txt", task="ask", out=tmp_path / "a", settings=settings, **MACHINE
    )
    assert (made.steps, made.task, made.lines) == (3, "ask", ["done"])
    arguments = [str(tmp_path / "a"), str(tmp_path / "lines.txt"), "--device", "cpu", "--threads", "1"]
    assert main(["predict", *arguments]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["line"] for answer in answers[:2]] == ["who is the king?", "the king was old"]
    assert main(["predict", *arguments, "--beam", "2"]) == 2
    assert "--beam goes with models that translate" in capsys.readouterr().err
    assert main(["evaluate", *arguments[:2], "--confusion", str(tmp_path / "c.png")]) == 2
    assert "this one is of the task ask" in capsys.readouterr().err
