"""tfcli generate: continue text."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tfcli.cli.lines import decoded, read_objects
from tfcli.cli.options import Device, Precision, Quantize, Threads
from tfcli.config.options import MAX_TOKENS, Sampling
from tfcli.config.resolve import resolve
from tfcli.errors import RunError, UserError

if TYPE_CHECKING:
    from tfcli.infer.engine import Encoded, Engine, Generation, Prompt

DEFAULT = Sampling()
SEPARATOR = "---"
"""The line between results, where there are several and --json was not asked for."""
MODEL, SAMPLING, OUTPUT = "Model and prompt", "Sampling", "Output"


def generate(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Model directory, or a GGUF file.",
            show_default="$TFCLI_MODEL, else the last run",
            rich_help_panel=MODEL,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="The text to continue, as it is.", show_default="stdin", rich_help_panel=MODEL),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--file",
            help='One prompt a line, or .jsonl with "prompt" or "messages"; - for stdin.',
            rich_help_panel=MODEL,
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Answer the prompt by the model's chat template.", rich_help_panel=MODEL),
    ] = False,
    system: Annotated[
        str | None,
        typer.Option("--system", help="With --chat: how the model should behave.", rich_help_panel=MODEL),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            help="New tokens at most.",
            show_default=f"{MAX_TOKENS}, or what fits",
            rich_help_panel=SAMPLING,
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
            "--top-k",
            help="Only the k likeliest tokens; 0 is off.",
            show_default=str(DEFAULT.top_k),
            rich_help_panel=SAMPLING,
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
            show_default=str(DEFAULT.min_p),
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            "--repetition-penalty",
            help="Above 1: avoid tokens of the context.",
            show_default=str(DEFAULT.repetition_penalty),
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
        typer.Option(
            "--num-samples",
            help="Continuations of each prompt.",
            show_default=str(DEFAULT.num_samples),
            rich_help_panel=SAMPLING,
        ),
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
    device: Device = None,
    precision: Precision = None,
    threads: Threads = None,
    quantize: Quantize = None,
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
    the continuation alone. With --chat each prompt is a user's message, which the model answers. A model that
    translates turns each prompt, or each line of stdin, into a line. A line of --file that is no prompt is reported
    with its number and the others are done; the exit code is then 1.

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
    if system is not None and not chat:
        raise UserError("--system needs --chat", hint="a plain prompt is continued as it is: put it there")
    sampling, _ = resolve(Sampling, file=config, sets=sets or (), flags=flags)
    ask = _Ask(chat, system)
    found = None if file is None else _Found(file, ask)
    engine = _load(model, sampling, device, precision, threads, quantize)
    if engine.sequence_to_sequence and prompt is None and found is None:
        if sys.stdin is not None and sys.stdin.isatty():
            raise UserError("there is no text", hint="give it with --prompt, or a line each with --file or by a pipe")
        found = _Found("-", ask)
    start = time.perf_counter()
    if found is None and not as_json and sampling.num_samples == 1:
        _one(engine, ask.wrapped(prompt if prompt is not None else _from_stdin()), sampling)
    else:
        prompts: Iterator[Prompt | Encoded] = (
            iter([ask.wrapped(prompt if prompt is not None else _from_stdin())])
            if found is None
            else found.prompts(engine, sampling)
        )
        tokens = _many(engine, prompts, sampling, as_json, found)
        seconds = time.perf_counter() - start
        print(f"{tokens} tokens in {seconds:.1f} s, {tokens / max(seconds, 1e-9):.0f} tokens/s", file=sys.stderr)
    if found is not None and found.failures:
        raise RunError(
            f"{len(found.failures)} of the prompts could not be read, as said above", hint="the others are done"
        )


class _Ask:
    """How a text becomes a prompt: as it is, or as a user's message after the system's."""

    def __init__(self, chat: bool, system: str | None) -> None:
        self._chat = chat
        self._before = [] if system is None else [{"role": "system", "content": system}]

    def wrapped(self, text: str) -> Prompt:
        """A prompt of a text."""
        return [*self._before, {"role": "user", "content": text}] if self._chat else text

    def row(self, row: dict[str, Any]) -> Prompt:
        """The prompt of a line of .jsonl: its "prompt", or its "messages" as they are."""
        if "messages" in row:
            from tfcli.text.chat.messages import read_messages

            return read_messages(row)
        if not isinstance(row.get("prompt"), str):
            raise UserError('has no "prompt" with a string', hint='such as {"prompt": "Once upon a time"}')
        return self.wrapped(row["prompt"])


class _Found:
    """The prompts of a file: those that are none are reported, and remembered by what was said of them."""

    def __init__(self, file: str, ask: _Ask) -> None:
        self.failures: list[int] = []
        if file != "-" and not Path(file).is_file():
            raise UserError(f"no such file: {file}", hint="--file takes one prompt a line; a single prompt is --prompt")
        self._file, self._ask = file, ask
        self._order: deque[str | None] = deque()  # of each line in turn: None for a prompt, else what was wrong

    def prompts(self, engine: Engine, sampling: Sampling) -> Iterator[Encoded]:
        """The prompts that the model can take."""

        def taken(prompt: Prompt) -> Encoded:
            encoded = engine.encode(prompt, sampling)
            self._order.append(None)
            return encoded

        yield from read_objects(
            self._file,
            "prompt",
            self.failures,
            lambda row: taken(self._ask.row(row)),
            lambda line: taken(self._ask.wrapped(line)),
            on_error=self._order.append,
        )

    def errors(self) -> Iterator[str]:
        """What was wrong with the lines before the next result; asked once before each result, and at the end."""
        while self._order and self._order[0] is not None:
            yield str(self._order.popleft())
        if self._order:
            self._order.popleft()


def _load(
    model: str | None,
    sampling: Sampling,
    device: str | None,
    precision: str | None,
    threads: int | None,
    quantize: str | None,
) -> Engine:
    """The engine, once all that can be checked without it is; says on stderr what it chose."""
    from tfcli.formats.open import open_path
    from tfcli.train.runs import find_model

    path = find_model(model, generates=True)
    opened = open_path(path)
    opened.config  # noqa: B018  # which says what is wrong with it
    from tfcli.infer.engine import load
    from tfcli.infer.sampling import check

    check(sampling)
    engine = load(opened, device=device, precision=precision, threads=threads, quantize=quantize)
    chosen = f"model: {path}; " if model is None else ""
    print(f"{chosen}device: {engine.runtime.describe()}", file=sys.stderr)
    if engine.sequence_to_sequence:
        return engine
    if engine.runtime.device.type == "cpu" and (why := engine.decoder.eager_because) is not None:
        print(f"decoding by PyTorch's operators, two to three times slower: {why}", file=sys.stderr)
    return engine


def _one(engine: Engine, prompt: Prompt, sampling: Sampling) -> None:
    """One prompt: its text as it comes, and how fast its reading and the writing were."""
    from tfcli.infer.engine import Finished

    if isinstance(prompt, str) and sys.stdout.isatty() and sys.stderr.isatty() and not engine.sequence_to_sequence:
        print(prompt, end="", file=sys.stderr, flush=True)
    start, first, last = time.perf_counter(), 0.0, ""
    for event in engine.stream(prompt, sampling):
        first = first or time.perf_counter()
        if event.text:
            last = event.text
            sys.stdout.write(event.text)
            sys.stdout.flush()
        if isinstance(event, Finished):
            if not last.endswith("\n"):
                print(flush=True)
            _note(event.generation, engine)
            _speed(event.generation, first - start, time.perf_counter() - first)


def _speed(result: Generation, reading: float, writing: float) -> None:
    """Of the prompt up to the first new token, and of those after it: what ``tfcli bench`` measures."""
    said = f"{result.prompt_tokens} prompt tokens in {reading:.2f} s; {len(result.ids)} tokens"
    rate = f", {(len(result.ids) - 1) / writing:.0f} tokens/s" if len(result.ids) > 1 and writing > 0 else ""
    print(said + rate, file=sys.stderr)


def _many(
    engine: Engine, prompts: Iterator[Prompt | Encoded], sampling: Sampling, as_json: bool, found: _Found | None = None
) -> int:
    """Results in the order of the prompts, with --json also what was no prompt; the number of new tokens."""
    tokens = 0
    for number, result in enumerate(engine.generate_batch(prompts, sampling)):
        tokens += len(result.ids)
        if found is not None and number % sampling.num_samples == 0:
            _say(found, as_json, lines=engine.sequence_to_sequence)
        if as_json:
            print(json.dumps(_fields(result), ensure_ascii=False), flush=True)
            continue
        if engine.sequence_to_sequence and sampling.num_samples == 1:
            print(" ".join(result.text.split("\n")), flush=True)
            continue
        if number:
            print(SEPARATOR)
        print(result.text, end="" if result.text.endswith("\n") else "\n", flush=True)
    if found is not None:
        _say(found, as_json, lines=engine.sequence_to_sequence)
    return tokens


def _say(found: _Found, as_json: bool, *, lines: bool) -> None:
    for error in found.errors():  # one line for each line of input: programs join the two by position
        if as_json:
            print(json.dumps({"error": error}, ensure_ascii=False), flush=True)
        elif lines:
            print(flush=True)


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
        more = "" if engine.sequence_to_sequence else "; --overflow slide goes on"
        print(f"\nthe context of {context} tokens is full{more}", file=sys.stderr)


def _from_stdin() -> str:
    """All of a piped stdin less one final line break; "" at a terminal, which is never asked."""
    from tfcli.text.read.sources import stdin

    if sys.stdin is not None and sys.stdin.isatty():
        return ""
    data = stdin().read()
    try:
        text = decoded(data)
    except UserError as error:
        raise UserError(f"stdin {error.message}", hint=error.hint) from None
    return text.removesuffix("\n").removesuffix("\r")
