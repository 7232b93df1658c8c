"""tfcli predict, as a shell sees it."""

import gzip
import io
import json
import lzma
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_models import save

import tfcli


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def call(directory: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """(exit code, stdout, stderr) of ``tfcli predict tiny ARGUMENTS``, with ``stdin`` piped in."""
    from tfcli.cli.main import main

    def run(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = main(["predict", str(directory), *arguments, "--device", "cpu"])
        return code, *capfd.readouterr()

    return run


def test_lines_become_vectors_in_order(call, directory: Path) -> None:  # type: ignore[no-untyped-def]
    """Prints one object per line, with the library's vectors; blank lines and CRLF are kept as texts."""
    code, out, err = call("--task", "embed", stdin="the king\r\n\n从前\n".encode())
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [line["text"] for line in lines] == ["the king", "", "从前"]
    expected = tfcli.load(directory, precision="fp32").embed(["the king", "", "从前"])
    assert np.allclose([line["embedding"] for line in lines], expected, atol=1e-6)
    assert "device: cpu" in err and "fp32" in err


def test_json_lines_and_a_broken_one(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The others are done, the broken one is named, and the exit code says so."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a", "id": 1}\n{"text": 3}\nno\n{"text": "b"}\n')
    code, out, err = call(str(path))
    assert code == 1
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["a", "b"]
    assert 'x.jsonl:2 has no "text" with a string' in err
    assert "x.jsonl:3 is not JSON" in err
    code, out, _ = call(str(path), "--limit", "1")
    assert (code, len(out.splitlines())) == (0, 1)


def test_closed_stdin_is_said(
    directory: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``tfcli predict M <&-``: was called a defect of tfcli."""
    from tfcli.cli.main import main

    monkeypatch.setattr(sys, "stdin", None)
    commands = [
        ["predict", str(directory)], ["generate", "--model", str(directory)], ["evaluate", str(directory), "-"],
        ["generate", "--model", str(directory), "--file", "-"], ["pretrain", "-", "--out", str(directory / "run")],
    ]  # fmt: skip
    for command in commands:
        assert main([*command, "--device", "cpu"]) == 2, command
        out, err = capfd.readouterr()
        assert "error: stdin is closed\n" in err and out == ""


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.txt.xz", "x.csv.gz"])
def test_compressed_files(call, tmp_path: Path, name: str) -> None:  # type: ignore[no-untyped-def]
    """Read as they are everywhere else; a file that is cut short is an error."""
    rows = {".jsonl": '{"text": "a"}\n{"text": "b"}\n', ".txt": "a\nb", ".csv": "text\na\nb\n"}
    plain = rows[Path(name).suffixes[0]].encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(plain) if name.endswith(".gz") else lzma.compress(plain))
    code, out, _ = call(str(path))
    assert (code, [json.loads(line)["text"] for line in out.splitlines()]) == (0, ["a", "b"])
    path.write_bytes(path.read_bytes()[:-9])
    code, _, err = call(str(path))
    assert code == 2 and "corrupt or truncated" in err


def test_other_encodings(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Decodes a file and stdin; refuses an encoding whose lines do not end with a byte, and an unknown one."""
    path = tmp_path / "x.txt"
    path.write_bytes("Zoë\n".encode("latin-1"))
    code, _, err = call(str(path))
    assert code == 1 and "x.txt:1 is not UTF-8 at byte 2 (name its encoding, as --encoding latin-1)" in err
    assert json.loads(call("--encoding", "utf-8-sig", stdin="\ufeffZoë".encode())[1])["text"] == "Zoë"
    for code, out, _ in (call(str(path), "--encoding", "latin-1"), call("--encoding", "latin-1", stdin=b"Zo\xeb")):
        assert (code, json.loads(out)["text"]) == (0, "Zoë")
    code, _, err = call(str(path), "--encoding", "utf-16")
    assert code == 2 and "iconv -f utf-16 -t utf-8" in err
    code, _, err = call(str(path), "--encoding", "latinn")
    assert code == 2 and "unknown encoding 'latinn'" in err


def test_a_text_beyond_the_context_is_said(call) -> None:  # type: ignore[no-untyped-def]
    """Would catch a cut in silence."""
    code, out, err = call(stdin=b"the king\n" + b"the king " * 100)
    assert code == 0
    assert ["cut" in json.loads(line) for line in out.splitlines()] == [False, True]
    assert "1 inputs are longer than the model's context" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--task", "embedd"], "did you mean 'embed'?"), (["nowhere.txt"], "no such file: nowhere.txt")],
)
def test_bad_input(call, arguments: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    """Exit code 2, and what to do."""
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert message in err


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder, pretrained for a moment by the command itself."""
    from tiny_models import TEXT

    from tfcli.cli.main import main

    folder = tmp_path_factory.mktemp("bert")
    (folder / "corpus.txt").write_text(TEXT, encoding="utf-8")
    sizes = ["--depth", "1", "--context", "32", "--batch-size", "4", "--vocab-size", "400", "--steps", "4"]
    code = main(["pretrain", str(folder / "corpus.txt"), "--arch", "bert", "--out", str(folder / "run"), *sizes,
                 "--set", "model.width=32", "--set", "mlm.whole_words=true", "--device", "cpu", "--json"])  # fmt: skip
    assert code == 0
    return folder / "run"


def test_filling_in(bert: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills a text given as an argument and lines of stdin; a line without a mask is reported and skipped."""
    from tfcli.cli.main import main

    text = "Once upon a [MASK] there was a [MASK]."
    assert main(["predict", str(bert), "--task", "fill", text, "--device", "cpu"]) == 0
    one = json.loads(capfd.readouterr().out)
    assert one["text"] == text
    assert [len(words) for words in one["masks"]] == [5, 5]
    shares = [guess["probability"] for guess in one["masks"][0]]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1
    assert all(guess["word"] == guess["word"].strip() != "" for guess in one["masks"][0])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"the king\n{text}\n".encode())))
    assert main(["predict", str(bert), "--task", "fill", "--device", "cpu"]) == 1
    out, err = capfd.readouterr()
    answer = json.loads(out)
    assert [[guess["word"] for guess in words] for words in answer["masks"]] == [
        [guess["word"] for guess in words] for words in one["masks"]
    ]
    assert "stdin:1 there is no [MASK] in the text" in err


def test_a_decoder_does_not_fill_in(call) -> None:  # type: ignore[no-untyped-def]
    """Exit code 2, and what would."""
    code, out, err = call("--task", "fill", "the [MASK]")
    assert (code, out) == (2, "")
    assert "pretrain corpus.txt --arch bert" in err
