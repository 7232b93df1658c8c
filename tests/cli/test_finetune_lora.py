"""tfcli finetune --lora, and what other commands make of its directory, as a shell sees them."""

import json
from pathlib import Path

import pytest
from tiny_models import save

from tfcli.cli.main import main


def test_from_pairs_to_an_answer_and_a_merged_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train, answer, merge: stdout holds results alone."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "base", context=128)
    rows = [json.dumps({"prompt": f"who is {number}?", "response": "the king"}) for number in range(12)]
    Path("a.jsonl").write_text("\n".join([*rows, '{"messages": []}']) + "\n")
    common = ["finetune", "base", "a.jsonl", "--task", "chat", "--steps", "2", "--device", "cpu"]
    assert main([*common, "--lora", "--set", "lora.rank=2", "--out", "run", "--json"]) == 0
    out, err = capsys.readouterr()
    made = json.loads(out)
    assert made["steps"] == 2 and made["loss"] > 0
    assert "1 empty conversations, left out (a.jsonl:13)" in err
    assert json.loads(Path("run/adapter_config.json").read_text())["r"] == 2
    asked = ["--prompt", "who is 3?", "--chat", "--greedy", "--max-tokens", "3", "--device", "cpu"]
    assert main(["generate", "--model", "run", *asked]) == 0
    answer = capsys.readouterr().out
    assert main(["convert", "base", "merged", "--merge", "run"]) == 0
    capsys.readouterr()
    assert main(["generate", "--model", "merged", *asked]) == 0
    assert capsys.readouterr().out == answer
    assert main([*common, "--set", "lora.rank=2", "--out", "other"]) == 2
    assert "not --lora" in capsys.readouterr().err
    assert main([*common, "--strict", "--out", "other"]) == 2
    assert "a.jsonl:13: empty conversations" in capsys.readouterr().err
