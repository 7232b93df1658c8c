"""The text edge of inference: prompts as text in, text out. Below it are only ids."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from tfcli.config.options import Sampling
from tfcli.errors import UserError
from tfcli.formats import open as models
from tfcli.infer.decode import ROWS, Decoder, Finish, Request, check_prompt
from tfcli.infer.embed import embed
from tfcli.infer.residency import settle
from tfcli.infer.sampling import check
from tfcli.infer.score import Scores, evaluate
from tfcli.infer.stopping import StopFilter
from tfcli.model.transformer import Transformer
from tfcli.runtime import Runtime
from tfcli.text.chat import messages as chat
from tfcli.text.tokenizers.codec import Codec

Prompt: TypeAlias = str | Sequence[chat.Message]
"""A text to continue (of an encoder-decoder: to turn into another), or the messages of a chat to answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """One continuation. ``text`` leaves out the prompt, the end-of-text token and the stop string.

    ``ids`` are the new tokens and ``logprobs`` their log-probabilities under the model, before any filter. The same
    prompt and settings with ``seed`` give the same text again. ``finish_reason`` is "stop" (end-of-text token),
    "stop_string", "length" (``max_tokens``) or "context" (no room).
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
    """A new token; ``text`` is what became certain with it, which may be "" (half a character, a possible stop)."""

    sample: int
    text: str
    id: int
    logprob: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The end of a sample; ``text`` is what was still held back."""

    sample: int
    text: str
    generation: Generation


Event = Token | Finished


def load(
    path: str | Path,
    *,
    device: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    quantize: str | None = None,
) -> Engine:
    """The model in a directory (tfcli's or Hugging Face's) or GGUF file, ready to generate, embed and score.

    ``device`` is auto, cuda, mps or cpu; ``precision`` auto, fp32 or bf16; ``threads`` CPU threads; ``quantize`` int8
    or int4 for weights in fewer bits. Raises UserError for what is not a model or a device that is not there.
    """
    runtime = Runtime.detect(device=device, precision=precision, threads=threads)
    model, tokenizer = models.load(path, runtime=runtime, quantize=quantize)
    return Engine(model, tokenizer, runtime)


class Engine:
    """A model and its tokenizer on one device."""

    def __init__(self, model: Transformer, tokenizer: Codec, runtime: Runtime) -> None:
        self.model = model.requires_grad_(False)
        self.tokenizer = tokenizer
        self.runtime = runtime
        self._decoder: Decoder | None = None
        self._template: chat.ChatTemplate | None = None

    @property
    def decoder(self) -> Decoder:
        """The token loop, made ready at first use."""
        if self._decoder is None:
            if not self.model.config.architecture.causal:
                raise UserError(
                    f"{self.tokenizer.name} belongs to an encoder, which reads text and does not write it",
                    hint="use it with: tfcli predict --task embed",
                )
            settle(self.model)
            self._decoder = Decoder(self.model)
        return self._decoder

    @overload
    def generate(
        self, prompt: Prompt = "", sampling: Sampling | None = None, *, max_tokens: int | None = None,
        temperature: float | None = None, top_k: int | None = None, top_p: float | None = None,
        min_p: float | None = None, repetition_penalty: float | None = None, stop: Sequence[str] | None = None,
        ignore_eos: bool | None = None, seed: int | None = None, overflow: Literal["error", "slide"] | None = None,
    ) -> Generation: ...  # fmt: skip

    @overload
    def generate(
        self, prompt: list[str], sampling: Sampling | None = None, *, max_tokens: int | None = None,
        temperature: float | None = None, top_k: int | None = None, top_p: float | None = None,
        min_p: float | None = None, repetition_penalty: float | None = None, stop: Sequence[str] | None = None,
        ignore_eos: bool | None = None, seed: int | None = None, overflow: Literal["error", "slide"] | None = None,
    ) -> list[Generation]: ...  # fmt: skip

    def generate(
        self, prompt: Prompt | list[str] = "", sampling: Sampling | None = None, *, max_tokens: int | None = None,
        temperature: float | None = None, top_k: int | None = None, top_p: float | None = None,
        min_p: float | None = None, repetition_penalty: float | None = None, stop: Sequence[str] | None = None,
        ignore_eos: bool | None = None, seed: int | None = None, overflow: Literal["error", "slide"] | None = None,
    ) -> Generation | list[Generation]:  # fmt: skip
        """Continue a prompt, or each of a list, as ``sampling`` says; a keyword goes over its field.

        An empty prompt starts a new document; a list of messages, as {"role": "user", "content": "Hello"}, is answered
        by way of the model's chat template. An encoder-decoder reads the prompt and writes another text, as a
        translation; of an empty one nothing. A list gives ``sampling.num_samples`` results for each prompt, in order.
        Raises UserError for an impossible setting, and for a prompt longer than the context.
        """
        sampling = _over(
            sampling, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repetition_penalty=repetition_penalty, stop=stop, ignore_eos=ignore_eos, seed=seed, overflow=overflow,
        )  # fmt: skip
        if isinstance(prompt, str) or (prompt and all(isinstance(part, dict) for part in prompt)):
            one: list[Prompt] = [prompt]  # type: ignore[list-item]
            if sampling.num_samples > 1:
                raise UserError("one prompt gives one result here", hint="for several samples give a list: [prompt]")
            return next(self.generate_batch(one, sampling))
        return list(self.generate_batch(prompt, sampling))  # type: ignore[arg-type]

    def stream(
        self, prompt: Prompt = "", sampling: Sampling | None = None, *, max_tokens: int | None = None,
        temperature: float | None = None, top_k: int | None = None, top_p: float | None = None,
        min_p: float | None = None, repetition_penalty: float | None = None, stop: Sequence[str] | None = None,
        ignore_eos: bool | None = None, seed: int | None = None, overflow: Literal["error", "slide"] | None = None,
    ) -> Iterator[Event]:  # fmt: skip
        """As ``generate``, an event for every token as it comes and one at the end of each sample.

        The ``text`` of a sample's events together is its result's text; none of them splits a character.
        """
        sampling = _over(
            sampling, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repetition_penalty=repetition_penalty, stop=stop, ignore_eos=ignore_eos, seed=seed, overflow=overflow,
        )  # fmt: skip
        self._check(sampling)
        self.check_prompt(prompt, sampling)
        return self._events(iter([prompt]), sampling)

    def generate_batch(self, prompts: Iterable[Prompt], sampling: Sampling | None = None) -> Iterator[Generation]:
        """Continue any number of prompts: the results in the order of the prompts, each prompt's samples together.

        Rows are decoded together, a bounded number at a time, new ones entering as others finish, so that memory stays
        flat. The result for a prompt does not depend on the prompts beside it.
        """
        sampling = sampling or Sampling()
        self._check(sampling)
        return self._in_order(self._events(iter(prompts), sampling))

    def check_prompt(self, prompt: Prompt, sampling: Sampling) -> None:
        """Raise UserError for a prompt that the model cannot take: no text, too long, no template for messages."""
        self._fit(self._encode(prompt), sampling)

    def _fit(self, ids: list[int], sampling: Sampling) -> None:
        context = self.model.config.context
        if self.turns_texts and len(ids) > context:
            raise UserError(
                f"the text has {len(ids)} tokens, the model reads {context} at most", hint="cut it into sentences"
            )
        check_prompt(ids, context, sampling)

    def embed(self, texts: str | Sequence[str]) -> npt.NDArray[np.float32]:
        """Vectors of length 1: (D,) of one text, (N, D) of several; the mean of the last hidden states.

        What is beyond the model's context does not count; ``fitted`` says how much that is.
        """
        self._refuse_turning("has no vectors of texts")
        many = [texts] if isinstance(texts, str) else texts
        vectors = embed(self.model, [self.fitted(text)[0] for text in many])
        one: npt.NDArray[np.float32] = vectors[0] if isinstance(texts, str) else vectors
        return one

    def fitted(self, text: str) -> tuple[list[int], int]:
        """The ids of a text between the tokenizer's own, cut to the model's context, and how many were cut off."""
        before, after = self.tokenizer.prefix_ids, self.tokenizer.suffix_ids
        ids = self.tokenizer.encode(text)
        room = self.model.config.context - len(before) - len(after)
        whole = [*before, *ids[:room], *after] or [self.tokenizer.eos_id]
        return whole, max(0, len(ids) - room)

    def score(self, text: str, *, stride: int | None = None) -> Scores:
        """Loss, perplexity and bits per byte of a text as one document, each token once."""
        self._refuse_turning("does not score a text by itself")
        ids = np.asarray(self.tokenizer.encode(text), dtype=np.int64)
        if not len(ids):
            raise UserError("there is no text to score")
        size = len(text.encode())
        scores = evaluate(self.model, ids, text_bytes=size, first=self.first_id, runtime=self.runtime, stride=stride)
        return scores.checked()

    def _refuse_turning(self, what: str) -> None:
        if self.turns_texts:
            raise UserError(
                f"{self.tokenizer.name} belongs to an encoder-decoder, which {what}",
                hint="it turns one text into another: tfcli generate, or tfcli predict",
            )

    @property
    def first_id(self) -> int:
        """The id that a text begins after: the tokenizer's beginning of text where it has one, else its end of text."""
        return (self.tokenizer.prefix_ids or (self.tokenizer.eos_id,))[0]

    @property
    def turns_texts(self) -> bool:
        """Whether it is an encoder-decoder: it reads a prompt whole and writes another text, as a translation."""
        return self.model.config.encoder_depth > 0

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            self._template = self._template or chat.template_of(self.tokenizer)
            return chat.prompt_ids(self.tokenizer, self._template, prompt)
        if self.turns_texts:
            return source_ids(self.tokenizer, [prompt])[0]
        return [*self.tokenizer.prefix_ids, *self.tokenizer.encode(prompt)] or [self.tokenizer.eos_id]

    def _check(self, sampling: Sampling) -> None:
        check(sampling)
        if self.turns_texts and sampling.overflow == "slide":
            raise UserError(
                "--overflow slide goes with models that continue a text; this one turns a text into another",
                hint="cut the text into sentences",
            )

    @staticmethod
    def _in_order(events: Iterator[Event]) -> Iterator[Generation]:
        ready: dict[int, Generation] = {}
        following = 0
        for event in events:
            if isinstance(event, Finished):
                ready[event.sample] = event.generation
            while following in ready:
                yield ready.pop(following)
                following += 1

    def _events(self, prompts: Iterator[Prompt], sampling: Sampling) -> Iterator[Event]:
        """Events of all rows as they come; ``sample`` counts the samples of all prompts in order."""
        opened: dict[int, _Row] = {}
        eos_ids = self.tokenizer.eos_ids

        def requests() -> Iterator[Request]:
            number = 0
            for index, prompt in enumerate(prompts, 1):
                ids = self._encode(prompt)
                try:
                    self._fit(ids, sampling)
                except UserError as error:
                    raise UserError(f"prompt {index}: {error.message}", hint=error.hint) from None
                seed = _seed(sampling)
                for first in range(0, sampling.num_samples, ROWS):
                    seeds = [seed + sample for sample in range(first, min(first + ROWS, sampling.num_samples))]
                    for of_row in seeds:
                        opened[number] = _Row(
                            self.tokenizer, prompt, len(ids), of_row, sampling.stop, turned=self.turns_texts
                        )
                        number += 1
                    mixed = [_mixed(of_row, ids) for of_row in seeds]
                    yield Request([self.tokenizer.eos_id], mixed, ids) if self.turns_texts else Request(ids, mixed)

        ended = lambda row, id: opened[row].push(id)  # noqa: E731
        for steps in self.decoder.run(requests(), sampling, eos_ids=eos_ids, ended=ended):
            for step in steps:
                row = opened[step.row]
                if step.id is not None and not row.silent:
                    row.logprobs.append(step.logprob)
                    yield Token(sample=step.row, text=row.fresh, id=step.id, logprob=step.logprob)
                if step.finish is not None:
                    tail = row.finish()
                    yield Finished(sample=step.row, text=tail, generation=row.result(step.finish))
                    del opened[step.row]


class _Row:
    """The text of one row as it grows."""

    def __init__(
        self, tokenizer: Codec, prompt: Prompt, length: int, seed: int, stops: Sequence[str], *, turned: bool
    ) -> None:
        self.prompt, self.length, self.seed = prompt, length, seed
        self.silent = turned and isinstance(prompt, str) and not prompt.strip()
        """Nothing is made of nothing: its only step does not count."""
        self._decoder = tokenizer.stream(continuing=bool(prompt) and not turned)
        self._stops = StopFilter(stops)
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.parts: list[str] = []
        self.fresh = ""

    def push(self, id: int) -> bool:
        """Take an id; ``fresh`` is the text that it made certain. Whether a stop string is complete."""
        if self.silent:
            return True
        self.ids.append(id)
        self.fresh = self._stops.push(self._decoder.push(id))
        self.parts.append(self.fresh)
        return self._stops.stopped

    def finish(self) -> str:
        """The text that was held back until the end."""
        if self._stops.stopped:
            return ""
        tail = self._stops.push(self._decoder.flush())
        if not self._stops.stopped:
            tail += self._stops.flush()
        self.parts.append(tail)
        return tail

    def result(self, finish: Finish) -> Generation:
        """What came of it."""
        return Generation(
            prompt=self.prompt,
            text="".join(self.parts),
            ids=self.ids,
            logprobs=self.logprobs,
            finish_reason="stop" if self.silent else finish,
            seed=self.seed,
            prompt_tokens=self.length,
        )


def source_ids(codec: Codec, texts: Sequence[str]) -> list[list[int]]:
    """What an encoder reads of each text: the tokenizer's prefix and suffix around it, or the end after it."""
    after = codec.suffix_ids or (codec.eos_id,)
    return [[*codec.prefix_ids, *ids, *after] for ids in codec.encode_batch(list(texts))]


def _seed(sampling: Sampling) -> int:
    return sampling.seed if sampling.seed is not None else secrets.randbits(31)


def _mixed(seed: int, ids: list[int]) -> int:
    """The seed of a row's generator: of the seed and the prompt, so that prompts do not share their random numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed} {ids}".encode()).digest()[:7], "big")


def _over(
    sampling: Sampling | None, *, max_tokens: int | None, temperature: float | None, top_k: int | None,
    top_p: float | None, min_p: float | None, repetition_penalty: float | None, stop: Sequence[str] | None,
    ignore_eos: bool | None, seed: int | None, overflow: Literal["error", "slide"] | None,
) -> Sampling:  # fmt: skip
    """``sampling`` with every field that was given in its place."""
    base = sampling or Sampling()
    if isinstance(stop, str):
        stop = (stop,)
    return Sampling(
        max_tokens=base.max_tokens if max_tokens is None else max_tokens,
        repetition_penalty=base.repetition_penalty if repetition_penalty is None else repetition_penalty,
        temperature=base.temperature if temperature is None else temperature,
        top_k=base.top_k if top_k is None else top_k,
        top_p=base.top_p if top_p is None else top_p,
        min_p=base.min_p if min_p is None else min_p,
        stop=base.stop if stop is None else tuple(stop),
        ignore_eos=base.ignore_eos if ignore_eos is None else ignore_eos,
        num_samples=base.num_samples,
        seed=base.seed if seed is None else seed,
        overflow=base.overflow if overflow is None else overflow,
    )
