"""tfcli pretrain with what cannot work: a clear line or two, the right exit code, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from safetensors import SafetensorError

import tfcli.train.pretrain
from tfcli.cli import live
from tfcli.cli.main import main
from tfcli.train import checkpoint
from tfcli.train.events import Evaluated, Event, Preparing, Saved

SMALL = ["--depth", "1", "--context", "16", "--batch-size", "4", "--vocab-size", "400", "--threads", "1"]
SMALL += ["--precision", "fp32", "--device", "cpu"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a good corpus in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.txt").write_text(tiny_models.TEXT)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """Return stderr without the lines on device and split; checks that it is a message of one or two lines."""
    capsys.readouterr()
    assert main(["pretrain", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert "defect" not in err
    lines = err.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(("error:", "Error", "interrupted", "stopped")))
    assert len(lines) - at <= 2, err
    return "\n".join(lines[at:])


def untouched(folder: Path) -> bool:
    """Return whether the working directory has only the files of the test."""
    return not (folder / "runs").exists()


CASES: list[tuple[str, bytes | None, list[str], list[str]]] = [
    ("no such file", None, ["godo.txt"], ["no such file: godo.txt", "did you mean good.txt?"]),
    ("empty file", b"", ["x.txt"], ["no text in x.txt"]),
    ("white space", b" \n\n", ["x.txt"], ["no text in x.txt"]),
    ("binary", bytes(range(256)) * 9, ["x.txt"], ["binary"]),
    ("invalid UTF-8", b"abc\n" * 50 + b"\xff\xfe", ["x.txt"], ["0xff at offset 200, line 51", "--errors replace"]),
    ("jsonl line", b'{"text": "a"}\n{"text": oops}\n', ["x.jsonl"], ["x.jsonl:2", "JSON"]),
    ("jsonl key", b'{"text": "a"}\n{"other": "b"}\n', ["x.jsonl"], ["x.jsonl:2", "text"]),
    ("glob of nothing", None, ["*.nothing"], ["no file matches"]),
    ("no file at all", None, [], ["no text is given", "tfcli pretrain corpus.txt"]),
    ("unknown key", None, ["good.txt", "--set", "optim.lrr=1"], ["optim.lrr", "optim.lr"]),
    ("no value", None, ["good.txt", "--set", "optim.lr"], ["has no value"]),
    ("wrong type", None, ["good.txt", "--set", "train.keep=many"], ["train.keep", "whole number"]),
    ("unknown preset", None, ["good.txt", "--preset", "tinny"], ["tinny", "tiny"]),
    ("no such settings", None, ["good.txt", "--config", "no.toml"], ["no such file: no.toml"]),
    ("not a number", None, ["good.txt", "--steps", "many"], ["--steps"]),
    ("unknown option", None, ["good.txt", "--stepz", "3"], ["--stepz", "--steps"]),
    ("two lengths", None, ["good.txt", "--steps", "3", "--budget", "1m"], ["two lengths", "--steps and --budget"]),
    ("no such device", None, ["good.txt", "--device", "cudda"], ["cudda", "cuda"]),
    ("no such precision", None, ["good.txt", "--precision", "fp8"], ["fp8"]),
    ("no threads", None, ["good.txt", "--threads", "0"], ["--threads is 0"]),
    ("no tokenizer", None, ["good.txt", "--tokenizer", "no.model"], ["no.model"]),
    ("corrupt tokenizer", b"\x00nonsense", ["good.txt", "--tokenizer", "x.model"], ["x.model"]),
    ("--errors", None, ["good.txt", "--errors", "ignore"], ["ignore", "replace"]),
    ("nothing held out", None, ["good.txt", "--val-fraction", "1.5"], ["held-out fraction is 1.5"]),
    ("no such validation file", None, ["good.txt", "--val", "no.txt"], ["no such file: no.txt"]),
    ("context", None, ["good.txt", "--context", "0"], ["model.context is 0"]),
    ("out is a file", None, ["good.txt", "--out", "good.txt"], ["'good.txt' is not a directory"]),
    ("nothing to resume", None, ["--resume"], ["no run to resume under runs/"]),
    ("nothing to resume there", None, ["--resume", "--out", "runs/x"], ["no run to resume in runs/x"]),
]


@pytest.mark.parametrize(
    ("content", "arguments", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_a_clear_line(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    arguments: list[str],
    words: list[str],
) -> None:
    """Catches a traceback, a wrong exit code, a message without what to do, and directories left by a failed start."""
    if content is not None:
        name = next(a for a in arguments if a.startswith("x."))
        (folder / name).write_bytes(content)
    message = refused(capsys, *arguments)
    for word in words:
        assert word in message
    assert untouched(folder)


def test_a_directory_without_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an empty corpus from a directory of pictures."""
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    assert "no text in the directory pictures" in refused(capsys, "pictures")
    assert untouched(folder)


def test_a_settings_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an unknown key in a file that is silently ignored."""
    (folder / "a.toml").write_text("[train]\nstep = 3\n")
    message = refused(capsys, "good.txt", "--config", "a.toml")
    assert "train.step" in message
    assert "train.steps" in message
    (folder / "b.toml").write_text("[train\n")
    assert "not valid TOML" in refused(capsys, "good.txt", "--config", "b.toml")
    assert untouched(folder)


def test_directories_that_are_taken(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches another run, or a person's files, overwritten."""
    assert main(["pretrain", "good.txt", "--out", "a", "--steps", "2", *SMALL]) == 0
    before = {path: path.read_bytes() for path in (folder / "a").rglob("*") if path.is_file()}
    message = refused(capsys, "good.txt", "--out", "a", "--steps", "2", *SMALL)
    assert "holds another run" in message
    assert "choose another --out" in message and "--resume" not in message, "it is finished"
    assert before == {path: path.read_bytes() for path in (folder / "a").rglob("*") if path.is_file()}
    (folder / "b").mkdir()
    (folder / "b" / "thesis.doc").write_text("years of work")
    assert "b is not empty" in refused(capsys, "good.txt", "--out", "b", *SMALL)
    (folder / "c").mkdir()
    (folder / "c" / "tokenizer.model").write_text("mine")
    assert "c is not empty" in refused(capsys, "good.txt", "--out", "c", *SMALL)
    assert (folder / "c" / "tokenizer.model").read_text() == "mine"


def test_replaced_bytes_are_counted(folder: Path) -> None:
    """Catches text that is changed and not accounted for."""
    (folder / "x.txt").write_bytes(tiny_models.TEXT.encode() + b"\xff and \xfe\n")
    assert main(["pretrain", "x.txt", "--errors", "replace", "--steps", "1", *SMALL]) == 0
    assert json.loads((folder / "runs/x/data.json").read_text())["repaired"]["count"] == 2


def test_a_tiny_file_trains_or_says_what_is_needed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a beginner's first three lines of text ending in a defect."""
    for size in (300, 3000):
        (folder / f"t{size}.txt").write_text(tiny_models.TEXT[:size])
        assert main(["pretrain", f"t{size}.txt", "--steps", "2", "--device", "cpu"]) == 0
    (folder / "t20.txt").write_text("twenty characters ok")
    assert "use more text" in refused(capsys, "t20.txt", "--steps", "2", "--device", "cpu")


def listening(monkeypatch: pytest.MonkeyPatch, listen: Any) -> None:
    """Let the command's view be ``listen``."""

    class View(live.PlainView):
        def __call__(self, event: Event) -> None:
            listen(event)

    monkeypatch.setattr(live, "view", View)


@pytest.fixture
def handlers() -> Iterator[None]:
    """The process's own handlers must be back when a run is over."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", ["scan", "train", "encode"])
def test_a_signal_while_the_text_is_prepared(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    stage: str,
) -> None:
    """Catches a SIGTERM that kills without cleaning up, and half-written shards that a later run takes for whole."""

    def listen(event: Event) -> None:
        if isinstance(event, Preparing) and event.stage == stage:
            os.kill(os.getpid(), number)

    listening(monkeypatch, listen)
    assert refused(capsys, "good.txt", "--steps", "2", *SMALL, code=130) == "interrupted"
    left = [path for path in (folder / "runs").rglob("*") if path.is_file()] if (folder / "runs").exists() else []
    assert not [path for path in left if path.suffix in (".bin", ".tmp", ".json")], left
    assert not (folder / "runs" / "good").exists()
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert main(["pretrain", "good.txt", "--steps", "2", *SMALL]) == 0


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_training(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Catches an interrupted run that lost its work, cannot be used, or does not say how to go on."""

    def listen(event: Event) -> None:
        if isinstance(event, Saved) and event.step == 3:
            os.kill(os.getpid(), number)

    listening(monkeypatch, listen)
    message = refused(capsys, "good.txt", "--steps", "9", "--checkpoint-every", "3", *SMALL, code=130)
    assert "stopped after step 4" in message
    assert "go on with: tfcli pretrain --resume --out runs/good" in message
    assert main(["generate", "--model", "runs/good", "--prompt", "Once", "--max-tokens", "2", "--device", "cpu"]) == 0
    assert main(["pretrain", "--resume"]) == 0
    assert "runs/good" in capsys.readouterr().out


@pytest.mark.usefixtures("handlers")
def test_a_second_signal_stops_at_once(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a person who has to wait for a long evaluation, and a checkpoint that the second signal breaks."""

    def listen(event: Event) -> None:
        if isinstance(event, Evaluated) and event.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    listening(monkeypatch, listen)
    often = ["--checkpoint-every", "3", "--set", "train.eval_every=3"]
    assert refused(capsys, "good.txt", "--steps", "9", *often, *SMALL, code=130) == "interrupted"
    assert [path.name for path in checkpoint.complete(folder / "runs/good")] == ["00000003"]
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert main(["pretrain", "--resume"]) == 0


@pytest.mark.parametrize("where", ["weights", "sync", "metrics", "model"])
def test_a_full_disk(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Catches a traceback, exit code 2, a broken checkpoint, and a run that cannot go on when there is room again."""
    from tfcli import disk
    from tfcli.train.metrics import Metrics

    full: list[bool] = []

    def listen(event: Event) -> None:
        if isinstance(event, Saved):
            full.append(True)

    def limited(owner: Any, name: str, error: Exception) -> None:
        function = getattr(owner, name)

        def write(*args: Any, **kwargs: Any) -> Any:
            if full:
                raise error
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, write)

    listening(monkeypatch, listen)
    no_space = OSError(errno.ENOSPC, "No space left on device")
    rust = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    match where:
        case "weights":
            limited(checkpoint, "save_file", rust)
        case "sync":
            limited(os, "fsync", no_space)
        case "metrics":
            limited(Metrics, "write", no_space)
        case "model":
            limited(disk, "whole_folder", no_space)
    often = ["--checkpoint-every", "3", "--set", "train.eval_every=3"]
    message = refused(capsys, "good.txt", "--steps", "9", *often, *SMALL, code=1)
    assert "disk is full" in message
    assert "free some space" in message
    run = folder / "runs/good"
    assert [path.name for path in checkpoint.complete(run)] == ["00000003"]
    assert not [path for path in run.rglob(".*") if path.name != ".lock"]
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert main(["pretrain", "--resume"]) == 0
    assert json.loads((run / "run.json").read_text())["steps"] == 9


def test_a_huge_rate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches divergence that goes on to the end, or exits with 0 or 2."""
    message = refused(capsys, "good.txt", "--steps", "9", "--set", "optim.muon_lr=1e30", *SMALL, code=1)
    assert "step 2:" in message or "step 3:" in message
    assert "blocks.0" in message
    assert "lower" in message


def test_two_runs_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a second run, or its being refused, that takes the first one's directory away."""
    with checkpoint.locked(folder / "a"):
        assert "another process is training in a" in refused(capsys, "good.txt", "--out", "a", *SMALL)
        assert (folder / "a" / ".lock").exists()


def test_names_that_are_taken_or_free(folder: Path) -> None:
    """Catches runs/NAME of a run that is at work, or was killed at its beginning, handled wrongly."""
    from tfcli.train import record

    with checkpoint.locked(folder / "runs/good"):
        assert record.new_directory(None, ["good.txt"]) == Path("runs/good-2")
    (folder / "runs/good").mkdir(parents=True)
    (folder / "runs/good/.lock").touch()
    assert record.new_directory(None, ["good.txt"]) == Path("runs/good"), "killed while it read the text"
    (folder / "runs/good/run.json").write_text("{}")
    assert record.new_directory(None, ["good.txt"]) == Path("runs/good"), "killed before its first checkpoint"
    (folder / "runs/good/model.safetensors").touch()
    assert record.new_directory(None, ["good.txt"]) == Path("runs/good-2")
    shutil.rmtree(folder / "runs")
    assert record.new_directory(None, ["-"]) == Path("runs/stdin")
    assert record.new_directory(None, ["data/*.txt"]) == Path("runs/run")
    assert record.new_directory(None, ["some/My Book.txt.gz"]) == Path("runs/My Book")


def test_the_library_raises_the_same(folder: Path) -> None:
    """Catches errors that only the command line understands."""
    from tfcli.errors import UserError

    with pytest.raises(UserError, match="no such file"):
        tfcli.train.pretrain.pretrain("nothing.txt")
    assert untouched(folder)
