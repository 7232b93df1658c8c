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
    """Return a text in lower case, without ASCII punctuation and articles, and with single spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact(answer: str, gold: str) -> float:
    """Return 1 where the normalized texts are equal, else 0."""
    return float(normalized(answer) == normalized(gold))


def f1(answer: str, gold: str, *, version: Literal[1, 2] = 2) -> float:
    """Return F1 over the words that two normalized texts share, each as often as both have it.

    Where one of them has no words, version 2 gives 1 if the other has none either; version 1 gives 0.
    """
    a, b = normalized(answer).split(), normalized(gold).split()
    if version == 2 and not (a and b):
        return float(a == b)
    same = (Counter(a) & Counter(b)).total()
    return 2 * same / (len(a) + len(b)) if same else 0.0


def best(answer: str, golds: Sequence[str], *, version: Literal[1, 2] = 2) -> tuple[float, float]:
    """Return exact match and F1 against the best of the golds; "" is no answer, also as the gold of a question.

    Version 2 skips golds that are empty once normalized.
    """
    if version == 2:
        golds = [gold for gold in golds if normalized(gold)]
    golds = golds or [""]
    return max(exact(answer, gold) for gold in golds), max(f1(answer, gold, version=version) for gold in golds)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The best ``answer`` to one question, the lead of "no answer" over it (in logits), and the right answers."""

    answer: str
    no_answer_score: float
    golds: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Means from 0 to 1, None over no questions; ``pairs`` are (exact match, F1) of each question, for resampling."""

    exact_match: float
    f1: float
    has_answer_exact_match: float | None
    has_answer_f1: float | None
    no_answer_accuracy: float | None
    pairs: tuple[tuple[float, float], ...]


def score(outcomes: Sequence[Outcome], *, threshold: float, version: Literal[1, 2] = 2) -> Scores:
    """Score answers; a no-answer score above the threshold abstains (version 2 alone: in version 1 all have one)."""
    pairs = []
    for outcome in outcomes:
        abstains = version == 2 and outcome.no_answer_score > threshold
        pairs.append(best("" if abstains else outcome.answer, outcome.golds, version=version))
    has = [pair for pair, outcome in zip(pairs, outcomes, strict=True) if outcome.golds]
    none = [pair for pair, outcome in zip(pairs, outcomes, strict=True) if not outcome.golds]
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
    """Return the threshold on the no-answer score with the highest F1 (version 2), and that F1, as the official script.

    It is halfway between two scores, or beyond the outermost, so that it does not depend on the last digit of one.
    """
    if not outcomes:
        return 0.0, 0.0
    ordered = sorted(outcomes, key=lambda outcome: outcome.no_answer_score)
    margins = [outcome.no_answer_score for outcome in ordered]
    answered = [best(outcome.answer, outcome.golds)[1] for outcome in ordered]
    abstained = [best("", outcome.golds)[1] for outcome in ordered]
    total = sum(abstained)  # no question answered
    highest, count = total, 0
    for index in range(len(ordered)):
        total += answered[index] - abstained[index]
        tied = index + 1 < len(ordered) and margins[index + 1] == margins[index]
        if total > highest + 1e-9 and not tied:
            highest, count = total, index + 1
    if count == 0:
        return margins[0] - 1.0, highest / len(ordered)
    if count == len(ordered):
        return margins[-1] + 1.0, highest / len(ordered)
    return (margins[count - 1] + margins[count]) / 2, highest / len(ordered)


def as_numbers(outcomes: Sequence[Outcome], *, threshold: float, version: Literal[1, 2]) -> dict[str, Any]:
    """Return scores from 0 to 1, with 95 % bootstrap intervals over questions."""
    scores = score(outcomes, threshold=threshold, version=version)
    columns = np.concatenate([np.array(scores.pairs), np.ones((len(outcomes), 1))], axis=1)
    numbers: dict[str, Any] = {
        "exact_match": scores.exact_match,
        "f1": scores.f1,
        "interval": {
            "exact_match": interval(columns, lambda sums: sums[:, 0] / sums[:, 2]),
            "f1": interval(columns, lambda sums: sums[:, 1] / sums[:, 2]),
        },
        "examples": len(outcomes),
    }
    if version == 2:
        at, best = best_threshold(outcomes)
        numbers |= {
            "has_answer_exact_match": scores.has_answer_exact_match,
            "has_answer_f1": scores.has_answer_f1,
            "no_answer_accuracy": scores.no_answer_accuracy,
        }
        numbers |= {"threshold": threshold if math.isfinite(threshold) else None, "best_f1": best, "best_threshold": at}
    return numbers


def table(numbers: Mapping[str, Any]) -> list[str]:
    """Return the scores in percent, for people."""
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
        if (value := numbers.get(name)) is not None:
            low_high = numbers["interval"].get(name)
            between = f"  (95 %: {100 * low_high[0]:.2f} to {100 * low_high[1]:.2f})" if low_high else ""
            lines.append(f"{words:42} {100 * value:6.2f}{between}")
    return lines
