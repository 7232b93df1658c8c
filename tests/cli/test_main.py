"""The shell contract: exit codes, messages instead of tracebacks, stdout for results only."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pytest
import typer

from tfcli.cli import main as module
from tfcli.cli.main import main
from tfcli.errors import Interrupted, RunError, TfcliError, UserError

Raising = Callable[[BaseException | type[BaseException]], None]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Raising:
    """Replace the application by one command, ``do [--count N]``, that raises what it is told."""

    def raising(error: BaseException | type[BaseException]) -> None:
        app = typer.Typer(pretty_exceptions_enable=False)

        @app.callback()
        def top() -> None:
            """Nothing."""

        @app.command("do")
        def do(count: Annotated[int, typer.Option("--count")] = 1) -> None:
            raise error

        monkeypatch.setattr(module, "build", lambda: app)

    return raising


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UserError("what was given", hint="what to do"), 2, "error: what was given\n  what to do\n"),
        (UserError("what was given"), 2, "error: what was given\n"),
        (RunError("it failed"), 1, "error: it failed\n"),
        (TfcliError("it failed"), 1, "error: it failed\n"),
        (Interrupted("stopped after step 3"), 130, "stopped after step 3\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 1, "error: no space left on the disk for a/b\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: no space left on the disk\n"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b"),
            2,
            "error: a/b: No such file or directory",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), 2, "error: a/b: Permission denied"),
        (MemoryError(), 1, "error: out of memory\n"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 1, "error: out of memory\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "error: out of memory\n"),
        (ZeroDivisionError("division by zero"), 1, "error: ZeroDivisionError: division by zero\n"),
    ],
)
def test_exit_code_and_message(
    error: BaseException, code: int, says: str, command: Raising, capsys: pytest.CaptureFixture[str]
) -> None:
    command(error)
    assert main(["do"]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(says) and "Traceback" not in captured.err and captured.out == ""


def test_a_defect_says_how_to_see_more(command: Raising, capsys: pytest.CaptureFixture[str]) -> None:
    command(ZeroDivisionError("x"))
    main(["do"])
    assert "defect of tfcli; run again with --debug" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "advice", "not_its_own"),
    [
        ("pretrain", "--depth", "--quantize"),
        ("finetune", "train.micro_batch=1", "--depth"),
        ("generate", "--num-samples", "--depth"),
        ("predict", "--quantize", "--depth"),
        ("evaluate", "--context", "--depth"),
        ("compress", "--text", "--depth"),
        ("convert", "close other programs", "--"),
    ],
)
def test_out_of_memory_advises_what_the_command_has(
    name: str, advice: str, not_its_own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Would catch --depth advised to who generates; every option that is named is in the command's help."""
    assert module._explain(MemoryError(), name) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: out of memory\n") and advice in message and not_its_own not in message
    assert main([name, "--help"]) == 0
    help = capsys.readouterr().out
    assert all(option in help for option in re.findall(r"--[a-z-]+", message))


@pytest.mark.parametrize("where", [["--debug", "do"], ["do", "--debug"], ["do", "--count", "2", "--debug"]])
@pytest.mark.parametrize("error", [ZeroDivisionError, UserError("x")])
def test_debug_shows_the_traceback(
    error: BaseException | type[BaseException], where: list[str], command: Raising
) -> None:
    command(error)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        main(where)


@pytest.mark.parametrize(("name", "keeps"), [("generate", True), ("pretrain", True), ("tokenize", False), ("", False)])
def test_the_command_line_tunes_malloc_for_its_own_process(
    name: str, keeps: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[bool] = []
    monkeypatch.setattr("tfcli.runtime.keep_freed_memory", lambda: called.append(True))
    assert main([*filter(None, [name]), "--help"]) == 0
    assert bool(called) == keeps


@pytest.mark.parametrize("arguments", [["do", "--word", "--debug"], ["do", "--", "--debug"]])
def test_debug_is_not_taken_out_of_values(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches the lost prompt of ``generate --prompt --debug``."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)

    @app.command("do")
    def do(name: str = typer.Argument(""), word: str = typer.Option("", "--word")) -> None:
        raise UserError(f"given {name}{word}")

    monkeypatch.setattr(module, "build", lambda: app)
    assert main(arguments) == 2
    assert capsys.readouterr().err == "error: given --debug\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["do", "--cuont", "1"], "No such option: --cuont"),
        (["do", "--count", "x"], "Invalid value for '--count'"),
        (["od"], "No such command 'od'"),
        (["do", "extra"], "unexpected extra argument"),
    ],
)
def test_usage_errors_are_two(
    arguments: list[str], says: str, command: Raising, capsys: pytest.CaptureFixture[str]
) -> None:
    command(ZeroDivisionError())
    for more in ([], ["--debug"]):
        assert main([*arguments, *more]) == 2
        captured = capsys.readouterr()
        assert says in captured.err and "Traceback" not in captured.err and captured.out == ""


def test_exit_raised_by_a_command_is_the_code(command: Raising) -> None:
    command(typer.Exit(1))
    assert main(["do"]) == 1
    command(typer.Exit())
    assert main(["do"]) == 0
    command(typer.Abort)
    assert main(["do"]) == 130


def test_version_and_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    from tfcli import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tfcli {__version__}\n"
    for arguments in (["--help"], ["-h"]):
        assert main(arguments) == 0
        assert "tfcli pretrain corpus.txt" in capsys.readouterr().out


def run(*arguments: str, **how: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tfcli", *arguments], capture_output=True, text=True, timeout=60, **how  # type: ignore[call-overload,no-any-return]
    )  # fmt: skip


def test_the_program_exits_with_the_code(tmp_path: Path) -> None:
    done = run("inspect", str(tmp_path / "nothing"))
    assert done.returncode == 2 and done.stderr.startswith("error: no such file") and done.stdout == ""
    done = run("inspect", "--jsno")
    assert done.returncode == 2 and "--json" in done.stderr and done.stdout == ""
    done = run("inspect", str(tmp_path / "nothing"), "--debug")
    assert done.returncode != 0 and "Traceback" in done.stderr


def test_stdout_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    """Would catch a UnicodeEncodeError called "a defect of tfcli", as under Windows pipes and LC_ALL=C."""
    path = tmp_path / "\U0001f389.txt"
    path.write_text("\U0001f389 text\n" * 20, encoding="utf-8")
    ascii = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for more in ((), ("--json",)):
        done = run("inspect", str(path), *more, env=ascii, encoding="utf-8")
        assert done.returncode == 0 and done.stderr == "" and "\U0001f389" in done.stdout
    done = run("inspect", str(tmp_path / "\u4ece.txt"), env=ascii, encoding="utf-8")
    assert done.returncode == 2 and done.stderr.startswith("error: no such file") and "\\u4ece" in done.stderr


def test_a_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"{number}.txt").write_text("text\n" * 200)
    targets = " ".join(str(path) for path in sorted(tmp_path.iterdir()))
    script = f"{sys.executable} -m tfcli inspect --json {targets} | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    line, code = done.stdout.splitlines()
    assert line.startswith("{") and code == "0" and done.stderr == ""


def test_a_closed_stream_is_said(tmp_path: Path) -> None:
    """stdout: nothing is done for nobody. stderr: would catch messages among the results."""

    def shell(how: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        words = ["sh", "-c", f'"$@" {how}', "sh", sys.executable, "-m", "tfcli", *arguments]
        return subprocess.run(words, capture_output=True, text=True, timeout=60)

    done = shell(">&-", "inspect", str(tmp_path))
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, "error: stdout is closed")
    done = shell("2>&-", "inspect", str(tmp_path / "nothing"))
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stdout_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text\n")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tfcli", "inspect", str(tmp_path / "a.txt")],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("error: no space left") and "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_control_c_is_130(tmp_path: Path) -> None:
    fifo = tmp_path / "slow.txt"
    os.mkfifo(fifo)
    process = subprocess.Popen(
        [sys.executable, "-m", "tfcli", "tokenize", "encode", "--tokenizer", str(fifo)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs ignore it
    )
    with fifo.open("wb"):  # opens when the process has opened it, and waits for what is never written
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130 and err == "interrupted\n"
