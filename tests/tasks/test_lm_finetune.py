"""Reading on: new text in windows, the tokenizer kept, and what is left is a model of text as before."""

import json
from pathlib import Path

import data_reports
import numpy as np
import pytest
import torch
from tiny_models import TEXT, cpu, model, save, tokenizer

from tfcli.config.model import Architecture
from tfcli.errors import UserError
from tfcli.formats.hf import adapters
from tfcli.formats.hf import directory as hf
from tfcli.formats.open import open_path
from tfcli.infer.engine import Engine
from tfcli.tasks.common.options import FinetuneData
from tfcli.tasks.lm.task import APPLICATION, LanguageModeling, LmConfig
from tfcli.tasks.task import Start
from tfcli.train.finetune import finetune


def prepared(path: Path, architecture: Architecture | None = None, **data: object) -> LanguageModeling:
    core = model() if architecture is None else model(architecture=architecture)
    start = Start(
        model=core, codec=tokenizer(), data=[str(path)], config=LmConfig(data=FinetuneData(**data)),  # type: ignore[arg-type]
        runtime=cpu(), hf_config={}, note=lambda line: None,
    )  # fmt: skip
    made = APPLICATION.prepare(start)
    assert isinstance(made, LanguageModeling)
    return made


def test_text_is_what_it_was_and_its_end_is_held_out(tmp_path: Path) -> None:
    """Nothing is lost or changed at the cut, and each document ends with the end of text."""
    (tmp_path / "a.txt").write_text(TEXT)
    task = prepared(tmp_path / "a.txt")
    eos = tokenizer().eos_id
    assert int(task.train.ids[-1]) == int(task.val.ids[-1]) == eos
    parts = [tokenizer().decode(part.ids[:-1]) for part in (task.train, task.val)]
    assert "".join(parts) == TEXT and parts[0].endswith("\n")
    assert 0.05 < len(parts[1]) / len(TEXT) < 0.15
    assert task.train.bytes + task.val.bytes == len(TEXT.encode())
    rows = [json.dumps({"text": line}) for line in TEXT.splitlines()]
    (tmp_path / "b.jsonl").write_text("\n".join(rows))
    many = prepared(tmp_path / "b.jsonl")
    assert many.train.documents + many.val.documents == len(rows)
    assert np.count_nonzero(many.train.ids == eos) == many.train.documents
    assert many.data_report["content_hash"] != task.data_report["content_hash"]
    for made in (task, many):
        data_reports.check(made.data_report, "lm")
        assert made.data_report["split"] == {"rule": "end of text", "fraction": 0.1}
        assert made.data_report["sources"][0]["part"] == "both"


def test_files_of_text_are_counted_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "the sun"}\n{"text": ""}\n{"text": "the sun"}\n')
    (tmp_path / "b.txt").write_text(TEXT)
    (tmp_path / "v.jsonl").write_text('{"text": "the sun"}\n' * 40)
    data = prepared(tmp_path / "[ab].*", val=str(tmp_path / "v.jsonl")).data_report
    data_reports.check(data, "lm")
    assert [(row["part"], row["documents"]) for row in data["sources"]] == [("train", 2), ("train", 1), ("val", 40)]
    assert data["dropped"]["reasons"][0]["places"] == [f"{tmp_path / 'a.jsonl'}:2"]
    assert data["duplicates"] == {"within_train": 1, "across_splits": 40}


@pytest.mark.parametrize("lora", [False, True])
def test_the_loss_falls_and_the_directory_continues_text(tmp_path: Path, lora: bool) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    base = save(tmp_path / "base", scale=0.1)
    sets = ["train.steps=40", "optim.lr=0.01", "train.batch_size=4", *(["lora.on=true"] if lora else [])]
    result = finetune(base, tmp_path / "a.txt", task="lm", out=tmp_path / "run", sets=sets, device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    assert (tmp_path / "run" / (adapters.WEIGHTS if lora else hf.WEIGHTS)).is_file()
    core, codec = open_path(tmp_path / "run").load(runtime=cpu())
    assert codec.encode(TEXT) == tokenizer().encode(TEXT)
    engine = Engine(core, codec, cpu())
    assert engine.score(TEXT).loss < 0.9 * losses[0]
    assert result.scores["loss"] == pytest.approx(min(losses), rel=1e-3)
    from tfcli.apply.predict import task_of

    assert task_of(open_path(tmp_path / "run")) is None


def test_what_cannot_be_read_on_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text("a king")
    with pytest.raises(UserError, match="is an encoder, --task lm needs a decoder"):
        prepared(tmp_path / "a.txt", Architecture(causal=False))
    with pytest.raises(UserError, match="too few for a context of 32"):
        prepared(tmp_path / "b.txt")
    with pytest.raises(UserError, match="reads UTF-8, not latin-1"):
        prepared(tmp_path / "a.txt", encoding="latin-1")
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": TEXT}) + '\n{"text": ""}\n')
    assert prepared(tmp_path / "c.jsonl").train.tokens
    for name, more in (("a.txt", {"val": str(tmp_path / "c.jsonl")}), ("c.jsonl", {})):
        with pytest.raises(UserError, match=r"c\.jsonl: 1 empty documents"):
            prepared(tmp_path / name, strict=True, **more)
    with pytest.raises(UserError, match="continues text"):
        APPLICATION.predictor(model(), tokenizer(), {}, cpu())


def test_rows_are_windows_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    task = prepared(tmp_path / "a.txt", context=16)
    rows = task.rows(np.array([0, 1]), np.array([0, 0]))
    assert rows.shape == (2, 17)
    assert torch.equal(rows[0], torch.from_numpy(task.train.ids[:17].astype(np.int64)))
