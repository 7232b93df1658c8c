"""The machine as an explicit value: device, precision and threads, chosen or refused in words."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from tfcli import runtime
from tfcli.errors import UserError
from tfcli.runtime import Runtime


def test_detect_chooses_what_is_there() -> None:
    chosen = Runtime.detect()
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert chosen.device.type == expected and chosen.precision in ("fp32", "bf16") and chosen.threads >= 1


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_the_dtype(precision: str, dtype: torch.dtype) -> None:
    chosen = Runtime.detect(device="cpu", precision=precision)
    assert chosen.dtype == dtype and chosen.precision == precision and precision in chosen.describe()


def test_bf16_only_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_native_bf16", lambda device: False)
    assert Runtime.detect(device="cpu").precision == "fp32"
    monkeypatch.setattr(runtime, "_native_bf16", lambda device: True)
    assert Runtime.detect(device="cpu", precision="auto").precision == "bf16"


@pytest.mark.parametrize(
    ("flags", "native"),
    [
        ("flags\t\t: fpu avx512_bf16 amx_tile\n", True),
        ("flags : fpu avx2\n", False),
        ("Features : bf16 sve\n", True),
        ("", False),
    ],
)
def test_native_bf16_is_a_whole_flag_of_the_processor(
    flags: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr("builtins.open", lambda *args, **kwargs: io.StringIO("processor : 0\n" + flags))
    assert runtime._native_bf16(torch.device("cpu")) is native


def test_a_processor_that_does_not_tell_has_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", refuse)
    assert runtime._native_bf16(torch.device("cpu")) is False


def test_threads() -> None:
    before = torch.get_num_threads()
    assert Runtime.detect(device="cpu").threads == before
    chosen = Runtime.detect(device="cpu", threads=1)
    assert chosen.threads == 1 and "1 thread," in chosen.describe() + ","
    assert torch.get_num_threads() == before, "a value changes nothing"
    for wrong in (0, -1, 4097):
        with pytest.raises(UserError, match=f"--threads is {wrong}") as error:
            Runtime.detect(threads=wrong)
        assert error.value.hint == "it must be from 1 to 4,096"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
@pytest.mark.parametrize(
    ("built_with", "reason"), [(None, "built without CUDA"), ("13.0", "PyTorch sees no CUDA device")]
)
def test_cuda_that_is_not_there_says_why(
    device: str, built_with: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", built_with)
    with pytest.raises(UserError, match=f"--device {device}: .*{reason}") as error:
        Runtime.detect(device=device)
    assert error.value.exit_code == 2 and "--device cpu" in str(error.value.hint)


def test_a_cuda_device_beyond_the_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="only 1 CUDA device"):
        Runtime.detect(device="cuda:3")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is an Apple GPU")
def test_mps_that_is_not_there() -> None:
    with pytest.raises(UserError, match="no Apple GPU here"):
        Runtime.detect(device="mps")


@pytest.mark.parametrize(
    ("given", "says", "hint"),
    [
        ({"device": "cdua"}, "unknown device 'cdua'", "did you mean 'cuda'?"),
        ({"device": "tpu:0"}, "unknown device 'tpu:0'", None),
        ({"device": "cpu:x"}, "--device cpu:x is not a device", "for example cuda:0"),
        ({"device": "cpu", "precision": "bf61"}, "unknown precision 'bf61'", "did you mean 'bf16'?"),
    ],
)
def test_what_is_misspelt_is_named(given: dict[str, str], says: str, hint: str | None) -> None:
    with pytest.raises(UserError) as error:
        Runtime.detect(**given)  # type: ignore[arg-type]
    assert error.value.message == says and (hint is None or error.value.hint == hint)


def test_it_is_a_value() -> None:
    chosen = Runtime.detect(device="cpu", precision="fp32")
    assert chosen == Runtime.detect(device="cpu", precision="fp32")
    with pytest.raises(dataclasses.FrozenInstanceError):
        chosen.threads = 3  # type: ignore[misc]
    chosen.synchronize()


def test_peak_memory_sees_an_allocation() -> None:
    ballast = b"x" * 400_000_000  # the parent's memory is not the child's
    code = """
import torch
from tfcli.runtime import Runtime
r = Runtime.detect(device="cpu")
before = r.peak_memory()
x = torch.ones(50_000_000)
print(r.peak_memory() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    if runtime.peak_resident():  # 0 on systems that do not tell
        assert 150e6 < int(done.stdout) < 300e6
    assert len(ballast) == 400_000_000


def test_cpu_threads_needs_no_torch() -> None:
    code = "import sys; from tfcli.runtime import cpu_threads; print(cpu_threads(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, torch_there = done.stdout.split()
    assert 1 <= int(count) <= (os.cpu_count() or 1) and torch_there == "False"
