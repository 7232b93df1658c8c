"""The data report, data.json: what a command read, held out, dropped, truncated and repaired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FORM = 2
"""The version of this layout; earlier reports, which differed from task to task, have no "form"."""
Action = Literal["dropped", "cut", "repaired"]
PLACES = 3
"""Places listed for each reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One file or ``hf:NAME``: its bytes as text, its documents (or labeled examples) and the split they are in."""

    name: str
    part: Literal["train", "val", "both"]
    bytes: int
    documents: int = 0
    tokens: int = 0
    sha256: str = ""
    """The hash of the file or of the rows of ``hf:NAME``; "" for text, which is hashed as a whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A split, for training or held out; ``details`` are the task's own figures."""

    documents: int
    tokens: int
    bytes: int | None = None
    """UTF-8 bytes of the text; None for labeled data."""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """The number of changes for one reason, and the first places ("file:line" where known)."""

    reason: str
    count: int
    places: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class DataReport:
    """The content of data.json."""

    task: str
    """pretrain, or the name of the task."""
    unit: str
    """The plural noun for what "documents" counts."""
    sources: Sequence[Source]
    split: Mapping[str, Any]
    """The rule of the held-out split and its parameters: {"rule", "fraction", "seed"}."""
    train: Part
    val: Part
    changes: Mapping[Action, Sequence[Change]] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)
    """Further remarks on the data, and how often each applies."""
    within_train: int
    """Training documents equal to an earlier one."""
    across_splits: int
    """Held-out documents that are also in the training split."""
    byte_fallback_rate: float | None = None
    """Share of the tokens that are bytes of characters without a piece; None if the tokenizer has no byte pieces."""
    unknown_rate: float | None = None
    content_hash: str
    """Hash of everything that was read: a run resumes only with the same data."""
    tokenizer_hash: str
    details: Mapping[str, Any] = field(default_factory=dict)
    """The task's own settings and figures."""

    def as_json(self) -> dict[str, Any]:
        """Return plain values, with the bytes and tokens of all sources added up."""
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
        """The held-out share: of the bytes of a text, else of the documents."""
        train, val = self.train.bytes, self.val.bytes
        if train is None or val is None:
            train, val = self.train.documents, self.val.documents
        return val / max(1, train + val)


def _part(part: Part) -> dict[str, Any]:
    return {"documents": part.documents, "bytes": part.bytes, "tokens": part.tokens, **part.details}


def changes_json(changes: Mapping[Action, Sequence[Change]]) -> dict[str, Any]:
    """Return {"count": in all, "reasons": [{"reason", "count", "places"}]} for each action."""
    return {action: _changes(changes.get(action, ())) for action in ("dropped", "cut", "repaired")}


def _changes(changes: Sequence[Change]) -> dict[str, Any]:
    reasons = [asdict(change) | {"places": list(change.places)[:PLACES]} for change in changes if change.count]
    return {"count": sum(change.count for change in changes), "reasons": reasons}
