"""Reading labelled data: files, and faults counted by kind with their first places, or fatal under --strict."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tfcli.errors import UserError
from tfcli.tasks.common.options import FinetuneData
from tfcli.text.data_report import PLACES, Action, Change, DataReport, Part, Source
from tfcli.text.read import files, hf_data, tables
from tfcli.text.read.files import Count, Digest, Errors
from tfcli.text.read.rows import Kind, OnFault, refuse


@dataclass(kw_only=True)
class Report:
    """Reads files, and counts their faults and notes.

    ``faults`` and ``notes`` are {kind: count}, ``places`` the first few of each, ``actions`` what was done about it. A
    kind is a phrase in the plural that also says what was done, such as "spans outside the text, left out".
    """

    strict: bool = False
    encoding: str = "utf-8"
    errors: Errors = "strict"
    part: Literal["train", "val", "both"] = "both"
    """The part that is being read."""
    sources: list[Source] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    actions: dict[str, Action] = field(default_factory=dict)

    @classmethod
    def of(cls, options: FinetuneData) -> Report:
        """Return the report for data that is read with these options."""
        return cls(strict=options.strict, encoding=options.encoding, errors=options.errors)

    def fault(self, kind: str, where: str, action: Action | None = "dropped") -> None:
        """Count a fault of the data. Raises UserError where ``strict``."""
        if self.strict:
            raise UserError(f"{where}: {kind.partition(',')[0]}", hint="without --strict it is counted and reported")
        self.faults[kind] = self.faults.get(kind, 0) + 1
        self._keep(kind, where, action)
        self.places.setdefault(kind, [])

    def note(self, kind: str, count: int = 1, *, action: Action | None = None, where: str | None = None) -> None:
        """Count what is no fault but should be known, such as a truncated text."""
        if count:
            self.notes[kind] = self.notes.get(kind, 0) + count
            self._keep(kind, where, action)

    def _keep(self, kind: str, where: str | None, action: Action | None) -> None:
        if action is not None:
            self.actions[kind] = action
        if where is not None and len(places := self.places.setdefault(kind, [])) < PLACES:
            places.append(where)

    def source(self, name: str, read: Digest, replaced: int) -> None:
        """Add a file that was read whole, with the number of bytes that were invalid in its encoding."""
        self.sources.append(Source(name=name, part=self.part, bytes=read.bytes, sha256=read.sha256))
        self.note("invalid bytes that became U+FFFD", replaced, action="repaired", where=name)

    def text(self, path: str | Path) -> str:
        """Read the text of a file, without a byte order mark, and note what was replaced.

        Raises UserError for an unknown encoding, and for bytes that are invalid in it.
        """
        count, read = Count(name=str(path)), Digest()
        pieces = files.texts(Path(path), count.name, self.errors, count, encoding=self.encoding, seen=read.update)
        text = "".join(pieces)
        self.source(count.name, read, count.replaced)
        return text

    def table(
        self,
        path: str | Path,
        known: Sequence[str],
        *,
        header: bool | None = None,
        kind: Kind | None = None,
        expected: str = tables.EXPECTED,
        on_fault: OnFault = refuse,
    ) -> tables.Table:
        """Read all rows of a file, as ``tables.rows`` does, and note what was replaced."""
        table = tables.rows(
            path, known=known, header=header, kind=kind, encoding=self.encoding, errors=self.errors,
            expected=expected, on_fault=on_fault, whole=True,
        ).table()  # fmt: skip
        self.source(table.name, table.digest, table.replaced)
        return table

    def lines(self) -> list[str]:
        """Return a line for each kind, for people."""
        faults = [f"{count} {kind} ({_first(self.places[kind], count)})" for kind, count in self.faults.items()]
        return faults + [f"{count} {kind}" for kind, count in self.notes.items()]

    def none(self, things: str, name: str, *, before: Mapping[str, int], hint: str) -> UserError:
        """Return the error for a file without ``things``, with the faults that are not in ``before``."""
        faults = []
        for kind, count in self.faults.items():
            new = count - before.get(kind, 0)
            places = [place for place in self.places[kind] if place.startswith(name)]
            if new:
                faults.append(f"{new} {kind}" + (f" ({_first(places, new)})" if places else ""))
        unusable = f" that can be used: {'; '.join(faults)}" if faults else ""
        return UserError(f"{name} has no {things}{unusable}", hint=hint)

    def too_few(self, what: str, *, hint: str) -> UserError:
        """Return the error for too little data: ``what`` is wrong, and all faults and notes."""
        return UserError("; ".join([what, *self.lines()]), hint=hint)

    def as_json(self) -> dict[str, object]:
        """Return faults, places and notes, for the result of an evaluation."""
        return {
            "faults": dict(self.faults),
            "places": {kind: list(self.places[kind]) for kind in self.faults},
            "notes": dict(self.notes),
        }

    def data_report(
        self,
        task: str,
        unit: str,
        train: Examples,
        val: Examples,
        *,
        split: Mapping[str, Any],
        tokenizer_hash: str,
        details: Mapping[str, Any],
        content_hash: str | None = None,
    ) -> dict[str, Any]:
        """Return data.json of the data that was read."""
        counts = {**self.faults, **self.notes}
        changes: dict[Action, list[Change]] = {}
        for kind, action in self.actions.items():
            change = Change(reason=kind, count=counts[kind], places=self.places.get(kind, ()))
            changes.setdefault(action, []).append(change)
        return DataReport(
            task=task, unit=unit, sources=self._counted(train, val), split=split, train=train.part,
            val=val.part, changes=changes,
            notes={kind: count for kind, count in counts.items() if kind not in self.actions},
            **duplicates(train.keys, val.keys), content_hash=self._hash() if content_hash is None else content_hash,
            tokenizer_hash=tokenizer_hash, details=details,
        ).as_json()  # fmt: skip

    def _counted(self, train: Examples, val: Examples) -> list[Source]:
        """Return the sources, with how much of each is used."""
        documents, tokens = [0] * len(self.sources), [0] * len(self.sources)
        for other, examples in (("val", train), ("train", val)):
            own = [i for i, source in enumerate(self.sources) if source.part != other]
            at = own[0] if own else 0
            for where, number in examples.read:
                if not _is_of(where, self.sources[at].name):
                    named = (i for i in own if _is_of(where, self.sources[i].name))
                    at = max(named, key=lambda i: len(self.sources[i].name))
                documents[at] += 1
                tokens[at] += number
        return [replace(s, documents=documents[i], tokens=tokens[i]) for i, s in enumerate(self.sources)]

    def _hash(self) -> str:
        """Return the SHA-256 of what was read, in order."""
        whole = hashlib.sha256()
        for source in self.sources:
            named = hf_data.is_named(source.name)
            whole.update(source.sha256.encode() if named else bytes.fromhex(source.sha256))
        return whole.hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """The examples of one part of the data, for its data report."""

    documents: int
    read: Sequence[tuple[str, int]]
    """The place where each was read, and its tokens; two of a pair whose sides have files of their own."""
    keys: Sequence[Hashable]
    """Values that are equal in duplicates."""
    details: Mapping[str, Any]

    @property
    def part(self) -> Part:
        """The counts of data.json."""
        tokens = sum(number for _, number in self.read)
        return Part(documents=self.documents, tokens=tokens, details=self.details)


def _is_of(where: str, name: str) -> bool:
    """Return whether a place, such as "file:3" or "file: row 3", is in a file."""
    return where.startswith(f"{name}:")


def duplicates(train: Sequence[Hashable], held_out: Sequence[Hashable]) -> dict[str, int]:
    """Return the number of duplicates within the training part, and of held-out examples in it."""
    times = Counter(train)
    return {
        "within_train": sum(number - 1 for number in times.values()),
        "across_splits": sum(example in times for example in held_out),
    }


def _first(places: list[str], count: int) -> str:
    return ", ".join(places) + (", ..." if count > len(places) else "")
