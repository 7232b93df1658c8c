"""tfcli evaluate of a file gives the score that training reported of it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from tiny_models import TEXT

from tfcli.cli.main import main

sys.path.append(str(Path(__file__).parent.parent / "text"))
import foreign

LINES = [line for line in TEXT.splitlines() if line]
ON_CPU = ["--device", "cpu", "--precision", "fp32", "--threads", "1"]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A text to learn, and two that are held out: one document, and documents as JSON lines, some of them long."""
    (tmp_path / "corpus.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "one.txt").write_text(TEXT[200:1100], encoding="utf-8")
    documents = [*LINES[:5], "", " ".join(LINES[:3]), "a king", "naïve 从前"]
    rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    (tmp_path / "many.jsonl").write_text(rows, encoding="utf-8")
    return tmp_path


def best(run: Path) -> dict[str, Any]:
    """Return the scores in metrics.jsonl of the model that was kept; the first of a run is not the best."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return min((line for line in lines if "val_loss" in line), key=lambda line: line["val_loss"])


def evaluated(run: Path, held: Path, capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capfd.readouterr()
    assert main(["evaluate", str(run), str(held), "--json", *ON_CPU]) == 0
    scores: dict[str, Any] = json.loads(capfd.readouterr().out)
    return scores


@pytest.mark.parametrize("held", ["one.txt", "many.jsonl"])
@pytest.mark.parametrize("arch", ["gpt", "bert", "lstm"])
def test_pretraining(files: Path, arch: str, held: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Would catch an end of text that only one of the two scores, other windows, and the last model for the best."""
    run = files / "run"
    sizes = ["--depth", "1", "--context", "16", "--batch-size", "4", "--vocab-size", "400", "--steps", "12"]
    sizes += ["--set", "model.width=32", "--set", "train.eval_every=5", "--val", str(files / held)]
    assert main(["pretrain", str(files / "corpus.txt"), "--arch", arch, "--out", str(run), *sizes, *ON_CPU]) == 0
    scores, best_scores = evaluated(run, files / held, capfd), best(run)
    if arch == "bert":
        assert scores["masked_loss"] == pytest.approx(best_scores["val_loss"], rel=1e-6)
        assert scores["accuracy"] == best_scores["val_accuracy"]
        return
    assert scores["loss"] == pytest.approx(best_scores["val_loss"], rel=1e-6)
    assert scores["bits_per_byte"] == pytest.approx(best_scores["val_bits_per_byte"], rel=1e-6)


@pytest.mark.parametrize("held", ["one.txt", "many.jsonl"])
@pytest.mark.parametrize("family", ["tfcli", "llama", "gemma3_text", "lora"])
def test_finetuning_on_text(files: Path, family: str, held: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Would catch a beginning of text that documents and windows have in training and not here."""
    base, more = files / "base", ["--lora"] if family == "lora" else []
    if family == "tfcli":
        tiny_models.save(base, scale=0.1)
    else:
        sizes = {"vocab_size": 800, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
        kind = "llama" if family == "lora" else family
        tiny_models.foreign(kind, **sizes).save_pretrained(base)
        foreign.write(base, "llama2" if kind == "gemma3_text" else "llama3")
    run = files / "run"
    assert main(["finetune", str(base), str(files / "corpus.txt"), "--task", "lm", "--out", str(run), "--val",
                 str(files / held), "--set", "data.context=16", "--set", "train.steps=6",
                 "--set", "train.eval_every=2", *more, *ON_CPU]) == 0  # fmt: skip
    scores, best_scores = evaluated(run, files / held, capfd), best(run)
    assert scores["loss"] == pytest.approx(best_scores["val_loss"], rel=1e-6)
    assert scores["bits_per_byte"] == pytest.approx(best_scores["val_bits_per_byte"], rel=1e-6)
    reported = json.loads((run / "run.json").read_text())["scores"]
    assert scores == {name: pytest.approx(value, rel=1e-6) for name, value in reported.items()}


def test_windows_of_long_contexts(
    files: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models that tfcli pretrained are scored in their whole context; finetuned and other ones in shorter windows."""
    from tfcli.apply import evaluate
    from tfcli.tasks.lm import task as lm

    for module in (evaluate, lm):
        monkeypatch.setattr(module, "WINDOW_TOKENS", 8)
    held = files / "many.jsonl"
    sizes = ["--depth", "1", "--context", "16", "--batch-size", "4", "--vocab-size", "400", "--steps", "4"]
    first = ["pretrain", str(files / "corpus.txt"), "--out", str(files / "base"), "--set", "model.width=32", *sizes]
    again = ["finetune", str(files / "base"), str(files / "corpus.txt"), "--task", "lm", "--out", str(files / "run")]
    for run, command in ((files / "base", first), (files / "run", [*again, "--set", "train.steps=2"])):
        assert main([*command, "--val", str(held), *ON_CPU]) == 0
        assert evaluated(run, held, capfd)["loss"] == pytest.approx(best(run)["val_loss"], rel=1e-6)
    monkeypatch.setattr(evaluate, "WINDOW_TOKENS", 16)
    whole = evaluated(files / "run", held, capfd)["loss"]
    assert whole != pytest.approx(best(files / "run")["val_loss"], rel=1e-6)


def test_documents_that_are_read_in_parts(
    files: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a long document that training encodes whole and evaluation in parts, which gives other ids."""
    from tfcli.text.read import sources

    monkeypatch.setattr(sources, "CHUNK", 40)
    (files / "indented.jsonl").write_text(json.dumps({"text": "if a:\n        return b\n    c\n" * 30}) + "\n")
    base, run, held = files / "base", files / "run", files / "indented.jsonl"
    sizes = {"vocab_size": 800, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
    tiny_models.foreign("llama", **sizes).save_pretrained(base)
    foreign.write(base, "gpt2")  # whose pieces cross the ends of lines
    command = ["finetune", str(base), str(files / "corpus.txt"), "--task", "lm", "--out", str(run), "--val", str(held)]
    assert main([*command, "--set", "data.context=16", "--set", "train.steps=2", *ON_CPU]) == 0
    scores = evaluated(run, held, capfd)
    assert scores["tokens"] == json.loads((run / "data.json").read_text())["val"]["tokens"]
    assert scores["loss"] == pytest.approx(best(run)["val_loss"], rel=1e-6)
