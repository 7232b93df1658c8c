"""Stop strings across the borders of tokens."""

from hypothesis import given
from hypothesis import strategies as st

from tfcli.infer.stopping import StopFilter


def shown(parts: list[str], stops: list[str]) -> tuple[str, bool]:
    filter = StopFilter(stops)
    out = ""
    for part in parts:
        out += filter.push(part)
        if filter.stopped:
            return out, True
    return out + filter.flush(), False


def test_a_stop_string_in_several_tokens_is_never_shown() -> None:
    """Would catch the first half of a stop string on the screen."""
    filter = StopFilter(["\n\nQ:"])
    assert [filter.push(part) for part in ["one\n", "\n", "Q"]] == ["one", "", ""]
    assert filter.push(":more") == ""
    assert filter.stopped


def test_text_that_only_began_like_one_comes_later() -> None:
    """Would catch text that is held back for ever, or lost at the end."""
    filter = StopFilter(["###"])
    assert filter.push("a##") == "a"
    assert filter.push("b#") == "##b"
    assert filter.flush() == "#"


def test_the_earliest_of_several_ends_the_text() -> None:
    """Would catch the first in the list winning over the first in the text."""
    assert shown(["a END b STOP"], ["STOP", "END"]) == ("a ", True)


@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_any_cut_of_the_text_gives_what_the_whole_gives(parts: list[str], stops: list[str]) -> None:
    """The law, up to which stop completes first: what is shown has no stop string and is a beginning of the text."""
    out, stopped = shown(parts, stops)
    whole = "".join(parts)
    assert whole.startswith(out)
    assert not any(stop in out for stop in stops)
    assert stopped == any(stop in whole for stop in stops)
    if not stopped:
        assert out == whole
