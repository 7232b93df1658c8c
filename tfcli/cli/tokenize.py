"""tfcli tokenize: train a tokenizer and use it in pipelines."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from tfcli.cli import options
from tfcli.cli.help import GroupedCommand
from tfcli.cli.options import argument, flag, option
from tfcli.cli.output import SECONDS_BETWEEN_LINES, note, show_json, show_table
from tfcli.config.options import DEFAULT_VOCAB_SIZE, DataOptions, TokenizerOptions
from tfcli.config.resolve import resolve
from tfcli.errors import RunError, UserError

if TYPE_CHECKING:
    from tfcli.text.corpus.stats import Stats
    from tfcli.text.corpus.tokenizer import Tokenizer

DEFAULT = TokenizerOptions()

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Train SentencePiece tokenizers and use them in pipelines.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeConfig:
    """The settings that determine a tokenizer."""

    tokenizer: TokenizerOptions = field(default_factory=TokenizerOptions)
    data: DataOptions = field(default_factory=DataOptions)


TokenizerOption = Annotated[
    Path | None,
    typer.Option(
        envvar="TFCLI_MODEL", show_default="./tokenizer.model", help="A tokenizer.model file, or a model directory."
    ),
]
ThreadsOption = Annotated[int | None, option("CPU threads.", None, "all cores", min=1)]
JsonOption = Annotated[bool, flag("--json", "Print one JSON object per line.")]
CorpusArgument = Annotated[
    list[str], argument("CORPUS...", "Files, directories, globs, hf:NAME:SPLIT, or - for stdin.")
]
FileArgument = Annotated[str, argument("[FILE]", "A file, or - for stdin.", "stdin")]
VOCAB_SIZE = f"{DEFAULT_VOCAB_SIZE}, fewer for little text"
COVERAGE = "Share of characters with a piece of their own."
TRAINER = "tokenizer.sample_bytes=..., or any SentencePiece trainer option, e.g. split_digits=true; repeatable."


@app.command(cls=GroupedCommand, epilog="Example: tfcli tokenize train corpus.txt --vocab-size 4096")
def train(
    corpus: CorpusArgument,
    out: Annotated[Path, option("File to write.")] = Path("tokenizer.model"),
    vocab_size: Annotated[int | None, option("Vocabulary size.", None, VOCAB_SIZE, min=1)] = None,
    type: Annotated[str | None, option("bpe or unigram.", None, DEFAULT.type)] = None,
    character_coverage: Annotated[float | None, option(COVERAGE, None, DEFAULT.character_coverage)] = None,
    user_symbol: Annotated[list[str] | None, option("A string that is always one piece; repeatable.")] = None,
    sets: Annotated[list[str] | None, options.sets(TRAINER)] = None,
    errors: options.Errors = None,
    text_key: options.TextKey = None,
    threads: ThreadsOption = None,
    force: Annotated[bool, flag("--force", "Overwrite an existing file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a tokenizer on text."""
    from tfcli.text.corpus.tokenizer import train as train_tokenizer

    flags = {
        "tokenizer.vocab_size": vocab_size, "tokenizer.type": type,
        "tokenizer.character_coverage": character_coverage,
        "tokenizer.user_symbols": tuple(user_symbol) if user_symbol else None,
        "data.errors": errors, "data.text_key": text_key,
    }  # fmt: skip
    config, _ = resolve(TokenizeConfig, sets=[_full_key(item) for item in sets or ()], flags=flags)
    path = out / "tokenizer.model" if out.is_dir() else out
    if path.exists() and not force:
        raise UserError(f"{path} exists already", hint="overwrite it with --force, or name another file with --out")
    with _progress() as report:
        trained = train_tokenizer(
            corpus, config.tokenizer, data=config.data, threads=threads, on_note=note, on_progress=report
        )
    tokenizer, ratio, size = trained.tokenizer, trained.bytes_per_token, trained.bytes
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from None
    if as_json:
        result = {"path": str(path), "vocab_size": tokenizer.vocab_size, "bytes_per_token": ratio, "bytes": size}
        show_json({**result, "documents": trained.documents, "hash": tokenizer.hash})
    else:
        print(f"{path}: {tokenizer.vocab_size} pieces, {ratio:.3f} bytes per token, from {size:,} bytes of text")


@app.command(
    cls=GroupedCommand, epilog="Example: tfcli tokenize encode corpus.txt --tokenizer tokenizer.model | head -3"
)
def encode(
    file: FileArgument = "-",
    tokenizer: TokenizerOption = None,
    pieces: Annotated[bool, flag("--pieces", "Pieces instead of ids; a space reads as \u2581.")] = False,
    errors: options.Errors = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Encode each line of text as a line of ids.

    With --json results are {"ids": [...]}, and an input line {"text": "..."} stands for that text, which may have line
    breaks.
    """
    from tfcli.runtime import cpu_threads
    from tfcli.text.corpus.filters import encode_lines, line_batches

    config, _ = resolve(TokenizeConfig, flags={"data.errors": errors})
    loaded = _tokenizer(tokenizer)
    with _input(file) as stream:
        results = encode_lines(
            line_batches(stream), loaded, errors=config.data.errors, pieces=pieces, as_json=as_json,
            threads=threads or cpu_threads(),
        )  # fmt: skip
        _write(results)


@app.command(cls=GroupedCommand, epilog="Example: echo Hello | tfcli tokenize encode | tfcli tokenize decode")
def decode(
    file: FileArgument = "-",
    tokenizer: TokenizerOption = None,
    pieces: Annotated[bool, flag("--pieces", "Read lines of pieces instead of ids.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Decode each line of ids, or {"ids": [...]}, to text; with --json to {"text": "..."}."""
    from tfcli.text.corpus.filters import decode_lines, line_batches

    loaded = _tokenizer(tokenizer)
    with _input(file) as stream:
        _write(decode_lines(line_batches(stream), loaded, pieces=pieces, as_json=as_json))


@app.command(cls=GroupedCommand, epilog="Example: tfcli tokenize stats corpus.txt --tokenizer tokenizer.model")
def stats(
    corpus: CorpusArgument,
    tokenizer: TokenizerOption = None,
    errors: options.Errors = None,
    text_key: options.TextKey = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Report how well a tokenizer fits a text: bytes per token, byte fallback, unknown pieces, and scripts."""
    config, _ = resolve(TokenizeConfig, flags={"data.errors": errors, "data.text_key": text_key})
    loaded = _tokenizer(tokenizer)
    result = loaded.stats(corpus, data=config.data, threads=threads, on_note=note)
    if as_json:
        show_json(result.to_json(loaded.vocab_size))
    else:
        _render(result, loaded.vocab_size)


def _full_key(item: str) -> str:
    """Expand a bare name in --set, which is SentencePiece's."""
    key = item.partition("=")[0]
    return item if "." in key else f"tokenizer.trainer.{item}"


def _tokenizer(path: Path | None) -> Tokenizer:
    from tfcli.text.corpus.tokenizer import Tokenizer
    from tfcli.text.tokenizers.sentencepiece import FILE_NAME

    if path is None:
        if not Path(FILE_NAME).is_file():
            hint = "name one with --tokenizer, or train one: tfcli tokenize train CORPUS"
            raise UserError("no tokenizer was given", hint=hint)
        path = Path(FILE_NAME)
        note(f"tokenizer: {path}")
    return Tokenizer.load(path)


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
    except BrokenPipeError:  # the reader has what it wants, as in `| head -1`, which typer would make exit code 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Report progress on stderr every ten seconds, also while SentencePiece trains and reports nothing."""
    start, line, stopped = time.monotonic(), "starting", threading.Event()

    def report(stage: str, done: int, total: int) -> None:
        nonlocal line
        name = {"scan": "reading", "train": "training the tokenizer"}.get(stage, stage)
        line = f"{name}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB"

    def speak() -> None:
        while not stopped.wait(SECONDS_BETWEEN_LINES):
            note(f"{line}, {time.monotonic() - start:.0f} s")

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield report
    finally:
        stopped.set()
        thread.join()


def _render(result: Stats, vocab_size: int) -> None:
    """Print totals as lines and scripts as a table."""
    tokens = max(1, result.tokens)
    print(f"{result.bytes:,} bytes, {result.documents:,} documents, {result.tokens:,} tokens")
    print(f"bytes per token      {result.bytes / tokens:.3f}")
    print(f"byte fallback rate   {result.byte_tokens / tokens:.4%}")
    print(f"unknown rate         {result.unknown_tokens / tokens:.4%}")
    print(f"pieces used          {result.pieces_used:,} of {vocab_size:,}")
    print(f"longest pieces       {' '.join(result.longest)}")
    if result.scripts:
        rows = [
            (name, f"{size:,}", f"{count:,}", f"{size / count:.3f}", f"{fallback / count:.4%}")
            for name, (size, count, fallback) in result.scripts.items()
        ]
        show_table(("script", "bytes", "tokens", "bytes per token", "byte fallback"), rows, numbers=True)
