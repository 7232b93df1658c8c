"""Generation with an encoder-decoder gives the same text as transformers and as beam search with one beam."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

import tfcli
from tfcli.config.options import Sampling
from tfcli.errors import UserError
from tfcli.formats.hf import directory as hf
from tfcli.infer.batching import Request
from tfcli.infer.beam import Beams, answers
from tfcli.infer.decode import Decoder, decode_reference
from tfcli.infer.engine import Engine, Finished, source_ids
from tfcli.model.cache import Memory
from tfcli.model.transformer import Transformer

GREEDY = Sampling(temperature=0.0, seed=1)
TEXTS = ["A man.", "the king", "从前有一个国王", "deep forest well", "a", "who is there? she said", "lime", "sun"]


def made(seed: int = 3) -> Transformer:
    """Small, random, and with the end about as likely as other tokens."""
    model = tiny_models.encoder_decoder(seed)
    with torch.no_grad():
        model.embed.weight[1] += {3: 0.2, 5: 0.22}[seed]
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "m"
    hf.save(folder, made(), tiny_models.tokenizer())
    return folder


@pytest.mark.parametrize("seed", [3, 5])
def test_greedy_is_that_of_transformers_and_of_one_beam(tmp_path: Path, seed: int) -> None:
    """A batch of texts of all lengths, whose answers end at different steps."""
    import transformers

    hf.save(tmp_path, made(seed), tiny_models.tokenizer())
    engine = tfcli.load(tmp_path, device="cpu", precision="fp32")
    codec = engine.tokenizer
    got = engine.generate(TEXTS, GREEDY)
    rows = source_ids(codec, TEXTS)
    one_beam = answers(made(seed), rows, Beams(width=1), start_id=codec.eos_id, eos_ids=codec.eos_ids)
    assert [result.ids for result in got] == [list(answer.ids) for answer in one_beam]
    other = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    for row, result in zip(rows, got, strict=True):
        ids = other.generate(input_ids=torch.tensor([row]), do_sample=False, num_beams=1)[0, 1:].tolist()
        assert result.ids == [id for id in ids if id != codec.eos_id]
        assert result.text == codec.decode(result.ids)
        assert result.prompt_tokens == len(row)
    assert {result.finish_reason for result in got} == {"stop", "context"}  # some end, and not all at once


@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"top_p": 0.8, "repetition_penalty": 1.3}])
def test_the_loop_is_its_reference_without_a_cache(options: dict[str, Any]) -> None:
    """Rows leave and enter over one cache and one memory: a row that got another's source would show."""
    model = made()
    sampling = Sampling(max_tokens=9, temperature=0.9, ignore_eos=True, num_samples=2, **options)
    sources = [[5 + n, *range(20, 20 + 3 * (n % 5) + 1), 1] for n in range(9)]
    requests = [Request([1], [10 * n, 10 * n + 1], source) for n, source in enumerate(sources)]
    stopped = {4: 2, 7: 5, 11: 1}  # these rows end early, after so many tokens
    made_: dict[int, list[int]] = {}
    ended = lambda row, id: len(made_.setdefault(row, [])) + 1 >= stopped.get(row, 99)  # noqa: E731
    for steps in Decoder(model).run(requests, sampling, eos_ids=(1,), ended=ended):
        for step in steps:
            assert step.id is not None
            made_.setdefault(step.row, []).append(step.id)
    for row, ids in made_.items():
        request = requests[row // 2]
        expected = decode_reference(model, [1], sampling, seed=request.seeds[row % 2], eos_id=1, source=request.source)
        assert ids == [id for id, _ in expected][: len(ids)], row
        assert len(ids) == stopped.get(row, 9)


def test_results_do_not_depend_on_what_is_beside_them(directory: Path) -> None:
    engine = tfcli.load(directory, device="cpu", precision="fp32")
    sampling = Sampling(seed=4, temperature=1.0, max_tokens=12)
    many = engine.generate(TEXTS * 12, sampling)  # more than are decoded together
    for text, result in zip(TEXTS * 12, many, strict=True):
        alone = engine.generate(text, sampling)
        assert replace(result, logprobs=[]) == replace(alone, logprobs=[])
        assert result.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_a_stream_is_its_result_and_nothing_becomes_nothing(directory: Path) -> None:
    engine = tfcli.load(directory, device="cpu", precision="fp32")
    events = list(engine.stream("A man.", GREEDY, max_tokens=5))
    assert isinstance(events[-1], Finished) and "".join(event.text for event in events) == events[-1].generation.text
    assert events[-1].generation == engine.generate("A man.", GREEDY, max_tokens=5)
    assert events[-1].generation.finish_reason == "length" and len(events) == 6
    mixed = engine.generate(["A man.", "", " \n", "a"], GREEDY)
    assert [result.text == "" and result.ids == [] for result in mixed][1:3] == [True, True]
    assert mixed[1].finish_reason == "stop" and mixed[0].text and mixed[3].ids == engine.generate("a", GREEDY).ids


def test_weights_in_fewer_bits_are_taken_too(directory: Path) -> None:
    assert tfcli.load(directory, device="cpu", quantize="int8").generate("A man.", GREEDY, max_tokens=3).ids


def test_what_such_a_model_cannot_take_is_said() -> None:
    engine = Engine(made(), tiny_models.tokenizer(), tiny_models.cpu())
    with pytest.raises(UserError, match=r"the text has \d+ tokens, the model reads 32 at most \(cut it into sentences"):
        engine.generate("king forest " * 40)
    with pytest.raises(UserError, match="--overflow slide goes with models that continue a text"):
        engine.generate("a", overflow="slide")
    for asked in (engine.embed, engine.score):
        with pytest.raises(UserError, match="belongs to an encoder-decoder, which"):
            asked("a king")
    with pytest.raises(UserError, match="has no chat template"):
        engine.generate([{"role": "user", "content": "a"}])


def test_memories_join_with_what_is_beyond_a_source_masked() -> None:
    model = made()
    parts = [[5, 6, 7, 1], [8, 1], [9, 10, 1]]
    joined = Memory.joined([model.encode(torch.tensor([part])) for part in parts])
    start = torch.full((3, 1), 1)
    together = model(start, memory=joined)
    for row, part in enumerate(parts):
        alone = model(start[:1], memory=model.encode(torch.tensor([part])))
        torch.testing.assert_close(together[row : row + 1], alone)
