"""Precision, recall and F1 of whole entities, as seqeval (and conlleval) computes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tfcli.tasks.entities.schemes import Entity


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
