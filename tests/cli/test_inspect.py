"""tfcli inspect: what it says of each kind of thing, as JSON and for people, without torch."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from tfcli.cli.inspect import inspect
from tfcli.config.model import ModelConfig
from tfcli.config.options import TokenizerOptions
from tfcli.errors import UserError
from tfcli.formats.hf import directory as hf
from tfcli.inspection import describe
from tfcli.model import cost
from tfcli.model.transformer import Transformer, initialize
from tfcli.text.corpus.shards import ShardWriter
from tfcli.text.read.sources import Chunk
from tfcli.text.tokenizers.training import train
from tfcli.train import checkpoint

CONFIG = ModelConfig(
    vocab_size=300, context=32, depth=2, width=32, heads=2, kv_heads=1, head_width=16, ffn_width=64
)  # fmt: skip
TEXT = "The cat sat on the mat. The dog sat on the log.\n" * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "first"
    tokenizer = train([Chunk(TEXT, True)], TokenizerOptions(vocab_size=280))
    transformer = Transformer(CONFIG)
    initialize(transformer, seed=0)
    hf.save(directory, transformer, tokenizer)
    return directory


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Path:
    """A run that stopped: no "finished" in run.json, old metrics."""
    directory = tmp_path / "run"
    directory.mkdir()
    for file in model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    (directory / "run.json").write_text(json.dumps({"command": "tfcli pretrain a.txt", "seed": 2024}))
    records = [
        {"step": 0, "seconds": 1.0, "tokens": 0, "val_loss": 5.0, "val_bits_per_byte": 3.0},
        {"step": 10, "seconds": 2.0, "tokens": 320, "train_loss": 4.0, "lr": 1e-3, "tokens_per_second": 320.0},
        {"step": 10, "seconds": 2.0, "tokens": 320, "val_loss": 4.1, "val_bits_per_byte": 2.0},
        {"step": 20, "seconds": 3.0, "tokens": 640, "val_loss": 4.2, "val_bits_per_byte": 2.5},
    ]
    metrics = directory / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 30, "trai')
    os.utime(metrics, (time.time() - 3600,) * 2)
    (directory / "data.json").write_text(json.dumps({"sources": [{"name": "a.txt"}], "bytes": 1920, "tokens": 640}))
    for step in ("00000010", "00000020", "00000030", "junk.tmp"):
        (directory / "checkpoints" / step).mkdir(parents=True)
        if step != "00000030":  # which was not finished
            (directory / "checkpoints" / step / describe.MARKER).touch()
    return directory


def described(capsys: pytest.CaptureFixture[str], *targets: object) -> list[dict[str, object]]:
    inspect([str(target) for target in targets], as_json=True)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_model_says_shape_and_costs(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (result,) = described(capsys, model)
    assert result["kind"] == "model" and result["architecture"] == "decoder"
    assert ModelConfig(**result["shape"]) == CONFIG  # type: ignore[arg-type]
    parts = cost.parameters(CONFIG)
    assert result["parameters"] == {
        "total": parts.total,
        "embedding": parts.embedding,
        "attention": parts.attention,
        "feed_forward": parts.feed_forward,
        "norms": parts.norms,
        "head": 0,
    }
    memory = result["memory"]
    assert memory["weights_bf16_bytes"] * 2 == memory["weights_fp32_bytes"] == 4 * parts.total  # type: ignore[index,operator]
    assert memory["kv_cache_per_1000_tokens_bf16_bytes"] == 1000 * 2 * 2 * 16 * 2  # type: ignore[index]
    assert result["stored"]["numbers"] == parts.total and result["stored"]["dtype"] == "F32"  # type: ignore[index]
    assert result["tokenizer"]["vocab_size"] == 280  # type: ignore[index]


def test_run_says_how_far_it_came(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (result,) = described(capsys, run)
    assert result["kind"] == "run" and result["status"] == "stopped"
    assert result["command"] == "tfcli pretrain a.txt" and result["seed"] == 2024
    assert result["steps"] == 20 and result["best_val_bits_per_byte"] == 2.0
    assert result["last_training"]["train_loss"] == 4.0  # type: ignore[index]
    assert result["checkpoints"] == ["00000010", "00000020"]
    assert result["data"] == {"bytes": 1920, "tokens": 640, "sources": ["a.txt"]}
    assert "parameters" in result


@pytest.mark.parametrize("sources", [{"sources": ["a.txt"]}, {"files": ["a.txt"]}, {"sources": [{"file": "a.txt"}]}])
def test_the_data_of_runs_of_earlier_versions(
    run: Path, capsys: pytest.CaptureFixture[str], sources: dict[str, object]
) -> None:
    """Each task had a form of its own."""
    (run / "data.json").write_text(json.dumps({**sources, "tokens": 640}))
    assert described(capsys, run)[0]["data"] == {"tokens": 640, "sources": ["a.txt"]}


def test_run_whose_lock_is_held_is_running_and_one_with_an_end_is_finished(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with checkpoint.locked(run):
        assert described(capsys, run)[0]["status"] == "running"
    assert described(capsys, run)[0]["status"] == "stopped"
    (run / "run.json").write_text(json.dumps({"finished": "2024-01-01T00:00:00Z"}))
    assert described(capsys, run)[0]["status"] == "finished"


def test_without_locks_a_run_that_wrote_lately_is_running(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert described(capsys, run)[0]["status"] == "running"
    for path in run.iterdir():
        os.utime(path, (time.time() - 3600,) * 2)
    assert described(capsys, run)[0]["status"] == "stopped"


def test_run_without_a_model_yet_is_still_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.json").unlink()
    assert "shape" not in described(capsys, run)[0]


def test_damaged_run_says_which_file(run: Path) -> None:
    (run / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json cannot be read"):
        inspect([str(run)])


def test_tokenizer_says_its_pieces(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (result,) = described(capsys, model / "tokenizer.model")
    assert result["kind"] == "tokenizer" and result["type"] == "bpe" and result["vocab_size"] == 280
    assert result["byte_fallback"] and result["lossless"]
    assert result["special"] == {"<unk>": 0, "<|endoftext|>": 1, "<pad>": 2} and result["end_of_text_id"] == 1
    lengths = [len(piece) for piece in result["longest_pieces"]]  # type: ignore[attr-defined]
    assert lengths == sorted(lengths, reverse=True) and len(str(result["hash"])) == 64


def test_shard_says_its_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "train.bin"
    with ShardWriter(path, tokenizer_hash="ab" * 32, vocab_size=300) as writer:
        writer.write(np.arange(10))
        writer.count(documents=2, bytes=35)
    (result,) = described(capsys, path)
    assert (
        result["kind"] == "shard" and result["tokens"] == 10 and result["documents"] == 2 and result["text_bytes"] == 35
    )
    assert result["bytes_per_token"] == 3.5 and result["dtype"] == "uint16" and result["tokenizer_hash"] == "ab" * 32


def test_weights_file_says_its_header(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (result,) = described(capsys, model / "model.safetensors")
    assert result["kind"] == "weights" and result["numbers"] == cost.parameters(CONFIG).total


def test_corpus_says_its_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("héllo\nworld", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "春眠不覚暁"}\n{"text": "x"}\n', encoding="utf-8")
    (result,) = described(capsys, tmp_path)
    assert result["kind"] == "corpus" and result["files"] == 2 and result["formats"] == {"text": 1, "jsonl": 1}
    assert (
        result["documents"] == 3 and result["lines"] == 4 and result["characters"] == 17 and result["text_bytes"] == 28
    )
    assert result["whole_text_read"] and result["preview"] == "héllo\nworld"
    assert result["scripts"] == pytest.approx({"Latin": 11 / 17, "Han": 5 / 17, "Common": 1 / 17})


def test_large_corpus_is_read_in_part_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(describe, "SCAN_BYTES", 1_000_000)
    (tmp_path / "a.txt").write_text("all work and no play\n" * 200_000)
    (result,) = described(capsys, tmp_path)
    assert result["whole_text_read"] is False
    assert 1_000_000 <= result["text_bytes"] < result["file_bytes"] == 4_200_000  # type: ignore[operator]


def test_empty_file_is_a_corpus_without_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").touch()
    (result,) = described(capsys, tmp_path / "empty.txt")
    assert result["text_bytes"] == 0 and result["scripts"] == {}
    inspect([str(tmp_path / "empty.txt")])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("image.png", b"\x89PNG\r\n", "PNG"),
        ("what.bin", bytes(range(256)), "binary"),
        ("old.model", b"{}", "JSON, expected a SentencePiece model"),
        ("cut.safetensors", b"\x01", "cut short"),
        ("cut.shard", b"TFSHARD\0", "not a token shard"),
    ],
)
def test_what_is_nothing_of_this_is_refused_in_words(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        inspect([str(tmp_path / name)])


def test_nothing_there_names_the_nearest(model: Path) -> None:
    with pytest.raises(UserError, match="no such file") as error:
        inspect([str(model.parent / "frist")])
    assert error.value.hint is not None and "first" in error.value.hint


def test_for_people_lines_are_aligned_and_plain(model: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect([str(model), str(run)])
    out = capsys.readouterr().out
    assert "\033" not in out and out.startswith(f"{model}: model\n") and f"\n\n{run}: run\n" in out
    assert f"({cost.parameters(CONFIG).total:,})" in out and "2024" in out
    shape = out.split("\n\n")[1].splitlines()
    starts = {re.match(r"  \S+( \S+)*  +", line).end() for line in shape[1:]}  # type: ignore[union-attr]
    assert shape[0] == "shape" and len(starts) == 1  # every value of the part begins in one column


def test_without_a_target_it_is_the_model_that_generate_uses(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TFCLI_MODEL", str(model))
    inspect(None, as_json=True)
    captured = capsys.readouterr()
    assert json.loads(captured.out)["target"] == str(model) and str(model) in captured.err
    monkeypatch.delenv("TFCLI_MODEL")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no model was named"):
        inspect(None)


def test_needs_no_torch(model: Path) -> None:
    work = "from tfcli.inspection.describe import inspect; inspect(sys.argv[1])"
    code = f"import sys; {work}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_stdin_leaves_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert described(capsys, "-")[0]["text_bytes"] == len(TEXT)
    assert list(tmp_path.iterdir()) == []


def test_a_gguf_file_and_a_compressed_directory(model: Path, tmp_path: Path) -> None:
    """Catches a model that is taken for text: its shape is that of the directory it was made from."""
    from tfcli.formats.gguf import save as gguf_save
    from tfcli.formats.open import open_path
    from tfcli.runtime import Runtime

    loaded, codec = open_path(model).load(runtime=Runtime.detect(device="cpu", precision="fp32"))
    folder = tmp_path / "compressed"
    folder.mkdir()
    gguf_save.save(folder / "model.gguf", loaded, codec, type="F16")
    for target in (folder / "model.gguf", folder):
        result = describe.inspect(target)
        assert result["kind"] == "model"
        assert result["family"] == "qwen3"
        assert result["shape"] == describe.inspect(model)["shape"]
        assert result["parameters"] == describe.inspect(model)["parameters"]
        assert "F16" in result["stored"]["dtype"]
        assert result["tokenizer"]["vocab_size"] == CONFIG.vocab_size  # padded to the rows of the embedding
