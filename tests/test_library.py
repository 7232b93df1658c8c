"""tfcli as a library: the same things without the shell."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import save

import tfcli
from tfcli.errors import RunError, UserError


def test_importing_costs_nothing() -> None:
    """torch enters when a function is used."""
    program = "import sys, tfcli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_load_generate_stream_and_score(tmp_path: Path) -> None:
    """The few lines of the README."""
    engine = tfcli.load(save(tmp_path), device="cpu")
    text = engine.generate("the king", max_tokens=10, seed=1).text
    assert "".join(event.text for event in engine.stream("the king", max_tokens=10, seed=1)) == text
    assert [r.prompt for r in engine.generate(["a", "b"], max_tokens=2)] == ["a", "b"]
    assert engine.score("the king").perplexity > 1


def test_errors_are_the_shell_s(tmp_path: Path) -> None:
    """A library user gets the same message, as an exception."""
    with pytest.raises(UserError, match="no such model"):
        tfcli.load(tmp_path / "absent")
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        tfcli.laod  # noqa: B018


def test_damaged_weights_have_no_score(tmp_path: Path) -> None:
    """A loss of nan passed on as a result, which JSON cannot even hold."""
    engine = tfcli.load(save(tmp_path), device="cpu")
    engine.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="loss of the text is nan"):
        engine.score("the king")
    assert set(dir(tfcli)) >= {"load", "pretrain"}
