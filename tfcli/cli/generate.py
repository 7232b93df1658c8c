"""tfcli generate: continue text."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tfcli.config import Sampling, resolve
from tfcli.errors import UserError

if TYPE_CHECKING:
    from tfcli.infer.engine import Engine, Generation

DEFAULT = Sampling()
SEPARATOR = "---"
"""The line between results, where there are several and --json was not asked for."""
MODEL, SAMPLING, OUTPUT, MACHINE = "Model and prompt", "Sampling", "Output", "Machine"


def generate(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="Model directory.", show_default="$TFCLI_MODEL, else the last run", rich_help_panel=MODEL
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="The text to continue, as it is.", show_default="stdin", rich_help_panel=MODEL),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option("--file", help='One prompt a line, or .jsonl with "prompt"; - for stdin.', rich_help_panel=MODEL),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", help="New tokens at most.", show_default="256, or what fits", rich_help_panel=SAMPLING
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            help="Lower is sharper; 0 is greedy.",
            show_default=str(DEFAULT.temperature),
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k", help="Only the k likeliest tokens; 0 is off.", show_default="0", rich_help_panel=SAMPLING
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            help="Only the likeliest tokens up to this mass.",
            show_default=str(DEFAULT.top_p),
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            "--min-p",
            help="Only tokens this likely relative to the likeliest.",
            show_default="0.0",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            "--repetition-penalty",
            help="Above 1: avoid tokens of the context.",
            show_default="1.0",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Always the likeliest token.", rich_help_panel=SAMPLING)
    ] = False,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", help="Text to stop at, not shown; repeatable.", rich_help_panel=SAMPLING),
    ] = None,
    num_samples: Annotated[
        int | None,
        typer.Option("--num-samples", help="Continuations of each prompt.", show_default="1", rich_help_panel=SAMPLING),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", help="Same seed, same text.", show_default="drawn, see --json", rich_help_panel=SAMPLING
        ),
    ] = None,
    overflow: Annotated[
        str | None,
        typer.Option(
            "--overflow",
            help="Full context: error, or slide the window.",
            show_default=DEFAULT.overflow,
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past the end-of-text token.", rich_help_panel=SAMPLING)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a result, with ids and logprobs.", rich_help_panel=OUTPUT)
    ] = False,
    device: Annotated[
        str | None,
        typer.Option("--device", help="cuda, mps or cpu.", show_default="the best there is", rich_help_panel=MACHINE),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option("--precision", help="fp32 or bf16.", show_default="bf16 where native", rich_help_panel=MACHINE),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", help="CPU threads.", show_default="all cores", rich_help_panel=MACHINE)
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="TOML file with sampling settings.", rich_help_panel=SAMPLING)
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of a sampling setting.", rich_help_panel=SAMPLING)
    ] = None,
) -> None:
    """Continue text: stdout gets the new text and nothing else.

    The prompt is --prompt, or all of a piped stdin less one final line break, or a line of --file each. With none of
    them, at a terminal, the text starts from nothing. A terminal shows the prompt before its continuation; a pipe gets
    the continuation alone.

    Example: tfcli generate --prompt "Once upon a time" --max-tokens 100
    """
    flags = {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "num_samples": num_samples, "seed": seed, "overflow": overflow,
        "stop": stop or None, "ignore_eos": ignore_eos or None,
    }  # fmt: skip
    if greedy:
        clash = [name for name in ("temperature", "top_k", "top_p", "min_p") if flags[name] is not None]
        if clash:
            option = "--" + clash[0].replace("_", "-")
            raise UserError(f"--greedy and {option} exclude each other", hint="leave one of them out")
        flags["temperature"] = 0.0
    if prompt is not None and file is not None:
        raise UserError("--prompt and --file exclude each other", hint="leave one of them out")
    sampling, _ = resolve(Sampling, file=config, sets=sets or (), flags=flags)
    engine = _load(model, sampling, device, precision, threads)
    start = time.perf_counter()
    if file is not None:
        tokens = _many(engine, _prompts(file), sampling, as_json)
    else:
        text = prompt if prompt is not None else _from_stdin()
        tokens = _one(engine, text, sampling, as_json)
    seconds = time.perf_counter() - start
    print(f"{tokens} tokens in {seconds:.1f} s, {tokens / max(seconds, 1e-9):.0f} tokens/s", file=sys.stderr)


def _load(
    model: str | None, sampling: Sampling, device: str | None, precision: str | None, threads: int | None
) -> Engine:
    """The engine, once all that can be checked without it is; says on stderr what it chose."""
    from tfcli.formats.hf import find_model, read_config

    directory = find_model(model)
    read_config(directory)
    from tfcli.infer.engine import load
    from tfcli.infer.sampling import check

    check(sampling)
    engine = load(directory, device=device, precision=precision, threads=threads)
    chosen = f"model: {directory}; " if model is None else ""
    print(f"{chosen}device: {engine.runtime.describe()}", file=sys.stderr)
    return engine


def _one(engine: Engine, prompt: str, sampling: Sampling, as_json: bool) -> int:
    """One prompt: its text as it comes, or its results."""
    from tfcli.infer.engine import Finished

    if as_json or sampling.num_samples > 1:
        return _many(engine, iter([prompt]), sampling, as_json)
    if sys.stdout.isatty() and sys.stderr.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
    tokens, last = 0, ""
    for event in engine.stream(prompt, sampling):
        if event.text:
            last = event.text
            sys.stdout.write(event.text)
            sys.stdout.flush()
        if isinstance(event, Finished):
            tokens = len(event.generation.ids)
            _note(event.generation, engine)
    if not last.endswith("\n"):
        print(flush=True)
    return tokens


def _many(engine: Engine, prompts: Iterator[str], sampling: Sampling, as_json: bool) -> int:
    """Results in the order of the prompts; the number of new tokens."""
    tokens = 0
    for number, result in enumerate(engine.generate_batch(prompts, sampling)):
        tokens += len(result.ids)
        if as_json:
            print(json.dumps(_fields(result), ensure_ascii=False), flush=True)
            continue
        if number:
            print(SEPARATOR)
        print(result.text, end="" if result.text.endswith("\n") else "\n", flush=True)
    return tokens


def _fields(result: Generation) -> dict[str, object]:
    return {
        "prompt": result.prompt,
        "text": result.text,
        "ids": result.ids,
        "logprobs": [round(value, 6) for value in result.logprobs],
        "finish_reason": result.finish_reason,
        "seed": result.seed,
        "prompt_tokens": result.prompt_tokens,
    }


def _note(result: Generation, engine: Engine) -> None:
    if result.finish_reason == "context":
        context = engine.model.config.context
        print(f"\nthe context of {context} tokens is full; --overflow slide goes on", file=sys.stderr)


def _from_stdin() -> str:
    """All of a piped stdin less one final line break; "" at a terminal, which is never asked."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    text = _decoded(sys.stdin.buffer.read(), "stdin")
    return text.removesuffix("\n").removesuffix("\r")


def _prompts(file: str) -> Iterator[str]:
    """The prompts of a file, one a line; of .jsonl the field "prompt"."""
    if file != "-" and not Path(file).is_file():
        raise UserError(f"no such file: {file}", hint="--file takes one prompt a line; a single prompt is --prompt")
    return _lines(file)


def _lines(file: str) -> Iterator[str]:
    name = "stdin" if file == "-" else file
    jsonl = Path(file).suffix in (".jsonl", ".ndjson")
    with sys.stdin.buffer if file == "-" else Path(file).open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            line = _decoded(raw, f"{name}:{number}").removesuffix("\n").removesuffix("\r")
            if number == 1:
                line = line.removeprefix("\ufeff")
            if not jsonl:
                yield line
            elif line.strip():
                yield _field(line, f"{name}:{number}")


def _field(line: str, where: str) -> str:
    expected = 'expected one JSON object a line, such as {"prompt": "Once upon a time"}'
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}", hint=expected) from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError(f'{where} has no "prompt" with a string', hint=expected)
    prompt: str = row["prompt"]
    return prompt


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 at byte {error.start}", hint="convert it first, as with iconv") from None
