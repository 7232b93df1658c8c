"""The rules that fail a benchmark run."""

from __future__ import annotations

import pytest

from tfcli.benchmark.rules import Rule, broken, check, parse
from tfcli.errors import UserError

SUITES = ("decode", "prefill", "memory")


def test_a_rule_is_a_suite_a_sign_and_a_number() -> None:
    assert parse(["decode<0.97x"], SUITES) == [Rule(suite="decode", sign="<", limit=0.97, relative=True)]
    assert parse([" memory > 450 , prefill<.5x"], SUITES) == [
        Rule(suite="memory", sign=">", limit=450.0, relative=False),
        Rule(suite="prefill", sign="<", limit=0.5, relative=True),
    ]
    assert parse([], SUITES) == []
    assert str(parse(["decode < 0.970x"], SUITES)[0]) == "decode<0.97x"


@pytest.mark.parametrize(
    "text",
    ["", "decode", "decode<", "<1", "decode=1", "decode<=1", "decode<1y", "decode<-1", "decode<1x,", "decode<1e3"],
)
def test_what_is_not_a_rule_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match="is not a rule") as error:
        parse([text], SUITES)
    assert "decode<0.97x" in str(error.value.hint)


def test_an_unknown_suite_comes_with_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown suite 'decod'") as error:
        parse(["decod<1x"], SUITES)
    assert error.value.hint == "did you mean 'decode'?"


def test_a_rule_that_nothing_can_break_is_refused() -> None:
    """Catches a gate in CI that never closes."""
    ratio, absolute = parse(["decode<1x", "memory>450"], SUITES)
    check([ratio, absolute], ["decode", "memory"], ["decode"])
    check([ratio], ["decode"], None, beside=["decode"])
    check([absolute], ["memory"], None)
    with pytest.raises(UserError, match="memory is not measured here"):
        check([absolute], ["decode"], None)
    with pytest.raises(UserError, match="nothing to compare with"):
        check([ratio], ["decode"], None)
    with pytest.raises(UserError, match="the earlier results have no decode"):
        check([ratio], ["decode"], ["memory"], beside=["decode"])


def test_broken_rules_say_what_was_measured() -> None:
    lines = [{"suite": "decode", "value": 90.0, "unit": "tokens/s"}, {"suite": "memory", "value": 451.0, "unit": "MB"}]
    rules = parse(["decode<0.97x,decode<90,decode<91,decode>1.5x,memory>450"], SUITES)
    assert broken(rules, lines, {"decode": [0.96, 1.6], "memory": [1.0]}) == [
        "decode<0.97x: decode is 0.96 times",
        "decode<91: decode is 90 tokens/s",
        "decode>1.5x: decode is 1.6 times",
        "memory>450: memory is 451 MB",
    ]
    assert broken(rules[:1], lines, {"decode": [0.97]}) == []
