"""A command opens its model once: config.json is read one time, the header of a GGUF file parsed one time."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
from opens import opens
from tiny_models import save, tokenizer

from tfcli.cli.main import main
from tfcli.formats.gguf import file as gguf
from tfcli.train.finetune import finetune

TEXT = "Once upon a time there was a king who had three daughters.\n"
ROWS = "".join(json.dumps({"text": f"the {word} king", "label": word}) + "\n" for word in ("old", "young") * 12)


def commands(model: Path, folder: Path) -> dict[str, list[str]]:
    text, rows = folder / "text.txt", folder / "rows.jsonl"
    text.write_text(TEXT * 4)
    rows.write_text(ROWS)
    few = ["--set", "train.steps=1", "--device", "cpu", "--task"]
    return {
        "generate": ["generate", "--model", str(model), "--prompt", "a king", "--max-tokens", "2"],
        "quantized": ["generate", "--model", str(model), "--prompt", "a", "--max-tokens", "1", "--quantize", "int8"],
        "embed": ["predict", str(model), str(text), "--task", "embed"],
        "evaluate": ["evaluate", str(model), str(text)],
        "inspect": ["inspect", str(model)],
        "finetune": ["finetune", str(model), str(rows), *few, "classify", "--out", str(folder / "tuned")],
        "lora": ["finetune", str(model), str(rows), *few, "classify", "--lora", "--out", str(folder / "lora")],
    }


def run(arguments: list[str]) -> Counter[str]:
    with opens() as counts:
        assert main(arguments) == 0
    return counts


@pytest.mark.parametrize("command", ["generate", "quantized", "embed", "evaluate", "inspect", "finetune", "lora"])
def test_config_json_is_read_once(tmp_path: Path, command: str) -> None:
    model = save(tmp_path / "model", context=64)
    counts = run(commands(model, tmp_path)[command])
    assert counts[str(model / "config.json")] == 1


def test_convert_and_compress_read_it_once(tmp_path: Path) -> None:
    model = save(tmp_path / "model", context=64)
    assert run(["convert", str(model), str(tmp_path / "m.gguf")])[str(model / "config.json")] == 1
    counts = run(["compress", str(model), str(tmp_path / "small"), "--quantize", "int8"])
    assert counts[str(model / "config.json")] == 2  # once to copy it


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_of_a_finetuned_model_and_the_base_of_an_adapter(tmp_path: Path, command: str, lora: bool) -> None:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    base = save(tmp_path / "model", context=64)
    settings: dict[str, Any] = {"train.steps": 1, "lora.on": lora}
    finetune(base, tmp_path / "rows.jsonl", task="classify", out=tmp_path / "run", settings=settings, device="cpu")
    counts = run([command, str(tmp_path / "run"), str(tmp_path / "rows.jsonl")])
    assert counts[str((base if lora else tmp_path / "run") / "config.json")] == 1


@pytest.mark.parametrize("command", ["generate", "embed", "evaluate", "inspect", "convert", "lora"])
def test_a_gguf_header_is_parsed_once(tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny_gguf.save(tmp_path / "m.gguf", tiny_gguf.config("qwen3"), tokenizer=tokenizer())
    parsed: list[Path] = []
    version: Callable[[Any], int] = gguf._Header.version

    def counted(header: Any) -> int:
        parsed.append(header.path)
        return version(header)

    monkeypatch.setattr(gguf._Header, "version", counted)
    run({**commands(file, tmp_path), "convert": ["convert", str(file), str(tmp_path / "hf")]}[command])
    assert parsed == [file]
