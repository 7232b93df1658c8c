"""Conversations: every form is read, what is broken is counted, and only answers are marked, by what they decode to."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tokenizer

from tfcli.errors import UserError
from tfcli.tasks.chat import data as rows
from tfcli.tasks.chat.data import Conversation, Fields
from tfcli.tasks.chat.encode import Encoded, encode, fit, lay, pack, template_for
from tfcli.tasks.common.report import Report
from tfcli.text.chat.messages import CHATML, ChatTemplate

ASK, SAY = {"role": "user", "content": "a king?"}, {"role": "assistant", "content": "the sun\nitself"}
QUIET = {"role": "system", "content": "be brief"}


def written(path: Path, *entries: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in entries) + "\n")
    return path


def read(path: Path, report: Report, **options: Any) -> list[Conversation]:
    return rows.read(path, report, **options)


def roles(conversation: Conversation) -> str:
    return "".join(message["role"][0] for message in conversation.messages)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [QUIET, ASK, SAY, ASK, SAY]}, "suaua"),
        ({"messages": [ASK, {"role": "tool", "content": "42"}, SAY], "id": 3}, "uta"),
        ({"prompt": "a", "response": "b"}, "ua"),
        ({"prompt": "a", "completion": "b", "system": "c"}, "sua"),
        ({"question": "a", "answer": "b"}, "ua"),
        ({"instruction": "a", "input": "b", "output": "c"}, "ua"),
        ({"instruction": "a", "input": "", "output": "c"}, "ua"),
        ({"conversations": [{"from": "system", "value": "x"}, {"from": "human", "value": "y"},
                            {"from": "gpt", "value": "z"}]}, "sua"),
    ],
)  # fmt: skip
def test_every_form_is_read(tmp_path: Path, row: Any, expected: str) -> None:
    report = Report(strict=True)
    lines = read(written(tmp_path / "a.jsonl", row, "", row), report)
    assert [roles(one) for one in lines] == [expected, expected]
    assert lines[1].where.endswith("a.jsonl:3")
    whole = read(written(tmp_path / "a.json", json.dumps([row, row], indent=1)), report)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    packed = read(tmp_path / "a.jsonl.gz", report)
    assert [one.messages for one in (*whole, *packed)] == [lines[0].messages] * 3


def test_alpaca_and_named_fields(tmp_path: Path) -> None:
    alpaca = read(written(tmp_path / "a.jsonl", {"instruction": "a", "input": "b", "output": "c"}), Report())
    assert [message["content"] for message in alpaca[0].messages] == ["a\n\nb", "c"]
    row = {"messages": "x", "q": "ask", "a": "say"}
    named = read(written(tmp_path / "b.jsonl", row), Report(), fields=Fields(prompt="q", response="a"))
    assert [message["content"] for message in named[0].messages] == ["ask", "say"]


BROKEN: dict[str, Any] = {
    "two user turns running": {"messages": [ASK, ASK, SAY]},
    "two assistant turns running": {"messages": [ASK, SAY, SAY]},
    "without an answer": {"messages": [ASK]},
    "an empty answer": {"prompt": "a", "response": " \n"},
    "an empty prompt": {"prompt": "", "response": "a"},
    "an unknown role": {"messages": [{"role": "king", "content": "x"}, SAY]},
    "empty conversations": {"messages": []},
    "messages are no list": {"messages": "x"},
    "whose content is no text": {"messages": [ASK, {"role": "assistant", "content": None}]},
    "has no role": {"messages": [ASK, {"content": "x"}]},
    "has no from": {"conversations": [{"value": "x"}]},
    "not the first": {"messages": [ASK, QUIET, SAY]},
    "begin with an answer": {"messages": [SAY, ASK, SAY]},
    "a pair that is known": {"text": "x"},
    "answer is no text": {"question": "a", "answer": 3},
    "are no objects": 3,
    "not JSON": "{",
}


@pytest.mark.parametrize("said", BROKEN)
def test_what_is_broken_is_counted_and_fatal_where_strict(tmp_path: Path, said: str) -> None:
    path, report = written(tmp_path / "a.jsonl", {"prompt": "a", "response": "b"}, BROKEN[said]), Report()
    assert len(read(path, report)) == 1
    ((kind, number),) = report.faults.items()
    assert (said in kind, number) == (True, 1)
    assert report.places[kind] == [f"{path}:2"]
    with pytest.raises(UserError, match=f"a.jsonl:2: .*{said}"):
        read(path, Report(strict=True))
    with pytest.raises(UserError, match="no conversations that can be used"):
        read(written(tmp_path / "b.jsonl", BROKEN[said]), Report())


def test_what_follows_the_last_answer_is_cut(tmp_path: Path) -> None:
    report = Report()
    assert roles(read(written(tmp_path / "a.jsonl", {"messages": [ASK, SAY, ASK]}), report)[0]) == "ua"
    assert "cut behind the last one" in next(iter(report.faults))


PLAIN = template_for(tokenizer())
ONE_BOS = "{{ bos_token }}" + CHATML.replace("'<|im_end|>\n'", "eos_token")
THINKS = (  # forgets earlier thoughts, and its prompt opens one
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('|')[-1] }}{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>[think]{% endif %}"
)


def marked(template: str, *messages: dict[str, str]) -> tuple[list[str], Report]:
    """What the marked runs of ids decode to."""
    codec, report = tokenizer(), Report()
    encoded = encode(codec, ChatTemplate(template), Conversation(messages=messages), report)
    if encoded is None:
        return [], report
    runs = "".join("x" if flag else " " for flag in encoded.answer)
    texts = []
    for run in re.finditer("x+", runs):
        ids = encoded.ids[run.start() : run.end()].tolist()
        assert ids[-1] == codec.eos_id, "the end of the turn is learnt"
        assert codec.eos_id not in ids[:-1]
        texts.append(codec.decode(ids))
    return texts, report


@pytest.mark.parametrize("template", [PLAIN, ONE_BOS])
def test_answers_and_the_end_of_their_turns_are_marked_and_nothing_else(template: str) -> None:
    texts, report = marked(template, QUIET, ASK, SAY, ASK, {"role": "assistant", "content": "été 12"})
    assert texts == ["the sun\nitself", "été 12"]
    assert not report.faults


def test_templates_that_rewrite_what_was_said() -> None:
    """The last answer is learnt whole, an earlier one not at all where its text changes once more follows."""
    thought = {"role": "assistant", "content": "hm|yes"}
    assert marked(THINKS, ASK, thought)[0] == ["hm|yes"]
    texts, report = marked(THINKS, ASK, thought, ASK, SAY)
    assert texts == ["the sun\nitself"]
    assert "writes otherwise" in next(iter(report.faults))
    texts, report = marked("{{ raise_exception('no') }}", ASK, SAY)
    assert texts == [] and "refuses" in next(iter(report.faults))


def test_what_is_too_long_is_cut_and_counted() -> None:
    whole = Encoded(ids=np.arange(10, dtype=np.int32), answer=np.arange(10) >= 4)
    report = Report()
    assert fit(whole, 9, report, "x") is whole
    cut = fit(whole, 6, report, "x")
    assert cut is not None and cut.ids.tolist() == list(range(7))
    assert list(report.notes.values()) == [1, 3]
    assert fit(whole, 3, report, "x") is None and "no answer within the context" in next(iter(report.faults))


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 40))
def test_packing_keeps_every_one_once_and_within_the_row(lengths: list[int], room: int) -> None:
    packed = pack(lengths, room)
    assert sorted(index for row in packed for index in row) == list(range(len(lengths)))
    for row in packed:
        assert sum(lengths[index] for index in row) <= room or len(row) == 1
    small = [sum(lengths[index] for index in row) for row in packed]
    assert sum(2 * total <= room for total in small) <= 1  # two such rows would have been one


def test_no_target_reaches_into_the_next_conversation() -> None:
    one = Encoded(ids=np.array([5, 6, 7], np.int32), answer=np.array([False, True, True]))
    two = Encoded(ids=np.array([8, 9], np.int32), answer=np.array([False, True]))
    row = {name: numbers.tolist() for name, numbers in lay([one, two]).items()}
    assert row == {"tokens": [5, 6, 8], "targets": [6, 7, 9], "segments": [0, 0, 1]}
