"""tfcli bench: results on stdout, everything else on stderr, and the gate."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import typer
from typer.testing import CliRunner

from tfcli.benchmark import case, fresh, peers, subject, suites
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
SEEN = {
    "program_bytes": 200_000_000,
    "resident_bytes": 290_000_000,
    "peak_bytes": 300_000_000,
    "first_token_seconds": 2,
}


NAMES = ["tokenize", "load", "memory", "decode", "prefill", "batch", "train"]


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    """The command alone, with little text and without the seconds that ceilings and processes take."""
    monkeypatch.setattr(subject, "TEXT_BYTES", 20_000)
    monkeypatch.setattr(subject, "VOCAB_SIZE", 320)
    monkeypatch.setattr(suites, "ROWS", 4)
    monkeypatch.setattr(suites, "ceilings", lambda runtime: suites.Ceilings(flops=1e12, bytes=1e10))
    monkeypatch.setattr(fresh, "started", lambda *arguments, **more: SEEN)
    app = typer.Typer()
    app.command()(bench)
    return app


def write(path: Path, **changes: Any) -> Path:
    """Results as ``--json`` wrote them before there were comparisons."""
    value = changes.pop("value", 100.0)
    line = {"suite": "decode", "value": value, "low": value * 0.99, "high": value * 1.01, "unit": "tokens/s"}
    path.write_text(json.dumps({**line, "what": "x", "machine": {"threads": 2}, **changes}) + "\n")
    return path


def test_json_is_one_object_a_suite(app: typer.Typer) -> None:
    done = CliRunner().invoke(app, [*TINY, "--json"])
    assert done.exit_code == 0, done.output
    lines = {line["suite"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert list(lines) == NAMES
    for line in lines.values():
        assert {"suite", "value", "unit", "median_s", "low", "high", "repeats", "against"} <= line.keys()
    assert lines["decode"]["bandwidth_utilisation"] > 0 and lines["train"]["flops_utilisation"] > 0
    assert lines["train"]["model"]["depth"] == 1 and lines["train"]["what"] == "steps of 1 x 64 tokens"
    assert [other["name"] for other in lines["batch"]["against"]] == ["one by one"]
    assert (lines["memory"]["value"], lines["memory"]["unit"]) == (300.0, "MB") and lines["load"]["unit"] == "s"
    assert lines["prefill"]["details"]["attention"]
    assert "device: cpu" in done.stderr and "train ..." in done.stderr and "memory: 300 MB" in done.stderr


def test_table_is_plain_and_aligned(app: typer.Typer) -> None:
    done = CliRunner().invoke(app, [*TINY, "--suite", "tokenize,decode"])
    assert done.exit_code == 0, done.output
    _, table, remark = done.stdout.split("\n\n")
    head, *rows = table.splitlines()
    assert remark.startswith("decode: by ")
    assert head.startswith("suite ") and [row.split()[0] for row in rows] == ["tokenize", "decode"]
    at = head.index("peak memory")
    assert all(row[at - 1] == " " and row[at] != " " for row in rows) and "\033" not in done.stdout


def test_markdown_tables_have_as_many_cells_in_every_row(app: typer.Typer) -> None:
    done = CliRunner().invoke(app, [*TINY, "--suite", "batch,memory", "--markdown"])
    assert done.exit_code == 0, done.output
    head, *tables, tail = done.stdout.split("\n\n")
    assert all(line.startswith("- ") for line in (head + "\n" + tail.strip()).splitlines())
    assert len(tables) == 2 and "one by one" in tables[1] and "forecast" in tail
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1 and "| --- |" in table


def test_compare_gates_on_what_is_surely_slower(app: typer.Typer, tmp_path: Path) -> None:
    arguments = [*TINY, "--suite", "decode", "--json"]

    def against(value: float, *rules: str) -> tuple[int, str, str]:
        old = write(tmp_path / "old.json", value=value)
        again = CliRunner().invoke(app, [*arguments, "--compare", str(old), *rules])
        return again.exit_code, again.stdout, again.stderr

    code, out, err = against(1e-6)
    assert code == 0 and "faster" in err and len(out.splitlines()) == 1
    code, out, err = against(1e9)
    assert code == 1 and "slower by more than 5%" in err and len(out.splitlines()) == 1
    # A rule takes the place of the five percent.
    code, _, err = against(1e9, "--fail-if", "decode<0.0x")
    assert code == 0 and "slower" in err
    code, _, err = against(1e9, "--fail-if", "decode<0.5x")
    assert code == 1 and "failed: decode<0.5x: decode is" in err


def test_two_files_are_compared_without_a_run(tmp_path: Path, app: typer.Typer) -> None:
    old, new = write(tmp_path / "a.json"), write(tmp_path / "b.json", value=90.0, machine={"threads": 1})

    def run(*more: str) -> Any:
        return CliRunner().invoke(app, ["--compare", str(old), str(new), *more])

    done = run()
    assert done.exit_code == 1 and "device" not in done.stderr
    assert done.stdout.split() == [
        "suite", "then", "now", "ratio", "verdict", "decode", "100", "tokens/s", "90", "tokens/s", "0.900x", "slower",
    ]  # fmt: skip
    assert "warning: the runs differ: machine threads: 2 then, 1 now" in done.stderr
    assert run("--fail-if", "decode<0.85x").exit_code == 0
    assert run("--fail-if", "decode<91").exit_code == 1
    assert "| decode | 100 tokens/s | 90 tokens/s | 0.900x | slower |" in run("--markdown").stdout
    (line,) = run("--json").stdout.splitlines()
    assert json.loads(line) == {
        "suite": "decode", "ratio": 0.9, "verdict": "slower", "then": "100 tokens/s", "now": "90 tokens/s",
    }  # fmt: skip


def test_against_times_a_peer_in_turn(app: typer.Typer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The prompt, tokens and threads go to the peer; what it says of itself and its times come into the table."""
    asked: list[peers.Task] = []

    @contextlib.contextmanager
    def opened(name: str, task: peers.Task, *, python: Path | None) -> Iterator[Any]:
        asked.append(task)
        peer = Peer()
        yield peer

    class Peer:
        name = "transformers"
        about: ClassVar[dict[str, Any]] = {"versions": {"transformers": "9"}, "weights": "fp32", "threads": 2}
        ids: ClassVar[list[int]] = []

        def run(self, tokens: int) -> tuple[float, float]:
            return 1.0, 2.0

    monkeypatch.setattr(peers, "opened", opened)
    monkeypatch.setattr(case, "REST", 0.0)
    done = CliRunner().invoke(app, [*TINY, "--against", "transformers", "--json"])
    assert done.exit_code == 0, done.output
    decode, prefill = map(json.loads, done.stdout.splitlines())
    (task,) = asked
    assert (len(task.prompt), task.tokens, task.device, task.precision) == (32, 32, "cpu", "fp32")
    (other,) = decode["against"]
    assert (other["value"], other["weights"], other["of_tokens"]) == (31 / 2, "fp32", 32)
    assert other["ratio"] == decode["value"] / other["value"]
    assert prefill["against"][0]["value"] == 32.0
    arguments = [*TINY, "--against", "transformers", "--markdown", "--fail-if"]
    done = CliRunner().invoke(app, [*arguments, "decode<1x"])
    assert done.exit_code == 0 and "| transformers 9, fp32, 2 threads | 15.5 tokens/s (15.5 to 15.5) |" in done.stdout
    assert CliRunner().invoke(app, [*arguments, "decode<1000000x"]).exit_code == 1


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
        (["--fail-if", "decode"], "is not a rule"),
        (["--fail-if", "decod<1"], "unknown suite 'decod'"),
        (["--fail-if", "decode<1x"], "nothing to compare with"),
        (["--suite", "train", "--fail-if", "decode<1"], "decode is not measured here"),
        (["--against", "transfomers"], "unknown peer 'transfomers'"),
        (["--against", "llama.cpp"], "llama.cpp reads GGUF files"),
        (["--json", "--markdown"], "exclude each other"),
        (["new.json"], "needs something to compare with"),
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
