"""What of a data set was not as it should be: counted by kind with the first places, and fatal under --strict."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tfcli.errors import UserError
from tfcli.text.data_report import PLACES, Action, Change, DataReport, Part, Source
from tfcli.text.read import files, hf_data, tables
from tfcli.text.read.files import Count, Digest, Errors


@dataclass(kw_only=True)
class Report:
    """Faults and notes of the data that was read, and the files that it was read from.

    ``faults`` and ``notes`` are {kind: how many}; ``places`` the first few of each, ``actions`` what was done about it.
    A kind is a phrase in the plural that also says what was done, as "spans outside the text, left out".
    """

    strict: bool = False
    part: Literal["train", "val", "both"] = "both"
    """What is being read."""
    sources: list[Source] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    actions: dict[str, Action] = field(default_factory=dict)

    def fault(self, kind: str, where: str, action: Action | None = "dropped") -> None:
        """Count what is wrong in the data; UserError where ``strict``."""
        if self.strict:
            raise UserError(f"{where}: {kind.partition(',')[0]}", hint="without --strict it is counted and reported")
        self.faults[kind] = self.faults.get(kind, 0) + 1
        self._keep(kind, where, action)
        self.places.setdefault(kind, [])

    def note(self, kind: str, count: int = 1, *, action: Action | None = None, where: str | None = None) -> None:
        """Count what is not wrong, but should be known, as a text that was cut."""
        if count:
            self.notes[kind] = self.notes.get(kind, 0) + count
            self._keep(kind, where, action)

    def _keep(self, kind: str, where: str | None, action: Action | None) -> None:
        if action is not None:
            self.actions[kind] = action
        if where is not None and len(places := self.places.setdefault(kind, [])) < PLACES:
            places.append(where)

    def source(self, name: str, read: Digest, replaced: int) -> None:
        """A file that was read whole, and how much of it was not valid in its encoding."""
        self.sources.append(Source(name=name, part=self.part, bytes=read.bytes, sha256=read.sha256))
        self.note("invalid bytes that became U+FFFD", replaced, action="repaired", where=name)

    def text(self, path: str | Path, *, encoding: str = "utf-8", errors: Errors = "strict") -> str:
        """The text of a file, without a byte order mark; what was replaced in it is noted.

        Raises UserError for an encoding that is not known, and for bytes that are not in it.
        """
        count, read = Count(name=str(path)), Digest()
        text = "".join(files.texts(Path(path), count.name, errors, count, encoding=encoding, seen=read.update))
        self.source(count.name, read, count.replaced)
        return text

    def table(self, rows: tables.Rows) -> tables.Table:
        """All rows of a file; what was replaced in it is noted."""
        table = rows.table()
        self.source(table.name, table.digest, table.replaced)
        return table

    def lines(self) -> list[str]:
        """One line a kind, for people."""
        said = [f"{count} {kind} ({_first(self.places[kind], count)})" for kind, count in self.faults.items()]
        return said + [f"{count} {kind}" for kind, count in self.notes.items()]

    def none(self, things: str, name: str, *, before: Mapping[str, int], hint: str) -> UserError:
        """What to raise for file ``name`` that holds none of ``things``: its faults, those that ``before`` had not."""
        faults = []
        for kind, count in self.faults.items():
            new = count - before.get(kind, 0)
            places = [place for place in self.places[kind] if place.startswith(name)]
            if new:
                faults.append(f"{new} {kind}" + (f" ({_first(places, new)})" if places else ""))
        said = f" that can be used: {'; '.join(faults)}" if faults else ""
        return UserError(f"{name} has no {things}{said}", hint=hint)

    def too_few(self, what: str, *, hint: str) -> UserError:
        """What to raise where too little is left to go on: ``what``, and all that is said of the data."""
        return UserError("; ".join([what, *self.lines()]), hint=hint)

    def as_json(self) -> dict[str, object]:
        """For the result of an evaluation."""
        return {
            "faults": dict(self.faults),
            "places": {kind: list(self.places[kind]) for kind in self.faults},
            "notes": dict(self.notes),
        }

    def data_report(
        self,
        task: str,
        unit: str,
        used: Iterable[tuple[str, int]],
        *,
        split: Mapping[str, Any],
        train: Part,
        val: Part,
        twice: Mapping[str, int],
        tokenizer_hash: str,
        details: Mapping[str, Any],
        content_hash: str | None = None,
    ) -> dict[str, Any]:
        """data.json of the data that was read; ``used`` are the place and the tokens of each example of both parts."""
        counts = {**self.faults, **self.notes}
        changes: dict[Action, list[Change]] = {}
        for kind, action in self.actions.items():
            change = Change(reason=kind, count=counts[kind], places=self.places.get(kind, ()))
            changes.setdefault(action, []).append(change)
        return DataReport(
            task=task,
            unit=unit,
            sources=self._counted(used),
            split=split,
            train=train,
            val=val,
            changes=changes,
            notes={kind: count for kind, count in counts.items() if kind not in self.actions},
            within_train=twice["within_train"],
            across_splits=twice["across_splits"],
            content_hash=self._hash() if content_hash is None else content_hash,
            tokenizer_hash=tokenizer_hash,
            details=details,
        ).as_json()

    def _counted(self, used: Iterable[tuple[str, int]]) -> list[Source]:
        """The sources with what of them is used."""
        documents, tokens = [0] * len(self.sources), [0] * len(self.sources)
        at = 0
        for where, number in used:
            if not _is_of(where, self.sources[at].name):
                named = (i for i, source in enumerate(self.sources) if _is_of(where, source.name))
                at = max(named, key=lambda i: len(self.sources[i].name))
            documents[at] += 1
            tokens[at] += number
        return [replace(s, documents=documents[i], tokens=tokens[i]) for i, s in enumerate(self.sources)]

    def _hash(self) -> str:
        """SHA-256 of what was read, in its order."""
        whole = hashlib.sha256()
        for source in self.sources:
            named = hf_data.is_named(source.name)
            whole.update(source.sha256.encode() if named else bytes.fromhex(source.sha256))
        return whole.hexdigest()


def _is_of(where: str, name: str) -> bool:
    """Whether a place, as "file:3" or "file: row 3", is in a file."""
    return where.startswith(f"{name}:")


def duplicates(train: Sequence[Hashable], held_out: Sequence[Hashable]) -> dict[str, int]:
    """How many examples come again: within training, and of the held-out part in training."""
    times = Counter(train)
    return {
        "within_train": sum(number - 1 for number in times.values()),
        "across_splits": sum(example in times for example in held_out),
    }


def _first(places: list[str], count: int) -> str:
    return ", ".join(places) + (", ..." if count > len(places) else "")
