"""Errors for people: what they carry and the nearest spelling."""

from __future__ import annotations

import pytest

from tfcli.errors import Interrupted, RunError, TfcliError, UserError, nearest, unknown


@pytest.mark.parametrize(("kind", "code"), [(TfcliError, 1), (UserError, 2), (RunError, 1), (Interrupted, 130)])
def test_each_kind_has_its_exit_code(kind: type[TfcliError], code: int) -> None:
    error = kind("what happened", hint="what to do")
    assert (error.exit_code, error.message, error.hint, str(error)) == (
        code,
        "what happened",
        "what to do",
        "what happened (what to do)",
    )
    assert kind("alone").hint is None


@pytest.mark.parametrize(
    ("word", "expected"), [("smal", "small"), ("tniy", "tiny"), ("", None), ("zebra", None), ("tiny", "tiny")]
)
def test_nearest(word: str, expected: str | None) -> None:
    assert nearest(word, ["tiny", "small", "12m"]) == expected


def test_unknown_names_the_nearest_else_all() -> None:
    near = unknown("preset", "smal", {"tiny": 1, "small": 2})
    assert (near.exit_code, near.message, near.hint) == (2, "unknown preset 'smal'", "did you mean 'small'?")
    assert unknown("preset", "zebra", ["tiny", "small"]).hint == "known: small, tiny"
