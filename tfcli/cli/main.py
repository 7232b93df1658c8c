"""The command line: joins the commands and turns what goes wrong into a message and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import typer
import typer.main
from typer.core import TyperCommand, TyperGroup

from tfcli import disk
from tfcli.cli.help import Context, GroupedCommand
from tfcli.errors import Interrupted, TfcliError, unknown

HELP = ["-h", "--help"]


COMMANDS = {
    "tokenize": "Train a SentencePiece tokenizer, and use it in pipelines.",
    "pretrain": "Train a language model on text: text in, model directory out.",
    "finetune": "Train a model for a task on labelled data.",
    "generate": "Continue text: stdout gets the new text and nothing else.",
    "predict": "Say what a model makes of texts: JSON lines in order.",
    "evaluate": "Score a model: of a text bits per byte, of a task accuracy, F1 and the like.",
    "convert": "Write a model in another format: GGUF, or a Hugging Face directory.",
    "compress": "Make a model smaller: weights in 8 or 4 bits.",
    "inspect": "Say what a model, run, tokenizer or text is, and what it costs.",
    "bench": "Measure speed and memory, with intervals.",
}
"""Every command with its line in the overview; the module of the same name is imported when it is asked for."""
WITHOUT_TORCH = ("tokenize", "inspect")
"""Commands that gain nothing from memory which the process keeps."""
LESS_MEMORY = {
    "pretrain": "use a smaller --depth or --context, or --set train.micro_batch=1",
    "finetune": "use --set train.micro_batch=1, a smaller --set data.context=N, or --lora",
    "generate": "use --quantize int8, a smaller --max-tokens, or fewer --num-samples",
    "predict": "use --quantize int8, or shorter texts",
    "evaluate": "use --quantize int8, or a smaller --context",
    "compress": "leave --text out, or close other programs",
    "bench": "use --quantize int8, a smaller --batch-size, or a smaller --depth where --model is left out",
    "tokenize": "give less text at once",
}
"""What to do where a command ran out of memory."""


@dataclass
class Asked:
    """What the command line asks of ``main`` itself, wherever it stands in it."""

    debug: bool = False


class Commands(TyperGroup):
    """The commands, each imported only when it is run: ``tfcli --help`` costs little more than Python itself."""

    def list_commands(self, ctx: Context) -> list[str]:
        """Their names, in the order of the work."""
        return list(COMMANDS)

    def get_command(self, ctx: Context, cmd_name: str) -> TyperCommand | TyperGroup | None:
        """Import one; None for an unknown name."""
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
        """As usual, but an unknown name comes with the nearest known one."""
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            raise unknown("command", args[0], COMMANDS)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Context, formatter: Any) -> None:
        """The overview, without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _as_command(app: typer.Typer) -> Any:
    command = typer.main.get_command(app)
    command.context_settings = {"help_option_names": HELP}
    return command


def _take_debug(command: Any, *, hidden: bool) -> None:
    """Let a command and those below it take --debug, as an option: never out of another option's value."""
    app = typer.Typer()

    @app.command()
    def only(
        debug: Annotated[
            bool,
            typer.Option(
                "--debug",
                help="Show the traceback of an error.",
                is_eager=True,
                expose_value=False,
                callback=_debug,
            ),
        ] = False,
    ) -> None:
        pass

    option: Any = typer.main.get_command(app).params[0]
    option.hidden = hidden
    command.params.insert(1, option)  # in the help after --version
    for below in command.commands.values() if isinstance(command, TyperGroup) else ():
        _take_debug(below, hidden=True)


def _debug(context: typer.Context, asked: bool) -> None:
    if asked:
        context.obj.debug = True


def build() -> typer.Typer:
    """The whole application."""
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
    """Run one command; returns the exit code: 0 done, 1 failed, 2 usage or bad input, 130 interrupted."""
    if sys.stderr is None:  # closed: print would write to stdout instead
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    if sys.stdout is None:
        print("error: stdout is closed\n  there is no place for results; to drop them: > /dev/null", file=sys.stderr)
        return 2
    _speak_utf8()
    arguments = sys.argv[1:] if arguments is None else arguments
    name = next((argument for argument in arguments if not argument.startswith("-")), "")
    asked = Asked()
    if name in COMMANDS and name not in WITHOUT_TORCH:
        from tfcli.runtime import keep_freed_memory

        keep_freed_memory()
    if _others_run():
        # Read by OpenMP when torch is loaded. Threads that wait by spinning are the fastest on a machine of their own,
        # and crawl (thirty times slower was measured) when they have to share it.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
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
        if asked.debug and not _is_usage(error):
            raise
        return _explain(error, name)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _speak_utf8() -> None:
    """Let stdout be UTF-8 whatever the locale, and neither stream fail at a character that it cannot write."""
    for stream, how in ((sys.stdout, {"encoding": "utf-8"}), (sys.stderr, {})):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace", **how)  # line ends stay as they were


def _others_run() -> bool:
    """Whether other processes keep half of the processors busy right now."""
    try:
        with open("/proc/loadavg") as file:  # noqa: PTH123
            running = int(file.read().split()[3].partition("/")[0]) - 1  # this process runs too
    except (OSError, ValueError, IndexError):
        return False
    return running >= max(1, (os.cpu_count() or 1) // 2)


def _is_usage(error: Exception) -> bool:
    """Whether the parser raised it; typer carries its own parser, whose errors know how to show themselves."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def _explain(error: Exception, command: str) -> int:
    """One or two lines on stderr for an error of a command; returns the exit code."""
    if isinstance(error, BrokenPipeError):
        # The reader went away, as `| head -1` does. Nothing is left to flush to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, TfcliError):
        print(error.message if isinstance(error, Interrupted) else f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  {error.hint}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, OSError) and disk.is_full(error):
        print(f"error: no space left on the disk{f' for {error.filename}' if error.filename else ''}", file=sys.stderr)
        print("  free some space, or choose another place with --out; what was saved before is whole", file=sys.stderr)
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
