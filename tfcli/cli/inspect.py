"""tfcli inspect: what a run, model, tokenizer, shard or corpus contains, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from tfcli.cli.options import argument, flag
from tfcli.cli.output import note, show_json

TARGETS = "Run or model directories, tokenizer.model files, shards, text. Left out: the model of the last run."
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
COUNTS = ("tokens", "documents", "lines", "characters", "numbers", "vocab_size", "exact_duplicates")
"""Keys whose numbers are long enough for thousands separators; years, seeds and steps are not."""


def inspect(
    targets: Annotated[list[str] | None, argument("[TARGET]...", TARGETS, False)] = None,
    as_json: Annotated[bool, flag("--json", "Print one JSON object per target.")] = False,
) -> None:
    """Show what something contains and what it costs.

    A model: shape, parameters, FLOPs, memory, tokenizer. A run: also its progress, data and checkpoints. A tokenizer, a
    token shard, text. Nothing is loaded or run: costs follow from the configuration.

    Example: tfcli inspect runs/first
    """
    from tfcli.inspection.describe import inspect as describe
    from tfcli.train.runs import find_model

    if not targets:
        targets = [str(find_model(None))]
        note(f"model: {targets[0]}")
    for number, target in enumerate(targets):
        description = describe(target, on_note=note)
        if as_json:
            show_json(description)
            continue
        if number:
            print()
        _render(description)


def _render(description: dict[str, Any]) -> None:
    """Print aligned lines, and a blank line before each part; typer prints bold names only on terminals."""
    rows = list(_rows({key: value for key, value in description.items() if key not in ("target", "kind")}))
    width = max((len(label) for label, value in rows if value is not None), default=0)
    typer.echo(f"{typer.style(description['target'], bold=True)}: {description['kind']}")
    for label, value in rows:
        typer.echo(f"\n{typer.style(label, bold=True)}" if value is None else f"  {label.ljust(width)}  {value}")


def _rows(values: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Yield (label, text) of each value, single lines first; a part begins with (its name, None)."""
    for key, value in values.items():
        if not isinstance(value, dict):
            yield _label(key), _text(key, value)
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield _label(key), None
            for name, inner in value.items():
                yield _label(name), _text(f"{key}.{name}", inner)


def _label(key: str) -> str:
    return "text" if key == "text_bytes" else key.removesuffix("_bytes").replace("_", " ")


def _text(key: str, value: Any) -> str:
    """Format a value for people, by its key."""
    if value is None or value in ([], {}):
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(name, inner)}" for name, inner in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        quoted = key.endswith("pieces")  # they begin with spaces
        return " ".join(json.dumps(item, ensure_ascii=False) if quoted else str(item) for item in value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False) if key == "preview" else value
    if key.startswith("scripts."):
        return f"{value:.1%}"
    if key.endswith("bytes"):
        return _scaled(value, "B")
    if key.startswith(("flops", "parameters.")):
        return _scaled(value, "")
    if isinstance(value, float):
        return f"{value:.5g}"
    return f"{value:,}" if key.rpartition(".")[2] in COUNTS else str(value)


def _scaled(value: float, unit: str) -> str:
    """Format three digits and a unit, then all digits: 12.3 MB (12,345,678)."""
    for scale, prefix in UNITS:
        if abs(value) >= scale:
            return f"{value / scale:.3g} {prefix}{unit} ({value:,})"
    return f"{value} {unit}".rstrip()
