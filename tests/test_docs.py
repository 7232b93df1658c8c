"""The README cannot lie: its commands run, its Python runs, its help is the real help.

To write the help blocks anew: TFCLI_UPDATE_DOCS=1 python -m pytest tests/test_docs.py
"""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- help -->\n", "<!-- end of help -->\n"
COMMANDS = ["", "tokenize train", "tokenize encode", "tokenize decode", "tokenize stats"]
COMMANDS += ["pretrain", "finetune", "generate", "predict", "evaluate", "convert", "compress", "inspect", "bench"]


LINES = {"mail.tsv": 81, "entities.conll": 500, "english-spanish.tsv": 101, "dialogue.jsonl": 40}
"""Examples kept of the long labeled samples for these tests."""


def blocks(language: str, *, finetune: bool = False) -> list[str]:
    """The fenced blocks of the section Finetune, or of all others."""
    before, heading, rest = README.read_text(encoding="utf-8").partition("\n## Finetune\n")
    section, following, after = rest.partition("\n## Other tools and Python\n")
    assert heading and following
    return re.findall(rf"```{language}\n(.*?)```", section if finetune else before + after, flags=re.DOTALL)


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": "100", "NO_COLOR": "1"}
    environment.pop("TFCLI_MODEL", None)
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=folder, env=environment, capture_output=True, text=True
    )


def shorter(command: str) -> str:
    """The same command on less time and text; everything else is as it stands in the README."""
    command = command.replace("--budget 90s", "--budget 8s").replace("--epochs 20", "--steps 1")
    return command.replace("sample_data/english.txt", "sample_data/part.txt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("readme")
    (folder / "sample_data").mkdir()
    for path in (ROOT / "sample_data").iterdir():
        if path.name in LINES:
            lines = path.read_text(encoding="utf-8").split("\n")[: LINES[path.name]]
            (folder / "sample_data" / path.name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        elif path.name == "questions.json":
            whole = json.loads(path.read_text(encoding="utf-8"))
            few = {**whole, "data": whole["data"][:3]}
            (folder / "sample_data" / path.name).write_text(json.dumps(few), encoding="utf-8")
        else:
            (folder / "sample_data" / path.name).symlink_to(path)
    part = (ROOT / "sample_data" / "english.txt").read_text(encoding="utf-8")[:200_000]
    (folder / "sample_data" / "part.txt").write_text(part, encoding="utf-8")
    yield folder


def test_the_first_command_trains_and_writes(folder: Path) -> None:
    """A stranger's first minute: the part of the command behind the installation."""
    train, test = blocks("bash")
    install, _, work = train.partition('-e ".[dev]" && ')
    assert test.startswith(install), "both commands install alike"
    result = shell(shorter(work.replace(".venv/bin/", "")), folder)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) >= 2, "where the model is, then what it wrote"


def test_ci_runs_the_readme_command() -> None:
    """CI must test what the README promises, word for word."""
    assert blocks("bash")[1].strip() in (ROOT / ".ci" / "run").read_text().splitlines()


def test_every_console_command_runs(folder: Path) -> None:
    """The blocks run in order, as written, each with exit code 0."""
    for block in blocks("console"):
        for line in block.splitlines():
            assert line.startswith("$ ")
            result = shell(shorter(line[2:]), folder)
            assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
            assert "Traceback" not in result.stderr


def test_every_command_of_finetuning_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As above, but in this process, which has loaded torch already; the shell runs what comes before a pipe."""
    from tfcli.cli.main import main

    monkeypatch.chdir(folder)
    monkeypatch.delenv("TFCLI_MODEL", raising=False)
    for line in "".join(blocks("console", finetune=True)).splitlines():
        assert line.startswith("$ ")
        given, _, command = line[2:].rpartition(" | ")
        text = shell(given, folder).stdout if given else ""
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        name, *arguments = shlex.split(shorter(command))
        assert name == "tfcli"
        code = main(arguments)
        out, err = capfd.readouterr()
        assert code == 0, f"{line}\n{out}\n{err}"
        may_be_silent = "generate" in line or "runs/spanish" in line  # what is drawn, or a model of one step
        assert out.strip() or may_be_silent, f"{line} says nothing"


def test_every_python_block_runs(folder: Path) -> None:
    """The blocks run in order, each in its own process, on the output of the console commands."""
    for block in blocks("python"):
        result = shell(f"python -c {shlex.quote(shorter(block))}", folder)
        assert result.returncode == 0, f"{block}\n{result.stderr}"


def test_the_help_in_the_readme_is_the_real_help() -> None:
    """A flag that changes without the README, or the other way round."""
    parts = []
    for command in COMMANDS:
        result = shell(f"tfcli {command} --help", ROOT)
        assert result.returncode == 0
        title = f"tfcli {command}".strip()
        parts.append(f"<details><summary><code>{title}</code></summary>\n\n```text\n{result.stdout}```\n\n</details>\n")
    real = BEGIN + "\n".join(parts) + END
    text = README.read_text(encoding="utf-8")
    start, end = text.index(BEGIN), text.index(END) + len(END)
    if os.environ.get("TFCLI_UPDATE_DOCS"):
        README.write_text(text[:start] + real + text[end:], encoding="utf-8")
        return
    assert text[start:end] == real, "run TFCLI_UPDATE_DOCS=1 python -m pytest tests/test_docs.py"
