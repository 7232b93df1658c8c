"""tfcli tokenize as a shell citizen: lossless filters, results on stdout only, clear refusals, no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tfcli.cli import tokenize
from tfcli.errors import UserError

PROSE = "".join(f"The number {n} is {'even' if n % 2 == 0 else 'odd'}, said the café owner.\n" for n in range(400))

# What `tfcli tokenize` runs, without the other commands: its exit codes are main's.
PROGRAM = """
import sys, typer
from tfcli.cli import main, tokenize
main.build = lambda: tokenize.app
code = main.main(sys.argv[1:])
assert "torch" not in sys.modules
sys.exit(code)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "corpus.txt").write_text(PROSE)
    invoke("train", folder / "corpus.txt", "--out", folder / "tokenizer.model", "--vocab-size", 320)
    return folder / "tokenizer.model"


def invoke(*arguments: Any, given: bytes = b"", fails: bool = False) -> Any:
    result = CliRunner().invoke(tokenize.app, [str(argument) for argument in arguments], input=given)
    if fails:
        assert isinstance(result.exception, UserError), result.output
    elif result.exception:
        raise result.exception
    return result


def run(*arguments: Any, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    return subprocess.run(command, input=given, capture_output=True, timeout=60, check=False)


def test_train_writes_a_file_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text(PROSE)
    out = tmp_path / "new" / "t.model"
    result = invoke("train", tmp_path / "corpus.txt", "--out", out, "--vocab-size", 300, "--type", "unigram")
    assert result.stdout.startswith(f"{out}: 300 pieces, ")
    assert result.stdout.count("\n") == 1
    assert invoke("train", tmp_path / "corpus.txt", "--out", out, fails=True).exception.hint.startswith("overwrite it")
    result = invoke("train", tmp_path / "corpus.txt", "--out", out, "--force", "--json", "--vocab-size", 280)
    row = json.loads(result.stdout)
    assert (row["path"], row["vocab_size"], row["bytes"]) == (str(out), 280, len(PROSE.encode()))
    assert row["bytes_per_token"] > 1


def test_train_reads_stdin_and_passes_settings(tmp_path: Path) -> None:
    """Catches --set that reaches nothing, and stdin that can only be read once."""
    out = tmp_path / "t.model"
    flags = ("--set", "split_digits=true", "--set", "tokenizer.sample_bytes=100000", "--user-symbol", "<|user|>")
    invoke("train", "-", "--out", out, *flags, given=PROSE.encode())
    pieces = invoke("encode", "--pieces", "--tokenizer", out, given=b"<|user|>The number 123").stdout.split()
    assert pieces[0] == "<|user|>"
    assert pieces[-2:] == ["2", "3"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--set", "split_digitz=true"], "split_digitz"),
        (["--set", "data.erors=strict"], "data.erors"),
        (["--type", "bpee"], "bpee"),
        (["--vocab-size", "100000"], "too small"),
        (["--errors", "ignore"], "ignore"),
    ],
)
def test_train_refuses(tmp_path: Path, flags: list[str], message: str) -> None:
    (tmp_path / "corpus.txt").write_text(PROSE)
    error = invoke("train", tmp_path / "corpus.txt", "--out", tmp_path / "t.model", *flags, fails=True).exception
    assert message in error.message
    assert error.hint
    assert not (tmp_path / "t.model").exists()


LINES = "a\r\n\nx\u2028y\x85z\x0b\x0c\n  two  spaces \t\n▁ <unk> \0 漢👩\nlast\n".encode()


@pytest.mark.parametrize("flags", [(), ("--pieces",)])
def test_encode_and_decode_are_inverse_filters(model: Path, flags: tuple[str, ...]) -> None:
    """Catches a line split at anything but a line feed, and any character lost on the way."""
    encoded = invoke("encode", "--tokenizer", model, *flags, given=LINES).stdout_bytes
    assert encoded.count(b"\n") == LINES.count(b"\n")
    assert invoke("decode", "--tokenizer", model, *flags, given=encoded).stdout_bytes == LINES


def test_a_last_line_without_line_feed_counts(model: Path) -> None:
    assert invoke("encode", "--tokenizer", model, given=b"a\nb").stdout.count("\n") == 2


def test_json_carries_line_breaks(model: Path) -> None:
    given = b'{"text": "two\\nlines"}\nplain {text}\n{"other": 1}\n'
    encoded = invoke("encode", "--tokenizer", model, "--json", given=given).stdout
    assert all(set(json.loads(line)) == {"ids"} for line in encoded.splitlines())
    decoded = invoke("decode", "--tokenizer", model, "--json", given=encoded.encode()).stdout
    assert [json.loads(line)["text"] for line in decoded.splitlines()] == ["two\nlines", "plain {text}", '{"other": 1}']
    pieces = invoke("encode", "--tokenizer", model, "--json", "--pieces", given=b"The a\n").stdout
    back = invoke("decode", "--tokenizer", model, "--pieces", given=pieces.encode()).stdout
    assert (list(json.loads(pieces)), back) == (["pieces"], "The a\n")


@pytest.mark.parametrize(
    ("command", "given", "message"),
    [
        ("encode", b"fine\n\xff\n", "line 2 is not valid UTF-8"),
        ("decode", b"5\n5 x\n", "line 2 is not a line of ids: 5 x"),
        ("decode", b"99999\n", "99999 is not an id"),
        ("decode", b"-1\n", "-1 is not an id"),
        ("decode", b'{"idz": [1]}\n', "line 1 is not a line of ids"),
    ],
)
def test_bad_lines_are_placed(model: Path, command: str, given: bytes, message: str) -> None:
    assert message in invoke(command, "--tokenizer", model, given=given, fails=True).exception.message


def test_invalid_lines_can_be_replaced(model: Path) -> None:
    encoded = invoke("encode", "--tokenizer", model, "--errors", "replace", given=b"a\xffb\n").stdout_bytes
    assert invoke("decode", "--tokenizer", model, given=encoded).stdout == "a\ufffdb\n"


def test_the_tokenizer_is_found(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a guess without a note, and results mixed with notes."""
    monkeypatch.delenv("TFCLI_MODEL", raising=False)
    expected = invoke("encode", "--tokenizer", model.parent, given=b"The\n").stdout
    monkeypatch.chdir(tmp_path)
    error = invoke("encode", given=b"The\n", fails=True).exception
    assert "tfcli tokenize train" in error.hint
    monkeypatch.setenv("TFCLI_MODEL", str(model.parent))
    assert invoke("encode", given=b"The\n").stdout == expected
    monkeypatch.delenv("TFCLI_MODEL")
    monkeypatch.chdir(model.parent)
    found = invoke("encode", given=b"The\n")
    assert (found.stdout, found.stderr) == (expected, "tokenizer: tokenizer.model\n")


def test_stats(model: Path, tmp_path: Path) -> None:
    """Catches rates over the wrong total, and tokens given to the wrong script."""
    (tmp_path / "a.txt").write_text("The number 7 даже 漢字漢\n")
    row = json.loads(invoke("stats", tmp_path / "a.txt", "--tokenizer", model, "--json").stdout)
    assert row["bytes"] == len("The number 7 даже 漢字漢\n".encode())
    assert row["documents"] == 1
    assert row["bytes_per_token"] == pytest.approx(row["bytes"] / row["tokens"])
    scripts = row["scripts"]
    assert set(scripts) == {"Latin", "Cyrillic", "Han", "Common"}
    assert scripts["Han"] == {"bytes": 9, "tokens": 9, "bytes_per_token": 1.0, "byte_fallback_rate": 1.0}
    assert scripts["Latin"]["byte_fallback_rate"] == 0
    assert sum(script["bytes"] for script in scripts.values()) == row["bytes"]
    assert sum(script["tokens"] for script in scripts.values()) == row["tokens"]
    assert row["byte_fallback_rate"] == pytest.approx((9 + 8) / row["tokens"])
    plain = invoke("stats", tmp_path / "a.txt", "--tokenizer", model).stdout
    assert "bytes per token" in plain
    assert "\x1b" not in plain
    (tmp_path / "empty.txt").write_text("")
    assert "no text" in invoke("stats", tmp_path / "empty.txt", "--tokenizer", model, fails=True).exception.message


@pytest.mark.parametrize("command", ["train", "encode", "decode", "stats"])
def test_help_has_an_example(command: str) -> None:
    assert (
        f"Example: {'echo' if command == 'decode' else 'tfcli tokenize ' + command}" in invoke(command, "--help").stdout
    )


def test_as_a_process_it_keeps_streams_and_codes_apart(model: Path) -> None:
    """Catches torch in the process (the program asserts it), tracebacks, and messages on stdout."""
    done = run("encode", "--tokenizer", model, given=b"The number\n")
    assert (done.returncode, done.stderr) == (0, b"")
    failed = run("encode", "--tokenizer", model, given=b"\xff")
    assert (failed.returncode, failed.stdout) == (2, b"")
    assert failed.stderr.startswith(b"error: line 1 is not valid UTF-8")
    assert b"Traceback" not in failed.stderr


def test_a_closed_pipe_ends_quietly(model: Path) -> None:
    """Catches a traceback under `| head -1`."""
    command = [sys.executable, "-c", PROGRAM, "encode", "-", "--tokenizer", str(model)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(b"The\n")
        process.stdin.flush()
        assert process.stdout.readline().strip()
        process.stdout.close()
        try:
            process.stdin.write(PROSE.encode() * 50)
            process.stdin.close()
        except BrokenPipeError:
            pass
        assert process.stderr.read() == b""
        assert process.wait(timeout=30) == 0


def test_a_line_typed_is_answered_at_once(model: Path) -> None:
    """Catches output that waits for a full buffer or for the end of the input."""
    command = [sys.executable, "-c", PROGRAM, "encode", "--tokenizer", str(model)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        os.set_blocking(process.stdout.fileno(), False)
        for line in (b"one\n", b"two\n"):
            process.stdin.write(line)
            process.stdin.flush()
            deadline = time.monotonic() + 30
            answer = b""
            while not answer.endswith(b"\n") and time.monotonic() < deadline:
                answer += process.stdout.read() or b""
                time.sleep(0.01)
            assert answer.count(b"\n") == 1
        process.stdin.close()
        assert process.wait(timeout=30) == 0


def test_json_that_is_nested_too_deeply_is_a_broken_line(model: Path) -> None:
    """Catches a traceback from Python's JSON reader."""
    deep = b'{"a":' * 100_000
    caught = invoke("encode", "--tokenizer", model, "--json", given=b'{"text": "a"}\n' + deep + b"\n", fails=True)
    assert caught.exception.message.startswith("line 2 ")
    caught = invoke("decode", "--tokenizer", model, given=b"5\n6\n" + deep + b"\n", fails=True)
    assert caught.exception.message.startswith("line 3 ")


@pytest.mark.parametrize("ids", ["[1.9]", "[5, true]", "[1.0]", '["5"]', "[null]", '"5"', '{"5": 5}', "5"])
def test_only_whole_numbers_are_ids(model: Path, ids: str) -> None:
    """Catches 1.9 and true read as 1."""
    caught = invoke("decode", "--tokenizer", model, given=f'{{"ids": [5]}}\n{{"ids": {ids}}}\n'.encode(), fails=True)
    assert caught.exception.message.startswith("line 2 is not a line of ids")


@pytest.mark.parametrize("command", ["encode", "decode", "stats -"])
def test_closed_stdin_is_said(model: Path, command: str) -> None:
    arguments = [sys.executable, "-c", PROGRAM, *command.split(), "--tokenizer", str(model)]
    result = subprocess.run(["sh", "-c", '"$@" <&-', "sh", *arguments], capture_output=True, timeout=60, check=False)
    assert result.returncode == 2, result.stderr
    assert b"stdin is closed" in result.stderr
    assert b"Traceback" not in result.stderr
