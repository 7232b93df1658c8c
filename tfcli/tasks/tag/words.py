"""Words of a text, and where each one lies: what tags are given to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tfcli.tasks.common.report import Report
from tfcli.tasks.tag.schemes import Entity

Span = tuple[int, int]
"""From a character to another, the last one not included."""
NO_SPACES = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Scripts that put no space between words (Thai, Lao, Burmese, Khmer, kana, ideographs): each character is a word."""
WORD = re.compile(rf"[{NO_SPACES}]|(?:(?![{NO_SPACES}])\w)(?:(?![{NO_SPACES}])[\w\u0300-\u036f])*|[^\w\s]")


def split(text: str) -> list[Span]:
    """The words of a text: runs of letters and digits, and every sign by itself, as BERT's first step."""
    return [match.span() for match in WORD.finditer(text)]


def joined(words: Iterable[str]) -> tuple[str, tuple[Span, ...]]:
    """Words with a space between them, and where each one lies."""
    listed = list(words)
    spans, at = [], 0
    for word in listed:
        spans.append((at, at + len(word)))
        at += len(word) + 1
    return " ".join(listed), tuple(spans)


def snapped(
    text: str, words: Sequence[Span], marked: Iterable[tuple[int, int, str]], report: Report, where: str
) -> list[Entity]:
    """Spans of characters with labels as entities of words, in order of the text.

    Whitespace at a span's ends is let go. What lies outside the text, has no word in it or overlaps a span before it is
    left out; what cuts a word is dequantized to it. The report is told of all of these.
    """
    found: list[Entity] = []
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
            report.fault("spans that begin or end within a word, dequantized to it", where, "repaired")
        found.append(Entity(label, first, last + 1))
        end_of_last = last + 1
    return found
