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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT, rows of three tasks, and an adapter for each of them."""
    pytest.importorskip("transformers")
    import small_bert

    folder = tmp_path_factory.mktemp("heads")
    small_bert.save(folder / "base", words=("king", "tree"))
    rows = ["king a b", "tree c", "a king", "the tree d"] * 8
    labels = [{"text": f"{text} {n}", "label": "king" if "king" in text else "tree"} for n, text in enumerate(rows)]
    (folder / "classify.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    (folder / "tag.conll").write_text("".join(f"king B-who\n{'abcdefgh'[n % 8]} O\n\n" for n in range(24)))
    asked = [
        {
            "question": "who ?",
            "context": f"a king {n}",
            "answers": {"text": ["king"], "answer_start": [2]},
            "id": str(n),
        }
        for n in range(24)
    ]
    (folder / "answer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    for task, data in DATA.items():
        arguments = ["--task", task, "--out", str(folder / task), "--steps", "6", "--lora", "--set", "lora.rank=2"]
        assert main(["finetune", str(folder / "base"), str(folder / data), *arguments, "--device", "cpu"]) == 0
    return folder


DATA = {"classify": "classify.jsonl", "tag": "tag.conll", "answer": "answer.jsonl"}


@pytest.mark.parametrize("task", DATA)
def test_an_adapter_answers_as_what_it_is_merged_into(
    folder: Path, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """predict and evaluate find base, head and labels by the adapter alone; catches scores of another head."""
    assert not (folder / task / "model.safetensors").exists()
    assert main(["convert", str(folder / "base"), str(tmp_path / "whole"), "--merge", str(folder / task)]) == 0
    inputs = tmp_path / "in.jsonl"
    inputs.write_text('{"text": "the king and a tree", "question": "who ?", "context": "a tree and a king"}\n' * 2)
    predictions, scores = [], []
    for model in (folder / task, tmp_path / "whole"):
        capsys.readouterr()
        machine = ["--device", "cpu", "--precision", "fp32"]
        assert main(["predict", str(model), str(inputs), *machine]) == 0
        predictions.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
        assert main(["evaluate", str(model), str(folder / DATA[task]), "--json", *machine]) == 0
        scores.append(json.loads(capsys.readouterr().out))
    assert len(predictions[0]) == 2 and predictions[0] == predictions[1]
    assert scores[0] == scores[1]
    if task == "classify":
        assert set(predictions[0][0]["probabilities"]) == {"king", "tree"}
    if task == "tag":
        assert {entity["label"] for entity in predictions[0][0]["entities"]} <= {"who"}


def test_what_an_adapter_lacks_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A base that was moved, quantizing, an adapter on an adapter, --from-scratch with --lora."""
    import shutil

    adapter = tmp_path / "adapter"
    shutil.copytree(folder / "classify", adapter)
    data = str(folder / "classify.jsonl")
    again = ["finetune", str(adapter), data, "--task", "classify", "--lora", "--out", str(tmp_path / "x")]
    assert main(again) == 2
    assert "is an adapter itself" in capsys.readouterr().err
    scratch = ["finetune", str(folder / "base"), data, "--task", "classify", "--lora", "--from-scratch"]
    assert main([*scratch, "--out", str(tmp_path / "x")]) == 2
    assert "--lora keeps a model's weights" in capsys.readouterr().err
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "/nowhere/base"}))
    for command in (["predict", str(adapter), data], ["evaluate", str(adapter), data]):
        assert main(command) == 2
        out, err = capsys.readouterr()
        assert (
            out == ""
            and "an adapter for '/nowhere/base', which does not exist" in err
            and "put the path of its base into" in err
        )
