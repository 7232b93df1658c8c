"""Peers: processes that follow the protocol, and those that do not."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import cpu, model, save, tokenizer

from tfcli.benchmark import peer_process as program
from tfcli.benchmark import peers
from tfcli.benchmark.case import Case, timed
from tfcli.config.options import Sampling
from tfcli.errors import RunError, UserError
from tfcli.formats.open import Opened
from tfcli.infer.engine import Engine

TASK = peers.Task(model=Path("m.gguf"), prompt=[1, 2], tokens=3, threads=2, device="cpu", precision="bf16")
FAKE = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "prepare":
        print("noise", file=sys.stderr)
        print(json.dumps({"versions": {"fake": "1"}, "weights": request["precision"], "threads": request["threads"]}))
    else:
        count = request["tokens"]
        print(json.dumps({"first": 0.5, "rest": 0.25, "ids": [7, 8, 9, 9][:count]}))
    sys.stdout.flush()
"""


def fake(folder: Path, text: str = FAKE) -> Path:
    path = folder / "fake.py"
    path.write_text(text)
    return path


def test_names_come_with_commas_and_the_nearest() -> None:
    assert peers.chosen([]) == []
    assert peers.chosen(["transformers, llama.cpp", "transformers"]) == ["transformers", "llama.cpp"]
    with pytest.raises(UserError, match=r"unknown peer 'lama\.cpp'") as error:
        peers.chosen(["lama.cpp"])
    assert error.value.hint == "did you mean 'llama.cpp'?"


def test_llama_cpp_needs_a_gguf_file() -> None:
    peers.check(["llama.cpp", "transformers"], Opened(kind="gguf", path=Path("a/m")))
    peers.check(["transformers"], Opened(kind="hf", path=Path("runs/x")))
    peers.check(["transformers"], None)
    with pytest.raises(UserError, match="reads GGUF files, and runs/x is not one") as error:
        peers.check(["llama.cpp"], Opened(kind="hf", path=Path("runs/x")))
    assert "tfcli convert runs/x model.gguf --to gguf" in str(error.value.hint)
    with pytest.raises(UserError, match="random weights"):
        peers.check(["llama.cpp"], None)
    with pytest.raises(UserError, match=r"transformers does not read a\.bin"):
        peers.check(["transformers"], Opened(kind="llama2.c", path=Path("a.bin")))


def test_a_peer_is_told_what_to_do_and_timed_by_itself(tmp_path: Path) -> None:
    with peers.opened("transformers-fp32", TASK, script=fake(tmp_path)) as peer:
        assert peer.about == {"versions": {"fake": "1"}, "weights": "fp32", "threads": 2}
        assert peer.run(3) == (0.5, 0.25) and peer.ids == [7, 8, 9]
        assert peer.run(1) == (0.5, 0.25) and peer.ids == [7, 8, 9]
    assert peer.process.returncode is not None, "it is still running"


@pytest.mark.parametrize(("suite", "ids", "rate"), [("decode", (7, 8, 1), 8.0), ("prefill", (7,), 4.0)])
def test_both_sides_of_a_suite_are_timed_in_turn(suite: str, ids: tuple[int, ...], rate: float, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("tfcli.benchmark.case.REST", 0.0)
    case = Case(start=lambda: lambda: None, amount=2, unit="tokens/s", what="", ids=ids)
    with peers.opened("llama.cpp", TASK, script=fake(tmp_path)) as peer:
        result = timed(suite, case, cpu(), repeats=5, peers=[peer])
        assert timed("train", case, cpu(), repeats=1, peers=[peer]).against == ()
    (other,) = result.against
    assert result.figures(other.timing)[0] == rate and len(other.timing.seconds) == 5
    same = {"decode": 2, "prefill": 1}[suite]
    assert other.about["same_tokens"] == same and other.about["of_tokens"] == len(ids)


def test_a_peer_that_is_not_installed_is_looked_for_here_too(tmp_path: Path) -> None:
    lines = "import json, sys\nsys.stdin.readline()\nprint(json.dumps({'missing': 'llama_cpp'}))\n"
    with pytest.raises(UserError, match="this Python does not have the module llama_cpp") as error:
        peers.opened("llama.cpp", TASK, script=fake(tmp_path, lines)).__enter__()
    assert "pip install llama-cpp-python" in str(error.value.hint) and "--against-python" in str(error.value.hint)
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nexec {sys.executable} -c \'print("{{\\"missing\\": \\"llama_cpp\\"}}")\'\n')
    other.chmod(0o755)
    with peers.opened("llama.cpp", TASK, python=other, script=fake(tmp_path)) as peer:
        assert peer.about["versions"] == {"fake": "1"}
    with pytest.raises(UserError, match=r"neither .*python nor this Python has the"):
        peers.opened("llama.cpp", TASK, python=other, script=fake(tmp_path, lines)).__enter__()
    with pytest.raises(UserError, match="nowhere cannot be run"):
        peers.opened("llama.cpp", TASK, python=tmp_path / "nowhere").__enter__()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("raise ValueError('no such file: m.gguf')", "llama.cpp failed: ValueError: no such file: m.gguf"),
        ("print('hello', flush=True)\nimport signal\nsignal.pause()", "failed: it ended with exit code -9"),
        ("raise SystemExit(3)", "failed: it ended with exit code 3 and said nothing"),
    ],
)
def test_a_peer_that_fails_leaves_its_last_line(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=says):
        peers.opened("llama.cpp", TASK, script=fake(tmp_path, text)).__enter__()


def test_a_peer_may_fail_in_the_middle(tmp_path: Path) -> None:
    text = FAKE.replace("count = request", "raise MemoryError('too much') #")
    with peers.opened("llama.cpp", TASK, script=fake(tmp_path, text)) as peer, pytest.raises(RunError) as error:
        peer.run(3)
    assert error.value.message == "llama.cpp failed: MemoryError: too much"


def test_the_program_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an interpreter without tfcli, and with one without the peer."""
    path = tmp_path / "peer.py"
    path.write_text(Path(program.__file__).read_text())
    path.with_name("llama_cpp.py").write_text("raise SystemExit('beside the program: not what is meant')\n")
    absent = tmp_path / "absent"
    absent.mkdir()
    for name in ("llama_cpp", "tfcli"):
        (absent / f"{name}.py").write_text(f"raise ModuleNotFoundError('absent', name='{name}')\n")
    monkeypatch.setenv("PYTHONPATH", str(absent))
    with pytest.raises(UserError, match="this Python does not have the module llama_cpp"):
        peers.opened("llama.cpp", TASK, script=path).__enter__()


def served(*requests: dict[str, Any]) -> list[dict[str, Any]]:
    replies = io.StringIO()
    program.serve(io.StringIO("".join(json.dumps(request) + "\n" for request in requests)), replies)
    return [json.loads(line) for line in replies.getvalue().splitlines()]


def prepare(name: str, **more: Any) -> dict[str, Any]:
    return {"do": "prepare", "peer": name, "tokens": 4, "threads": 2, "device": "cpu", "precision": "fp32", **more}


def test_transformers_continues_as_we_do(tmp_path: Path) -> None:
    """The same ids from the same directory, so the two are timed at the same work; end-of-text stops neither."""
    directory = save(tmp_path / "m", seed=3)
    ids = tokenizer().encode("the king")
    engine = Engine(model(3), tokenizer(), cpu())
    sampling = Sampling(max_tokens=4, temperature=0.0, ignore_eos=True)
    ours = engine.generate("the king", sampling)
    threads = torch.get_num_threads()
    about, four, one = served(
        prepare("transformers", model=str(directory), prompt=ids),
        {"do": "run", "tokens": 4},
        {"do": "run", "tokens": 1},
    )
    torch.set_num_threads(threads)
    assert about["weights"] == "fp32" and about["threads"] == 2 and "transformers" in about["versions"]
    assert four["ids"] == ours.ids and one["ids"] == ours.ids[:1]
    assert four["first"] > 0 and four["rest"] > 0


def test_llama_cpp_reads_the_prompt_anew_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a prompt that is still in the cache and costs nothing the second time."""
    calls: list[Any] = []

    class Llama:
        def __init__(self, **options: Any) -> None:
            calls.append(options)
            self.metadata = {"general.file_type": "3"}

        def reset(self) -> None:
            calls.append("reset")

        def generate(self, prompt: list[int], **options: Any) -> Any:
            calls.append((prompt, options))
            yield from range(100, 110)

    library = types.SimpleNamespace(
        Llama=Llama, __version__="0", LLAMA_FTYPE_ALL_F32=0, LLAMA_FTYPE_MOSTLY_Q4_1=3, LLAMA_FTYPE_GUESSED=1024
    )
    monkeypatch.setitem(sys.modules, "llama_cpp", library)  # type: ignore[arg-type]
    about, reply, _ = served(
        prepare("llama.cpp", model="m.gguf", prompt=[5, 6]), {"do": "run", "tokens": 4}, {"do": "run", "tokens": 1}
    )
    assert about == {"versions": {"llama-cpp-python": "0"}, "weights": "Q4_1", "threads": 2}
    assert reply["ids"] == [100, 101, 102, 103]
    options, *rest = calls
    assert (options["model_path"], options["n_ctx"], options["n_gpu_layers"]) == ("m.gguf", 6, 0)
    assert options["n_threads"] == options["n_threads_batch"] == 2
    assert rest == ["reset", ([5, 6], {"temp": 0.0})] * 2
