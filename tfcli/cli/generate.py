"""tfcli generate: continue text."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tfcli.cli import options
from tfcli.cli.lines import decoded, read_objects, unread
from tfcli.cli.options import OUTPUT, flag, option
from tfcli.cli.output import note, show_json
from tfcli.config.options import MAX_TOKENS, Sampling
from tfcli.config.resolve import resolve
from tfcli.errors import UserError

if TYPE_CHECKING:
    from tfcli.infer.engine import Encoded, Engine, Generation, Prompt
    from tfcli.runtime import Machine

DEFAULT = Sampling()
SEPARATOR = "---"
"""The line between results, where there are several and --json was not given."""
MODEL, SAMPLING = "Model and prompt", "Sampling"
FILE = 'One prompt per line, or .jsonl with "prompt" or "messages"; - for stdin.'
PENALTY = "Above 1: discourage tokens already in the context."


def generate(
    model: Annotated[
        str | None, option("Model directory or GGUF file.", MODEL, "$TFCLI_MODEL, else the last run")
    ] = None,
    prompt: Annotated[str | None, option("The text to continue, verbatim.", MODEL, "stdin")] = None,
    file: Annotated[str | None, option(FILE, MODEL)] = None,
    chat: Annotated[bool, flag("--chat", "Answer the prompt, using the model's chat template.", MODEL)] = False,
    system: Annotated[str | None, option("With --chat: the system message.", MODEL)] = None,
    max_tokens: Annotated[int | None, option("Maximum new tokens.", SAMPLING, f"{MAX_TOKENS}, or what fits")] = None,
    temperature: Annotated[
        float | None, option("Lower is sharper; 0 is greedy.", SAMPLING, DEFAULT.temperature)
    ] = None,
    top_k: Annotated[int | None, option("Keep the k likeliest tokens; 0 is off.", SAMPLING, DEFAULT.top_k)] = None,
    top_p: Annotated[
        float | None, option("Keep the likeliest tokens up to this probability mass.", SAMPLING, DEFAULT.top_p)
    ] = None,
    min_p: Annotated[
        float | None, option("Keep tokens at least this likely relative to the likeliest.", SAMPLING, DEFAULT.min_p)
    ] = None,
    repetition_penalty: Annotated[float | None, option(PENALTY, SAMPLING, DEFAULT.repetition_penalty)] = None,
    greedy: Annotated[bool, flag("--greedy", "Always take the likeliest token.", SAMPLING)] = False,
    stop: Annotated[list[str] | None, option("Stop at this text, without printing it; repeatable.", SAMPLING)] = None,
    num_samples: Annotated[int | None, option("Continuations per prompt.", SAMPLING, DEFAULT.num_samples)] = None,
    seed: Annotated[int | None, option("The same seed gives the same text.", SAMPLING, "drawn, see --json")] = None,
    overflow: Annotated[
        str | None, option("When the context is full: error, or slide the window.", SAMPLING, DEFAULT.overflow)
    ] = None,
    ignore_eos: Annotated[bool, flag("--ignore-eos", "Continue past the end-of-text token.", SAMPLING)] = False,
    as_json: Annotated[
        bool, flag("--json", "Print one JSON object per result, with ids and logprobs.", OUTPUT)
    ] = False,
    device: options.Device = None,
    precision: options.Precision = None,
    threads: options.Threads = None,
    quantize: options.Quantize = None,
    config: Annotated[Path | None, option("Read sampling settings from a TOML file.", SAMPLING)] = None,
    sets: Annotated[list[str] | None, options.sets("A sampling setting, e.g. top_k=40; repeatable.", SAMPLING)] = None,
) -> None:
    """Continue text: stdout gets the new text and nothing else.

    The prompt is --prompt, all of a piped stdin without its final line break, or each line of --file. At a terminal
    without any of them, generation starts from an empty prompt. A terminal shows the prompt before its continuation; a
    pipe gets the continuation alone. With --chat each prompt is a user message, which the model answers. A
    sequence-to-sequence model turns each prompt, or each line of stdin, into one line. Invalid lines of --file are
    reported with their line number and skipped; the exit code is then 1.

    Example: tfcli generate --prompt "Once upon a time" --max-tokens 100
    """
    from tfcli.runtime import Machine

    flags = {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "num_samples": num_samples, "seed": seed, "overflow": overflow,
        "stop": stop or None, "ignore_eos": ignore_eos or None,
    }  # fmt: skip
    if greedy:
        clash = [name for name in ("temperature", "top_k", "top_p", "min_p") if flags[name] is not None]
        if clash:
            name = clash[0].replace("_", "-")
            raise UserError(f"--greedy and --{name} exclude each other", hint="leave one of them out")
        flags["temperature"] = 0.0
    if prompt is not None and file is not None:
        raise UserError("--prompt and --file exclude each other", hint="leave one of them out")
    if system is not None and not chat:
        raise UserError("--system needs --chat", hint="a plain prompt is continued verbatim: put it there")
    sampling, _ = resolve(Sampling, file=config, sets=sets or (), flags=flags)
    template = _Template(chat, system)
    lines = None if file is None else _Lines(file, template)
    engine = _load(model, sampling, Machine(device=device, precision=precision, threads=threads, quantize=quantize))
    if engine.sequence_to_sequence and prompt is None and lines is None:
        if sys.stdin is not None and sys.stdin.isatty():
            raise UserError("there is no text", hint="give it with --prompt, as lines of --file, or through a pipe")
        lines = _Lines("-", template)
    if lines is not None:
        _many(engine, lines.prompts(engine, sampling), sampling, as_json, lines)
        if lines.failures:
            raise unread(lines.failures, "prompt")
        return
    single = template.wrap(prompt if prompt is not None else _from_stdin())
    if as_json or sampling.num_samples > 1:
        _many(engine, iter([single]), sampling, as_json)
    else:
        _one(engine, single, sampling)


class _Template:
    """Make a prompt of a text: verbatim, or as a user message after the system message."""

    def __init__(self, chat: bool, system: str | None) -> None:
        self._chat = chat
        self._before = [] if system is None else [{"role": "system", "content": system}]

    def wrap(self, text: str) -> Prompt:
        return [*self._before, {"role": "user", "content": text}] if self._chat else text

    def from_row(self, row: dict[str, Any]) -> Prompt:
        """Return the prompt of a .jsonl line: its "prompt", or its "messages" as they are."""
        if "messages" in row:
            from tfcli.text.chat.messages import read_messages

            return read_messages(row)
        if not isinstance(row.get("prompt"), str):
            raise UserError('has no "prompt" with a string', hint='such as {"prompt": "Once upon a time"}')
        return self.wrap(row["prompt"])


class _Lines:
    """The prompts of a file, and the errors of invalid lines."""

    def __init__(self, file: str, template: _Template) -> None:
        self.failures: list[int] = []
        if file != "-" and not Path(file).is_file():
            hint = "--file takes one prompt per line; a single prompt is --prompt"
            raise UserError(f"no such file: {file}", hint=hint)
        self._file, self._template = file, template
        self._order: deque[str | None] = deque()  # for each line in turn: None for a prompt, else its error

    def prompts(self, engine: Engine, sampling: Sampling) -> Iterator[Encoded]:
        """Yield the prompts that the model can take."""

        def encode(prompt: Prompt) -> Encoded:
            encoded = engine.encode(prompt, sampling)
            self._order.append(None)
            return encoded

        yield from read_objects(
            self._file,
            "prompt",
            self.failures,
            lambda row: encode(self._template.from_row(row)),
            lambda line: encode(self._template.wrap(line)),
            on_error=self._order.append,
        )

    def errors(self) -> Iterator[str]:
        """Yield the errors of the lines before the next result; call it before each result, and at the end."""
        while self._order and self._order[0] is not None:
            yield str(self._order.popleft())
        if self._order:
            self._order.popleft()


def _load(model: str | None, sampling: Sampling, machine: Machine) -> Engine:
    """Load the engine after checking all that can be checked without it; report the device on stderr."""
    from tfcli.formats.open import open_path
    from tfcli.train.runs import find_model

    path = find_model(model, generates=True)
    opened = open_path(path)
    opened.config  # noqa: B018  # raises if it is unusable
    from tfcli.infer.engine import load
    from tfcli.infer.sampling import check

    check(sampling)
    engine = load(
        opened, device=machine.device, precision=machine.precision, threads=machine.threads, quantize=machine.quantize
    )
    chosen = f"model: {path}; " if model is None else ""
    note(f"{chosen}device: {engine.runtime.describe()}")
    if not engine.sequence_to_sequence and engine.runtime.device.type == "cpu" and engine.decoder.eager_because:
        note(f"decoding with PyTorch's operators, two to three times slower: {engine.decoder.eager_because}")
    return engine


def _one(engine: Engine, prompt: Prompt, sampling: Sampling) -> None:
    """Stream one continuation, then report the speed of prefill and decoding as ``tfcli bench`` measures them."""
    from tfcli.infer.engine import Finished

    if isinstance(prompt, str) and sys.stdout.isatty() and sys.stderr.isatty() and not engine.sequence_to_sequence:
        print(prompt, end="", file=sys.stderr, flush=True)
    start, first, last = time.perf_counter(), 0.0, ""
    for event in engine.stream(prompt, sampling):
        first = first or time.perf_counter()
        if event.text:
            last = event.text
            print(event.text, end="", flush=True)
        if isinstance(event, Finished):
            if not last.endswith("\n"):
                print(flush=True)
            result, decoding = event.generation, time.perf_counter() - first
            if result.finish_reason == "context":
                more = "" if engine.sequence_to_sequence else "; use --overflow slide to continue"
                note(f"\nthe context of {engine.model.config.context} tokens is full{more}")
            count = len(result.ids)
            speed = f", {(count - 1) / decoding:.0f} tokens/s" if count > 1 and decoding > 0 else ""
            note(f"{result.prompt_tokens} prompt tokens in {first - start:.2f} s; {count} tokens{speed}")


def _many(
    engine: Engine, prompts: Iterator[Prompt | Encoded], sampling: Sampling, as_json: bool, lines: _Lines | None = None
) -> None:
    """Print results in the order of the prompts, with --json also the errors of invalid lines, and report the speed."""
    start, tokens = time.perf_counter(), 0
    for number, result in enumerate(engine.generate_batch(prompts, sampling)):
        tokens += len(result.ids)
        if lines is not None and number % sampling.num_samples == 0:
            _show_errors(lines, as_json, engine.sequence_to_sequence)
        if as_json:
            show_json(_fields(result))
        elif engine.sequence_to_sequence and sampling.num_samples == 1:
            print(" ".join(result.text.split("\n")), flush=True)
        else:
            if number:
                print(SEPARATOR)
            print(result.text, end="" if result.text.endswith("\n") else "\n", flush=True)
    if lines is not None:
        _show_errors(lines, as_json, engine.sequence_to_sequence)
    seconds = time.perf_counter() - start
    note(f"{tokens} tokens in {seconds:.1f} s, {tokens / max(seconds, 1e-9):.0f} tokens/s")


def _show_errors(lines: _Lines, as_json: bool, sequence_to_sequence: bool) -> None:
    """Print a line for each invalid line of input, as programs join the two by position."""
    for error in lines.errors():
        if as_json:
            show_json({"error": error})
        elif sequence_to_sequence:
            print(flush=True)


def _fields(result: Generation) -> dict[str, object]:
    return {
        "prompt": result.prompt, "text": result.text, "ids": result.ids,
        "logprobs": [round(value, 6) for value in result.logprobs], "finish_reason": result.finish_reason,
        "seed": result.seed, "prompt_tokens": result.prompt_tokens,
    }  # fmt: skip


def _from_stdin() -> str:
    """Return a piped stdin without its final line break; "" at a terminal, which is never asked."""
    from tfcli.text.read.sources import stdin

    if sys.stdin is not None and sys.stdin.isatty():
        return ""
    data = stdin().read()
    try:
        return decoded(data).removesuffix("\n").removesuffix("\r")
    except UserError as error:
        raise UserError(f"stdin {error.message}", hint=error.hint) from None
