"""Exact match and F1 of answers, against the official scripts' rules written out and cases computed by hand."""

import collections
import random
import re
import string

import pytest

from tfcli.tasks.answer.scores import Outcome, best, best_threshold, exact, f1, normalized, score

# The rules of evaluate-v2.0.py (Rajpurkar et al. 2018), in its own order of steps.


def normalize_answer(s: str) -> str:
    s = "".join(ch for ch in s.lower() if ch not in set(string.punctuation))
    s = re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", s)
    return " ".join(s.split())


def get_tokens(s: str) -> list[str]:
    return normalize_answer(s).split() if s else []


def compute_exact(gold: str, pred: str) -> int:
    return int(normalize_answer(gold) == normalize_answer(pred))


def compute_f1(gold: str, pred: str) -> float:
    gold_toks, pred_toks = get_tokens(gold), get_tokens(pred)
    num_same = sum((collections.Counter(gold_toks) & collections.Counter(pred_toks)).values())
    if len(gold_toks) == 0 or len(pred_toks) == 0:
        return int(gold_toks == pred_toks)
    if num_same == 0:
        return 0
    precision, recall = 1.0 * num_same / len(pred_toks), 1.0 * num_same / len(gold_toks)
    return (2 * precision * recall) / (precision + recall)


def find_best_f1(outcomes: list[Outcome]) -> float:
    """Its search for a threshold, by trying every margin."""
    tries = [-1e9, *(outcome.no_answer_score for outcome in outcomes)]
    return max(score(outcomes, threshold=threshold).f1 for threshold in tries)


WORDS = [
    "the",
    "A",
    "an",
    "Paris",
    "paris.",
    "1,000",
    "$",
    "—",
    "e\u0301cole",
    "THE",
    "then",
    "a-b",
    "it's",
    "東京",
    "  ",
]


def text(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(0, 6)))


def test_rules_equal_the_official_ones_on_a_thousand_random_cases() -> None:
    """Order of the steps (articles after punctuation), words that repeat, answers of which nothing is left."""
    rng = random.Random(3)
    for _ in range(1000):
        pred, golds = text(rng), [text(rng) for _ in range(rng.randrange(0, 4))]
        for gold in golds:
            assert normalized(gold) == normalize_answer(gold)
            assert exact(pred, gold) == compute_exact(gold, pred)
            assert f1(pred, gold) == pytest.approx(compute_f1(gold, pred), abs=1e-12)
        kept = [gold for gold in golds if normalize_answer(gold)] or [""]
        expected = max(compute_exact(g, pred) for g in kept), max(compute_f1(g, pred) for g in kept)
        assert best(pred, golds) == pytest.approx(expected, abs=1e-12)


def test_cases_computed_by_hand() -> None:
    assert normalized("The  U.S.A.'s -- an apple, a pear!") == "usas apple pear"
    assert exact("the Eiffel Tower!", "Eiffel tower") == 1
    assert f1("Denver Broncos", "the Broncos") == pytest.approx(2 / 3)
    assert f1("to be or not to be", "to be") == pytest.approx(0.5)
    assert f1("Paris", "London") == 0
    assert best("", []) == (1, 1)
    assert best("Paris", []) == (0, 0)
    assert best("", ["Paris"]) == (0, 0)
    assert best("in Paris", ["London", "Paris", "in the Paris"]) == (1, 1)
    assert (f1("the", "a", version=2), f1("the", "a", version=1)) == (1, 0), "version 1 has no rule for no words"


def test_a_margin_above_the_threshold_is_no_answer() -> None:
    outcomes = [
        Outcome(answer="Paris", no_answer_score=-2.0, golds=("Paris",)),
        Outcome(answer="red house", no_answer_score=1.0, golds=("house",)),
        Outcome(answer="blue", no_answer_score=0.5, golds=()),
        Outcome(answer="green", no_answer_score=3.0, golds=()),
    ]
    at_zero = score(outcomes, threshold=0.0)
    assert (at_zero.exact_match, at_zero.f1) == (3 / 4, 3 / 4)
    assert (at_zero.has_answer_f1, at_zero.no_answer_accuracy) == (1 / 2, 1)
    at_two = score(outcomes, threshold=2.0)
    assert at_two.f1 == pytest.approx((1 + 2 / 3 + 0 + 1) / 4)
    answered = score(outcomes[:2], threshold=0.0, version=1)
    assert answered.f1 == pytest.approx((1 + 2 / 3) / 2), "version 1 always answers"
    assert answered.no_answer_accuracy is None


def test_the_best_threshold_is_the_best_of_all() -> None:
    """Also where margins are equal, where all or none should be answered, and at that very threshold."""
    rng = random.Random(5)
    for _ in range(300):
        outcomes = [
            Outcome(
                answer=rng.choice(["x", "x y", "z"]),
                no_answer_score=float(rng.randrange(-3, 4)),
                golds=rng.choice([(), ("x",), ("y",)]),
            )
            for _ in range(rng.randrange(1, 8))
        ]
        threshold, highest = best_threshold(outcomes)
        assert score(outcomes, threshold=threshold).f1 == pytest.approx(highest)
        assert highest == pytest.approx(find_best_f1(outcomes))
    assert best_threshold([]) == (0.0, 0.0)
