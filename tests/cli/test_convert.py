"""tfcli convert, as a shell sees it."""

import json
from pathlib import Path

import pytest
from tiny_models import cpu, save

from tfcli.cli.main import main
from tfcli.config.options import LoraOptions
from tfcli.formats.hf import adapters
from tfcli.formats.hf import directory as hf
from tfcli.model import lora


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return save(tmp_path / "run", ffn_width=64)


def test_there_and_back(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The format follows from OUT; stdout says what was written and how near it is."""
    assert main(["convert", "run", "m.gguf"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].startswith("m.gguf: f16, 0.")
    assert out.splitlines()[1].startswith("max |delta| of logits: 0 when reloaded, ")
    assert err == ""
    assert main(["convert", "m.gguf", "hf", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["path"], made["format"], made["type"], made["logit_change"]) == ("hf", "hf", "f32", 0.0)
    assert made["bytes"] == (run.parent / "hf" / "model.safetensors").stat().st_size
    assert main(["generate", "--model", "hf", "--prompt", "a king", "--max-tokens", "2", "--device", "cpu"]) == 0


def test_adapters_are_merged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Adapters are merged into their base model, and both comparisons are reported."""
    core = hf.load_model(run, runtime=cpu())
    for layer in lora.attach(core, LoraOptions(), seed=0).values():
        layer.b.data.fill_(0.01)
    adapters.save("adapter", core, base=run)
    assert main(["convert", "run", "merged", "--merge", "adapter"]) == 0
    out, err = capsys.readouterr()
    assert "by merging, of base and adapters apart" in out.splitlines()[1] and err == ""
    assert main(["convert", "run", "again", "--merge", "run"]) == 2
    assert "no adapter_config.json in run" in capsys.readouterr().err


CASES = [
    (["run", "m.gguf", "--to", "ggjt"], 2, "unknown format 'ggjt'"),
    (["run", "m.gguf", "--type", "q8"], 2, "did you mean 'q8_0'?"),
    (["run", "out", "--to", "gguf"], 2, "name a file: out.gguf"),
    (["run", "run"], 2, "run is the model that is read"),
    (["none", "m.gguf"], 2, "no such model: none"),
    (["run", "there.gguf"], 2, "overwrite it: --force"),
    (["run"], 2, "Missing argument"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), CASES, ids=[message for *_, message in CASES])
def test_what_cannot_work_is_said(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    (run.parent / "there.gguf").write_text("x")
    assert main(["convert", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and message in err and "Traceback" not in err
    assert sorted(path.name for path in run.parent.iterdir()) == ["run", "there.gguf"]
