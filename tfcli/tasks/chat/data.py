"""Conversations read from JSON or tables: messages, pairs of a prompt and its answer, or ShareGPT's turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tfcli.tasks.common import columns
from tfcli.tasks.common.report import Report
from tfcli.text.chat.messages import ROLES, Message
from tfcli.text.read import tables
from tfcli.text.read.files import Errors
from tfcli.text.read.rows import Fault

PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "output"),
)
"""Names of the two fields of a pair; Alpaca's "input" is added to its instruction."""
LISTS = ("messages", "conversations")
FROM: Mapping[str, str] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
}
"""ShareGPT's speakers."""
EXPECTED = (
    'expected {"messages": [{"role": "user", "content": "..."}, ...]}, {"prompt": "...", "response": "..."} '
    'or {"conversations": [{"from": "human", "value": "..."}, ...]}'
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fields:
    """Names of fields or columns; left out, they are recognised."""

    prompt: str | None = None
    response: str | None = None
    messages: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Messages that end with an answer; ``where`` they were read, "file:line"."""

    messages: tuple[Message, ...]
    where: str = ""

    @property
    def answers(self) -> list[int]:
        """Which of the messages are the assistant's."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]


class _Broken(Exception):
    """A row that cannot be used: what kind of fault it is, in the plural."""


def read(
    path: str | Path,
    report: Report,
    *,
    encoding: str = "utf-8",
    errors: Errors = "strict",
    fields: Fields | None = None,
) -> list[Conversation]:
    """The conversations of a file: JSON lines, one JSON list, or a table (.csv, .tsv, .parquet, hf:NAME), whose
    messages in the cells of a csv are lists, as JSON writes them.

    What cannot be used is left out and counted in ``report``. Raises UserError for a file that holds no conversation.
    """
    fields = fields or Fields()
    found: list[Conversation] = []
    before = dict(report.faults)
    named = {"prompt": fields.prompt, "response": fields.response, "messages": fields.messages}
    lists = [*LISTS, *([fields.messages] if fields.messages else [])]
    known = [*lists, *(name for pair in PAIRS for name in pair), *(name for name in named.values() if name)]
    kind = tables.kind_of(path)
    has_columns = kind in tables.COLUMNS

    def on_fault(fault: Fault) -> None:
        if fault.kind == "rows with another number of fields":
            raise fault.error
        report.fault(f"{fault.kind}, left out", fault.where)

    listed = tables.rows(
        path, known=known, header=True, kind=kind if has_columns else "json", encoding=encoding, errors=errors,
        expected=EXPECTED, on_fault=on_fault, whole=True,
    )  # fmt: skip
    table = report.table(listed)
    for row in table.rows:
        if has_columns and row is table.rows[0]:
            columns.named(row.values, named, row.where)  # a column that is not there is a mistake of the settings
        values = columns.unfolded(row.values, lists) if has_columns else row.values
        try:
            found.append(conversation(values, fields, row.where, report))
        except _Broken as broken:
            report.fault(f"{broken}, left out", row.where)
    if not found:
        raise report.none("conversations", str(path), before=before, hint=EXPECTED)
    return found


def conversation(row: Mapping[str, Any], fields: Fields, where: str, report: Report) -> Conversation:
    """The conversation of a row; ``read`` says what is left out."""
    there = fields.messages or next((name for name in LISTS if row.get(name) is not None), None)
    if there is None or (fields.messages is None and (fields.prompt or fields.response) is not None):
        messages = _pair(row, fields)
    else:
        entries = _list(row, there)
        first = entries[0] if isinstance(entries[0], dict) else {}
        share = "role" not in first and ("from" in first or there == "conversations")
        roles = {role: role for role in ROLES}
        messages = [
            _message(entry, "from", "value", FROM) if share else _message(entry, "role", "content", roles)
            for entry in entries
        ]
    return Conversation(messages=tuple(_checked(messages, where, report)), where=where)


def _list(row: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(row.get(key), list):
        raise _Broken(f"rows whose {key} are no list")
    if not row[key]:
        raise _Broken("empty conversations")
    listed: list[Any] = row[key]
    return listed


def _message(entry: Any, speaker: str, said: str, roles: Mapping[str, str]) -> Message:
    if not isinstance(entry, dict) or not isinstance(entry.get(speaker), str):
        raise _Broken(f"conversations with a turn that has no {speaker}")
    if entry[speaker] not in roles:
        raise _Broken("conversations with an unknown role")
    if not isinstance(entry.get(said), str):
        raise _Broken(f"conversations with a turn whose {said} is no text")
    return {"role": roles[entry[speaker]], "content": entry[said]}


def _pair(row: Mapping[str, Any], fields: Fields) -> list[Message]:
    prompt, response = fields.prompt, fields.response
    if prompt is None or response is None:
        names = (pair for pair in PAIRS if prompt in (None, pair[0]) and response in (None, pair[1]))
        known = next((pair for pair in names if row.keys() >= set(pair)), None)
        if known is None:
            raise _Broken("rows without a pair that is known or a conversation")
        prompt, response = known
    if not isinstance(row.get(prompt), str) or not isinstance(row.get(response), str):
        raise _Broken(f"rows whose {prompt} or {response} is no text")
    asked = row[prompt]
    more = row.get("input")
    if prompt == "instruction" and isinstance(more, str) and more.strip():
        asked = f"{asked}\n\n{more}"
    system = row.get("system")
    before: list[Message] = []
    if isinstance(system, str) and system.strip():
        before.append({"role": "system", "content": system})
    if not asked.strip():
        raise _Broken("rows with an empty prompt")
    return [*before, {"role": "user", "content": asked}, {"role": "assistant", "content": row[response]}]


def _checked(messages: list[Message], where: str, report: Report) -> list[Message]:
    """Messages in an order that makes sense; what follows the last answer is cut."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise _Broken("conversations without an answer")
    if any(message["role"] == "assistant" and not message["content"].strip() for message in messages):
        raise _Broken("conversations with an empty answer")
    if roles[0] == "assistant" or roles[:2] == ["system", "assistant"]:
        raise _Broken("conversations that begin with an answer")
    if "system" in roles[1:]:
        raise _Broken("conversations with a system turn that is not the first")
    for role in ("user", "assistant"):
        if any(pair == (role, role) for pair in pairwise(roles)):
            raise _Broken(f"conversations with two {role} turns running")
    end = len(roles) - roles[::-1].index("assistant")
    if end < len(roles):
        report.fault("conversations that end without an answer, cut behind the last one", where, "cut")
    return messages[:end]
