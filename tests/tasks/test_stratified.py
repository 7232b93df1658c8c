"""The held-out part of examples with several labels: every label is in it as often as was asked for."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tfcli.tasks.classify import data
from tfcli.tasks.classify.options import ClassifyData
from tfcli.tasks.common.split import split


def drawn(seed: int, rows: int, labels: int = 30) -> list[tuple[str, ...]]:
    """Labels of Zipf's frequencies; some rows have none, many have two or three."""
    generator = np.random.default_rng(seed)
    share = 1 / np.arange(1, labels + 1)
    counts = generator.integers(0, 4, rows)
    drawn = (generator.choice(labels, count, replace=False, p=share / share.sum()) for count in counts)
    return [tuple(f"label {n}" for n in each) for each in drawn]


def held_out(rows: list[tuple[str, ...]], fraction: float, seed: int) -> set[int]:
    return set(split(len(rows), fraction, seed, labels=rows).held_out)


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
    held = held_out(rows, fraction, 1)
    chance = set(np.random.default_rng(seed).permutation(len(rows))[: round(fraction * len(rows))].tolist())
    assert gap(rows, held, fraction) < 0.8 < gap(rows, chance, fraction)
    assert abs(len(held) - fraction * len(rows)) <= 0.02 * len(rows)
    there, found = Counter(label for row in rows for label in row), Counter(label for i in held for label in rows[i])
    assert all(found[label] for label, count in there.items() if fraction * count >= 2)
    assert held == held_out(rows, fraction, 1), "the same every time"
    assert held != held_out(rows, fraction, 2)


def test_files_of_several_labels_are_split_so(tmp_path: Path) -> None:
    rows = drawn(5, 300, labels=6)
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"text {n}", "labels": list(row)}) + "\n" for n, row in enumerate(rows))
    )
    part = data.read([str(tmp_path / "a.jsonl")], ClassifyData(), name="the data", note=lambda line: None)
    held = held_out([example.labels for example in part.examples], 0.1, 1337)
    there, found = Counter(label for row in rows for label in row), Counter(x for n in held for x in rows[n])
    assert all(abs(found[label] - 0.1 * count) <= 2 for label, count in there.items())
