"""tfcli tokenize: train a tokenizer, and use it in pipelines."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from tfcli.cli import options
from tfcli.cli.help import GroupedCommand
from tfcli.cli.lines import note
from tfcli.config.options import DEFAULT_VOCAB_SIZE, DataOptions, TokenizerOptions
from tfcli.config.resolve import resolve
from tfcli.errors import RunError, UserError

if TYPE_CHECKING:
    from tfcli.text.corpus.stats import Stats
    from tfcli.text.corpus.tokenizer import Tokenizer

SECONDS_BETWEEN_LINES = 10.0

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Train a SentencePiece tokenizer, and use it in pipelines.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeConfig:
    """What decides a tokenizer."""

    tokenizer: TokenizerOptions = field(default_factory=TokenizerOptions)
    data: DataOptions = field(default_factory=DataOptions)


TokenizerOption = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer",
        envvar="TFCLI_MODEL",
        show_default="./tokenizer.model",
        help="A tokenizer.model file, or a model directory.",
    ),
]
ErrorsOption = Annotated[str | None, options.errors(None)]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, show_default="all cores", help="Threads.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
TextKeyOption = Annotated[str | None, options.text_key(None)]
CorpusArgument = Annotated[
    list[str], typer.Argument(metavar="CORPUS...", help="Files, directories, globs, hf:NAME:SPLIT, - for stdin.")
]
FileArgument = Annotated[str, typer.Argument(metavar="[FILE]", show_default="stdin", help="A file, or - for stdin.")]


@app.command(cls=GroupedCommand, epilog="Example: tfcli tokenize train corpus.txt --vocab-size 4096")
def train(
    corpus: CorpusArgument,
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("tokenizer.model"),
    vocab_size: Annotated[
        int | None,
        typer.Option(
            "--vocab-size", min=1, show_default=f"{DEFAULT_VOCAB_SIZE}, fewer for little text", help="Pieces."
        ),
    ] = None,
    type: Annotated[
        str | None, typer.Option("--type", show_default=TokenizerOptions().type, help="bpe or unigram.")
    ] = None,
    character_coverage: Annotated[
        float | None,
        typer.Option(
            "--character-coverage",
            show_default=str(TokenizerOptions().character_coverage),
            help="Share of characters with a piece of their own.",
        ),
    ] = None,
    user_symbol: Annotated[
        list[str] | None, typer.Option("--user-symbol", help="A string that is always one piece; repeatable.")
    ] = None,
    sets: Annotated[
        list[str] | None,
        options.sets(
            "tokenizer.sample_bytes=..., or any SentencePiece trainer option, as split_digits=true; repeatable.", None
        ),
    ] = None,
    errors: ErrorsOption = None,
    text_key: TextKeyOption = None,
    threads: ThreadsOption = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a tokenizer on text."""
    from tfcli.text.corpus.tokenizer import train as train_tokenizer

    flags = {
        "tokenizer.vocab_size": vocab_size,
        "tokenizer.type": type,
        "tokenizer.character_coverage": character_coverage,
        "tokenizer.user_symbols": tuple(user_symbol) if user_symbol else None,
        "data.errors": errors,
        "data.text_key": text_key,
    }
    config, _ = resolve(TokenizeConfig, sets=[_full_key(item) for item in sets or ()], flags=flags)
    path = out / "tokenizer.model" if out.is_dir() else out
    if path.exists() and not force:
        raise UserError(f"{path} is there already", hint="write over it with --force, or name another file with --out")
    with _progress() as report:
        made = train_tokenizer(
            corpus, config.tokenizer, data=config.data, threads=threads, on_note=note, on_progress=report
        )
    tokenizer, ratio = made.tokenizer, made.bytes_per_token
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from None
    if as_json:
        result = {"path": str(path), "vocab_size": tokenizer.vocab_size, "bytes_per_token": ratio, "bytes": made.bytes}
        _out(json.dumps({**result, "documents": made.documents, "hash": tokenizer.hash}, ensure_ascii=False))
    else:
        _out(f"{path}: {tokenizer.vocab_size} pieces, {ratio:.3f} bytes per token, from {made.bytes:,} bytes of text")


@app.command(
    cls=GroupedCommand, epilog="Example: tfcli tokenize encode corpus.txt --tokenizer tokenizer.model | head -3"
)
def encode(
    file: FileArgument = "-",
    tokenizer: TokenizerOption = None,
    pieces: Annotated[bool, typer.Option("--pieces", help="Pieces instead of ids; a space reads as \u2581.")] = False,
    errors: ErrorsOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Turn each line of text into a line of ids.

    With --json results are {"ids": [...]}, and a line that is {"text": "..."} stands for that text, with its line
    breaks.
    """
    from tfcli.text.corpus.filters import encode_lines, line_batches

    config, _ = resolve(TokenizeConfig, flags={"data.errors": errors})
    loaded = _tokenizer(tokenizer)
    with _input(file) as stream:
        results = encode_lines(
            line_batches(stream),
            loaded,
            errors=config.data.errors,
            pieces=pieces,
            as_json=as_json,
            threads=_threads(threads),
        )
        _write(results)


@app.command(cls=GroupedCommand, epilog="Example: echo Hello | tfcli tokenize encode | tfcli tokenize decode")
def decode(
    file: FileArgument = "-",
    tokenizer: TokenizerOption = None,
    pieces: Annotated[bool, typer.Option("--pieces", help="Lines of pieces instead of ids.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Turn each line of ids, or {"ids": [...]}, into text; with --json into {"text": "..."}."""
    from tfcli.text.corpus.filters import decode_lines, line_batches

    loaded = _tokenizer(tokenizer)
    with _input(file) as stream:
        _write(decode_lines(line_batches(stream), loaded, pieces=pieces, as_json=as_json))


@app.command(cls=GroupedCommand, epilog="Example: tfcli tokenize stats corpus.txt --tokenizer tokenizer.model")
def stats(
    corpus: CorpusArgument,
    tokenizer: TokenizerOption = None,
    errors: ErrorsOption = None,
    text_key: TextKeyOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say how well a tokenizer fits a text: bytes per token, byte fallback, unknown pieces, and each script's share."""
    config, _ = resolve(TokenizeConfig, flags={"data.errors": errors, "data.text_key": text_key})
    loaded = _tokenizer(tokenizer)
    result = loaded.stats(corpus, data=config.data, threads=threads, on_note=note)
    if as_json:
        _out(json.dumps(result.to_json(loaded.vocab_size), ensure_ascii=False))
    else:
        _render(result, loaded.vocab_size)


def _full_key(item: str) -> str:
    """A bare name in --set is SentencePiece's."""
    key = item.partition("=")[0]
    return item if "." in key else f"tokenizer.trainer.{item}"


def _tokenizer(path: Path | None) -> Tokenizer:
    from tfcli.text.corpus.tokenizer import Tokenizer
    from tfcli.text.tokenizers.sentencepiece import FILE_NAME

    if path is None:
        if not Path(FILE_NAME).is_file():
            raise UserError(
                "no tokenizer was given", hint="name one with --tokenizer, or make one: tfcli tokenize train CORPUS"
            )
        path = Path(FILE_NAME)
        note(f"tokenizer: {path}")
    return Tokenizer.load(path)


def _threads(given: int | None) -> int:
    from tfcli.runtime import cpu_threads

    return given or cpu_threads()


@contextmanager
def _input(name: str) -> Iterator[BinaryIO]:
    from tfcli.text.read.sources import stdin

    if name == "-":
        yield stdin()
        return
    try:
        stream = Path(name).open("rb")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from None
    with stream:
        yield stream


def _write(results: Iterable[bytes]) -> None:
    try:
        for result in results:
            sys.stdout.buffer.write(result)
            sys.stdout.buffer.flush()
    except BrokenPipeError:  # the reader has what it wants, as in `| head -1`; typer would make it exit code 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None


def _out(line: str) -> None:
    _write([line.encode() + b"\n"])


class _Report:
    """What the work last said about itself."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.line = "starting"

    def __call__(self, stage: str, done: int, total: int) -> None:
        what = {"scan": "reading", "train": "training the tokenizer"}.get(stage, stage)
        self.line = f"{what}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB"


@contextmanager
def _progress() -> Iterator[_Report]:
    """A line on stderr every ten seconds, also while SentencePiece trains and says nothing."""
    report, stopped = _Report(), threading.Event()

    def speak() -> None:
        while not stopped.wait(SECONDS_BETWEEN_LINES):
            note(f"{report.line}, {time.monotonic() - report.start:.0f} s")

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield report
    finally:
        stopped.set()
        thread.join()


def _render(result: Stats, vocab_size: int) -> None:
    """Totals as lines, scripts as a table: rich's on a terminal, aligned columns elsewhere."""
    tokens = max(1, result.tokens)
    _out(f"{result.bytes:,} bytes, {result.documents:,} documents, {result.tokens:,} tokens")
    _out(f"bytes per token      {result.bytes / tokens:.3f}")
    _out(f"byte fallback rate   {result.byte_tokens / tokens:.4%}")
    _out(f"unknown rate         {result.unknown_tokens / tokens:.4%}")
    _out(f"pieces used          {result.pieces_used:,} of {vocab_size:,}")
    _out(f"longest pieces       {' '.join(result.longest)}")
    if not result.scripts:
        return
    head = ("script", "bytes", "tokens", "bytes per token", "byte fallback")
    rows = [
        (name, f"{size:,}", f"{count:,}", f"{size / count:.3f}", f"{fallback / count:.4%}")
        for name, (size, count, fallback) in result.scripts.items()
    ]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*head)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(len(row[index]) for row in (head, *rows)) for index in range(len(head))]
    for row in (head, *rows):
        _out(
            "  ".join(
                [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
            )
        )
