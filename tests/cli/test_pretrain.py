"""tfcli pretrain, as a shell sees it."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import data_reports
import pytest
import tiny_models
import typer
from safetensors.torch import load_file

import tfcli
import tfcli.train.pretrain
from tfcli.cli import pretrain as command
from tfcli.cli.main import main
from tfcli.config.options import PretrainConfig
from tfcli.config.resolve import known_keys, resolve, to_dict
from tfcli.errors import UserError
from tfcli.train import checkpoint, events, metrics
from tfcli.train.pretrain import Result

SMALL = ["--depth", "1", "--context", "16", "--batch-size", "4", "--vocab-size", "400", "--threads", "1"]
SMALL += ["--precision", "fp32", "--device", "cpu"]

KEYS: dict[str, tuple[str, str, Any]] = {
    "--steps": ("train.steps", "7", 7),
    "--tokens": ("train.tokens", "900", 900),
    "--epochs": ("train.epochs", "1.5", 1.5),
    "--budget": ("train.budget", "9m", "9m"),
    "--batch-size": ("train.batch_size", "3", 3),
    "--checkpoint-every": ("train.checkpoint_every", "11", 11),
    "--tensorboard": ("train.tensorboard", "", True),
    "--arch": ("model.arch", "bert", "bert"),
    "--depth": ("model.depth", "5", 5),
    "--context": ("model.context", "96", 96),
    "--vocab-size": ("tokenizer.vocab_size", "777", 777),
    "--val": ("data.val", "v.txt", "v.txt"),
    "--val-fraction": ("data.val_fraction", "0.25", 0.25),
    "--text-key": ("data.text_key", "body", "body"),
    "--errors": ("data.errors", "replace", "replace"),
    "--seed": ("seed", "5", 5),
}
"""Options that are settings: (key, what is typed, what it becomes)."""
OTHERS = {"--out", "--resume", "--config", "--set", "--json", "--preset", "--tokenizer"}
OTHERS |= {"--device", "--precision", "--threads"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a corpus."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.txt").write_text(tiny_models.TEXT)
    return tmp_path


def options() -> set[str]:
    app = typer.Typer()
    app.command()(command.pretrain)
    return {option for parameter in typer.main.get_command(app).params for option in parameter.opts} - {"corpus"}


def test_the_list_of_options() -> None:
    """Catches an option added or taken away without a decision: this list is the decision."""
    known = options() - {"--install-completion", "--show-completion"}
    assert known == KEYS.keys() | OTHERS
    assert {key for key, _, _ in KEYS.values()} <= set(known_keys(PretrainConfig))


@pytest.mark.parametrize("option", sorted(KEYS))
def test_an_option_changes_its_setting_and_no_other(monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    """Catches a flag that does nothing, or the wrong thing."""
    asked: list[dict[str, Any]] = []

    def spy(corpus: list[str], **arguments: Any) -> Result:
        asked.append(arguments)
        return Result(directory=Path("x"), steps=0, score=None)

    monkeypatch.setattr(tfcli.train.pretrain, "pretrain", spy)
    key, typed, value = KEYS[option]
    assert main(["pretrain", "good.txt", option, *([typed] if typed else [])]) == 0
    config, sources = resolve(PretrainConfig, flags=asked[0]["settings"])
    assert {name for name, source in sources.items() if source != "default"} == {key}
    flat: Any = to_dict(config)
    for part in key.split("."):
        flat = flat[part]
    assert flat == value


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches help without an example that runs, or a default that is not the real one."""
    assert main(["pretrain", "--help"]) == 0
    out = capsys.readouterr().out
    assert "Example: tfcli pretrain corpus.txt --budget 10m" in " ".join(re.sub(r"[^\w\s.:/-]", " ", out).split())
    assert str(PretrainConfig().seed) in out


def test_streams(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches progress on stdout, color in a log, and a directory that is not what DESIGN says it holds."""
    assert main(["pretrain", "good.txt", "--steps", "12", "--out", "runs/a", *SMALL]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(
        r'runs/a \(validation: \d\.\d{4} bits per byte\): tfcli generate --model runs/a --prompt "..."\n', out
    )
    assert "\x1b" not in out + err
    assert "device: cpu, 1 thread, fp32" in err
    assert "held out for validation: the last" in err
    assert {path.name for path in (folder / "runs/a").iterdir()} == {
        ".lock", "README.md", "checkpoints", "config.json", "data.json", "generation_config.json", "metrics.jsonl",
        "model.safetensors", "run.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    }  # fmt: skip


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches more or less than one object."""
    assert main(["pretrain", "good.txt", "--steps", "3", "--json", *SMALL]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"model", "steps", "val_bits_per_byte", "seconds"}
    assert result["steps"] == 3
    assert result["model"] == "runs/good"


def test_the_record(folder: Path) -> None:
    """Catches what other programs look for in run.json and data.json and is gone."""
    (folder / "s.toml").write_text("[optim]\nwarmup = 0.3\n")
    arguments = ["good.txt", "--steps", "3", "--config", "s.toml", "--set", "train.keep=1", "--preset", "tiny"]
    assert main(["pretrain", *arguments, *SMALL]) == 0
    run = json.loads((folder / "runs/good/run.json").read_text())
    for key in ("command", "config", "sources", "versions", "git_commit", "seed", "data_hash", "started", "finished"):
        assert key in run, key
    assert set(run["sources"]) == set(known_keys(PretrainConfig)), "the source of each value"
    of = {"model.depth": "flag", "optim.warmup": "s.toml", "train.keep": "--set", "optim.lr": "default"}
    assert {key: run["sources"][key] for key in of} == of
    assert run["config"]["optim"]["warmup"] == 0.3
    assert run["seed"] == 1337
    assert run["versions"].keys() == {"tfcli", "torch", "python"}
    assert run["corpus"] == [str(folder / "good.txt")]
    assert run["finished"] >= run["started"]
    data = json.loads((folder / "runs/good/data.json").read_text())
    (source,) = data["sources"]
    size = len(tiny_models.TEXT.encode())
    assert (source["name"], source["bytes"], source["documents"]) == ("good.txt", size, 1)
    assert data["train"]["bytes"] + data["val"]["bytes"] == size
    assert data["train"]["tokens"] + data["val"]["tokens"] == data["tokens"] == source["tokens"]
    data_reports.check(data, "pretrain")
    assert data["split"]["rule"] == "end of text"
    assert [data[action]["count"] for action in ("dropped", "cut", "repaired")] == [0, 0, 0]
    assert run["data_hash"] == data["content_hash"]


def test_the_best_model_is_what_is_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run directory that holds the last model where an earlier one was better."""
    from tfcli.tasks.lm.task import LanguageModeling

    scores = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(
        LanguageModeling, "evaluate", lambda self, model: {"val_bits_per_byte": next(scores), "val_loss": 1.0}
    )
    often = ["--set", "train.eval_every=3", "--checkpoint-every", "3", "--set", "train.keep=1"]
    assert main(["pretrain", "good.txt", "--steps", "9", *often, *SMALL]) == 0
    run = folder / "runs/good"
    assert [path.name for path in checkpoint.complete(run)] == ["00000006", "00000009"], "the newest and the best"
    best = checkpoint.load(run / "checkpoints" / "00000006")[1]["embed.weight"]
    last = checkpoint.load(run / "checkpoints" / "00000009")[1]["embed.weight"]
    left = load_file(run / "model.safetensors")["model.embed_tokens.weight"]
    assert left.equal(best)
    assert not left.equal(last)


def test_stdin(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a pipe that is read twice, a copy of it that stays, and a resume that waits for text on stdin."""

    def piped(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    def stop(event: events.Event) -> None:
        if isinstance(event, events.Saved):
            raise KeyboardInterrupt

    piped(tiny_models.TEXT)
    with pytest.raises(KeyboardInterrupt):
        settings = {"train.steps": 9, "train.checkpoint_every": 3, "model.depth": 1, "model.context": 16}
        tfcli.pretrain("-", settings=settings, device="cpu", listen=stop)
    assert sorted(path.name for path in (folder / "runs").iterdir()) == [".shards", "stdin"]
    assert all(path.is_dir() for path in (folder / "runs/.shards").iterdir()), "no copy of the pipe"
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["pretrain", "--resume"]) == 0
    assert "runs/stdin" in capsys.readouterr().out


def test_stdin_is_gone(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a resume that waits on a terminal for text that nobody types."""
    import shutil

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(tiny_models.TEXT.encode())))
    assert main(["pretrain", "-", "--steps", "3", *SMALL]) == 0
    record = json.loads((folder / "runs/stdin/run.json").read_text())
    (folder / "runs/stdin/run.json").write_text(json.dumps({**record, "finished": None}))
    shutil.rmtree(folder / "runs/.shards")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    assert main(["pretrain", "--resume"]) == 2
    assert "pipe the same text in: ... | tfcli pretrain --resume --out runs/stdin" in capsys.readouterr().err


def test_a_budget(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a budget that is not settled, or that runs for the whole default time."""
    assert main(["pretrain", "good.txt", "--budget", "1s", *SMALL]) == 0
    err = capsys.readouterr().err
    assert "length: about 1 s " in err
    assert re.search(r"length: [\d,]+ steps, [\d,]+ tokens, [\d.]+ epochs", err)


def test_the_library(folder: Path) -> None:
    """Catches events that are not of the types that are documented, and a result without its numbers."""
    told: list[events.Event] = []
    settings = {"train.steps": 4, "model.depth": 1, "model.context": 16}
    result = tfcli.pretrain("good.txt", out=folder / "lib", settings=settings, device="cpu", listen=told.append)
    assert result.directory == folder / "lib"
    assert result.steps == 4
    assert result.bits_per_byte is not None
    kinds = {events.Note, events.Preparing, events.Progress, events.Evaluated, events.Sampled, events.Saved}
    assert {type(event) for event in told} == kinds
    assert len(tfcli.load(result.directory).generate("Once", max_tokens=2, ignore_eos=True).ids) == 2


def test_in_a_thread(folder: Path) -> None:
    """Catches signal handlers set outside the main thread, which Python refuses."""
    from concurrent.futures import ThreadPoolExecutor

    settings = {"train.steps": 2, "model.depth": 1, "model.context": 16}
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: tfcli.pretrain("good.txt", settings=settings, device="cpu")).result().steps == 2


def test_tensorboard(folder: Path) -> None:
    """Catches events that are not written, and steps that are there twice after a resume."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of tensorboard's own imports
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        def stop(event: events.Event) -> None:
            if isinstance(event, events.Evaluated) and event.step == 15:
                raise KeyboardInterrupt

        settings = {"train.steps": 20, "train.checkpoint_every": 6, "train.eval_every": 5, "train.tensorboard": True}
        settings |= {"model.depth": 1, "model.context": 16}
        with pytest.raises(KeyboardInterrupt):
            tfcli.pretrain("good.txt", out="a", settings=settings, device="cpu", listen=stop)
        tfcli.pretrain(out="a", resume=True)
        board = EventAccumulator("a/tensorboard")
        board.Reload()
        assert [event.step for event in board.Scalars("val_bits_per_byte")] == [5, 10, 15, 20]
        assert [event.step for event in board.Scalars("train_loss")] == [10, 20]


def test_without_tensorboard(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    """Catches a traceback after the text was prepared, where a line before it is due."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(UserError, match="needs the package tensorboard"):
        metrics.check_tensorboard()
    assert main(["pretrain", "good.txt", "--tensorboard", "--steps", "2", *SMALL]) == 2
    assert 'pip install "tfcli[tensorboard]"' in capsys.readouterr().err
    assert not (folder / "runs").exists()


def test_the_real_command(folder: Path) -> None:
    """Catches an entry point that does not return the exit code, and two streams that are mixed."""
    code = "import sys; from tfcli.cli.main import main; sys.exit(main())"
    arguments = [sys.executable, "-c", code, "pretrain", "-", "--steps", "2", "--json", *SMALL]
    done = subprocess.run(arguments, input=tiny_models.TEXT, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2
