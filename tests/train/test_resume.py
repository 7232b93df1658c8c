"""A run that was stopped or killed, at whatever moment, ends like one that never was: bit for bit."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_runs
from small_runs import facts, resume, start, text, timeless

from tfcli.errors import Interrupted, UserError
from tfcli.formats.hf import directory as hf
from tfcli.text.corpus import prepare as corpora
from tfcli.train import checkpoint, metrics
from tfcli.train.events import Event, Note, Saved


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus and the unbroken run "whole"."""
    folder = tmp_path_factory.mktemp("room")
    start(text(folder), folder / "whole")
    return folder


@pytest.fixture
def out(room: Path, request: pytest.FixtureRequest) -> Path:
    """Another run in the same directory."""
    return room / request.node.name.replace("/", "_")


def stopper(step: int) -> Callable[[Event], None]:
    """A listener that sends this process a SIGINT once a step is done; the run hears it at the next one."""

    def listen(event: Event) -> None:
        if isinstance(event, Saved) and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return listen


@pytest.mark.parametrize("step", [6, 18])
def test_stopped_and_resumed(room: Path, out: Path, step: int) -> None:
    """Catches anything that a checkpoint forgets: weights, moments, order, dropout, schedule, counters, metrics."""
    with pytest.raises(Interrupted) as error:
        start(room / "corpus.txt", out, listen=stopper(step))
    assert error.value.exit_code == 130
    assert f"after step {step + 1}" in error.value.message
    assert (out / hf.WEIGHTS).exists(), "a model that can be used"
    result = resume(out)
    assert result.steps == 24
    assert facts(out) == facts(room / "whole")
    assert json.loads((out / "run.json").read_text())["finished"]


def test_a_run_whose_warm_up_was_in_steps(room: Path, out: Path) -> None:
    """A run of an older version, whose default was ten steps, resumes; with other steps it is refused."""
    with pytest.raises(Interrupted):
        start(room / "corpus.txt", out, listen=stopper(6))
    about = json.loads((out / "run.json").read_text())
    assert about["config"]["optim"]["warmup"] is None
    for steps, message in ((3, "with a warm-up of 3 steps"), (10, None)):
        about["config"]["optim"]["warmup"] = steps
        (out / "run.json").write_text(json.dumps(about))
        if message:
            with pytest.raises(UserError, match=message):
                resume(out)
    resume(out)
    assert facts(out) == facts(room / "whole")


def test_stopped_at_every_checkpoint(room: Path, out: Path) -> None:
    """Catches state that survives one resume and not two."""
    listen: Any = stopper(6)
    with pytest.raises(Interrupted):
        start(room / "corpus.txt", out, listen=listen)
    for step in (12, 18):
        with pytest.raises(Interrupted):
            resume(out, listen=stopper(step))
    resume(out)
    assert facts(out) == facts(room / "whole")


class Killed(BaseException):
    """Stands for the end of the process."""


class Death:
    """Counts what a run does to the disk; after ``after`` of these operations every one raises."""

    def __init__(self, patch: pytest.MonkeyPatch, after: int) -> None:
        self.left = after
        operations: list[tuple[Any, str]] = [
            (checkpoint, "save_file"), (os, "fsync"), (shutil, "rmtree"), (metrics.Metrics, "write"),
            (Path, "mkdir"), (Path, "write_text"), (Path, "write_bytes"), (Path, "rename"), (Path, "replace"),
            (Path, "unlink"), (Path, "rmdir"),
        ]  # fmt: skip
        for owner, name in operations:
            patch.setattr(owner, name, self._mortal(getattr(owner, name)))

    def _mortal(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise Killed
            return function(*args, **kwargs)

        return call


ALIVE = 10_000


def test_killed_between_any_two_writes(room: Path, out: Path) -> None:
    """Catches a moment at which the directory is neither the old nor the new: every 17th of a run's writes."""
    start(room / "corpus.txt", out / "encoded")  # the runs that are killed find its shards
    with pytest.MonkeyPatch.context() as patch:
        death = Death(patch, ALIVE)
        start(room / "corpus.txt", out / "count")
    writes = ALIVE - death.left
    assert writes > 100
    kills = range(1, writes, 17)
    for after in kills:
        run = out / str(after)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            Death(patch, after)
            start(room / "corpus.txt", run)
        if (run / "run.json").exists():
            resume(run)
        else:
            start(room / "corpus.txt", run)
        assert facts(run) == facts(room / "whole"), f"killed after {after} writes"
        assert not [path for path in run.iterdir() if path.name.startswith(".") and path.name != ".lock"]


CHILD = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {paths}
import small_runs
from tfcli.train import checkpoint
from tfcli.train.events import Evaluated, Saved

def listen(event):
    if isinstance(event, {kind}) and event.step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)

small_runs.start(Path({corpus!r}), Path({out!r}), listen=listen)
"""


@pytest.mark.parametrize(("kind", "step"), [("Evaluated", 18), ("Saved", 6)])
def test_killed_for_real(room: Path, out: Path, kind: str, step: int) -> None:
    """Catches what only a real SIGKILL does: no handler, no buffer flushed, a lock held by a dead process."""
    code = CHILD.format(
        paths=[str(Path(__file__).parent), str(Path(__file__).parent.parent)],
        kind=kind,
        step=step,
        corpus=str(room / "corpus.txt"),
        out=str(out),
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resume(out)
    assert facts(out) == facts(room / "whole")


def half(room: Path, run: Path, step: int = 6) -> None:
    """A run that was stopped after a step."""
    with pytest.raises(Interrupted):
        start(room / "corpus.txt", run, listen=stopper(step))


def test_resuming_reads_no_text_and_repeats_nothing(room: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a resume that tokenizes the corpus again, or takes steps again to get where it was."""
    half(room, out)
    opened: list[str] = []
    plain = builtins.open

    def spy(file: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(str(file))
        return plain(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", spy)
    monkeypatch.setattr(corpora, "scan", lambda *args, **kwargs: pytest.fail("the corpus was read"))
    saved: list[int] = []
    resume(out, listen=lambda event: saved.append(event.step) if isinstance(event, Saved) else None)
    assert not [name for name in opened if name.endswith("corpus.txt")]
    assert saved[0] == 12


def test_other_settings_are_shown(room: Path, out: Path) -> None:
    """Catches a setting that is silently ignored, or a run that changes its nature half-way."""
    half(room, out)
    with pytest.raises(UserError) as error:
        resume(out, settings={"train.steps": 48, "model.depth": 1}, sets=["optim.lr=0.5"])
    assert "train.steps: the run has 24, given 48" in error.value.message
    assert "optim.lr: the run has its own choice, given 0.5" in error.value.message
    assert "depth" not in error.value.message, "which is the same"
    assert error.value.exit_code == 2


def test_other_files_are_refused(room: Path, out: Path) -> None:
    """Catches a resume on another text."""
    half(room, out)
    with pytest.raises(UserError, match=r"trained on other files: .*corpus.txt"):
        pretrain_on = room / "other.txt"
        pretrain_on.write_text("x" * 500)
        from tfcli.train.pretrain import pretrain

        pretrain(pretrain_on, out=out, resume=True)


def test_another_tokenizer_is_refused(room: Path, out: Path) -> None:
    """Catches --tokenizer ignored on resume."""
    import tiny_models

    half(room, out)
    tiny_models.tokenizer("bpe", 390).save(room / "other.model")
    with pytest.raises(UserError, match="another tokenizer"):
        resume(out, tokenizer=room / "other.model")
    resume(out, tokenizer=out)
    assert facts(out) == facts(room / "whole")


def test_a_finished_run_is_finished(room: Path) -> None:
    """Catches a finished run trained on past the end of its schedule."""
    with pytest.raises(UserError, match="is finished") as error:
        resume(room / "whole")
    assert "generate" in str(error.value.hint)


def test_no_run_there(room: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches a new run started where one was to be continued."""
    with pytest.raises(UserError, match="no run to resume"):
        resume(room / "nothing")
    assert not (room / "nothing").exists()
    monkeypatch.chdir(tmp_path)
    from tfcli.train.pretrain import pretrain

    with pytest.raises(UserError, match="no run to resume under runs/"):
        pretrain(resume=True)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", "3", '{"config": 3}', "\x00\x01", '"text"'])
def test_a_damaged_record(room: Path, out: Path, content: str) -> None:
    """Catches a traceback from a run.json that is not what was written."""
    (room / "damaged").mkdir(exist_ok=True)
    (room / "damaged" / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run\.json") as error:
        resume(room / "damaged")
    assert error.value.hint


@pytest.mark.parametrize(
    ("key", "value"),
    [("plan", {}), ("plan", {"model": 3}), ("config", {"nothing": 1}), ("config", {"seed": "x"}), ("checksums", None)],
)
def test_a_record_of_another_shape(room: Path, out: Path, key: str, value: Any) -> None:
    """Catches a traceback from a run.json of another version or an editor."""
    half(room, out)
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, key: value}))
    with pytest.raises(UserError, match=r"run\.json"):
        resume(out)


def test_a_shape_that_the_checkpoint_does_not_have(room: Path, out: Path) -> None:
    """Catches weights that are copied into another shape, or a traceback about sizes."""
    half(room, out)
    record = json.loads((out / "run.json").read_text())
    record["plan"]["model"]["ffn_width"] = 128
    (out / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"does not fit .*run\.json"):
        resume(out)


def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(room: Path, out: Path) -> None:
    """Catches silent use of a damaged file; what the message says to do must work."""
    half(room, out, step=12)
    newest = sorted((out / "checkpoints").iterdir())[-1]
    (newest / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=f"{newest.name} cannot be read: model.safetensors has 1 bytes") as error:
        resume(out)
    assert f"delete {newest} to go on from step 12" in str(error.value.hint)
    shutil.rmtree(newest)
    resume(out)
    assert facts(out) == facts(room / "whole")


def test_the_encoded_text_is_made_again(room: Path, tmp_path: Path) -> None:
    """Catches a resume that trains another tokenizer, or takes another text, when the shards are gone."""
    corpus = text(tmp_path)
    out = tmp_path / "run"
    half(tmp_path, out)
    shutil.rmtree(tmp_path / ".shards")
    corpus.write_text(small_runs.TEXT.replace("king", "queen"))
    with pytest.raises(UserError, match="the text is not the one"):
        resume(out)
    corpus.unlink()
    with pytest.raises(UserError, match="no such file"):
        resume(out)
    text(tmp_path)
    resume(out)
    assert facts(out) == facts(room / "whole")


def test_damaged_shards_are_made_again(room: Path, tmp_path: Path) -> None:
    """Catches training on ids that a disk changed."""
    text(tmp_path)
    half(tmp_path, tmp_path / "run")
    (shard,) = (tmp_path / ".shards").glob("*/train.bin")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    notes: list[str] = []
    resume(tmp_path / "run", listen=lambda event: notes.append(event.text) if isinstance(event, Note) else None)
    assert any("again" in note for note in notes)
    assert facts(tmp_path / "run") == facts(room / "whole")


def test_metrics_that_were_deleted(room: Path, out: Path) -> None:
    """Catches a file that begins with zeros."""
    half(room, out)
    (out / "metrics.jsonl").unlink()
    resume(out)
    assert timeless(out) == [line for line in timeless(room / "whole") if line["step"] > 7]


def test_killed_before_its_first_checkpoint(room: Path, out: Path) -> None:
    """Catches a run that can neither be resumed nor started again."""
    for again in (lambda: resume(out), lambda: start(room / "corpus.txt", out)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):

            def die(*args: Any) -> None:
                raise Killed

            patch.setattr(checkpoint, "save", die)
            patch.setattr(hf, "save", die)
            start(room / "corpus.txt", out)
        assert (out / "run.json").exists()
        again()
        assert facts(out) == facts(room / "whole")
        shutil.rmtree(out)


def test_the_clock_goes_on(room: Path, out: Path) -> None:
    """Catches seconds that start at 0 again after a resume, or run on while nobody trained."""
    half(room, out)
    state = json.loads((sorted((out / "checkpoints").iterdir())[-1] / "state.json").read_text())
    resume(out, started=__import__("time").time() - 1000)  # a process that was slow to begin with
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    later = next(line["seconds"] for line in lines if line["step"] > 7)
    assert state["seconds"] <= later < state["seconds"] + 500


def test_which_run_is_meant(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches --resume without --out taking a finished run, a damaged one, or one of another text."""
    from tfcli.train import record

    monkeypatch.chdir(tmp_path)
    base = json.loads((room / "whole" / "run.json").read_text())
    runs = {
        "done": {"started": "2026-03-01", "finished": "2026-03-02", "corpus": ["/a"]},
        "old": {"started": "2026-01-01", "finished": None, "corpus": ["/a"]},
        "new": {"started": "2026-02-01", "finished": None, "corpus": ["/b"]},
    }
    for name, changes in runs.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text(json.dumps({**base, **changes}))
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "run.json").write_text("{")
    assert record.resumable(None, []) == Path("runs/new")
    assert record.resumable(None, ["/a"]) == Path("runs/old")
    with pytest.raises(UserError, match="no run to resume"):
        record.resumable(None, ["/c"])
