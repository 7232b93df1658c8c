"""tfcli compress, as a shell sees it."""

import json
from pathlib import Path

import pytest
from tiny_models import TEXT, save

from tfcli.cli.main import main

CPU = ["--device", "cpu", "--precision", "fp32"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return save(tmp_path / "run", width=64, ffn_width=64, head_width=16)


def test_a_table_and_where_it_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Results on stdout, what goes on on stderr; the directory is a model like any other."""
    assert main(["compress", "run", "out", "--quantize", "int4", "--text", "text.txt", *CPU]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line[:14].strip() for line in lines[:5]] == ["", "disk", "memory", "perplexity", "bits per byte"]
    assert lines[5] == "out"
    assert "device: cpu" in err and "quantizing run to 4 bits" in err and "verifying the file" in err
    assert main(["evaluate", "out", "text.txt", "--json", *CPU]) == 0
    score = json.loads(capsys.readouterr().out)["perplexity"]
    assert f"{score:.4f}" in lines[3]


def test_json_is_one_object(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "run", "out", "--quantize", "int8", "--json", *CPU]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["path"], made["quantize"], made["before"], made["after"]) == ("out", "int8", None, None)
    assert made["disk_after"] == (run.parent / "out" / "model.gguf").stat().st_size < made["disk_before"]


CASES = [
    (["run", "out"], "choose --quantize int8 or --quantize int4"),
    (["run", "out", "--quantize", "int2"], "unknown kind of quantization 'int2'"),
    (["run", "run", "--quantize", "int4"], "run is the model that is read"),
    (["run", "text.txt", "--quantize", "int4"], "text.txt is a file"),
    (["run", "out", "--quantize", "int4", "--text", "txt.txt"], "no such file: txt.txt"),
    (["none", "out", "--quantize", "int4"], "no such model: none"),
]


@pytest.mark.parametrize(("arguments", "message"), CASES, ids=[message for _, message in CASES])
def test_what_cannot_work_is_said(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["compress", *arguments, *CPU]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and "Traceback" not in err
    assert sorted(path.name for path in run.parent.iterdir()) == ["run", "text.txt"]
