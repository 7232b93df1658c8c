"""Precision, recall and F1 of whole entities, as seqeval (and conlleval) computes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tfcli.tasks.common.resample import interval
from tfcli.tasks.tag.schemes import Entity


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Counts of entities: ``correct`` have words and label right, of those ``predicted`` and those that are ``true``.

    What would be divided by zero is 0, as in seqeval.
    """

    correct: int
    predicted: int
    true: int

    @property
    def precision(self) -> float:
        return self.correct / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        return self.correct / self.true if self.true else 0.0

    @property
    def f1(self) -> float:
        """2 P R / (P + R)."""
        total = self.predicted + self.true
        return 2 * self.correct / total if total else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Over all entities, and of each label; ``sentences`` are the counts of each sentence, to resample them."""

    all: Score
    by_label: dict[str, Score] = field(default_factory=dict)
    sentences: tuple[Score, ...] = ()


def score(true: Sequence[Sequence[Entity]], predicted: Sequence[Sequence[Entity]]) -> Scores:
    """Of a sentence at a time: its true entities and those that were predicted."""
    right: Counter[str] = Counter()
    found: Counter[str] = Counter()
    there: Counter[str] = Counter()
    sentences = []
    for gold, guess in zip(true, predicted, strict=True):
        gold_set, guess_set = set(gold), set(guess)
        both = gold_set & guess_set
        right.update(entity.label for entity in both)
        found.update(entity.label for entity in guess_set)
        there.update(entity.label for entity in gold_set)
        sentences.append(Score(correct=len(both), predicted=len(guess_set), true=len(gold_set)))
    by_label = {
        label: Score(correct=right[label], predicted=found[label], true=there[label])
        for label in sorted(found.keys() | there.keys())
    }
    whole = Score(correct=right.total(), predicted=found.total(), true=there.total())
    return Scores(all=whole, by_label=by_label, sentences=tuple(sentences))


def as_numbers(scores: Scores) -> dict[str, Any]:
    """Precision, recall and F1, over all ("interval": 95 % by the bootstrap) and in "by_label"."""
    counts = np.array([(s.correct, s.predicted, s.true) for s in scores.sentences], np.float64).reshape(-1, 3)
    # Of sums over sentences: correct / predicted, correct / true, 2 correct / (predicted + true).
    below = {"precision": (0.0, 1.0, 0.0), "recall": (0.0, 0.0, 1.0), "f1": (0.0, 0.5, 0.5)}
    return {
        **_three(scores.all),
        "interval": {name: interval(counts, _ratio(weights)) for name, weights in below.items()},
        "by_label": {label: {**_three(each), "support": each.true} for label, each in scores.by_label.items()},
    }


def _three(each: Score) -> dict[str, float]:
    return {"precision": each.precision, "recall": each.recall, "f1": each.f1}


def _ratio(weights: Sequence[float]) -> Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]:
    return lambda sums: sums[:, 0] / np.maximum(sums @ np.array(weights), 0.5)


def table(scores: Scores) -> list[str]:
    """Precision, recall, F1 and how many there are, of each label and of all, in percent."""
    listed = [*scores.by_label.items(), ("all", scores.all)]
    width = max(len(label) for label, _ in listed)
    lines = [f"{'':{width}}  precision  recall      f1  entities"]
    for label, each in listed:
        numbers = f"{100 * each.precision:9.2f} {100 * each.recall:7.2f} {100 * each.f1:7.2f} {each.true:9,}"
        lines.append(f"{label:{width}}  {numbers}")
    return lines
