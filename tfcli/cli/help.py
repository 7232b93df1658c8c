"""Layout of a command's help: options in named groups, concise defaults."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from typer.core import TyperCommand

Context: TypeAlias = Any
"""The parser's context; typer carries its own parser and does not name its types."""


def by_task(key: str, configs: Mapping[str, type[Any]]) -> str:
    """Format the default of a setting: that of most tasks, then those of others, as "32; 128 for translate"."""
    from tfcli.config.resolve import default_of

    tasks: dict[str, list[str]] = {}
    for task, config in configs.items():
        tasks.setdefault(str(default_of(config, key)), []).append(task)
    (usual, _), *others = sorted(tasks.items(), key=lambda item: -len(item[1]))
    return "; ".join([usual, *(f"{value} for {', '.join(names)}" for value, names in others)])


def rate(value: float) -> str:
    """Format a learning rate, as 5e-5."""
    return f"{value:.0e}".replace("e-0", "e-")


class GroupedCommand(TyperCommand):
    """A command whose help lists options under their ``rich_help_panel`` headings, as plain text."""

    def format_options(self, ctx: Context, formatter: Any) -> None:
        """Write the arguments, then each group in the order of its first option."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            heading = getattr(parameter, "rich_help_panel", None)
            heading = heading or ("Arguments" if parameter.param_type_name == "argument" else "Options")
            names, text = record
            if heading == "Arguments":
                names = names.partition(" <")[0]
            groups.setdefault(heading, []).append((re.sub(r" <([\w ]+(\[\w+\])?)>$", _metavar, names), _tidy(text)))
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def _metavar(match: re.Match[str]) -> str:
    kinds = {"int": " N", "float": " X", "path": " PATH", "str": " TEXT", "list[str]": " TEXT"}
    return kinds.get(match[1].removesuffix(" range"), match[0])


def _tidy(text: str) -> str:
    """Shorten ``[default: (all cores); x>=1]`` to ``[default: all cores]``."""
    return re.sub(r"\bdefault: \((.*)\)(; [^\]]*)?\]", r"default: \1]", text)
