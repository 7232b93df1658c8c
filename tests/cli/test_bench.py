"""tfcli bench: results on stdout, everything else on stderr, and the gate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tfcli.bench import subject, suites
from tfcli.cli.bench import bench
from tfcli.errors import UserError

TINY = [
    "--preset",
    "tiny",
    "--depth",
    "1",
    "--batch-size",
    "1",
    "--repeats",
    "2",
    "--device",
    "cpu",
    "--precision",
    "fp32",
]


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    """The command alone, with little text and without the seconds that ceilings take."""
    monkeypatch.setattr(subject, "TEXT_BYTES", 20_000)
    monkeypatch.setattr(subject, "VOCAB_SIZE", 320)
    monkeypatch.setattr(suites, "ceilings", lambda runtime: suites.Ceilings(flops=1e12, bytes=1e10))
    app = typer.Typer()
    app.command()(bench)
    return app


def test_json_is_one_object_a_suite(app: typer.Typer) -> None:
    done = CliRunner().invoke(app, [*TINY, "--json"])
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["suite"] for line in lines] == ["tokenize", "decode", "prefill", "train"]
    assert {"suite", "value", "unit", "median_s", "low", "high", "repeats"} <= lines[0].keys()
    assert lines[1]["bandwidth_utilisation"] > 0 and lines[3]["flops_utilisation"] > 0
    assert lines[3]["model"]["depth"] == 1 and lines[3]["what"] == "steps of 1 x 64 tokens"
    assert "device: cpu" in done.stderr and "train ..." in done.stderr


def test_table_is_plain_and_aligned(app: typer.Typer) -> None:
    done = CliRunner().invoke(app, [*TINY, "--suite", "tokenize,decode"])
    assert done.exit_code == 0, done.output
    head, *rows = done.stdout.splitlines()[-3:]
    assert head.startswith("suite ") and [row.split()[0] for row in rows] == ["tokenize", "decode"]
    at = head.index("peak memory")
    assert all(row[at - 1] == " " and row[at] != " " for row in rows) and "\033" not in done.stdout


def test_compare_gates_on_what_is_surely_slower(app: typer.Typer, tmp_path: Path) -> None:
    arguments = [*TINY, "--suite", "decode", "--json"]
    done = CliRunner().invoke(app, arguments)
    (line,) = [json.loads(line) for line in done.stdout.splitlines()]
    old = tmp_path / "old.json"

    def against(factor: float) -> tuple[int, str, str]:
        scaled = {key: line[key] * factor for key in ("value", "low", "high")}
        old.write_text(json.dumps({**line, **scaled}))
        again = CliRunner().invoke(app, [*arguments, "--compare", str(old)])
        return again.exit_code, again.stdout, again.stderr

    code, out, err = against(1e-6)
    assert code == 0 and "faster" in err and len(out.splitlines()) == 1
    code, out, err = against(1e6)
    assert code == 1 and "slower by more than 5%" in err and len(out.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--suite", "trian"], "unknown suite 'trian'"),
        (["--preset", "smal"], "unknown preset 'smal'"),
        (["--model", "m", "--depth", "2"], "--model has a shape of its own"),
        (["--model", "nowhere"], "no such model"),
        (["--precision", "fp23"], "unknown precision"),
        (["--compare", "nowhere.json"], "cannot be read"),
        (["--file", "nowhere.txt"], "no such file"),
    ],
)
def test_bad_input_is_the_persons_to_mend(app: typer.Typer, arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, UserError) and says in str(done.exception) and done.stdout == ""


def test_a_device_that_is_not_there_says_so_before_any_work(app: typer.Typer) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = CliRunner().invoke(app, ["--device", "cuda"])
    assert isinstance(done.exception, UserError) and "--device cuda" in str(done.exception) and done.stdout == ""
