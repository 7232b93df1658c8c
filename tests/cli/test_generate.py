"""tfcli generate, as a shell sees it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import encoder_decoder, save, tokenizer

RUN = [sys.executable, "-c", "import sys; from tfcli.cli.main import main; sys.exit(main())"]
Result = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def call(directory: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """(exit code, stdout, stderr) of ``tfcli generate --model tiny ARGUMENTS``, with ``stdin`` piped in."""
    import io

    from tfcli.cli.main import main

    def run(*arguments: str, stdin: bytes = b"", model: bool = True) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        named = ["--model", str(directory), "--device", "cpu"] if model else []
        code = main(["generate", *named, *arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return run


def test_stdout_is_the_new_text_alone(call) -> None:  # type: ignore[no-untyped-def]
    """Would catch the prompt, a banner or a progress bar in what a pipe reads."""
    code, out, err = call("--prompt", "the king", "--max-tokens", "8", "--seed", "1", "--precision", "fp32")
    assert code == 0
    _, line, _ = call("--prompt", "the king", "--max-tokens", "8", "--seed", "1", "--json", "--precision", "fp32")
    result = json.loads(line)
    assert out.removesuffix("\n") == result["text"].removesuffix("\n")
    assert "device: cpu" in err
    assert "5 prompt tokens in" in err
    assert "8 tokens, " in err
    assert "\x1b" not in out + err


def test_json_has_every_field(call) -> None:  # type: ignore[no-untyped-def]
    """Would catch a field that is renamed: programs rely on them."""
    _, out, _ = call("--prompt", "the", "--max-tokens", "3", "--json", "--num-samples", "2", "--ignore-eos")
    first, second = map(json.loads, out.splitlines())
    assert list(first) == ["prompt", "text", "ids", "logprobs", "finish_reason", "seed", "prompt_tokens"]
    assert first["prompt"] == second["prompt"] == "the"
    assert second["seed"] == first["seed"] + 1
    assert len(first["ids"]) == len(first["logprobs"]) == 3
    assert first["finish_reason"] == "length"


def test_stdin_is_one_prompt_less_its_last_line_break(call) -> None:  # type: ignore[no-untyped-def]
    """`echo text | tfcli generate` means the text that echo was given; breaks within stay."""
    _, out, _ = call("--json", "--max-tokens", "2", stdin=b"one\ntwo\n\n")
    assert json.loads(out)["prompt"] == "one\ntwo\n"
    _, out, _ = call("--json", "--max-tokens", "2", stdin=b"")
    assert json.loads(out)["prompt"] == ""


def test_file_keeps_order_and_empty_lines(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Prints one result per line of input; catches sorted or skipped ones, and CRLF in prompts."""
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa longer prompt\r\nb\n\n从前\n".encode())
    code, out, _ = call("--file", str(path), "--json", "--max-tokens", "2")
    assert code == 0
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["a longer prompt", "b", "", "从前"]
    _, out, _ = call("--file", "-", "--json", "--max-tokens", "2", stdin=b"x\ny")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["x", "y"]
    _, out, _ = call("--file", "-", "--max-tokens", "2", "--stop", "\n", stdin=b"x\ny")
    assert out.splitlines()[1] == "---"


def test_jsonl_prompts_may_have_line_breaks(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Other fields are let be; blank lines are no prompts."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"id": 1, "prompt": "a\\nb"}\n\n{"prompt": ""}\n')
    _, out, _ = call("--file", str(path), "--json", "--max-tokens", "2")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["a\nb", ""]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt"', "p.jsonl:2 is not JSON"),
        (b'{"prompt": "a"}\n["a"]\n', "p.jsonl:2 is not a JSON object"),
        (b'{"text": "a"}\n', 'p.jsonl:1 has no "prompt"'),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "p.jsonl:2 is not UTF-8 at byte 12"),
    ],
)
def test_broken_prompts_are_named_by_line(call, tmp_path: Path, content: bytes, message: str) -> None:  # type: ignore[no-untyped-def]
    """Errors in a file of many prompts name the line."""
    (tmp_path / "p.jsonl").write_bytes(content)
    code, out, err = call("--file", str(tmp_path / "p.jsonl"), "--json", "--max-tokens", "2")
    assert code == 1
    assert message in err
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == len(content.splitlines())
    assert message in lines[-1]["error"]
    assert all(line["prompt"] == "a" for line in lines[:-1])


def test_the_other_prompts_of_a_file_are_done(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Prints one result per line, in order, also for a broken line, one too long, and messages without a template."""
    path = tmp_path / "p.jsonl"
    rows = ['{"prompt": "a"}', "oops", '{"prompt": "b"}', json.dumps({"prompt": "long " * 100})]
    rows += ['{"messages": [{"role": "user", "content": "x"}]}', '{"messages": []}', '{"prompt": "c"}']
    path.write_text("\n".join(rows))
    code, out, err = call("--file", str(path), "--json", "--max-tokens", "2", "--num-samples", "2")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line.get("prompt", "error") for line in lines] == ["a", "a", "error", "b", "b", *["error"] * 3, "c", "c"]
    assert code == 1
    for message in ("p.jsonl:2 is not JSON", "p.jsonl:4 the prompt has", "p.jsonl:5", "no chat template", "p.jsonl:6"):
        assert message in err
    assert "4 prompts could not be read" in err
    piped = call("--file", "-", "--json", "--max-tokens", "2", "--num-samples", "2", stdin=path.read_bytes())
    places = [json.loads(line).get("prompt", "error") for line in piped[1].splitlines()]
    assert places == [line.get("prompt", "error") for line in lines]
    code, out, _ = call("--file", str(path), "--max-tokens", "2")
    assert code == 1
    assert out.split("---").__len__() == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--greedy", "--temperature", "1"], "--greedy and --temperature exclude each other"),
        (["--greedy", "--top-k", "3"], "--greedy and --top-k exclude each other"),
        (["--prompt", "a", "--file", "b"], "--prompt and --file exclude each other"),
        (["--temperature", "-1"], "--temperature is -1.0"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--top-p", "0"], "--top-p is 0.0"),
        (["--top-p", "1.1"], "--top-p is 1.1"),
        (["--max-tokens", "0"], "--max-tokens is 0"),
        (["--num-samples", "0"], "--num-samples is 0"),
        (["--stop", ""], "--stop is empty"),
        (["--overflow", "slid"], "did you mean 'slide'?"),
        (["--set", "temprature=1"], "did you mean 'temperature'?"),
        (["--threads", "0"], "--threads is 0"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--file", "absent.txt"], "no such file: absent.txt"),
        (["--prompt", "the king " * 100], "the model's context is 32"),
        (["--prompt", "\udcff"], "lone surrogate"),
        (["--config", "absent.toml"], "no such file: absent.toml"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_message(call, arguments: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    """Exit 2, nothing on stdout, no traceback."""
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_models_that_are_not_there(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Would catch a search elsewhere, or a traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TFCLI_MODEL", raising=False)
    code, _, err = call("--prompt", "a", model=False)
    assert code == 2
    assert "no model was named, and no run under runs/ has finished" in err
    code, _, err = call("--prompt", "a", "--model", "nothing", model=False)
    assert code == 2
    assert "no such model: nothing" in err


def test_the_last_run_is_used_and_named(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """stderr says which model it is, as nobody named it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TFCLI_MODEL", raising=False)
    run = save(Path("runs/first"))
    (run / "run.json").write_text('{"finished": "2026-01-01T00:00:00Z"}')
    code, _, err = call("--prompt", "a", "--max-tokens", "2", "--device", "cpu", model=False)
    assert code == 0
    assert f"model: {run}" in err


def test_settings_come_from_file_set_and_flags(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Later wins: file, --set, flag."""
    (tmp_path / "s.toml").write_text('max_tokens = 3\ntemperature = 0.0\nstop = ["zzz"]\n')
    arguments = ["--config", str(tmp_path / "s.toml"), "--prompt", "a", "--json", "--ignore-eos"]
    lengths = [
        len(json.loads(call(*arguments, *more)[1])["ids"])
        for more in ([], ["--set", "max_tokens=4"], ["--set", "max_tokens=4", "--max-tokens", "5"])
    ]
    assert lengths == [3, 4, 5]


def test_greedy_is_temperature_zero_and_slide_goes_on(call) -> None:  # type: ignore[no-untyped-def]
    """More tokens than the context holds; without slide the text ends there and stderr says why."""
    base = ["--prompt", "a", "--max-tokens", "50", "--ignore-eos", "--json"]
    whole = json.loads(call(*base, "--greedy", "--overflow", "slide")[1])
    same = json.loads(call(*base, "--temperature", "0", "--overflow", "slide")[1])
    assert whole["ids"] == same["ids"]
    assert len(whole["ids"]) == 50
    cut = json.loads(call(*base, "--greedy")[1])
    assert cut["finish_reason"] == "context"
    assert whole["ids"][: len(cut["ids"])] == cut["ids"]
    assert "--overflow slide" in call(*base[:-1], "--greedy")[2]


def test_a_closed_pipe_ends_quietly_and_streams(directory: Path) -> None:
    """`tfcli generate | head -c 5`: what is there is read at once, and no traceback follows."""
    command = [*RUN, "generate", "--model", str(directory), "--prompt", "a", "--max-tokens", "100000", "--ignore-eos",
               "--overflow", "slide", "--device", "cpu"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout
        assert process.stderr
        assert len(process.stdout.read(5)) == 5
        process.stdout.close()
        err = process.stderr.read().decode()
        assert process.wait(30) == 0
    assert "Traceback" not in err
    assert "error" not in err


def test_help_does_not_import_torch() -> None:
    """--help answers at once."""
    program = (
        "import sys; from tfcli.cli.main import main; main(['generate', '--help']); main(['evaluate', '--help']);"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ})
    assert result.returncode == 0, result.stderr
    assert "Example: tfcli generate" in result.stdout


@pytest.mark.parametrize(
    "given",
    [
        ("--num-samples", "0"), ("--max-tokens", "0"), ("--top-p", "0"), ("--top-p", "nan"), ("--min-p", "2"),
        ("--temperature", "nan"), ("--temperature", "-1"), ("--top-k", "-1"), ("--repetition-penalty", "0"),
        ("--seed", "-1"), ("--stop", ""),
    ],
)  # fmt: skip
def test_impossible_values_are_refused_by_name(call, given: tuple[str, str]) -> None:  # type: ignore[no-untyped-def]
    """Would catch a value that is checked, but not on the way from the command line, and 0 taken for left out."""
    code, out, err = call("--prompt", "the", *given)
    assert (code, out) == (2, "") and err.startswith(f"error: {given[0]} is ") and "Traceback" not in err


def test_the_smallest_temperature_is_a_temperature(call) -> None:  # type: ignore[no-untyped-def]
    """Would catch logits that overflow into "index out of bounds"."""
    given = ("--prompt", "the king", "--max-tokens", "8", "--precision", "fp32", "--ignore-eos", "--json", "--seed")
    code, cold, _ = call(*given, "1", "--temperature", "1e-40")
    _, greedy, _ = call(*given, "1", "--greedy")
    assert code == 0 and cold == greedy


def test_the_help_has_headings(capsys: pytest.CaptureFixture[str]) -> None:
    """Twenty options in one list are not read."""
    from tfcli.cli.main import main

    assert main(["generate", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Model and prompt:", "Sampling:", "Output:", "Machine:", "Options:"]
    assert [line.split()[0] for line in lines[lines.index("Options:") + 1 :]] == ["-h,"]


@pytest.fixture
def translator(tmp_path: Path) -> list[str]:
    """Arguments that name an encoder-decoder in place of the fixture's model."""
    from tfcli.formats.hf import directory as hf

    hf.save(tmp_path / "pairs", encoder_decoder(3), tokenizer())
    return ["--model", str(tmp_path / "pairs"), "--device", "cpu", "--precision", "fp32", "--greedy"]


def test_a_model_that_translates_gives_a_line_for_each_line(call, translator: list[str], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Would catch separators, lines that shift against their source, and stdin taken as one text."""
    import tfcli
    from tfcli.config.options import Sampling

    lines = ["A man.", "", "the king", "forest " * 60, "a well"]
    engine = tfcli.load(tmp_path / "pairs", device="cpu", precision="fp32")
    greedy = Sampling(temperature=0.0, max_tokens=6)
    made = ["" if len(line) > 99 else engine.generate(line, greedy).text.replace("\n", " ") for line in lines]
    limit = [*translator, "--max-tokens", "6"]
    stdin = "".join(line + "\n" for line in lines).encode()
    code, out, err = call(*limit, stdin=stdin, model=False)
    assert code == 1 and "stdin:4 the text has" in err, "the others are done"
    assert out.split("\n") == [*made, ""]
    (tmp_path / "lines.txt").write_bytes(stdin)
    assert call(*limit, "--file", str(tmp_path / "lines.txt"), model=False)[1] == out
    _, out, _ = call(*limit, "--json", stdin=stdin, model=False)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row.get("text") for row in rows] == [
        engine.generate("A man.", greedy).text,
        "",
        *(None if len(line) > 99 else engine.generate(line, greedy).text for line in lines[2:]),
    ]
    assert "error" in rows[3]


def test_one_text_to_translate_streams(call, translator: list[str]) -> None:  # type: ignore[no-untyped-def]
    code, out, err = call(*translator, "--prompt", "A man.", "--max-tokens", "4", model=False)
    assert code == 0 and out.endswith("\n") and "prompt tokens in" in err
    _, line, _ = call(*translator, "--prompt", "A man.", "--max-tokens", "4", "--json", model=False)
    assert json.loads(line)["text"] == out.removesuffix("\n")
    sampled = ["--num-samples", "3", "--temperature", "1.5", "--top-k", "9", "--seed", "2", "--prompt", "A man."]
    _, out, _ = call(*translator[:-1], *sampled, "--max-tokens", "4", model=False)
    assert out.count("---\n") == 2
    code, _, err = call(*translator, "--prompt", "a", "--overflow", "slide", model=False)
    assert code == 2 and "--overflow slide goes with models that continue a text" in err
