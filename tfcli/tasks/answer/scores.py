"""Exact match and F1 of answers, by the rules of the official SQuAD scripts (Rajpurkar et al. 2016, 2018)."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tfcli.tasks.common.resample import interval

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = dict.fromkeys(map(ord, string.punctuation))


def normalized(text: str) -> str:
    """Lower case, without ASCII punctuation, then without articles, then with single spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact(answer: str, gold: str) -> float:
    """1 where the normalised texts are equal, else 0."""
    return float(normalized(answer) == normalized(gold))


def f1(answer: str, gold: str, *, version: Literal[1, 2] = 2) -> float:
    """F1 over the words that two normalised texts share, each as often as both have it.

    Where one of them has no word, version 2 gives 1 if the other has none either; version 1 gives 0.
    """
    a, b = normalized(answer).split(), normalized(gold).split()
    if version == 2 and not (a and b):
        return float(a == b)
    same = (Counter(a) & Counter(b)).total()
    return 2 * same / (len(a) + len(b)) if same else 0.0


def best(answer: str, golds: Sequence[str], *, version: Literal[1, 2] = 2) -> tuple[float, float]:
    """Exact match and F1 against the best of the golds; "" is no answer, and the gold of a question without one.

    Version 2 leaves out golds of which normalising leaves nothing.
    """
    if version == 2:
        golds = [gold for gold in golds if normalized(gold)]
    golds = golds or [""]
    return max(exact(answer, gold) for gold in golds), max(f1(answer, gold, version=version) for gold in golds)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a model says to one question: its best ``answer``, and by how much "no answer" scores above it."""

    answer: str
    null_margin: float
    golds: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Means from 0 to 1; None over no question. ``pairs`` are (exact match, F1) of each question, to resample them."""

    exact_match: float
    f1: float
    has_answer_exact_match: float | None
    has_answer_f1: float | None
    no_answer_accuracy: float | None
    pairs: tuple[tuple[float, float], ...]


def score(outcomes: Sequence[Outcome], *, threshold: float, version: Literal[1, 2] = 2) -> Scores:
    """Where ``null_margin`` is above the threshold, "" is the answer (version 2; in version 1 all have one)."""
    pairs, with_answer = [], []
    for outcome in outcomes:
        silent = version == 2 and outcome.null_margin > threshold
        pairs.append(best("" if silent else outcome.answer, outcome.golds, version=version))
        with_answer.append(bool(outcome.golds))
    has = [pair for pair, known in zip(pairs, with_answer, strict=True) if known]
    none = [pair for pair, known in zip(pairs, with_answer, strict=True) if not known]
    return Scores(
        exact_match=_mean(pairs, 0) or 0.0,
        f1=_mean(pairs, 1) or 0.0,
        has_answer_exact_match=_mean(has, 0),
        has_answer_f1=_mean(has, 1),
        no_answer_accuracy=_mean(none, 0),
        pairs=tuple(pairs),
    )


def _mean(pairs: Sequence[tuple[float, float]], which: int) -> float | None:
    return sum(pair[which] for pair in pairs) / len(pairs) if pairs else None


def best_threshold(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """The threshold on ``null_margin`` with the highest F1 (version 2), and that F1; the official script's search.

    It lies halfway between two margins, so that it does not hang on the last digit of one; at the ends beyond them.
    """
    if not outcomes:
        return 0.0, 0.0
    ordered = sorted(outcomes, key=lambda outcome: outcome.null_margin)
    said = [best(outcome.answer, outcome.golds)[1] for outcome in ordered]
    silent = [best("", outcome.golds)[1] for outcome in ordered]
    total = sum(silent)  # all questions unanswered
    highest, count = total, 0
    for index in range(len(ordered)):
        total += said[index] - silent[index]
        tied = index + 1 < len(ordered) and ordered[index + 1].null_margin == ordered[index].null_margin
        if total > highest + 1e-9 and not tied:
            highest, count = total, index + 1
    margins = [outcome.null_margin for outcome in ordered]
    if count == 0:
        return margins[0] - 1.0, highest / len(ordered)
    if count == len(ordered):
        return margins[-1] + 1.0, highest / len(ordered)
    return (margins[count - 1] + margins[count]) / 2, highest / len(ordered)


def as_numbers(found: Sequence[Outcome], *, threshold: float, version: Literal[1, 2]) -> dict[str, Any]:
    """Scores from 0 to 1 by the names of DESIGN.md, with 95 % bootstrap intervals over questions."""
    scores = score(found, threshold=threshold, version=version)
    columns = np.concatenate([np.array(scores.pairs), np.ones((len(found), 1))], axis=1)
    numbers: dict[str, Any] = {
        "exact_match": scores.exact_match,
        "f1": scores.f1,
        "interval": {
            "exact_match": interval(columns, lambda sums: sums[:, 0] / sums[:, 2]),
            "f1": interval(columns, lambda sums: sums[:, 1] / sums[:, 2]),
        },
        "examples": len(found),
    }
    if version == 2:
        at, best = best_threshold(found)
        numbers |= _by_kind(scores)
        numbers |= {"threshold": threshold if math.isfinite(threshold) else None, "best_f1": best, "best_threshold": at}
    return numbers


def _by_kind(scores: Scores) -> dict[str, float | None]:
    return {
        "has_answer_exact_match": scores.has_answer_exact_match,
        "has_answer_f1": scores.has_answer_f1,
        "no_answer_accuracy": scores.no_answer_accuracy,
    }


def table(numbers: Mapping[str, Any]) -> list[str]:
    """Scores in percent, for people."""
    shown = {
        "exact match": "exact_match",
        "F1": "f1",
        "exact match, of questions with an answer": "has_answer_exact_match",
        "F1, of questions with an answer": "has_answer_f1",
        "right, of questions without one": "no_answer_accuracy",
        "F1 at the best threshold for this data": "best_f1",
    }
    lines = []
    for words, name in shown.items():
        value = numbers.get(name)
        if value is not None:
            low_high = numbers["interval"].get(name)
            between = f"  (95 %: {100 * low_high[0]:.2f} to {100 * low_high[1]:.2f})" if low_high else ""
            lines.append(f"{words:42} {100 * value:6.2f}{between}")
    return lines
