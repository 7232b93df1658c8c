"""Conversations from JSON or tables: messages, pairs of a prompt and its response, or ShareGPT's turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tfcli.tasks.chat.options import ChatData
from tfcli.tasks.common import columns
from tfcli.tasks.common.report import Report
from tfcli.text.chat.messages import ROLES, Message
from tfcli.text.read import tables
from tfcli.text.read.rows import Fault

PAIRS = (
    ("prompt", "response"), ("prompt", "completion"), ("question", "answer"),
    ("instruction", "output"), ("instruction", "response"), ("input", "output"),
)  # fmt: skip
"""Names of the two fields of a pair; Alpaca's "input" is added to its instruction."""
LISTS = ("messages", "conversations")
FROM: Mapping[str, str] = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "function"), "tool"),
    "system": "system",
}
"""Roles of ShareGPT's speakers."""
EXPECTED = (
    'expected {"messages": [{"role": "user", "content": "..."}, ...]}, {"prompt": "...", "response": "..."} '
    'or {"conversations": [{"from": "human", "value": "..."}, ...]}'
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Messages that end with an answer; ``where`` they were read, "file:line"."""

    messages: tuple[Message, ...]
    where: str = ""

    @property
    def answers(self) -> list[int]:
        """Indices of the assistant's messages."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]


class _Broken(Exception):
    """A row that cannot be used, with the kind of fault in the plural."""


def read(path: str | Path, report: Report, options: ChatData | None = None) -> list[Conversation]:
    """Read the conversations of a file: JSON lines, a JSON list, or a table (.csv, .tsv, .parquet, hf:NAME).

    Messages in the cells of a csv are JSON lists. What cannot be used is skipped and counted in ``report``. Raises
    UserError for a file without conversations.
    """
    options = options or ChatData()
    conversations: list[Conversation] = []
    before = dict(report.faults)
    lists = [*LISTS, *([options.messages_key] if options.messages_key else [])]
    known = [*lists, *(name for pair in PAIRS for name in pair), *(name for name in options.keys.values() if name)]
    kind = tables.kind_of(path)
    has_columns = kind in tables.COLUMNS

    def on_fault(fault: Fault) -> None:
        if fault.kind == "rows with another number of fields":
            raise fault.error
        report.fault(f"{fault.kind}, left out", fault.where)

    kind = kind if has_columns else "json"
    table = report.table(path, known, header=True, kind=kind, expected=EXPECTED, on_fault=on_fault)
    for row in table.rows:
        if has_columns and row is table.rows[0]:
            columns.named(row.values, options.keys, row.where)  # a missing column is a mistake in the settings
        values = columns.unfolded(row.values, lists) if has_columns else row.values
        try:
            conversations.append(conversation(values, options, row.where, report))
        except _Broken as broken:
            report.fault(f"{broken}, left out", row.where)
    if not conversations:
        raise report.none("conversations", str(path), before=before, hint=EXPECTED)
    return conversations


def conversation(row: Mapping[str, Any], options: ChatData, where: str, report: Report) -> Conversation:
    """Return the conversation of a row. Raises _Broken for one that cannot be used."""
    there = options.messages_key or next((name for name in LISTS if row.get(name) is not None), None)
    if there is None or (options.messages_key is None and (options.prompt_key or options.response_key) is not None):
        messages = _pair(row, options)
    else:
        entries = row.get(there)
        if not isinstance(entries, list):
            raise _Broken(f"rows whose {there} are not a list")
        if not entries:
            raise _Broken("empty conversations")
        first = entries[0] if isinstance(entries[0], dict) else {}
        share = "role" not in first and ("from" in first or there == "conversations")
        roles = {role: role for role in ROLES}
        messages = [
            _message(entry, "from", "value", FROM) if share else _message(entry, "role", "content", roles)
            for entry in entries
        ]
    return Conversation(messages=tuple(_checked(messages, where, report)), where=where)


def _message(entry: Any, speaker: str, content: str, roles: Mapping[str, str]) -> Message:
    if not isinstance(entry, dict) or not isinstance(entry.get(speaker), str):
        raise _Broken(f"conversations with a turn that has no {speaker}")
    if entry[speaker] not in roles:
        raise _Broken("conversations with an unknown role")
    if not isinstance(entry.get(content), str):
        raise _Broken(f"conversations with a turn whose {content} is not text")
    return {"role": roles[entry[speaker]], "content": entry[content]}


def _pair(row: Mapping[str, Any], options: ChatData) -> list[Message]:
    prompt, response = options.prompt_key, options.response_key
    if prompt is None or response is None:
        names = (pair for pair in PAIRS if prompt in (None, pair[0]) and response in (None, pair[1]))
        known = next((pair for pair in names if row.keys() >= set(pair)), None)
        if known is None:
            raise _Broken("rows without a known pair or a conversation")
        prompt, response = known
    if not isinstance(row.get(prompt), str) or not isinstance(row.get(response), str):
        raise _Broken(f"rows whose {prompt} or {response} is not text")
    asked, more, system = row[prompt], row.get("input"), row.get("system")
    if prompt == "instruction" and isinstance(more, str) and more.strip():
        asked = f"{asked}\n\n{more}"
    before: list[Message] = []
    if isinstance(system, str) and system.strip():
        before.append({"role": "system", "content": system})
    if not asked.strip():
        raise _Broken("rows with an empty prompt")
    return [*before, {"role": "user", "content": asked}, {"role": "assistant", "content": row[response]}]


def _checked(messages: list[Message], where: str, report: Report) -> list[Message]:
    """Return messages in a valid order, without those after the last answer."""
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
            raise _Broken(f"conversations with two {role} turns in a row")
    end = len(roles) - roles[::-1].index("assistant")
    if end < len(roles):
        report.fault("conversations that end without an answer, cut behind the last one", where, "cut")
    return messages[:end]
