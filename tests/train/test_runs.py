"""Which model is meant where none is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from tfcli.errors import UserError
from tfcli.train.runs import find_model


def finished(directory: Path, stamp: Any) -> None:
    tiny_models.save(directory)
    (directory / "run.json").write_text(json.dumps({"finished": stamp}))


def test_model_given_then_environment_then_last_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch the newest directory being taken for the newest run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TFCLI_MODEL", raising=False)
    with pytest.raises(UserError, match="no run under runs/ has finished"):
        find_model(None)
    finished(Path("runs/b"), "2026-01-02T00:00:00Z")
    finished(Path("runs/a"), "2026-01-03T00:00:00Z")
    finished(Path("runs/c"), None)  # not finished
    Path("runs/d").mkdir()
    Path("runs/d/run.json").write_text("{")  # broken, and no model
    assert find_model(None) == Path("runs/a")
    Path("runs/e").mkdir()  # adapters are a model too
    Path("runs/e/run.json").write_text('{"finished": "2026-01-04T00:00:00Z"}')
    Path("runs/e/adapter_model.safetensors").write_bytes(b"")
    assert find_model(None) == Path("runs/e")
    (Path("runs/e") / "adapter_config.json").write_text('{"task_type": "TOKEN_CLS"}')
    assert find_model(None, generates=True) == Path("runs/a")
    (Path("runs/e") / "adapter_config.json").write_text('{"task_type": "CAUSAL_LM"}')
    assert find_model(None, generates=True) == Path("runs/e")
    for name, made_for in {"f": ["BertForTokenClassification"], "g": None}.items():  # g: an LSTM
        finished(Path(f"runs/{name}"), "2026-01-05T00:00:00Z")
        config = json.loads(Path(f"runs/{name}/config.json").read_text())
        Path(f"runs/{name}/config.json").write_text(json.dumps(config | {"architectures": made_for}))
    assert find_model(None, generates=True) == Path("runs/e")
    assert find_model(None) in (Path("runs/f"), Path("runs/g"))
    monkeypatch.setenv("TFCLI_MODEL", "elsewhere")
    assert find_model(None) == Path("elsewhere")
    assert find_model("given") == Path("given")
