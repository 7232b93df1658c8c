"""Answers of an encoder-decoder: the ids that transformers' generate gives for the same weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from tfcli.errors import UserError
from tfcli.formats.hf import directory as hf
from tfcli.infer.beam import Beams, answers
from tfcli.model.transformer import Transformer

EOS, PAD = 1, 2


LIKELY = {0: 0.22, 3: 0.2, 5: 0.22}
"""By seed: what makes the end as likely as other tokens, so that answers have all lengths."""


def made(seed: int) -> Transformer:
    """Small and random."""
    model = tiny_models.encoder_decoder(seed)
    with torch.no_grad():
        model.embed.weight[EOS] += LIKELY[seed]
    return model.requires_grad_(False)


def sources(seed: int, count: int, longest: int = 12) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 400) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def theirs(directory: Path, model: Transformer, texts: list[list[int]], **options: Any) -> list[list[int]]:
    """Return the output of transformers' generate, without start, end and padding."""
    import transformers

    hf.save(directory, model, tiny_models.tokenizer())
    other = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory)
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[PAD] * (longest - len(text))] for text in texts])
    mask = torch.tensor([[*[1] * len(text), *[0] * (longest - len(text))] for text in texts])
    out = other.generate(input_ids=ids, attention_mask=mask, do_sample=False, **options)[:, 1:].tolist()
    return [row[: row.index(EOS)] if EOS in row else [id for id in row if id != PAD] for row in out]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("seed", list(LIKELY))
def test_beams_are_those_of_transformers(tmp_path: Path, seed: int, penalty: float) -> None:
    model, texts = made(seed), sources(seed, 7)
    expected = theirs(tmp_path, model, texts, num_beams=4, length_penalty=penalty)
    got = answers(model, texts, Beams(width=4, length_penalty=penalty), start_id=EOS, eos_ids=[EOS])
    assert [list(answer.ids) for answer in got] == expected
    assert penalty != 1.0 or len({len(answer.ids) for answer in got}) > 1  # some end, and not all at once


def test_greedy_is_the_likeliest_token_without_a_cache(tmp_path: Path) -> None:
    model, texts = made(3), sources(3, 6)
    expected = []
    for text in texts:
        memory, ids = model.encode(torch.tensor([text])), [EOS]
        while len(ids) < model.config.context:
            hidden = model(torch.tensor([ids]), memory=memory)
            ids.append(int(model.logits(hidden)[0, -1].argmax()))
            if ids[-1] == EOS:
                break
        expected.append([id for id in ids[1:] if id != EOS])
    got = answers(model, texts, Beams(width=1), start_id=EOS, eos_ids=[EOS])
    assert [list(answer.ids) for answer in got] == expected
    assert expected == theirs(tmp_path, model, texts, num_beams=1)


def test_an_answer_depends_on_its_source_alone() -> None:
    model, texts = made(5), sources(4, 40)  # more than are worked on together
    options: dict[str, Any] = {"start_id": EOS, "eos_ids": [EOS]}
    alone = [answers(model, [text], Beams(width=3, max_tokens=9), **options)[0] for text in texts]
    seen: list[int] = []
    together = answers(model, texts, Beams(width=3, max_tokens=9), on_progress=seen.append, **options)
    assert [answer.ids for answer in together] == [answer.ids for answer in alone]
    assert seen[-1] == 40 and len(seen) > 1
    assert all(len(answer.ids) <= 9 for answer in together)


def test_a_score_is_the_log_probability_over_the_length() -> None:
    model, text = made(3), sources(3, 1)[0]
    (got,) = answers(model, [text], Beams(width=2, length_penalty=0.6), start_id=EOS, eos_ids=[EOS])
    ids = torch.tensor([[EOS, *got.ids, EOS]])
    logprobs = model.logits(model(ids[:, :-1], memory=model.encode(torch.tensor([text])))).log_softmax(-1)
    picked = logprobs[0].gather(1, ids[0, 1:, None])[:, 0]
    if len(got.ids) == model.config.context - 1:
        picked = picked[:-1]
    assert got.score == pytest.approx(float(picked.sum()) / len(picked) ** 0.6, rel=1e-4)


def test_what_cannot_be_read_is_refused() -> None:
    model = made(0)
    for text in ([], [5] * 33):
        with pytest.raises(UserError, match=f"text 2 has {len(text)} tokens, the model reads 1 to 32"):
            answers(model, [[5], text], Beams(), start_id=EOS, eos_ids=[EOS])
    with pytest.raises(UserError, match="--beam is 0"):
        Beams(width=0)
