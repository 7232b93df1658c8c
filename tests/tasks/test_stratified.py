"""The held-out part of examples with several labels: every label is in it as often as was asked for."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tfcli.tasks.classify import data
from tfcli.tasks.classify.options import ClassifyData


def drawn(seed: int, rows: int, labels: int = 30) -> list[tuple[str, ...]]:
    """Labels of Zipf's frequencies; some rows have none, many have two or three."""
    generator = np.random.default_rng(seed)
    share = 1 / np.arange(1, labels + 1)
    counts = generator.integers(0, 4, rows)
    drawn = (generator.choice(labels, count, replace=False, p=share / share.sum()) for count in counts)
    return [tuple(f"label {n}" for n in each) for each in drawn]


def gap(rows: list[tuple[str, ...]], held: set[int], fraction: float) -> float:
    """The mean over labels of how many examples the held-out part has too many or too few (Sechidis et al., 4.2)."""
    there = Counter(label for row in rows for label in row)
    found = Counter(label for index in held for label in rows[index])
    return float(np.mean([abs(found[label] - fraction * count) for label, count in there.items()]))


@pytest.mark.parametrize("fraction", [0.1, 0.25])
@pytest.mark.parametrize("seed", range(3))
def test_every_label_has_its_share(seed: int, fraction: float) -> None:
    """A draw by chance is off by several examples a label, and leaves rare labels out."""
    rows = drawn(seed, 800)
    held = data.stratified(rows, fraction, np.random.default_rng(1))
    chance = set(np.random.default_rng(seed).permutation(len(rows))[: round(fraction * len(rows))].tolist())
    assert gap(rows, held, fraction) < 0.8 < gap(rows, chance, fraction)
    assert abs(len(held) - fraction * len(rows)) <= 0.02 * len(rows)
    there, found = Counter(label for row in rows for label in row), Counter(label for i in held for label in rows[i])
    assert all(found[label] for label, count in there.items() if fraction * count >= 2)
    assert held == data.stratified(rows, fraction, np.random.default_rng(1)), "the same every time"
    assert held != data.stratified(rows, fraction, np.random.default_rng(2))


def test_with_one_label_each_it_is_a_stratified_draw() -> None:
    rows = [(label,) for label, count in {"a": 60, "b": 30, "c": 10, "d": 1}.items() for _ in range(count)]
    held = data.stratified(rows, 0.1, np.random.default_rng(0))
    assert Counter(rows[index][0] for index in held) == {"a": 6, "b": 3, "c": 1}


def test_files_of_several_labels_are_split_so(tmp_path: Path) -> None:
    rows = drawn(5, 300, labels=6)
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"text {n}", "labels": list(row)}) + "\n" for n, row in enumerate(rows))
    )
    part = data.read([str(tmp_path / "a.jsonl")], ClassifyData(), name="the data", note=lambda line: None)
    train, held = data.split(part, 0.1, 1337)
    assert len(train) + len(held) == 300
    there, found = Counter(label for row in rows for label in row), Counter(x for e in held for x in e.labels)
    assert all(abs(found[label] - 0.1 * count) <= 2 for label, count in there.items())


def test_few_examples_leave_something_on_both_sides(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"{n}", "labels": ["a", "b"]}) + "\n" for n in range(3))
    )
    part = data.read([str(tmp_path / "a.jsonl")], ClassifyData(), name="the data", note=lambda line: None)
    train, held = data.split(part, 0.1, 1)
    assert (len(train), len(held)) == (2, 1)
