"""Precision, recall and F1 of whole entities, as seqeval (and conlleval) computes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tfcli.tasks.common.resample import interval
from tfcli.tasks.tag.schemes import Entity


@dataclass(frozen=True, slots=True)
class Score:
    """Counts of entities: ``correct`` ones have the right words and label. Division by zero gives 0, as in seqeval."""

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
    """Scores of all entities, and by label; ``sentences`` are the counts of each sentence, for resampling."""

    all: Score
    by_label: dict[str, Score] = field(default_factory=dict)
    sentences: tuple[Score, ...] = ()


def score(true: Sequence[Sequence[Entity]], predicted: Sequence[Sequence[Entity]]) -> Scores:
    """Score the predicted entities of each sentence."""
    counts: dict[str, list[int]] = {}
    sentences = []
    for gold, guess in zip(true, predicted, strict=True):
        sets = set(gold) & set(guess), set(guess), set(gold)
        for column, entities in enumerate(sets):
            for entity in entities:
                counts.setdefault(entity.label, [0, 0, 0])[column] += 1
        sentences.append(Score(*map(len, sets)))
    whole = Score(*(sum(column) for column in zip(*counts.values(), strict=True))) if counts else Score(0, 0, 0)
    by_label = {label: Score(*counts[label]) for label in sorted(counts)}
    return Scores(all=whole, by_label=by_label, sentences=tuple(sentences))


def as_numbers(scores: Scores) -> dict[str, Any]:
    """Return precision, recall and F1, over all (with 95 % bootstrap intervals) and by label."""
    counts = np.array([(s.correct, s.predicted, s.true) for s in scores.sentences], np.float64).reshape(-1, 3)
    # Over sums of sentences: correct / predicted, correct / true, 2 correct / (predicted + true).
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
    """Return a table of precision, recall and F1 in percent, and counts, by label and over all."""
    listed = [*scores.by_label.items(), ("all", scores.all)]
    width = max(len(label) for label, _ in listed)
    lines = [f"{'':{width}}  precision  recall      f1  entities"]
    for label, each in listed:
        numbers = f"{100 * each.precision:9.2f} {100 * each.recall:7.2f} {100 * each.f1:7.2f} {each.true:9,}"
        lines.append(f"{label:{width}}  {numbers}")
    return lines
