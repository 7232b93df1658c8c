"""Named entities as tags of words, in BIO, BIOES and other schemes, and back.

Tags are read as conlleval does (Tjong Kim Sang and De Meulder 2003), so that entities equal those of seqeval.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

Scheme = Literal["bio", "bioes"]

TAG = re.compile(r"O|[BIES](-.+)?", re.DOTALL)
UNTYPED = "_"
"""Label of entities whose tags have none, such as "B"."""
BILOU = {"L": "E", "U": "S"}
"""Letters of BILOU (Ratinov and Roth 2009), and those of BIOES."""


class Entity(NamedTuple):
    """Words ``start`` to ``end`` (exclusive) with one label."""

    label: str
    start: int
    end: int


def _split(tag: str) -> tuple[str, str]:
    return tag[0], tag[2:] or UNTYPED


def entities(tags: Sequence[str]) -> list[Entity]:
    """Return the entities of a sentence, also where its tags break their scheme; they never overlap.

    An entity begins at B or S, at I or E after O, E or S, and where the label changes; it ends after E or S, before O,
    B or S, and where the label changes.
    """
    spans: list[Entity] = []
    letter, label, start = "O", UNTYPED, 0
    for index, tag in enumerate([*tags, "O"]):
        here, kind = _split(tag)
        fresh = here in "BS" or letter in "OES" or label != kind
        if letter != "O" and (here == "O" or fresh):
            spans.append(Entity(label, start, index))
        if here != "O" and fresh:
            start = index
        letter, label = here, kind
    return spans


def write(spans: Iterable[Entity], length: int, scheme: Scheme) -> list[str]:
    """Return the tags of a sentence of ``length`` words with these entities, which must not overlap."""
    tags = ["O"] * length
    for label, start, end in spans:
        tags[start:end] = [f"I-{label}"] * (end - start)
        tags[start] = f"B-{label}"
        if scheme == "bioes":
            tags[end - 1] = f"E-{label}"
            if end - start == 1:
                tags[start] = f"S-{label}"
    return tags


def labels(kinds: Iterable[str], scheme: Scheme) -> list[str]:
    """Return every tag of the scheme for these kinds of entities, "O" first."""
    return ["O", *(f"{letter}-{kind}" for kind in sorted(set(kinds)) for letter in scheme.upper() if letter != "O")]


def unified(tags: Sequence[str]) -> list[str]:
    """Return tags with BILOU as BIOES, others unchanged."""
    return [BILOU.get(tag[:1], tag[:1]) + tag[1:] if tag[1:2] in ("", "-") else tag for tag in tags]


def scheme_of(tags: Iterable[str]) -> Scheme:
    """Return the scheme of a data set's tags (BILOU unified): BIOES where E or S occurs."""
    return "bioes" if any(tag[:1] in ("E", "S") for tag in tags) else "bio"


def broken(tags: Sequence[str], scheme: Scheme) -> int | None:
    """Return the first word whose tag does not follow the scheme, None where all do."""
    right = write(entities(tags), len(tags), scheme)
    bare = [f"{tag}-{UNTYPED}" if len(tag) == 1 and tag != "O" else tag for tag in tags]
    return next((index for index, (a, b) in enumerate(zip(bare, right, strict=True)) if a != b), None)
