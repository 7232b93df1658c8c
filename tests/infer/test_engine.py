"""The text edge: streams, batches, seeds, characters and stop strings."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TEXT, config, cpu, model, save, tokenizer

import tfcli
from tfcli.config.options import Sampling
from tfcli.errors import UserError
from tfcli.infer.engine import Engine, Finished, Generation, SamplingFields, Token
from tfcli.text.chat import messages as chat
from tfcli.text.chat.messages import with_template
from tfcli.text.tokenizers.codec import Codec

FREE = Sampling(max_tokens=20, ignore_eos=True, temperature=1.0, seed=1)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(model(context=64), tokenizer(), cpu())


def same(one: Generation, other: Generation) -> None:
    """All alike; log-probabilities up to the order in which a batch adds in fp32."""
    assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert replace(one, logprobs=[]) == replace(other, logprobs=[])


def test_stream_and_generate_give_the_same(engine: Engine) -> None:
    """Would catch text that is lost or doubled on the way of the stream."""
    for seed in range(5):
        events = list(engine.stream("从前 the king", FREE, seed=seed))
        result = engine.generate("从前 the king", FREE, seed=seed)
        assert isinstance(events[-1], Finished)
        assert events[-1].generation == result
        assert "".join(event.text for event in events) == result.text
        tokens = [event for event in events if isinstance(event, Token)]
        assert [token.id for token in tokens] == result.ids
        assert result.text == engine.tokenizer.decode(result.ids)
        assert len(result.logprobs) == len(result.ids) == 20
        assert str(result) == result.text


def test_a_character_is_never_split(engine: Engine) -> None:
    """Half an emoji is no text: every event's text is whole, whatever bytes come."""
    pieces = engine.tokenizer
    emoji = pieces.encode("🎉")
    assert len(emoji) == 4
    stream = pieces.stream()
    assert [stream.push(id) for id in emoji] == ["", "", "", "🎉"]
    # A model that always continues with these bytes: the embedding of each points at the next.
    core = model(context=64, tied=False)
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.zero_()
        core.norm.weight.fill_(1.0)
        core.embed.weight[:, :4] = 0.0
        for index, id in enumerate(emoji):
            core.embed.weight[id, index] = 1.0
            core.head.weight[emoji[(index + 1) % 4], index] = 1.0
    events = list(Engine(core, pieces, cpu()).stream("🎉", max_tokens=6, temperature=0.0))
    assert [event.text for event in events] == ["", "", "", "🎉", "", "", "\ufffd"]


def test_same_seed_same_text_whatever_is_beside_it(engine: Engine) -> None:
    """Would catch one generator shared by the rows of a batch."""
    prompts = ["the king", "a", "", "once upon a time there was", "the king"]
    together = engine.generate(prompts, FREE)
    for result, prompt in zip(together, prompts, strict=True):
        same(result, engine.generate(prompt, FREE))
    same(together[0], together[4])
    assert together[0].text != engine.generate("the king", FREE, seed=2).text


def test_drawn_seeds_are_reported_and_repeat(engine: Engine) -> None:
    """Would catch a text that nobody can get again."""
    first, second = engine.generate(["x", "x"], Sampling(max_tokens=20, ignore_eos=True))
    assert first.seed != second.seed
    assert engine.generate("x", FREE, temperature=0.8, seed=second.seed).text == second.text


def test_batches_keep_order_and_samples(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small windows and batches: would catch results in the order of their length, or a lost last window."""
    import tfcli.infer.batching as batching
    import tfcli.infer.engine as module

    monkeypatch.setattr(batching, "LOOK_AHEAD", 5)
    monkeypatch.setattr(module, "ROWS", 2)
    monkeypatch.setattr(batching, "ROWS", 2)
    prompts = ["the " * (7 * i % 11) for i in range(13)]
    sampling = Sampling(max_tokens=4, num_samples=3, seed=7, ignore_eos=True)
    results = list(engine.generate_batch(iter(prompts), sampling))
    assert [r.prompt for r in results] == [prompt for prompt in prompts for _ in range(3)]
    assert [r.seed for r in results] == [7, 8, 9] * 13
    for result in results:
        again = engine.generate(result.prompt, max_tokens=4, seed=result.seed, ignore_eos=True)
        same(again, result)


def test_a_batch_is_read_as_it_is_needed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An endless file of prompts works: would catch list(prompts)."""
    import itertools

    import tfcli.infer.batching as module

    monkeypatch.setattr(module, "LOOK_AHEAD", 4)
    endless = engine.generate_batch(itertools.repeat("a"), Sampling(max_tokens=1))
    assert len(list(itertools.islice(endless, 10))) == 10


def test_stop_strings_end_the_text_before_them(engine: Engine) -> None:
    """Cut in the middle of tokens and across them."""
    whole = engine.generate("the", FREE).text
    for begin, end in ((3, 4), (5, 9), (0, 2)):
        stop = whole[begin:end]
        result = engine.generate("the", FREE, stop=[stop, "never there"])
        assert result.text == whole[: whole.index(stop)]
        assert result.finish_reason == "stop_string"
        assert "".join(event.text for event in engine.stream("the", FREE, stop=stop)) == result.text
    assert engine.generate("the", FREE, stop=["never there"]).text == whole


def test_an_empty_prompt_starts_a_document(engine: Engine) -> None:
    """Would catch an empty tensor, or a prompt that is reported as the end-of-text piece."""
    result = engine.generate("", FREE)
    assert result.prompt == ""
    assert result.prompt_tokens == 1
    assert len(result.ids) == 20


def test_the_end_of_text_token_is_not_in_the_result() -> None:
    """Would catch "<|endoftext|>" in a text, and ignore_eos that ends all the same."""
    core, pieces = model(context=64, tied=False), tokenizer()
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.zero_()
        core.norm.weight.fill_(1.0)
        core.embed.weight[:, 0] = 1.0
        core.head.weight[pieces.eos_id, 0] = 1.0
    ends = Engine(core, pieces, cpu())
    first = ends.generate("a", temperature=0.0)
    assert (first.finish_reason, first.text, first.ids) == ("stop", "", [])
    second = ends.generate("a", temperature=0.0, ignore_eos=True, max_tokens=3)
    assert (second.finish_reason, second.text, second.ids) == ("length", "", [pieces.eos_id] * 3)


def test_errors_come_before_the_first_token(engine: Engine) -> None:
    """Would catch a generator that complains only when it is read."""
    with pytest.raises(UserError, match="--top-p"):
        engine.stream("a", top_p=2.0)
    with pytest.raises(UserError, match="the model's context is 64"):
        engine.stream("the " * 100)
    with pytest.raises(UserError, match="prompt 2: the prompt has"):
        engine.generate(["a", TEXT, "b"], FREE)
    with pytest.raises(UserError, match="one result") as error:
        engine.generate("a", Sampling(num_samples=2))
    assert "[prompt]" in str(error.value.hint)
    with pytest.raises(UserError, match="lone surrogate"):
        engine.generate("\ud800", FREE)


def test_score_counts_bytes_of_text(engine: Engine) -> None:
    """Bits per byte compares models with different tokenizers: bytes are UTF-8, the tokens any."""
    scores = engine.score("从前 a king")
    assert scores.bytes == len("从前 a king".encode())
    assert scores.tokens == len(engine.tokenizer.encode("从前 a king")) + 1, "with the end of the text"
    with pytest.raises(UserError, match="no text"):
        engine.score("")


def test_a_sliding_window_begins_with_the_beginning_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer says what stays; a chat's or a document's first id that is none does not."""
    from tfcli.infer.decode import Decoder
    from tfcli.text.tokenizers.sentencepiece import Tokenizer

    windows: list[list[int]] = []
    prefill = Decoder.prefill

    def watched(self: Decoder, given: list[list[int]], *more: object) -> torch.Tensor:
        windows.extend(list(window) for window in given)
        return prefill(self, given, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "prefill", watched)
    sampling = replace(FREE, max_tokens=40, overflow="slide")
    plain = tokenizer()
    for prefix in ((7,), ()):
        codec = Tokenizer(plain.model_bytes, prefix_ids=prefix)
        windows.clear()
        Engine(model(), codec, cpu()).generate([TEXT[:300], "a king"], sampling)
        assert len(windows) > 4
        assert all(window[:1] == [7] for window in windows) == bool(prefix)


def test_load_is_the_library_face(tmp_path: Path) -> None:
    """tfcli.load(directory).generate(prompt) is all there is to know."""
    save(tmp_path)
    loaded = tfcli.load(tmp_path, device="cpu", precision="fp32")
    result = loaded.generate("the king", temperature=0.0, max_tokens=5)
    assert isinstance(result, Generation)
    assert result.ids == Engine(model(), tokenizer(), cpu()).generate("the king", temperature=0.0, max_tokens=5).ids
    assert loaded.model.config == config()


class Counting:
    """A tokenizer that says how often it encoded each text."""

    def __init__(self, codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: Counter[str] = Counter()
        encode, encode_batch = codec.encode, codec.encode_batch

        def one(text: str) -> list[int]:
            self.texts[text] += 1
            return encode(text)

        def many(texts: Sequence[str]) -> list[list[int]]:
            self.texts.update(texts)
            return encode_batch(texts)

        monkeypatch.setattr(codec, "encode", one)
        monkeypatch.setattr(codec, "encode_batch", many)


def test_a_prompt_is_encoded_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt took the tokenizer's time twice, to be checked and to be read."""
    seen = Counting(engine.tokenizer, monkeypatch).texts
    short = replace(FREE, max_tokens=2)
    list(engine.stream("the king", short))
    engine.generate("a well", short)
    list(engine.generate_batch(["a sun", "a face"], short))
    encoded = engine.encode("a castle", short)
    same(engine.generate(encoded, short), next(engine.generate_batch([encoded], short)))
    engine.embed([engine.fitted("a tree"), "a forest"])
    assert set(seen.values()) == {1} and len(seen) == 7, seen


def test_a_template_is_rendered_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = with_template(engine.tokenizer, "{% for m in messages %}{{ m.content }}{% endfor %}")
    rendered: list[object] = []
    render = chat.prompt_ids

    def counted(*arguments: Any) -> list[int]:
        rendered.append(arguments[2])
        return render(*arguments)

    monkeypatch.setattr(chat, "prompt_ids", counted)
    list(Engine(engine.model, codec, cpu()).stream([{"role": "user", "content": "hello"}], max_tokens=2))
    assert len(rendered) == 1


def test_keywords_are_the_fields_of_sampling(engine: Engine) -> None:
    """Would catch a field of the dataclass that the keywords lack, and a keyword that is dropped on its way."""
    assert SamplingFields.__annotations__.keys() == {field.name for field in fields(Sampling)}
    base = replace(FREE, max_tokens=3, num_samples=2)
    given = engine.generate(["a"], FREE, max_tokens=3, num_samples=2, stop=None)
    assert given == list(engine.generate_batch(["a"], base)) and len(given) == 2
    assert engine.generate("a", FREE, stop="e").finish_reason in ("length", "stop_string")
    with pytest.raises(TypeError, match="temprature"):
        engine.generate("a", temprature=0.5)  # type: ignore[call-overload]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_generating_leaves_the_model_as_it_is(tmp_path: Path, precision: str) -> None:
    """Would catch a first use that packs weights under other names: ``load`` has done so."""
    save(tmp_path, context=64)
    for made in (
        tfcli.load(tmp_path, device="cpu", precision=precision),
        Engine(model(context=64), tokenizer(), cpu()),
    ):
        before = {name: value.clone() for name, value in made.model.state_dict().items()}
        assert made.generate("the king", FREE).ids == made.generate("the king", FREE).ids
        after = made.model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())
