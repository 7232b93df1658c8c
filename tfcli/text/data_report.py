"""The data report, data.json: what a command read, held out, dropped, cut and repaired; one form for every command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FORM = 2
"""Of this form. data.json of versions that had another for every task has no "form"."""
Action = Literal["dropped", "cut", "repaired"]
ACTIONS: tuple[Action, ...] = ("dropped", "cut", "repaired")
PLACES = 3
"""Places that are named of each reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One file, or ``hf:NAME``: ``bytes`` of it as text, and what of it is used.

    ``documents`` are those of a text, or the examples of labelled data; ``part`` is where they went.
    """

    name: str
    part: Literal["train", "val", "both"]
    bytes: int
    documents: int = 0
    tokens: int = 0
    sha256: str = ""
    """Of the file, or of the rows of ``hf:NAME``; "" of a text, which has one hash of all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What is trained on, or held out; ``details`` are the task's own figures."""

    documents: int
    tokens: int
    bytes: int | None = None
    """UTF-8 bytes of the text; None of labelled data."""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """How often something was done to the data for one reason, and the first places, "file:line" where there are."""

    reason: str
    count: int
    places: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class DataReport:
    """Everything that data.json says."""

    task: str
    """pretrain, or the word after --task."""
    unit: str
    """What "documents" counts, in the plural."""
    sources: Sequence[Source]
    split: Mapping[str, Any]
    """How the held-out part was chosen: {"rule", and what the rule needs: "fraction", "seed"}."""
    train: Part
    val: Part
    changes: Mapping[Action, Sequence[Change]] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)
    """What else should be known of the data, and how often it was so."""
    within_train: int
    """Documents that are equal to an earlier one of the training part."""
    across_splits: int
    """Held-out documents that are in the training part too."""
    byte_fallback_rate: float | None = None
    """Share of the tokens that are bytes of characters without a piece; None where the tokenizer has no such pieces."""
    unknown_rate: float | None = None
    content_hash: str
    """Of all that was read: a run is resumed with the same data only."""
    tokenizer_hash: str
    details: Mapping[str, Any] = field(default_factory=dict)
    """The task's own settings and findings."""

    def as_json(self) -> dict[str, Any]:
        """As plain values, with the bytes and tokens of all sources together."""
        return {
            "form": FORM,
            "task": self.task,
            "unit": self.unit,
            "sources": [asdict(source) for source in self.sources],
            "bytes": sum(source.bytes for source in self.sources),
            "tokens": sum(source.tokens for source in self.sources),
            "split": dict(self.split),
            "train": _part(self.train),
            "val": {**_part(self.val), "share": self._share()},
            **changes_json(self.changes),
            "notes": dict(self.notes),
            "duplicates": {"within_train": self.within_train, "across_splits": self.across_splits},
            "byte_fallback_rate": self.byte_fallback_rate,
            "unknown_rate": self.unknown_rate,
            "content_hash": self.content_hash,
            "tokenizer_hash": self.tokenizer_hash,
            "details": dict(self.details),
        }

    def _share(self) -> float:
        """Of the held-out part: of the bytes of a text, else of the documents."""
        if self.train.bytes is not None and self.val.bytes is not None:
            train, val = self.train.bytes, self.val.bytes
        else:
            train, val = self.train.documents, self.val.documents
        return val / max(1, train + val)


def _part(part: Part) -> dict[str, Any]:
    return {
        "documents": part.documents,
        "bytes": part.bytes,
        "tokens": part.tokens,
        **part.details,
    }


def changes_json(changes: Mapping[Action, Sequence[Change]]) -> dict[str, Any]:
    """Of each action {"count": in all, "reasons": [{"reason", "count", "places"}]}, without what never came up."""
    return {action: _changes(changes.get(action, ())) for action in ACTIONS}


def _changes(changes: Sequence[Change]) -> dict[str, Any]:
    there = [change for change in changes if change.count]
    return {
        "count": sum(change.count for change in there),
        "reasons": [
            {"reason": change.reason, "count": change.count, "places": list(change.places)[:PLACES]} for change in there
        ],
    }
