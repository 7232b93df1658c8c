"""Conversations as ids with the answers marked, and several of them packed into rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tfcli.errors import UserError
from tfcli.tasks.chat.data import Conversation
from tfcli.tasks.common.report import Report
from tfcli.text.chat.messages import CHATML, ChatTemplate
from tfcli.text.tokenizers.codec import Codec

END = "<|im_end|>"
REFUSED = "conversations that the chat template refuses, left out"
OTHERWISE = "answers that the chat template renders otherwise once more follows, not trained on"
NOTHING = "conversations with no answer within the context, left out"
CUT, CUT_TOKENS = "conversations cut at the context", "tokens cut off"


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """The ids of a conversation, and which are trained on: the answers with the end of their turn."""

    ids: npt.NDArray[np.int32]
    answer: npt.NDArray[np.bool_]


def template_for(codec: Codec) -> str:
    """Return the chat template of a tokenizer, by default ChatML.

    Where the vocabulary has no <|im_end|>, turns end with the end-of-text token, at which generation stops.
    """
    if codec.chat_template is not None:
        return codec.chat_template
    if codec.encode_special(END) == [codec.eos_id]:
        return CHATML
    return CHATML.replace("'<|im_end|>\n'", "eos_token + '\n'")


def encode(codec: Codec, template: ChatTemplate, conversation: Conversation, report: Report) -> Encoded | None:
    """Return the ids of a conversation as ``prompt_ids`` gives them; None for one that cannot be trained on.

    An answer is the text beyond that of the messages before it, up to the end of its turn.
    """

    def render(count: int, prompt: bool) -> str:
        return template.render(
            conversation.messages[:count], add_generation_prompt=prompt,
            bos_token=None if codec.bos_id is None else codec.piece(codec.bos_id), eos_token=codec.piece(codec.eos_id),
        )  # fmt: skip

    try:
        text = render(len(conversation.messages), False)
        parts = [(_before(render, text, index), render(index + 1, False)) for index in conversation.answers]
    except UserError:
        report.fault(REFUSED, conversation.where)
        return None
    ids = codec.encode_special(text)
    answer = np.zeros(len(ids), bool)
    for before, until in parts:
        if before is None or not text.startswith(until):
            report.fault(OTHERWISE, conversation.where)
            continue
        start, end = _shared(codec.encode_special(before), ids), _shared(codec.encode_special(until), ids)
        ends = [at for at in range(start, end) if ids[at] in codec.eos_ids]
        answer[start : ends[-1] + 1 if ends else end] = True
    answer[:1] = False  # nothing before it could predict it
    if not answer.any():
        report.fault("conversations without an answer to train on, left out", conversation.where)
        return None
    return Encoded(ids=np.array(ids, np.int32), answer=answer)


def _before(render: Any, text: str, index: int) -> str | None:
    """Return the text before an answer; None where the template renders the messages before it otherwise."""
    prompt: str = render(index, True)
    if text.startswith(prompt):
        return prompt
    shared = prompt[: _shared(prompt, text)]  # the prompt may have more, such as an open <think>
    return shared if len(shared) > len(render(index, False)) else None


def _shared(some: Sequence[object], others: Sequence[object]) -> int:
    """Return how many ids, or characters, both have in common at their start."""
    return next(
        (at for at, (a, b) in enumerate(zip(some, others, strict=False)) if a != b), min(len(some), len(others))
    )


def fit(encoded: Encoded, context: int, report: Report, where: str) -> Encoded | None:
    """Truncate a conversation to ``context`` + 1 ids (the last is only a target), and count it."""
    most = context + 1
    if len(encoded.ids) <= most:
        return encoded
    cut = Encoded(ids=encoded.ids[:most], answer=encoded.answer[:most])
    if not cut.answer.any():
        report.fault(NOTHING, where)
        return None
    report.note(CUT, action="cut", where=where)
    report.note(CUT_TOKENS, len(encoded.ids) - most)
    return cut


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Pack lengths into rows of at most ``room``, longer ones alone, by best fit, longest first; return the indices."""
    rows: list[list[int]] = []
    by_space: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        space = min((left for left, held in by_space.items() if left >= length and held), default=None)
        if space is None:
            rows.append([index])
            left, row = room - length, len(rows) - 1
        else:
            row = by_space[space].pop()
            rows[row].append(index)
            left = space - length
        if left > 0:
            by_space.setdefault(left, []).append(row)
    return rows


def lay(conversations: Sequence[Encoded]) -> Mapping[str, npt.NDArray[np.int64]]:
    """Return a row of consecutive conversations: "tokens", "targets" (-1 for none) and "segments" (from 0).

    Every id but a conversation's last is read; every id of an answer is the target of the id before it.
    """
    columns = {
        "tokens": [one.ids[:-1] for one in conversations],
        "targets": [np.where(one.answer[1:], one.ids[1:], -1) for one in conversations],
        "segments": [np.full(len(one.ids) - 1, number) for number, one in enumerate(conversations)],
    }
    return {name: np.concatenate(arrays).astype(np.int64) for name, arrays in columns.items()}
