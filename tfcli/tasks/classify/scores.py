"""Scores of predicted labels, as in scikit-learn, with bootstrap intervals, and tables of them for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tfcli.tasks.common.resample import interval

Labels = npt.NDArray[np.int64]
Sets = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class OfClass:
    """The scores of one label."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


def confusion(true: Labels, predicted: Labels, labels: int) -> npt.NDArray[np.int64]:
    """Return how often each true label (row) was predicted as each label (column)."""
    return np.bincount(true * labels + predicted, minlength=labels * labels).reshape(labels, labels)


def f1_of(hits: npt.NDArray[Any], predicted: npt.NDArray[Any], true: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return F1 = 2 hits / (predicted + true); 0 where there is neither."""
    total = predicted + true
    return np.divide(2.0 * hits, total, out=np.zeros(np.shape(total)), where=total > 0)


def _macro(matrix: npt.NDArray[np.int64]) -> float:
    """Return the mean F1 of the labels that are true or predicted somewhere."""
    predicted, true = matrix.sum(axis=0), matrix.sum(axis=1)
    there = predicted + true > 0
    return float(f1_of(np.diag(matrix), predicted, true)[there].mean()) if there.any() else 0.0


def single(true: Labels, predicted: Labels, labels: int) -> dict[str, float]:
    """Return accuracy and macro F1 of one label each."""
    matrix = confusion(true, predicted, labels)
    return {"accuracy": float(np.trace(matrix) / max(1, len(true))), "macro_f1": _macro(matrix)}


def multi(true: Sets, predicted: Sets) -> dict[str, float]:
    """Return accuracy of whole sets (N, labels), macro F1, and micro precision, recall and F1."""
    hits, found, there = (true & predicted).sum(axis=0), predicted.sum(axis=0), true.sum(axis=0)
    return {
        "accuracy": float((true == predicted).all(axis=1).mean()) if len(true) else 0.0,
        "macro_f1": float(f1_of(hits, found, there).mean()),
        "precision": float(hits.sum() / max(1, found.sum())),
        "recall": float(hits.sum() / max(1, there.sum())),
        "f1": float(f1_of(hits.sum(), found.sum(), there.sum())),
    }


def by_class(true: Sets, predicted: Sets, labels: Sequence[str]) -> list[OfClass]:
    """Return precision, recall, F1 and support of each label, for sets (N, labels)."""
    hits, found, there = (true & predicted).sum(axis=0), predicted.sum(axis=0), true.sum(axis=0)
    f1 = f1_of(hits, found, there)
    return [
        OfClass(
            label=label,
            precision=float(hits[i] / found[i]) if found[i] else 0.0,
            recall=float(hits[i] / there[i]) if there[i] else 0.0,
            f1=float(f1[i]),
            support=int(there[i]),
        )
        for i, label in enumerate(labels)
    ]


def intervals(true: Sets, predicted: Sets, *, multi: bool) -> dict[str, list[float]]:
    """Return 95 % bootstrap intervals of accuracy and macro F1, for sets (N, labels)."""
    labels = true.shape[1]
    right = (true == predicted).all(axis=1, keepdims=True)
    columns = np.concatenate([true & predicted, predicted, true, right, np.ones_like(right)], axis=1).astype(float)

    def macro_f1(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        hits, found, there = (sums[:, part * labels : (part + 1) * labels] for part in range(3))
        seen = np.ones_like(hits) if multi else found + there > 0
        means: npt.NDArray[np.float64] = f1_of(hits, found, there).sum(axis=1) / seen.sum(axis=1)
        return means

    scores = {"accuracy": lambda sums: sums[:, -2] / sums[:, -1], "macro_f1": macro_f1}
    return {name: interval(columns, score) for name, score in scores.items()}


def report(classes: Sequence[OfClass]) -> list[str]:
    """Return a table of the scores of each label."""
    width = min(30, max(len("label"), *(len(c.label) for c in classes)))
    rows = [
        f"{shortened(c.label, width):{width}}  {c.precision:9.4f}  {c.recall:6.4f}  {c.f1:6.4f}  {c.support:8}"
        for c in classes
    ]
    return [f"{'label':{width}}  precision  recall      f1  examples", *rows]


def table(matrix: npt.NDArray[np.int64], labels: Sequence[str], *, most: int = 20) -> list[str]:
    """Return the confusion matrix, true labels down, predicted across; of many labels, the most confused pairs."""
    if len(labels) > most:
        wrong = [(int(matrix[i, j]), i, j) for i, j in zip(*np.nonzero(matrix), strict=True) if i != j]
        top = sorted(wrong, reverse=True)[:10]
        return ["most often confused:", *(f"{n:6}  {labels[i]} predicted as {labels[j]}" for n, i, j in top)]
    width = min(16, max(len(label) for label in labels))
    cell = max(4, min(10, max(len(label) for label in labels)), len(str(matrix.max())))
    lines = ["true \\ predicted".ljust(width) + "".join(f"  {shortened(label, cell):>{cell}}" for label in labels)]
    head = max(width, len("true \\ predicted"))
    lines += [
        shortened(label, width).ljust(head) + "".join(f"  {n:>{cell}}" for n in row)
        for label, row in zip(labels, matrix, strict=True)
    ]
    return lines


def shortened(text: str, width: int) -> str:
    """Return a text on one line, with an ellipsis beyond ``width`` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"
