"""Words of a text and their spans: what is tagged."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tfcli.tasks.common.report import Report
from tfcli.tasks.tag.schemes import Entity

Span = tuple[int, int]
"""First and last character, the last exclusive."""
NO_SPACES = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Scripts without spaces between words (Thai, Lao, Burmese, Khmer, kana, ideographs): each character is a word."""
WORD = re.compile(rf"[{NO_SPACES}]|(?:(?![{NO_SPACES}])\w)(?:(?![{NO_SPACES}])[\w\u0300-\u036f])*|[^\w\s]")


def split(text: str) -> list[Span]:
    """Return the words of a text: runs of letters and digits, and every sign by itself, as BERT's pretokenizer."""
    return [match.span() for match in WORD.finditer(text)]


def joined(words: Iterable[str]) -> tuple[str, tuple[Span, ...]]:
    """Return words joined by spaces, and their spans."""
    listed = list(words)
    spans, at = [], 0
    for word in listed:
        spans.append((at, at + len(word)))
        at += len(word) + 1
    return " ".join(listed), tuple(spans)


def snapped(
    text: str, words: Sequence[Span], marked: Iterable[tuple[int, int, str]], report: Report, where: str
) -> list[Entity]:
    """Return labelled spans of characters as entities of words, in the order of the text.

    Whitespace at the ends of a span is ignored. Spans outside the text, without a word, or overlapping an earlier one
    are skipped; a span that cuts a word is extended to it. The report counts all of these.
    """
    snapped: list[Entity] = []
    end_of_last = 0
    for start, end, label in sorted(marked):
        if not 0 <= start < end <= len(text):
            report.fault("spans outside the text, left out", where)
            continue
        while start < end and text[start].isspace():
            start += 1
        while start < end and text[end - 1].isspace():
            end -= 1
        inside = [index for index, (a, b) in enumerate(words) if a < end and b > start]
        if not inside:
            report.fault("spans without a word in them, left out", where)
            continue
        first, last = inside[0], inside[-1]
        if first < end_of_last:
            report.fault("spans that overlap another, left out", where)
            continue
        if (words[first][0], words[last][1]) != (start, end):
            report.fault("spans that begin or end within a word, extended to it", where, "repaired")
        snapped.append(Entity(label, first, last + 1))
        end_of_last = last + 1
    return snapped
