"""The command line: joins the commands and turns what goes wrong into a message and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated

import typer

from tfcli.errors import TfcliError


def build() -> typer.Typer:
    """The whole application, one sub-module a command."""
    from tfcli.cli import bench, evaluate, generate, inspect, pretrain, tokenize

    app = typer.Typer(
        name="tfcli",
        help="From a text file to a small, fast language model on the machine you have.",
        epilog="Start with: tfcli pretrain corpus.txt",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def top(
        version: Annotated[
            bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_version)
        ] = False,
        debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    ) -> None:
        pass

    app.add_typer(tokenize.app, name="tokenize")
    app.command("pretrain")(pretrain.pretrain)
    app.command("generate")(generate.generate)
    app.command("evaluate")(evaluate.evaluate)
    app.command("inspect")(inspect.inspect)
    app.command("bench")(bench.bench)
    return app


def _version(asked: bool) -> None:
    if asked:
        from tfcli import __version__

        typer.echo(f"tfcli {__version__}")
        raise typer.Exit


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 usage or bad input, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    # Read by OpenMP when torch is loaded: threads that wait by spinning make everything else on the machine crawl,
    # and crawl themselves when anything else runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        code = build()(args=arguments, prog_name="tfcli", standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # typer's answer to Ctrl-C
            print("interrupted", file=sys.stderr)
        return code if isinstance(code, int) else 0
    except SystemExit as leaving:
        if isinstance(leaving.__context__, BrokenPipeError):  # typer's answer to a closed pipe is exit code 1
            return _explain(leaving.__context__)
        raise
    except Exception as error:
        if debug and not _is_usage(error):
            raise
        return _explain(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _is_usage(error: Exception) -> bool:
    """Whether the parser raised it; typer carries its own parser, whose errors know how to show themselves."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def _explain(error: Exception) -> int:
    """One or two lines on stderr for an error; returns the exit code."""
    if isinstance(error, BrokenPipeError):
        # The reader went away, as `| head -1` does. Nothing is left to flush to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, TfcliError):
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  {error.hint}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
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
        print("  use a smaller --depth or --context, or --set train.micro_batch=1", file=sys.stderr)
        return 1
    print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
    print("  this is a defect of tfcli; run again with --debug for the traceback", file=sys.stderr)
    return 1


def run() -> None:
    """Entry point of the ``tfcli`` command."""
    sys.exit(main())
