"""The text edge of inference: prompts as text in, text out. Below it are only ids."""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, overload

import numpy as np

from tfcli.config import Sampling
from tfcli.errors import UserError
from tfcli.formats import hf
from tfcli.infer.decode import MAX_TOKENS, Finish, check_prompt, decode
from tfcli.infer.sampling import check
from tfcli.infer.score import Scores, evaluate
from tfcli.infer.stopping import StopFilter
from tfcli.model.transformer import Transformer
from tfcli.runtime import Runtime
from tfcli.text.tokenizer import Tokenizer

WINDOW = 512
"""Prompts that a batch run holds at once and sorts by length."""
ROWS = 64
"""Rows that are decoded together at most."""
CACHE_BYTES = 512 << 20
"""Bytes of keys and values that they may need."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """One continuation. ``text`` leaves out the prompt, the end-of-text token and the stop string.

    ``ids`` are the new tokens and ``logprobs`` their log-probabilities under the model, before any filter. The same
    prompt and settings with ``seed`` give the same text again. ``finish_reason`` is "stop" (end-of-text token),
    "stop_string", "length" (``max_tokens``) or "context" (no room).
    """

    prompt: str
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
    directory: str | Path, *, device: str | None = None, precision: str | None = None, threads: int | None = None
) -> Engine:
    """The model in ``directory``, ready to generate and score.

    ``device`` is auto, cuda, mps or cpu; ``precision`` auto, fp32 or bf16; ``threads`` CPU threads. Raises UserError
    for a directory that does not hold a model or a device that is not there.
    """
    runtime = Runtime.detect(device=device, precision=precision, threads=threads)
    model, tokenizer = hf.load(directory, runtime=runtime)
    return Engine(model, tokenizer, runtime)


class Engine:
    """A model and its tokenizer on one device."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, runtime: Runtime) -> None:
        self.model = model.requires_grad_(False)
        self.tokenizer = tokenizer
        self.runtime = runtime

    @overload
    def generate(
        self, prompt: str = "", sampling: Sampling | None = None, *, max_tokens: int | None = None,
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
        self, prompt: str | list[str] = "", sampling: Sampling | None = None, *, max_tokens: int | None = None,
        temperature: float | None = None, top_k: int | None = None, top_p: float | None = None,
        min_p: float | None = None, repetition_penalty: float | None = None, stop: Sequence[str] | None = None,
        ignore_eos: bool | None = None, seed: int | None = None, overflow: Literal["error", "slide"] | None = None,
    ) -> Generation | list[Generation]:  # fmt: skip
        """Continue a prompt, or each of a list, as ``sampling`` says; a keyword goes over its field.

        An empty prompt starts a new document. A list gives ``sampling.num_samples`` results for each prompt, in order.
        Raises UserError for an impossible setting, and for a prompt longer than the context.
        """
        sampling = _over(
            sampling, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repetition_penalty=repetition_penalty, stop=stop, ignore_eos=ignore_eos, seed=seed, overflow=overflow,
        )  # fmt: skip
        if not isinstance(prompt, str):
            return list(self.generate_batch(prompt, sampling))
        if sampling.num_samples > 1:
            raise UserError("one prompt gives one result here", hint="for several samples give a list: [prompt]")
        return next(self.generate_batch([prompt], sampling))

    def stream(
        self, prompt: str = "", sampling: Sampling | None = None, *, max_tokens: int | None = None,
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
        check(sampling)
        ids = self._encode(prompt)
        check_prompt(ids, self.model.config.context, sampling)
        seed = _seed(sampling)
        seeds = [seed + sample for sample in range(sampling.num_samples)]
        return self._events([prompt], [ids], sampling, seeds)

    def generate_batch(self, prompts: Iterable[str], sampling: Sampling | None = None) -> Iterator[Generation]:
        """Continue any number of prompts: the results in the order of the prompts, each prompt's samples together.

        Prompts of similar length are decoded together, a bounded number at a time, so that memory stays flat. The
        result for a prompt does not depend on the prompts beside it.
        """
        sampling = sampling or Sampling()
        check(sampling)
        return self._batches(iter(prompts), sampling)

    def score(self, text: str, *, stride: int | None = None) -> Scores:
        """Loss, perplexity and bits per byte of a text as one document, each token once."""
        ids = np.asarray(self.tokenizer.encode(text), dtype=np.int64)
        if not len(ids):
            raise UserError("there is no text to score")
        size, first = len(text.encode()), self.tokenizer.eos_id
        scores = evaluate(self.model, ids, text_bytes=size, first=first, runtime=self.runtime, stride=stride)
        return scores.checked()

    def _encode(self, prompt: str) -> list[int]:
        return self.tokenizer.encode(prompt) or [self.tokenizer.eos_id]

    def _batches(self, prompts: Iterator[str], sampling: Sampling) -> Iterator[Generation]:
        done = 0
        while window := list(islice(prompts, WINDOW)):
            ids = [self._encode(prompt) for prompt in window]
            for number, prompt in enumerate(ids, done + 1):
                try:
                    check_prompt(prompt, self.model.config.context, sampling)
                except UserError as error:
                    raise UserError(f"prompt {number}: {error.message}", hint=error.hint) from None
            yield from self._window(window, ids, sampling)
            done += len(window)

    def _window(self, prompts: list[str], ids: list[list[int]], sampling: Sampling) -> Iterator[Generation]:
        """The results of a window of prompts, in order, each as soon as those before it are there."""
        seeds = [_seed(sampling) for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda index: len(ids[index]))
        ready: dict[tuple[int, int], Generation] = {}
        wanted = iter([(index, sample) for index in range(len(prompts)) for sample in range(sampling.num_samples)])
        following = next(wanted, None)
        for first in range(0, sampling.num_samples, ROWS):
            count = min(ROWS, sampling.num_samples - first)
            part = dataclasses.replace(sampling, num_samples=count)
            for batch in self._by_length(order, ids, part):
                events = self._events(
                    [prompts[index] for index in batch],
                    [ids[index] for index in batch],
                    part,
                    [seeds[index] + first + sample for index in batch for sample in range(count)],
                )
                for event in events:
                    if isinstance(event, Finished):
                        ready[batch[event.sample // count], first + event.sample % count] = event.generation
                while following is not None and following in ready:
                    yield ready.pop(following)
                    following = next(wanted, None)

    def _by_length(self, order: list[int], ids: list[list[int]], sampling: Sampling) -> Iterator[list[int]]:
        """Prompts in batches of at most ROWS rows whose cache fits CACHE_BYTES."""
        config = self.model.config
        width = self.model.embed.weight.element_size()
        per_token = 2 * config.depth * config.kv_heads * config.head_width * width * sampling.num_samples
        batch: list[int] = []
        for index in order:
            length = min(len(ids[index]) + (sampling.max_tokens or MAX_TOKENS), config.context)
            rows = (len(batch) + 1) * sampling.num_samples
            if batch and (rows > ROWS or (len(batch) + 1) * length * per_token > CACHE_BYTES):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _events(
        self, prompts: list[str], ids: list[list[int]], sampling: Sampling, seeds: list[int]
    ) -> Iterator[Event]:
        """Events of all rows; ``sample`` of an event is the row."""
        count = sampling.num_samples
        rows = [_Row(self.tokenizer, prompt, sampling.stop) for prompt in prompts for _ in range(count)]
        eos_id = self.tokenizer.eos_id
        mixed = [_mixed(seed, ids[row // count]) for row, seed in enumerate(seeds)]
        for steps in decode(
            self.model, ids, sampling, seeds=mixed, eos_id=eos_id, ended=lambda row, id: rows[row].push(id)
        ):
            for step in steps:
                row = rows[step.row]
                if step.id is not None:
                    row.logprobs.append(step.logprob)
                    yield Token(sample=step.row, text=row.fresh, id=step.id, logprob=step.logprob)
                if step.finish is not None:
                    tail = row.finish()
                    generation = Generation(
                        prompt=prompts[step.row // count],
                        text="".join(row.parts),
                        ids=row.ids,
                        logprobs=row.logprobs,
                        finish_reason=step.finish,
                        seed=seeds[step.row],
                        prompt_tokens=len(ids[step.row // count]),
                    )
                    yield Finished(sample=step.row, text=tail, generation=generation)


class _Row:
    """The text of one row as it grows."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, stops: Sequence[str]) -> None:
        self._decoder = tokenizer.stream(continuing=bool(prompt))
        self._stops = StopFilter(stops)
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.parts: list[str] = []
        self.fresh = ""

    def push(self, id: int) -> bool:
        """Take an id; ``fresh`` is the text that it made certain. Whether a stop string is complete."""
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
