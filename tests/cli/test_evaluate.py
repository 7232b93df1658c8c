"""tfcli evaluate, as a shell sees it."""

import json
import sys
from pathlib import Path

import pytest
from tiny_models import TEXT, cpu, model, save, tokenizer

from tfcli.infer.engine import Engine


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def call(directory: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """(exit code, stdout, stderr) of ``tfcli evaluate tiny ARGUMENTS``, with ``stdin`` piped in."""
    import io

    from tfcli.cli.main import main

    def run(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = main(["evaluate", str(directory), *arguments, "--device", "cpu", "--precision", "fp32"])
        out, err = capfd.readouterr()
        return code, out, err

    return run


def test_scores_of_a_text_are_the_library_s(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Files, stdin and Engine.score agree; bytes are the text's UTF-8."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8", newline="")
    code, out, err = call(str(tmp_path / "text.txt"), "--json")
    assert code == 0
    scores = json.loads(out)
    expected = Engine(model(), tokenizer(), cpu()).score(TEXT)
    assert list(scores) == ["loss", "perplexity", "bits_per_byte", "tokens", "bytes"]
    assert scores["loss"] == pytest.approx(expected.loss, abs=1e-6)
    assert (scores["tokens"], scores["bytes"]) == (expected.tokens, len(TEXT.encode()))
    assert "device: cpu" in err
    _, out, _ = call("-", "--json", stdin=TEXT.encode())
    assert json.loads(out) == scores
    _, out, _ = call(str(tmp_path / "text.txt"))
    assert [line.split()[0] for line in out.splitlines()] == list(scores)


def test_documents_end_with_the_end_of_text_token(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The token counts, of the last one too, its bytes do not; --limit takes the first documents."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("a king", "", "his", "x")))
    pieces = tokenizer()
    counts = [len(pieces.encode(text)) for text in ("a king", "his", "x")]
    _, out, _ = call(str(tmp_path / "rows.jsonl"), "--json")
    assert (json.loads(out)["tokens"], json.loads(out)["bytes"]) == (sum(counts) + 3, 10)
    _, out, _ = call(str(tmp_path / "rows.jsonl"), "--json", "--limit", "2")
    assert (json.loads(out)["tokens"], json.loads(out)["bytes"]) == (sum(counts[:2]) + 2, 9)


def test_the_size_of_batches_does_not_matter(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Would catch an end-of-text token lost between two batches of documents."""
    from tfcli.text.corpus import encoding

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"king {i}"}) + "\n" for i in range(20)))
    _, whole, _ = call(str(tmp_path / "rows.jsonl"), "--json")
    monkeypatch.setattr(encoding, "BATCH", 1)
    _, parts, _ = call(str(tmp_path / "rows.jsonl"), "--json")
    assert whole == parts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.txt"], "no such file: absent.txt"),
        (["-"], "there is no text in -"),
        (["-", "--stride", "0"], "--stride is 0"),
        (["-", "--stride", "33"], "--stride is 33, the context 32"),
        (["-", "--limit", "0"], "--limit is 0"),
        (["-", "--errors", "ignore"], "unknown errors 'ignore'"),
    ],
)
def test_bad_input_is_one_clear_message(call, arguments: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    """Exit 2, nothing on stdout."""
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
