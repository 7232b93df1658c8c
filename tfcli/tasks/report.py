"""What of a data set was not as it should be: counted by kind with the first places, and fatal under --strict."""

from __future__ import annotations

from dataclasses import dataclass, field

from tfcli.errors import UserError

PLACES = 3
"""Places that are named of each kind."""


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

    def lines(self) -> list[str]:
        """One line a kind, for people."""
        said = [f"{count} {kind} ({_first(self.places[kind], count)})" for kind, count in self.faults.items()]
        return said + [f"{count} {kind}" for kind, count in self.notes.items()]

    def as_json(self) -> dict[str, object]:
        """For data.json."""
        return {"faults": dict(self.faults), "places": dict(self.places), "notes": dict(self.notes)}


def _first(places: list[str], count: int) -> str:
    return ", ".join(places) + (", ..." if count > len(places) else "")
