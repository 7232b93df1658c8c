"""Runs of a second: a small text, a small model, and what two runs are compared by."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import tiny_models

from tfcli.train.events import Listener
from tfcli.train.pretrain import Result, pretrain

SETTINGS: dict[str, Any] = {
    "model.depth": 1,
    "model.context": 16,
    "train.steps": 24,
    "train.batch_size": 4,
    "train.checkpoint_every": 6,
    "train.eval_every": 9,
    "train.sample_every": 12,
    "train.dropout": 0.1,
    "tokenizer.vocab_size": 400,
}
"""About six passes over TEXT, so that dropout is on from the second one."""
TEXT = tiny_models.TEXT[: len(tiny_models.TEXT) // 4]


def text(folder: Path, content: str = TEXT) -> Path:
    """A corpus in a folder."""
    path = folder / "corpus.txt"
    path.write_text(content, encoding="utf-8")
    return path


def start(
    corpus: Path | str,
    out: Path,
    *,
    listen: Listener | None = None,
    settings: dict[str, Any] | None = None,
    **more: Any,
) -> Result:
    """A new run on one thread in fp32."""
    changed = {**SETTINGS, **(settings or {})}
    return pretrain(corpus, out=out, settings=changed, device="cpu", precision="fp32", threads=1, listen=listen, **more)


def resume(out: Path, **more: Any) -> Result:
    """Go on with a run."""
    return pretrain(out=out, resume=True, **more)


def facts(run: Path) -> dict[str, Any]:
    """Everything that two runs with the same end share: model, weights, optimizer state, metrics without times."""
    last = sorted((run / "checkpoints").iterdir())[-1]
    state = json.loads((last / "state.json").read_text())
    return {
        "model": digest(run / "model.safetensors"),
        "weights": digest(last / "model.safetensors"),
        "moments": digest(last / "optimizer.safetensors"),
        "state": {key: value for key, value in state.items() if key not in ("seconds", "metrics_bytes")},
        "metrics": timeless(run),
    }


def timeless(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
