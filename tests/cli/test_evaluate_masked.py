"""tfcli evaluate of encoders that fill in, as a shell sees it."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import TEXT, save

from tfcli.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder, pretrained for a moment, and the file that was held out."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "corpus.txt").write_text(TEXT, encoding="utf-8")
    (folder / "val.txt").write_text(TEXT[:1500], encoding="utf-8")
    sizes = ["--depth", "1", "--context", "32", "--batch-size", "4", "--vocab-size", "400", "--steps", "4"]
    masks = ["--set", "mlm.whole_words=true", "--set", "mlm.rate=0.2", "--val", str(folder / "val.txt")]
    assert main(["pretrain", str(folder / "corpus.txt"), "--arch", "bert", "--out", str(folder / "run"), *sizes, *masks,
                 "--set", "model.width=32", "--device", "cpu", "--precision", "fp32"]) == 0  # fmt: skip
    return folder


def evaluate(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capfd.readouterr()
    code = main(["evaluate", *arguments, "--device", "cpu", "--precision", "fp32"])
    return code, *capfd.readouterr()


def test_scores_are_those_of_training(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The held-out file scores what metrics.jsonl says of it: the same windows, the same masked tokens."""
    code, out, err = evaluate(capfd, str(folder / "run"), str(folder / "val.txt"), "--json")
    assert code == 0 and "device: cpu" in err
    scores: dict[str, Any] = json.loads(out)
    assert list(scores) == ["masked_loss", "perplexity", "accuracy", "masked_tokens", "tokens", "bytes"]
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    best = min((line for line in lines if "val_loss" in line), key=lambda line: line["val_loss"])
    assert scores["masked_loss"] == pytest.approx(best["val_loss"], abs=1e-5)
    assert scores["accuracy"] == pytest.approx(best["val_accuracy"], abs=1e-6)
    assert scores["bytes"] == len(TEXT[:1500].encode())
    assert 0.1 < scores["masked_tokens"] / scores["tokens"] < 0.3
    _, out, _ = evaluate(capfd, str(folder / "run"), str(folder / "val.txt"))
    assert [line.split()[0] for line in out.splitlines()] == list(scores)
    more = ["--set", "mlm.rate=0.5", "--set", "mlm.whole_words=false", "--context", "16", "--json"]
    _, out, _ = evaluate(capfd, str(folder / "run"), str(folder / "val.txt"), *more)
    assert json.loads(out)["masked_tokens"] > 1.5 * scores["masked_tokens"]


def test_quantized(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nearly the same loss, of other weights."""
    losses = []
    for more in ([], ["--quantize", "int8"]):
        code, out, _ = evaluate(capfd, str(folder / "run"), str(folder / "val.txt"), "--json", *more)
        assert code == 0
        losses.append(json.loads(out)["masked_loss"])
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)


def test_an_encoder_of_transformers(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The loss is that of transformers on the same windows with the same masked tokens."""
    transformers = pytest.importorskip("transformers")
    import numpy as np
    import small_bert
    import torch

    from tfcli.config.options import MaskOptions
    from tfcli.formats.hf.tokenizers import load_tokenizer
    from tfcli.objectives.masked import Masking

    small_bert.save(tmp_path / "base", architecture="BertForMaskedLM")
    (tmp_path / "a.txt").write_text("a king had three daughters, and the youngest was so lovely")
    code, out, _ = evaluate(capfd, str(tmp_path / "base"), str(tmp_path / "a.txt"), "--json")
    assert code == 0
    codec = load_tokenizer(tmp_path / "base", vocab_size=len(small_bert.WORDS))
    text = (tmp_path / "a.txt").read_text()
    (rows,) = Masking(tokenizer=codec, options=MaskOptions()).whole(np.array([*codec.encode(text), codec.eos_id]), 64)
    theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path / "base").eval()
    labels = rows["targets_BT"].masked_fill(rows["targets_BT"] < 0, -100)
    with torch.no_grad():
        expected = theirs(input_ids=rows["tokens_BT"], labels=labels).loss
    scores = json.loads(out)
    assert scores["masked_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert scores["masked_tokens"] == int((labels >= 0).sum()) == round(0.3 * (scores["tokens"] - 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stride", "8"], "--stride goes with a decoder"),
        (["--context", "64"], "--context is 64, the model reads 32 tokens"),
        (["--context", "2"], "--context is 2"),
        (["--set", "mlm.rate=1.5"], "mlm.rate is 1.5"),
        (["--set", "mlm.rat=0.5"], "did you mean 'mlm.rate'"),
        (["--strict"], "--strict goes with a model that was finetuned"),
    ],
)
def test_bad_input(folder: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    """Exit 2, nothing on stdout."""
    code, out, err = evaluate(capfd, str(folder / "run"), str(folder / "val.txt"), *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_windows_of_a_decoder_have_a_bound(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default a long context is shortened, with a note; --context sets it."""
    from tfcli.apply import evaluate as command

    save(tmp_path / "tiny")
    (tmp_path / "a.txt").write_text(TEXT[:600])
    whole = evaluate(capfd, str(tmp_path / "tiny"), str(tmp_path / "a.txt"))
    short = evaluate(capfd, str(tmp_path / "tiny"), str(tmp_path / "a.txt"), "--context", "16")
    monkeypatch.setattr(command, "WINDOW_TOKENS", 16)
    bound = evaluate(capfd, str(tmp_path / "tiny"), str(tmp_path / "a.txt"))
    asked = evaluate(capfd, str(tmp_path / "tiny"), str(tmp_path / "a.txt"), "--context", "32")
    assert bound[1] == short[1] != whole[1] == asked[1]
    assert "windows of 16 of the 32 tokens that the model reads" in bound[2]
    assert "windows of" not in whole[2] + short[2] + asked[2]
