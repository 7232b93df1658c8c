"""The text edge of inference: prompts as text in, text out. Below it are only ids."""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict, Unpack, overload

import numpy as np
import numpy.typing as npt

from tfcli.config.options import Sampling
from tfcli.errors import UserError
from tfcli.formats.open import Opened, open_path
from tfcli.infer.batching import ROWS, Request, check_prompt
from tfcli.infer.decode import Decoder, Finish
from tfcli.infer.embed import embed
from tfcli.infer.residency import pack_weights
from tfcli.infer.sampling import check
from tfcli.infer.score import Scores, evaluate
from tfcli.infer.stopping import StopFilter
from tfcli.model.transformer import Transformer
from tfcli.runtime import Runtime
from tfcli.text.chat import messages as chat
from tfcli.text.corpus.encoding import encode
from tfcli.text.read.sources import Chunk
from tfcli.text.tokenizers.codec import Codec

Prompt: TypeAlias = str | Sequence[chat.Message]
"""A text to continue (for an encoder-decoder: its source), or the messages of a chat to answer."""


class SamplingFields(TypedDict, total=False):
    """The fields of ``Sampling`` as keywords; None is the default."""

    max_tokens: int | None
    repetition_penalty: float | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    stop: str | Sequence[str] | None
    ignore_eos: bool | None
    num_samples: int | None
    seed: int | None
    overflow: Literal["error", "slide"] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A prompt, or a text to embed, with the ids that the model reads; ``cut`` counts tokens truncated."""

    prompt: Prompt
    ids: list[int]
    cut: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """One continuation. ``text`` excludes the prompt, the end-of-text token and the stop string.

    ``ids`` are the new tokens and ``logprobs`` their log-probabilities under the model, before any filter. The same
    prompt, settings and ``seed`` reproduce the text. ``finish_reason`` is "stop" (end-of-text token), "stop_string",
    "length" (``max_tokens``) or "context" (full).
    """

    prompt: Prompt
    text: str
    ids: list[int]
    logprobs: list[float]
    finish_reason: Finish
    seed: int
    prompt_tokens: int

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """A new token; ``text`` is the text it completes, which may be "" (half a character, a possible stop string)."""

    sample: int
    text: str
    id: int
    logprob: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The end of a sample; ``text`` is the text that was held back until then."""

    sample: int
    text: str
    generation: Generation


Event = Token | Finished


def load(
    path: str | Path | Opened, *, device: str | None = None, precision: str | None = None, threads: int | None = None,
    quantize: str | None = None,
) -> Engine:  # fmt: skip
    """Load the model in a directory (tfcli's or Hugging Face's) or GGUF file, to generate, embed and score.

    ``device`` is auto, cuda, mps or cpu; ``precision`` auto, fp32 or bf16; ``threads`` CPU threads; ``quantize`` int8
    or int4 for weights in fewer bits. The weights of a decoder are packed for reading (``tfcli.infer.residency``), so
    that ``engine.model`` cannot be trained. Raises UserError for a path that is not a model or an unavailable device.

    Example:
        >>> import tfcli
        >>> model = tfcli.load("runs/first")
        >>> result = model.generate("the king", max_tokens=5, seed=1)
        >>> len(result.ids), result.finish_reason
        (5, 'length')
        >>> model.embed(["a king", "a well"]).shape
        (2, 32)
    """
    runtime = Runtime.detect(device=device, precision=precision, threads=threads)
    opened = path if isinstance(path, Opened) else open_path(path)
    with runtime.active():
        model, tokenizer = opened.load(runtime=runtime, quantize=quantize)
        engine = Engine(model, tokenizer, runtime)
        if model.config.architecture.causal:
            pack_weights(model)
    return engine


class Engine:
    """A model and its tokenizer on one device, for any number of threads."""

    def __init__(self, model: Transformer, tokenizer: Codec, runtime: Runtime) -> None:
        self.model = model.requires_grad_(False)
        self.tokenizer = tokenizer
        self.runtime = runtime
        self._decoder: Decoder | None = None
        self._template: chat.ChatTemplate | None = None
        self._first_use = threading.Lock()

    @property
    def decoder(self) -> Decoder:
        """The token loop, prepared at first use, once for all threads."""
        if not self.model.config.architecture.causal:
            raise UserError(
                f"{self.tokenizer.name} belongs to an encoder, which reads text and does not write it",
                hint="use it with: tfcli predict MODEL --task embed, or fill",
            )
        with self._first_use:
            self._decoder = self._decoder or Decoder(self.model)
            return self._decoder

    @overload
    def generate(
        self, prompt: Prompt | Encoded = "", sampling: Sampling | None = None, **fields: Unpack[SamplingFields]
    ) -> Generation: ...

    @overload
    def generate(
        self, prompt: list[str], sampling: Sampling | None = None, **fields: Unpack[SamplingFields]
    ) -> list[Generation]: ...

    def generate(
        self,
        prompt: Prompt | Encoded | list[str] = "",
        sampling: Sampling | None = None,
        **fields: Unpack[SamplingFields],
    ) -> Generation | list[Generation]:
        """Continue a prompt, or each of a list, with ``sampling``; keywords override its fields.

        An empty prompt starts a new document; a list of messages, as {"role": "user", "content": "Hello"}, is answered
        through the model's chat template. An encoder-decoder reads the prompt and writes another text, as a
        translation, or nothing for an empty one. A list gives ``sampling.num_samples`` results per prompt, in order.
        Raises UserError for an invalid setting, and for a prompt longer than the context.
        """
        sampling = _over(sampling, fields)
        if isinstance(prompt, str | Encoded) or (prompt and all(isinstance(part, dict) for part in prompt)):
            one: list[Prompt | Encoded] = [prompt]  # type: ignore[list-item]
            if sampling.num_samples > 1:
                raise UserError("one prompt gives one result here", hint="for several samples give a list: [prompt]")
            return next(self.generate_batch(one, sampling))
        return list(self.generate_batch(prompt, sampling))  # type: ignore[arg-type]

    def stream(
        self, prompt: Prompt | Encoded = "", sampling: Sampling | None = None, **fields: Unpack[SamplingFields]
    ) -> Iterator[Event]:
        """Yield the events of ``generate``: one for every token as it is decoded and one at the end of each sample.

        The ``text`` of a sample's events concatenates to the result's text; none of them splits a character.
        """
        sampling = _over(sampling, fields)
        self._check(sampling)
        encoded = self.encode(prompt, sampling) if not isinstance(prompt, Encoded) else prompt
        return self._events(iter([encoded]), sampling)

    def generate_batch(
        self, prompts: Iterable[Prompt | Encoded], sampling: Sampling | None = None
    ) -> Iterator[Generation]:
        """Continue any number of prompts: results in the order of the prompts, each prompt's samples together.

        Prompts are decoded with continuous batching, so that memory stays constant. The result for a prompt does not
        depend on the others.
        """
        sampling = sampling or Sampling()
        self._check(sampling)
        return self._in_order(self._events(iter(prompts), sampling))

    def encode(self, prompt: Prompt, sampling: Sampling) -> Encoded:
        """Encode a prompt once, for ``stream`` and ``generate_batch``.

        Raises UserError for a prompt that the model cannot take: too long, or messages without a chat template.
        """
        ids = self._encode(prompt)
        self._fit(ids, sampling)
        return Encoded(prompt=prompt, ids=ids)

    def _fit(self, ids: list[int], sampling: Sampling) -> None:
        context = self.model.config.context
        if self.sequence_to_sequence and len(ids) > context:
            raise UserError(
                f"the text has {len(ids)} tokens, the model reads {context} at most", hint="cut it into sentences"
            )
        check_prompt(ids, context, sampling)

    def embed(self, texts: str | Sequence[str | Encoded]) -> npt.NDArray[np.float32]:
        """Return vectors of length 1, (D,) of one text or (N, D) of several: the mean of the last hidden states.

        Texts are truncated to the model's context; ``fitted`` tells by how much.
        """
        self._refuse_sequence_to_sequence("has no vectors of texts")
        many = [texts] if isinstance(texts, str) else texts
        encoded = [self.fitted(text) if isinstance(text, str) else text for text in many]
        with self.runtime.active():
            vectors = embed(self.model, [text.ids for text in encoded])
        return vectors[0] if isinstance(texts, str) else vectors

    def fitted(self, text: str) -> Encoded:
        """Encode a text for ``embed``, with the tokenizer's prefix and suffix, truncated to the model's context."""
        before, after = self.tokenizer.prefix_ids, self.tokenizer.suffix_ids
        ids = self.tokenizer.encode(text)
        limit = self.model.config.context - len(before) - len(after)
        whole = [*before, *ids[:limit], *after] or [self.tokenizer.eos_id]
        return Encoded(prompt=text, ids=whole, cut=max(0, len(ids) - limit))

    def score(self, text: str, *, stride: int | None = None) -> Scores:
        """Score a text as one document: loss, perplexity and bits per byte, with its end-of-text token."""
        self._refuse_sequence_to_sequence("does not score a text by itself")
        if not text:
            raise UserError("there is no text to score")
        document, codec, runtime = encode([Chunk(text, True)], self.tokenizer, begin=True), self.tokenizer, self.runtime
        with runtime.active():
            return evaluate(
                self.model, document.ids, text_bytes=document.bytes, codec=codec, runtime=runtime, stride=stride
            ).checked()

    def _refuse_sequence_to_sequence(self, what: str) -> None:
        if self.sequence_to_sequence:
            raise UserError(
                f"{self.tokenizer.name} belongs to an encoder-decoder, which {what}",
                hint="it turns one text into another: tfcli generate, or tfcli predict",
            )

    @property
    def sequence_to_sequence(self) -> bool:
        """True for an encoder-decoder, which reads the whole prompt and writes another text, as a translation."""
        return self.model.config.encoder_depth > 0

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            self._template = self._template or chat.template_of(self.tokenizer)
            return chat.prompt_ids(self.tokenizer, self._template, prompt)
        if self.sequence_to_sequence:
            return source_ids(self.tokenizer, [prompt])[0]
        return [*self.tokenizer.prefix_ids, *self.tokenizer.encode(prompt)] or [self.tokenizer.eos_id]

    def _check(self, sampling: Sampling) -> None:
        check(sampling)
        if self.sequence_to_sequence and sampling.overflow == "slide":
            raise UserError(
                "--overflow slide goes with models that continue a text; this one turns a text into another",
                hint="cut the text into sentences",
            )

    @staticmethod
    def _in_order(events: Iterator[Event]) -> Iterator[Generation]:
        ready: dict[int, Generation] = {}
        yielded = 0
        for event in events:
            if isinstance(event, Finished):
                ready[event.sample] = event.generation
            while yielded in ready:
                yield ready.pop(yielded)
                yielded += 1

    def _events(self, prompts: Iterator[Prompt | Encoded], sampling: Sampling) -> Iterator[Event]:
        """Yield the events of all rows as they come; ``sample`` counts the samples of all prompts in order."""
        opened: dict[int, _Row] = {}
        eos_ids, before = self.tokenizer.eos_ids, list(self.tokenizer.prefix_ids)

        def requests() -> Iterator[Request]:
            number = 0
            for index, prompt in enumerate(prompts, 1):
                one = prompt if isinstance(prompt, Encoded) else Encoded(prompt=prompt, ids=self._encode(prompt))
                ids = one.ids
                try:
                    self._fit(ids, sampling)
                except UserError as error:
                    raise UserError(f"prompt {index}: {error.message}", hint=error.hint) from None
                seed = sampling.seed if sampling.seed is not None else secrets.randbits(31)
                for first in range(0, sampling.num_samples, ROWS):
                    seeds = [seed + sample for sample in range(first, min(first + ROWS, sampling.num_samples))]
                    for row_seed in seeds:
                        opened[number] = _Row(self, one, row_seed, sampling.stop)
                        number += 1
                    mixed = [_mixed(row_seed, ids) for row_seed in seeds]
                    if self.sequence_to_sequence:
                        yield Request([self.tokenizer.eos_id], mixed, ids)
                    else:
                        kept = len(before) if ids[: len(before)] == before else 0
                        yield Request(ids, mixed, kept=kept)

        ended = lambda row, id: opened[row].push(id)  # noqa: E731
        steps_of_rows = self.decoder.run(requests(), sampling, eos_ids=eos_ids, ended=ended)
        for steps in self.runtime.stepped(steps_of_rows):
            for step in steps:
                row = opened[step.row]
                if step.id is not None and not row.empty:
                    row.logprobs.append(step.logprob)
                    yield Token(sample=step.row, text=row.fresh, id=step.id, logprob=step.logprob)
                if step.finish is not None:
                    yield Finished(sample=step.row, text=row.flush(), generation=row.result(step.finish))
                    del opened[step.row]


class _Row:
    """The text of one row as it grows."""

    def __init__(self, engine: Engine, encoded: Encoded, seed: int, stops: Sequence[str]) -> None:
        self.prompt, self.length, self.seed = encoded.prompt, len(encoded.ids), seed
        self.empty = engine.sequence_to_sequence and isinstance(self.prompt, str) and not self.prompt.strip()
        """An empty source has an empty result: its only step does not count."""
        self._decoder = engine.tokenizer.stream(continuing=bool(self.prompt) and not engine.sequence_to_sequence)
        self._stops = StopFilter(stops)
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.parts: list[str] = []
        self.fresh = ""

    def push(self, id: int) -> bool:
        """Append an id; ``fresh`` is the text that it completes. Return whether a stop string is complete."""
        if self.empty:
            return True
        self.ids.append(id)
        self.fresh = self._stops.push(self._decoder.push(id))
        self.parts.append(self.fresh)
        return self._stops.stopped

    def flush(self) -> str:
        """Return the text that was held back until the end."""
        if self._stops.stopped:
            return ""
        tail = self._stops.push(self._decoder.flush())
        if not self._stops.stopped:
            tail += self._stops.flush()
        self.parts.append(tail)
        return tail

    def result(self, finish: Finish) -> Generation:
        return Generation(
            prompt=self.prompt, text="".join(self.parts), ids=self.ids, logprobs=self.logprobs,
            finish_reason="stop" if self.empty else finish, seed=self.seed, prompt_tokens=self.length,
        )  # fmt: skip


def source_ids(codec: Codec, texts: Sequence[str]) -> list[list[int]]:
    """Encode texts as sources: with the tokenizer's prefix and suffix, or the end-of-text token after them."""
    after = codec.suffix_ids or (codec.eos_id,)
    return [[*codec.prefix_ids, *ids, *after] for ids in codec.encode_batch(list(texts))]


def _mixed(seed: int, ids: list[int]) -> int:
    """Derive the seed of a row's generator from seed and prompt, so that prompts do not share random numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed} {ids}".encode()).digest()[:7], "big")


def _over(sampling: Sampling | None, fields: SamplingFields) -> Sampling:
    """Return ``sampling`` with the fields that are given replaced."""
    given: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    if "stop" in given:
        given["stop"] = (given["stop"],) if isinstance(given["stop"], str) else tuple(given["stop"])
    return replace(sampling or Sampling(), **given)
