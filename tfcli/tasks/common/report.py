"""What of a data set was not as it should be: counted by kind with the first places, and fatal under --strict."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tfcli.errors import UserError
from tfcli.text.read import files, tables
from tfcli.text.read.files import Count, Errors

PLACES = 3
"""Places that are named of each kind."""
REPLACED = "invalid bytes that became U+FFFD"


@dataclass(kw_only=True)
class Report:
    """Faults and notes of the data that was read.

    ``faults`` and ``notes`` are {kind: how many}; ``places`` the first few of each fault. A kind is a phrase in the
    plural that also says what was done, as "spans outside the text, left out".
    """

    strict: bool = False
    faults: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    digests: list[bytes] = field(default_factory=list)
    """Of each file in the order in which they were read."""

    def fault(self, kind: str, where: str) -> None:
        """Count what is wrong in the data; UserError where ``strict``."""
        if self.strict:
            raise UserError(f"{where}: {kind.partition(',')[0]}", hint="without --strict it is counted and reported")
        self.faults[kind] = self.faults.get(kind, 0) + 1
        places = self.places.setdefault(kind, [])
        if len(places) < PLACES:
            places.append(where)

    def note(self, kind: str, count: int = 1) -> None:
        """Count what is not wrong, but should be known, as a text that was cut."""
        if count:
            self.notes[kind] = self.notes.get(kind, 0) + count

    def text(self, path: str | Path, *, encoding: str = "utf-8", errors: Errors = "strict") -> str:
        """The text of a file, without a byte order mark; what was replaced in it is noted.

        Raises UserError for an encoding that is not known, and for bytes that are not in it.
        """
        count, digest = Count(name=str(path)), hashlib.sha256()
        pieces = files.texts(Path(path), count.name, errors, count, encoding=encoding, seen=digest.update)
        text = "".join(pieces)
        self.digests.append(digest.digest())
        self.note(REPLACED, count.replaced)
        return text

    def table(self, rows: tables.Rows) -> tables.Table:
        """All rows of a file; what was replaced in it is noted."""
        table = rows.table()
        self.digests.append(table.digest)
        self.note(REPLACED, table.replaced)
        return table

    @property
    def content_hash(self) -> str:
        """SHA-256 of all that was read: of the bytes of files, decompressed, and of the rows of data sets."""
        return hashlib.sha256(b"".join(self.digests)).hexdigest()

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
        """For data.json."""
        return {"faults": dict(self.faults), "places": dict(self.places), "notes": dict(self.notes)}

    def receipt(
        self,
        task: str,
        paths: Sequence[str],
        form: Mapping[str, object],
        *,
        train: Mapping[str, object],
        held_out: Mapping[str, object],
        twice: Mapping[str, int],
    ) -> dict[str, object]:
        """data.json of data that was read with this report; ``form`` is what was found of how it is written."""
        return {
            "task": task,
            "sources": list(paths),
            **form,
            "train": train,
            "val": held_out,
            **self.as_json(),
            "duplicates": twice,
            "content_hash": self.content_hash,
        }


def duplicates(train: Sequence[Hashable], held_out: Sequence[Hashable]) -> dict[str, int]:
    """How many examples come again: within training, and of the held-out part in training."""
    times = Counter(train)
    return {
        "within_train": sum(number - 1 for number in times.values()),
        "across_splits": sum(example in times for example in held_out),
    }


def _first(places: list[str], count: int) -> str:
    return ", ".join(places) + (", ..." if count > len(places) else "")
