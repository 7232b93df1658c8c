"""Tags to entities and back, and their scores, against seqeval on a thousand random cases."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfcli.tasks.tag.schemes import Entity, broken, entities, labels, scheme_of, unified, write
from tfcli.tasks.tag.scores import score

TAGS = ["O", "O", *(f"{letter}-{kind}" for letter in "BIES" for kind in ("per", "creative-work")), "B", "I"]


def sentence(rng: random.Random, length: int) -> list[str]:
    """Tags that follow no scheme."""
    return [rng.choice(TAGS) for _ in range(length)]


def test_scores_equal_seqeval_on_a_thousand_random_cases() -> None:
    """Broken tags, labels with a hyphen, empty sets, untyped tags; precision, recall and F1, over all and by label."""
    metrics = pytest.importorskip("seqeval.metrics.sequence_labeling")
    rng = random.Random(1)
    for case in range(1000):
        lengths = [rng.randrange(0, 9) for _ in range(rng.randrange(1, 5))]
        true = [sentence(rng, length) for length in lengths]
        near = [[tag if rng.random() < 0.7 else rng.choice(TAGS) for tag in tags] for tags in true]
        guess = near if case % 3 else [["O"] * length for length in lengths]
        if case % 10 == 0:
            true = [["O"] * length for length in lengths]
        ours = score([entities(tags) for tags in true], [entities(tags) for tags in guess])
        theirs = metrics.precision_recall_fscore_support(true, guess, average="micro", zero_division=0)
        assert (ours.all.precision, ours.all.recall, ours.all.f1) == pytest.approx(theirs[:3], abs=1e-12)
        each = metrics.precision_recall_fscore_support(true, guess, average=None, zero_division=0)
        assert [s.f1 for s in ours.by_label.values()] == pytest.approx(list(each[2]), abs=1e-12)
        assert [s.true for s in ours.by_label.values()] == list(each[3])


def test_entities_equal_seqeval_get_entities() -> None:
    """Positions as well; theirs name the last word, ours the one after."""
    lines = pytest.importorskip("seqeval.metrics.sequence_labeling")
    rng = random.Random(2)
    for _ in range(1000):
        tags = sentence(rng, rng.randrange(0, 12))
        assert entities(tags) == [Entity(kind, start, end + 1) for kind, start, end in lines.get_entities(tags)]


@given(st.lists(st.sampled_from(TAGS), max_size=12), st.sampled_from(["bio", "bioes"]))
def test_repaired_tags_have_the_same_entities(tags: list[str], scheme: str) -> None:
    """Writing what was read changes no entity, and what was written follows its scheme."""
    made = write(entities(tags), len(tags), scheme)  # type: ignore[arg-type]
    assert entities(made) == entities(tags)
    assert broken(made, scheme) is None  # type: ignore[arg-type]


def test_what_breaks_a_scheme_is_found() -> None:
    assert broken(["O", "I-per"], "bio") == 1
    assert broken(["B-per", "I-loc"], "bio") == 1
    assert broken(["B-per", "I-per", "O"], "bio") is None
    assert broken(["B-per", "O"], "bioes") == 0, "an entity that does not end"
    assert broken(["S-per", "B-per", "I-per", "E-per"], "bioes") is None
    assert broken(["B", "I"], "bio") is None
    assert broken([], "bio") is None


def test_schemes_are_recognised_and_listed() -> None:
    assert scheme_of(["O", "B-x", "I-x"]) == "bio"
    assert scheme_of(["O", "S-x"]) == "bioes"
    assert unified(["U-x", "L-x", "B-x", "O", "L"]) == ["S-x", "E-x", "B-x", "O", "E"]
    assert labels(["b", "a", "b"], "bio") == ["O", "B-a", "I-a", "B-b", "I-b"]
    assert labels(["a"], "bioes") == ["O", "B-a", "I-a", "E-a", "S-a"]
