"""The entry point of the command line: dispatch to commands; report errors as a message and an exit code."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Annotated, Any, TypeAlias

import typer
import typer.main
from typer.core import TyperCommand, TyperGroup

from tfcli.cli.help import Context, GroupedCommand
from tfcli.errors import Interrupted, TfcliError, unknown

HELP = ["-h", "--help"]


COMMANDS = {
    "tokenize": "Train SentencePiece tokenizers and use them in pipelines.",
    "pretrain": "Pretrain a language model on text: text in, model directory out.",
    "finetune": "Finetune a model for a task on labeled data.",
    "generate": "Continue text: stdout gets the new text and nothing else.",
    "predict": "Apply a model to texts: labels, entities, answers or vectors as JSON lines.",
    "evaluate": "Score a model: bits per byte on text; accuracy, F1 and the like on a task.",
    "convert": "Convert a model to GGUF or to a Hugging Face directory.",
    "compress": "Quantize a model to 8 or 4 bits.",
    "inspect": "Show what a model, run, tokenizer or text contains and what it costs.",
    "bench": "Measure speed and memory, with confidence intervals.",
}
"""Every command and its summary; the module of the same name is imported on first use."""
WITHOUT_TORCH = ("tokenize", "inspect")
"""Commands that gain nothing when malloc keeps freed memory."""
LESS_MEMORY = {
    "pretrain": "use a smaller --depth or --context, or --set train.micro_batch=1",
    "finetune": "use --set train.micro_batch=1, a smaller --set data.context=N, or --lora",
    "generate": "use --quantize int8, a smaller --max-tokens, or fewer --num-samples",
    "predict": "use --quantize int8, or shorter texts",
    "evaluate": "use --quantize int8, or a smaller --context",
    "compress": "leave out --text, or close other programs",
    "bench": "use --quantize int8, a smaller --batch-size, or a smaller --depth where --model is left out",
    "tokenize": "pass less text at once",
}
"""What to do when a command runs out of memory."""


@dataclass
class Asked:
    """Options for ``main`` itself, given anywhere on the command line."""

    debug: bool = False


class Commands(TyperGroup):
    """The commands, each imported only when it runs, which keeps ``tfcli --help`` fast."""

    def list_commands(self, ctx: Context) -> list[str]:
        """Return the names, in the order of a typical workflow."""
        return list(COMMANDS)

    def get_command(self, ctx: Context, cmd_name: str) -> TyperCommand | TyperGroup | None:
        """Import a command; None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"tfcli.cli.{cmd_name}")
        if hasattr(module, "app"):
            app = module.app
        else:
            app = typer.Typer(rich_markup_mode=None, add_completion=False)
            app.command(cmd_name, cls=GroupedCommand)(getattr(module, cmd_name))
        command = _as_command(app)
        _take_debug(command, hidden=True)
        return command

    def resolve_command(self, ctx: Context, args: list[str]) -> Any:
        """Resolve as usual, but suggest the nearest name for an unknown one."""
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            raise unknown("command", args[0], COMMANDS)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Context, formatter: Any) -> None:
        """Write the summaries, without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _as_command(app: typer.Typer) -> Any:
    command = typer.main.get_command(app)
    command.context_settings = {"help_option_names": HELP}
    return command


def _debug(context: typer.Context, asked: bool) -> None:
    if asked:
        context.obj.debug = True


Debug: TypeAlias = Annotated[
    bool,
    typer.Option("--debug", help="Show the traceback of an error.", is_eager=True, expose_value=False, callback=_debug),
]


def _take_debug(command: Any, *, hidden: bool) -> None:
    """Let a command and its subcommands take --debug as an option: never out of another option's value."""
    app = typer.Typer()

    @app.command()
    def only(debug: Debug = False) -> None:
        pass

    option: Any = typer.main.get_command(app).params[0]
    option.hidden = hidden
    command.params.insert(1, option)  # in the help after --version
    for below in command.commands.values() if isinstance(command, TyperGroup) else ():
        _take_debug(below, hidden=True)


def build() -> typer.Typer:
    """Return the application."""
    app = typer.Typer(
        name="tfcli",
        cls=Commands,
        help="From a text file to a small, fast language model on the machine you have.",
        epilog="Start with: tfcli pretrain corpus.txt",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": HELP},
    )

    @app.callback()
    def top(
        version: Annotated[
            bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_version)
        ] = False,
    ) -> None:
        pass

    return app


def _version(asked: bool) -> None:
    if asked:
        from tfcli import __version__

        typer.echo(f"tfcli {__version__}")
        raise typer.Exit


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 1 failed, 2 usage or bad input, 130 interrupted."""
    if sys.stderr is None:  # closed: print would write to stdout instead
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    if sys.stdout is None:
        print("error: stdout is closed\n  results have nowhere to go; to discard them: > /dev/null", file=sys.stderr)
        return 2
    _use_utf8()
    arguments = sys.argv[1:] if arguments is None else arguments
    name = next((argument for argument in arguments if not argument.startswith("-")), "")
    asked = Asked()
    if name in COMMANDS and name not in WITHOUT_TORCH:
        from tfcli.runtime import keep_freed_memory

        keep_freed_memory()
    if _machine_is_busy():
        # Read by OpenMP when torch is loaded. Spinning threads are fastest on an idle machine, and up to thirty times
        # slower (measured) on one that is shared.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    interrupted: list[int] = []
    restore = _noting(interrupted)
    try:
        command = typer.main.get_command(build())
        _take_debug(command, hidden=False)
        code = command(args=arguments, prog_name="tfcli", standalone_mode=False, obj=asked)
        sys.stdout.flush()
        if code == 130:  # typer's answer to Ctrl-C
            print("interrupted", file=sys.stderr)
        return code if isinstance(code, int) else 0
    except SystemExit as leaving:
        if isinstance(leaving.__context__, BrokenPipeError):  # typer's answer to a closed pipe is exit code 1
            return _explain(leaving.__context__, name)
        raise
    except Exception as error:
        if interrupted:  # Ctrl-C while a library is imported comes out as an error of the import
            print("interrupted", file=sys.stderr)
            return 130
        if asked.debug and not _is_usage(error):
            raise
        return _explain(error, name)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        restore()


def _noting(interrupted: list[int]) -> Callable[[], object]:
    """Append SIGINT to ``interrupted`` when it comes; return the function that puts the handler back."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        return lambda: None

    def handler(number: int, frame: FrameType | None) -> None:
        interrupted.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, handler)
    return lambda: signal.signal(signal.SIGINT, usual)


def _use_utf8() -> None:
    """Make stdout UTF-8 whatever the locale, and let neither stream fail on characters that it cannot encode."""
    for stream, how in ((sys.stdout, {"encoding": "utf-8"}), (sys.stderr, {})):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace", **how)  # line endings stay as they are


def _machine_is_busy() -> bool:
    """Return whether other processes keep half of the processors busy right now."""
    try:
        with open("/proc/loadavg") as file:  # noqa: PTH123
            running = int(file.read().split()[3].partition("/")[0]) - 1  # without this process
    except (OSError, ValueError, IndexError):
        return False
    return running >= max(1, (os.cpu_count() or 1) // 2)


def _is_usage(error: Exception) -> bool:
    """Return whether typer's own parser raised it, whose errors can show themselves."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def _explain(error: Exception, command: str) -> int:
    """Print one or two lines about an error on stderr and return the exit code."""
    from tfcli import disk

    if isinstance(error, BrokenPipeError):
        # The reader is gone, as with `| head -1`; there is nothing left to flush to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, TfcliError):
        print(error.message if isinstance(error, Interrupted) else f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  {error.hint}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, OSError) and disk.is_full(error):
        print(f"error: no space left on the disk{f' for {error.filename}' if error.filename else ''}", file=sys.stderr)
        print("  free some space, or choose another place with --out; earlier files are intact", file=sys.stderr)
        return 1
    if isinstance(error, OSError) and error.filename:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    if _is_usage(error):
        error.show()  # type: ignore[attr-defined]
        return int(error.exit_code)  # type: ignore[attr-defined]
    if type(error).__name__ == "Abort":
        print("interrupted", file=sys.stderr)
        return 130
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "can't allocate memory" in str(error):
        print("error: out of memory", file=sys.stderr)
        print(f"  {LESS_MEMORY.get(command, 'close other programs, or use a larger machine')}", file=sys.stderr)
        return 1
    print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
    print("  this is a defect of tfcli; run again with --debug for the traceback", file=sys.stderr)
    return 1


def run() -> None:
    """Entry point of the ``tfcli`` command."""
    sys.exit(main())
