"""What is held out: every example on one side, the right share, the same for one seed and another for the next."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfcli.errors import UserError
from tfcli.tasks.applications import configs
from tfcli.tasks.common.report import Report
from tfcli.tasks.common.split import Split, last, split

FRACTIONS = st.floats(0.01, 0.9)
SEEDS = st.integers(-(2**63), 2**63 - 1)


def whole(made: Split, count: int) -> bool:
    return sorted(made.train + made.held_out) == list(range(count)) and bool(made.train) and bool(made.held_out)


@given(count=st.integers(2, 300), fraction=FRACTIONS, seed=SEEDS)
def test_a_plain_split(count: int, fraction: float, seed: int) -> None:
    made = split(count, fraction, seed)
    assert whole(made, count)
    assert abs(len(made.held_out) - fraction * count) <= 1
    assert made == split(count, fraction, seed), "the same every time"
    assert made.how == {"rule": "random", "fraction": fraction, "seed": seed}


@given(labels=st.lists(st.sampled_from("abcd"), min_size=8, max_size=200), fraction=FRACTIONS, seed=SEEDS)
def test_a_stratified_split(labels: list[str], fraction: float, seed: int) -> None:
    """Of each label about the same part, and one left to learn from."""
    made = split(len(labels), fraction, seed, labels=[(label,) for label in labels])
    assert whole(made, len(labels))
    held = Counter(labels[index] for index in made.held_out)
    for label, count in Counter(labels).items():
        assert abs(held[label] - fraction * count) <= 1
        assert held[label] < count
    assert made == split(len(labels), fraction, seed, labels=[(label,) for label in labels])


@given(
    labels=st.lists(st.sets(st.sampled_from("abcd")).map(tuple), min_size=2, max_size=80),
    fraction=FRACTIONS,
    seed=SEEDS,
)
def test_a_split_of_several_labels(labels: list[tuple[str, ...]], fraction: float, seed: int) -> None:
    labels = [*labels, ("a", "b"), (), ("a", "c")]
    made = split(len(labels), fraction, seed, labels=labels)
    assert whole(made, len(labels))
    assert made == split(len(labels), fraction, seed, labels=labels)


@given(groups=st.lists(st.integers(0, 9), min_size=2, max_size=200), fraction=FRACTIONS, seed=SEEDS)
def test_groups_stay_together(groups: list[int], fraction: float, seed: int) -> None:
    """The share is right within the largest group."""
    groups = [*groups, 10, 11]
    made = split(len(groups), fraction, seed, groups=groups)
    assert whole(made, len(groups))
    assert not {groups[index] for index in made.train} & {groups[index] for index in made.held_out}
    assert abs(len(made.held_out) - fraction * len(groups)) <= max(Counter(groups).values())
    assert made == split(len(groups), fraction, seed, groups=groups)


@given(seeds=st.lists(SEEDS, min_size=2, max_size=2, unique=True))
def test_another_seed_gives_another_split(seeds: list[int]) -> None:
    labels = [(f"{n % 3}",) for n in range(200)]
    several = [(f"{n % 3}", f"{n % 7}") for n in range(200)]
    for more in ({}, {"labels": labels}, {"labels": several}, {"groups": range(200)}):
        assert split(200, 0.3, seeds[0], **more).held_out != split(200, 0.3, seeds[1], **more).held_out  # type: ignore[arg-type]


def test_too_little_is_said() -> None:
    with pytest.raises(UserError, match="1 pairs are too few to hold some out"):
        split(1, 0.1, 0, things="pairs")
    with pytest.raises(UserError, match="the 5 questions are of one group, so none can be held out"):
        split(5, 0.1, 0, groups=["one"] * 5, things="questions")
    with pytest.raises(UserError, match="2 examples are too few"):
        split(2, 0.1, 0, labels=[("a",), ("b",)])
    made = split(100, 0.001, 0, groups=["big"] * 90 + ["small"] * 10)
    assert made.train
    assert made.held_out


@given(documents=st.lists(st.text(min_size=1), min_size=1, max_size=30), fraction=FRACTIONS)
def test_of_a_text_the_end_is_held_out(documents: list[str], fraction: float) -> None:
    train, val, how = last(documents, fraction)
    assert "".join(train + val) == "".join(documents)
    assert how == {"rule": "end of text", "fraction": fraction}
    assert len(documents) == 1 or (train and val and train + val == documents)


@pytest.mark.parametrize("task", ["tag", "answer", "chat"])
def test_the_seed_of_a_run_decides_what_is_held_out(tmp_path: Path, task: str) -> None:
    """Catches a task whose part is the same for every --seed, and equal texts on both sides."""
    rows: dict[str, Any] = {
        "tag": lambda n: {"tokens": [f"w{n}", "x"], "tags": ["B-a", "O"]},
        "answer": lambda n: {"question": "q", "context": f"c{n} x", "answers": {"text": ["x"], "answer_start": [3]}},
        "chat": lambda n: {"prompt": f"p{n}", "response": "r"},
    }
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(rows[task](n // 2)) + "\n" for n in range(80)))
    module: Any = importlib.import_module(f"tfcli.tasks.{task}.task")

    def held(seed: int) -> tuple[set[str], Any]:
        start: Any = SimpleNamespace(data=[str(path)], config=configs()[task](seed=seed), note=lambda line: None)
        data = module._halves(start, Report())
        assert (len(data.train), len(data.held_out)) == (72, 8)
        return {one.where for one in data.held_out}, data.how

    assert held(1) == held(1)
    assert held(1)[0] != held(2)[0]
    assert held(2)[1] == {"rule": "random groups", "fraction": 0.1, "seed": 2}
