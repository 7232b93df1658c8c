"""A library call leaves its host process as it was: threads, random numbers, signals, environment, torch's settings."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # which changes the environment itself when it is first imported
from tiny_models import TEXT, encoder_decoder, save, tokenizer

import tfcli
from tfcli import runtime
from tfcli.config.options import Sampling
from tfcli.formats.hf import directory as hf
from tfcli.runtime import Runtime

Call = Callable[[Path], object]


SETTINGS = {
    "model.depth": 1,
    "model.context": 16,
    "train.batch_size": 4,
    "train.checkpoint_every": 6,
    "train.eval_every": 9,
    "train.sample_every": 12,
    "train.dropout": 0.1,
    "tokenizer.vocab_size": 400,
}


def text(folder: Path, content: str = TEXT[: len(TEXT) // 4]) -> Path:
    """A corpus in a folder, of which a few steps are several passes: dropout begins with the second."""
    path = folder / "corpus.txt"
    path.write_text(content, encoding="utf-8")
    return path


def snapshot() -> dict[str, Any]:
    """All that a call could change for the program around it."""
    np_state = np.random.get_state(legacy=False)
    assert isinstance(np_state, dict)
    return {
        "threads": torch.get_num_threads(),
        "threads of new threads": in_thread(torch.get_num_threads),
        "parallel": torch.__config__.parallel_info(),
        "interop threads": torch.get_num_interop_threads(),
        "torch generator": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "numpy": [*np_state["state"]["key"].tolist(), np_state["state"]["pos"]],
        "environment": dict(os.environ),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "stance": str(torch._dynamo.eval_frame._stance),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision of products": torch.get_float32_matmul_precision(),
        "warnings": list(warnings.filters),
        "folder": Path.cwd(),
        "path": list(sys.path),
    }


def in_thread(work: Callable[[], Any]) -> Any:
    """Return the result of a call in its own thread."""
    made: list[Any] = []
    thread = threading.Thread(target=lambda: made.append(work()))
    thread.start()
    thread.join()
    return made[0]


def load_and_use(folder: Path) -> None:
    engine = tfcli.load(save(folder / "model"), device="cpu", threads=3)
    engine.generate("the king", max_tokens=3, seed=1)
    list(engine.generate_batch(["the", "king"], Sampling(max_tokens=3, num_samples=2)))
    list(engine.stream("the", max_tokens=3, temperature=0.7))
    engine.score("the king")
    engine.embed(["the king", "a"])


def quantized(folder: Path) -> None:
    engine = tfcli.load(save(folder / "model", width=64), device="cpu", threads=3, quantize="int8")
    engine.generate("the king", max_tokens=3, seed=1)


def turning(folder: Path) -> None:
    hf.save(folder / "model", encoder_decoder(), tokenizer())
    tfcli.load(folder / "model", device="cpu", threads=3).generate("the king", max_tokens=3)


def pretrain(folder: Path) -> None:
    tfcli.pretrain(text(folder), out=folder / "run", settings={**SETTINGS, "train.steps": 12}, threads=3, device="cpu")


def pretrain_lstm(folder: Path) -> None:
    settings = {**SETTINGS, "train.steps": 6, "model.arch": "lstm"}
    tfcli.pretrain(text(folder), out=folder / "run", settings=settings, threads=3, device="cpu")


def compiling(folder: Path) -> None:
    """torch.compile fails, or the system has no compiler: once a stance that stayed for the whole process."""
    settings = {**SETTINGS, "train.steps": 12, "train.compile": "on"}
    tfcli.pretrain(text(folder), out=folder / "run", settings=settings, threads=3, device="cpu")


def finetune(folder: Path, *, lora: bool = False) -> None:
    from tfcli.train.finetune import finetune

    (folder / "rows.csv").write_text("text,label\n" + "a king,one\nthe sun,two\n" * 12)
    settings: dict[str, Any] = {"train.steps": 3, "train.dropout": 0.1, **({"lora.on": True} if lora else {})}
    model = save(folder / "model")
    finetune(
        model, folder / "rows.csv", task="classify", out=folder / "run", settings=settings, threads=3, device="cpu"
    )


def finetune_lora(folder: Path) -> None:
    finetune(folder, lora=True)


def compress(folder: Path) -> None:
    from tfcli.compression.quantize import compress

    source = save(folder / "model", width=64)
    text(folder, TEXT[:300])
    compress(source, folder / "small", quantize="int8", text=[str(folder / "corpus.txt")], device="cpu", threads=3)


def convert(folder: Path) -> None:
    from tfcli.formats.convert import convert

    convert(save(folder / "model"), folder / "model.gguf", to="gguf")


def bench(folder: Path) -> None:
    from tfcli.benchmark import subject, suites
    from tfcli.formats.open import open_path

    chosen = Runtime.detect(device="cpu", threads=3)
    found = subject.from_model(open_path(save(folder / "model")), chosen, text=TEXT, batch_size=2)
    names = ["tokenize", "load", "decode", "prefill", "train"]
    list(suites.run(names, found, chosen, repeats=1, on_start=lambda name: None))


CALLS = [
    load_and_use, quantized, turning, pretrain, pretrain_lstm, compiling, finetune, finetune_lora, compress, convert,
    bench,
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_a_call_changes_nothing_around_it(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a thread count, a seed, a handler, a stance or a malloc option that stays."""
    monkeypatch.setattr(runtime, "keep_freed_memory", lambda: pytest.fail("malloc options are the command line's"))
    if call is compiling:
        fails = RuntimeError("no compiler here")
        monkeypatch.setattr(torch, "compile", lambda forward: lambda *a, **k: (_ for _ in ()).throw(fails))
    before = snapshot()
    call(tmp_path)
    after = snapshot()
    assert {key: (before[key], after[key]) for key in before if before[key] != after[key]} == {}


def test_threads_hold_inside_a_call_and_not_between_two_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tfcli.infer.decode import Decoder

    seen: list[int] = []
    step = Decoder.step

    def watched(*arguments: Any) -> Any:
        seen.append(torch.get_num_threads())
        return step(*arguments)

    monkeypatch.setattr(Decoder, "step", watched)
    own = torch.get_num_threads()
    engine = tfcli.load(save(tmp_path), device="cpu", threads=own + 1)
    for _ in engine.stream("the king", max_tokens=4, ignore_eos=True):
        assert torch.get_num_threads() == own
    assert seen and set(seen) == {own + 1}


def test_threads_are_the_calling_threads_alone() -> None:
    """Would catch torch.set_num_threads, which is also what a thread that starts meanwhile begins with."""
    own = torch.get_num_threads()
    chosen = Runtime.detect(device="cpu", threads=own + 1)
    with chosen.active():
        assert torch.get_num_threads() == own + 1
        assert f"mkl_get_max_threads() : {own}" not in torch.__config__.parallel_info()
        if runtime._openmp() is not None:
            assert in_thread(torch.get_num_threads) == own
        with pytest.raises(ZeroDivisionError), Runtime.detect(device="cpu", threads=own + 2).active():
            assert torch.get_num_threads() == own + 2
            raise ZeroDivisionError
        assert torch.get_num_threads() == own + 1
    assert torch.get_num_threads() == own


def test_threads_without_openmps_own_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_openmp", lambda: None)
    own = torch.get_num_threads()
    with Runtime.detect(device="cpu", threads=own + 1).active():
        assert torch.get_num_threads() == own + 1
    assert torch.get_num_threads() == own
