"""The token loop: prompts in, one id a row and step out. It knows ids, not text.

Rows are batched continuously (Yu et al. 2022, Orca): every step feeds one token of each open row over a key/value
cache; rows that are finished leave at once, and waiting prompts are read into their places. Without a cache, one by
one, the same ids come out (``decode_reference``). A decoder with an encoder beside it is given the source of each row,
which the encoder reads once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from tfcli.config.options import Sampling
from tfcli.errors import RunError, UserError
from tfcli.infer import step as stepper
from tfcli.infer.graph import GraphStepper
from tfcli.infer.sampling import Uniforms, draw, exact_device, filtered, greedy
from tfcli.model.cache import KVCache, Memory
from tfcli.model.transformer import Transformer
from tfcli.native import ops

Finish = Literal["stop", "stop_string", "length", "context"]
MAX_TOKENS = 256
"""New tokens where ``Sampling.max_tokens`` is left out."""
ROWS = 64
"""Rows that are decoded together at most."""
CACHE_BYTES = 512 << 20
"""Bytes of keys and values that they may need together."""
LOOK_AHEAD = 512
"""Prompts that are known before their turn: for the size of the cache."""
PREFILL_TOKENS = 2048
"""Positions that are read at once, over all rows."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one step gave one row. ``id`` is None for the end-of-text token, which is not part of the result.

    ``logprob`` is the natural logarithm of the probability that the model itself gave the token, before any filter.
    """

    row: int
    id: int | None
    logprob: float
    finish: Finish | None


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt (at least one id), and the seed of each of its samples.

    ``source`` is what the encoder reads, where there is one; ``ids`` are then what the decoder begins with. The first
    ``kept`` of ``ids``, a beginning of text, stay where a full window slides.
    """

    ids: Sequence[int]
    seeds: Sequence[int]
    source: Sequence[int] | None = None
    kept: int = 0

    @property
    def length(self) -> int:
        """Positions that are read at once."""
        return len(self.ids if self.source is None else self.source)


def window_of(ids: Sequence[int], size: int, kept: int) -> list[int]:
    """The last ids, up to ``size``, behind the first ``kept`` of them, which stay."""
    if len(ids) <= size:
        return list(ids)
    kept = min(kept, size - 1)
    return [*ids[:kept], *ids[len(ids) - size + kept :]]


def check_prompt(ids: Sequence[int], context: int, sampling: Sampling) -> None:
    """Raise UserError for a prompt that is longer than the context, unless the window may slide."""
    if len(ids) > context and sampling.overflow == "error":
        raise UserError(
            f"the prompt has {len(ids)} tokens, the model's context is {context}",
            hint="shorten it, or keep only its end with --overflow slide",
        )


def decode(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    seeds: Sequence[int],
    eos_id: int,
    ended: Callable[[int, int], bool] | None = None,
) -> Iterator[list[Step]]:
    """``Decoder.run`` for a few prompts at once: ``seeds`` has one seed a row, a prompt's samples side by side."""
    samples = sampling.num_samples
    requests = [Request(prompt, seeds[index * samples : (index + 1) * samples]) for index, prompt in enumerate(prompts)]
    return Decoder(model).run(requests, sampling, eos_ids=(eos_id,), ended=ended)


class Decoder:
    """A model made ready to decode: on the CPU with the compiled step of ``tfcli.native.ops``, where that is there,
    on CUDA with recorded graphs.

    ``compiled=False`` takes PyTorch's operators all the same. The model's weights must stay as they are.
    """

    def __init__(self, model: Transformer, *, compiled: bool = True) -> None:
        self.model = model
        exact = model.dtype == torch.float32
        self._stepper: stepper.Stepper | GraphStepper | None = None
        if compiled and stepper.supports(model):
            self._stepper = stepper.Stepper(model, exact=exact)
        elif compiled and model.device.type == "cuda" and not model.config.encoder_depth:
            self._stepper = GraphStepper(model)

    def run(
        self,
        requests: Iterable[Request],
        sampling: Sampling,
        *,
        eos_ids: Collection[int],
        ended: Callable[[int, int], bool] | None = None,
    ) -> Iterator[list[Step]]:
        """Continue every request, a step of all open rows at a time; requests are taken as there is room for them.

        Row numbers count samples: a request's follow each other, and those of the request before. ``ended(row, id)``
        may finish a row with "stop_string". Rows finish with "stop" at one of ``eos_ids`` unless that is ignored,
        "length" at ``max_tokens``, and "context" when the window is full. With ``overflow="slide"`` a full window is
        cut to half of the context, its beginning of text and its end, which is read anew, so that positions never
        exceed what the model was trained on; not so beside an encoder, whose decoder gives up to one token less than
        the context, as in ``beam``. Raises RunError for logits that are not finite.
        """
        batch = _Batch(self, _Waiting(requests, self.model, sampling), sampling)
        limit, context = _most(self.model, sampling), self.model.config.context
        if self.model.config.encoder_depth:
            context = max(1, context - 1)
        while batch.next():
            steps: list[Step] = []
            for row, logprob in zip(batch.rows, batch.choose(), strict=True):
                row.made += 1
                finish: Finish | None = None
                if row.chosen in eos_ids and not sampling.ignore_eos:
                    steps.append(Step(row.number, None, logprob, "stop"))
                    continue
                if ended is not None and ended(row.number, row.chosen):
                    finish = "stop_string"
                elif row.made >= limit:
                    finish = "length"
                elif len(row.window) >= context and sampling.overflow == "error":
                    finish = "context"
                steps.append(Step(row.number, row.chosen, logprob, finish))
            yield steps
            batch.keep([step.finish is None for step in steps])

    @torch.inference_mode()
    def encode(self, sources: Sequence[Sequence[int]]) -> Memory:
        """What the decoder sees of each source."""
        ids_BS, mask_BS = padded(sources, self.model.device)
        return self.model.encode(ids_BS, mask_BS=mask_BS)

    @torch.inference_mode()
    def prefill(self, windows: Sequence[Sequence[int]], cache: KVCache, memory: Memory | None = None) -> Tensor:
        """Read windows into the rows of a cache, in parts, whatever they held: logits (B, V) after each, fp32."""
        model, lengths = self.model, [len(window) for window in windows]
        longest = max(lengths)
        tokens_BT = torch.tensor([[*window, *[0] * (longest - len(window))] for window in windows], device=model.device)
        cache.set_lengths([0] * len(windows))
        size = max(1, PREFILL_TOKENS // len(windows))
        last_BD: list[Tensor | None] = [None] * len(windows)
        for start in range(0, longest, size):
            hidden_BTD = model(tokens_BT[:, start : start + size], cache=cache, memory=memory)
            for row, length in enumerate(lengths):
                if start < length <= start + size:
                    last_BD[row] = hidden_BTD[row, length - 1 - start]
        cache.set_lengths(lengths)
        return model.logits(torch.stack([hidden for hidden in last_BD if hidden is not None])).float()

    @torch.inference_mode()
    def step(self, ids: Sequence[int], cache: KVCache, memory: Memory | None = None) -> Tensor:
        """Append one id to each row of a cache: logits (B, V) of what follows, fp32."""
        if self._stepper is not None:
            return self._stepper.step(ids, cache)
        tokens_B1 = torch.tensor(ids, device=self.model.device)[:, None]
        return self.model.logits(self.model(tokens_B1, cache=cache, memory=memory)[:, -1]).float()

    @property
    def compiled(self) -> bool:
        """Whether the compiled step does the decoding."""
        return isinstance(self._stepper, stepper.Stepper)

    @property
    def eager_because(self) -> str | None:
        """Why PyTorch's operators do it one by one, in words; None where a compiled step or a graph does."""
        return (
            None
            if self._stepper is not None
            else ops.unavailable() or "this model has parts that the compiled step has not"
        )


def _most(model: Transformer, sampling: Sampling) -> int:
    """New tokens at most; of an encoder-decoder, whose texts end as their sources do, no fewer than the context has."""
    return sampling.max_tokens or (model.config.context if model.config.encoder_depth else MAX_TOKENS)


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Ids (B, S), padded with 0 at their end, and True where an id is real (None where all are)."""
    longest = max(map(len, rows))
    ids_BS = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    if all(len(row) == longest for row in rows):
        return ids_BS, None
    length_B1 = torch.tensor([[len(row)] for row in rows], device=device)
    return ids_BS, torch.arange(longest, device=device) < length_B1


class _Row:
    """An open row: its number, its window of ids, how many of them stay, its random numbers, what was chosen last."""

    __slots__ = ("chosen", "kept", "made", "number", "uniforms", "window")

    def __init__(self, number: int, window: list[int], kept: int, uniforms: Uniforms | None) -> None:
        self.number, self.window, self.kept, self.uniforms = number, window, kept, uniforms
        self.chosen, self.made = -1, 0


class _Waiting:
    """Requests that are not open yet, with a look ahead at how much room they will need."""

    def __init__(self, requests: Iterable[Request], model: Transformer, sampling: Sampling) -> None:
        self._source = iter(requests)
        self._queue: deque[Request] = deque()
        self._context = model.config.context
        self._sampling, self._new = sampling, _most(model, sampling)
        config = model.config
        width = torch.empty((), dtype=model.dtype).element_size()
        self._row_bytes = 2 * config.depth * config.kv_heads * config.head_width * width
        self._numbers = count()

    def fill(self) -> bool:
        """Look ahead; whether anything is waiting."""
        while len(self._queue) < LOOK_AHEAD and (request := next(self._source, None)) is not None:
            check_prompt(request.ids if request.source is None else request.source, self._context, self._sampling)
            self._queue.append(request)
        return bool(self._queue)

    def need(self, request: Request) -> int:
        """Positions that a row of this request may come to hold."""
        return min(self._context, len(request.ids) + self._new)

    def room(self) -> tuple[int, int]:
        """(rows, positions) of a cache for those in sight, as many rows as CACHE_BYTES allow."""
        longest = max(map(self.need, self._queue))
        sources = max(len(request.source or ()) for request in self._queue)
        rows = max(1, min(ROWS, CACHE_BYTES // ((longest + sources) * self._row_bytes)))
        if len(self._queue) < LOOK_AHEAD:  # these are all
            rows = min(rows, sum(len(request.seeds) for request in self._queue))
        return rows, longest

    def take(self, rows: int, cache: KVCache) -> list[tuple[Request, list[int]]]:
        """The next requests, with the numbers of their rows, that fit into so many free rows of ``cache``.

        One with more samples than the cache has rows is taken a cache at a time.
        """
        taken: list[tuple[Request, list[int]]] = []
        while self.fill():
            request = self._queue[0]
            seeds, later = request.seeds[: cache.batch], request.seeds[cache.batch :]
            if len(seeds) > rows or self.need(request) > cache.capacity:
                break
            self._queue.popleft()
            if later:
                self._queue.appendleft(replace(request, seeds=later))
            taken.append((replace(request, seeds=seeds), [next(self._numbers) for _ in seeds]))
            rows -= len(seeds)
        return taken


class _Batch:
    """The open rows, their cache and the logits of their next tokens; row i is row i of the cache."""

    def __init__(self, decoder: Decoder, waiting: _Waiting, sampling: Sampling) -> None:
        self._decoder, self._waiting, self._sampling = decoder, waiting, sampling
        self._model = decoder.model
        # On MPS the logits go to the CPU as soon as they are there, for float64 and for one wait a step only.
        self._place = exact_device(self._model.device)
        self.rows: list[_Row] = []
        self._cache: KVCache | None = None
        self._memory: Memory | None = None
        """Of the open rows, where an encoder read their sources."""
        self._seen_BV: Tensor | None = None
        self._logits_BV = torch.empty(0)

    @torch.inference_mode()
    def next(self) -> bool:
        """The logits of every row's next token: feed what was chosen, and read new prompts; False when all is done."""
        parts = [self._feed()] if self.rows else []
        cache = self._cache
        if not self.rows:
            cache = self._cache = self._new_cache() if self._waiting.fill() else None
        if cache is None:
            return False
        free = cache.batch - len(self.rows)
        # Reading a prompt alone costs as much as reading a few: wait until some rows are free.
        if free and (not self.rows or free >= max(1, cache.batch // 8)):
            parts += self._admit(self._waiting.take(free, cache), cache)
        self._logits_BV = torch.cat(parts) if len(parts) > 1 else parts[0]
        return True

    def _new_cache(self) -> KVCache:
        rows, positions = self._waiting.room()
        model = self._model
        if self._sampling.repetition_penalty != 1.0:
            self._seen_BV = torch.zeros(rows, model.config.vocab_size, dtype=torch.bool, device=self._place)
        return KVCache(model.config, batch=rows, capacity=positions, dtype=model.dtype, device=model.device)

    def _admit(self, taken: list[tuple[Request, list[int]]], cache: KVCache) -> list[Tensor]:
        """Read requests into the rows behind the open ones, those of similar length together."""
        context, parts = self._model.config.context, []
        taken.sort(key=lambda pair: pair[0].length)
        while taken:
            longest = min(taken[-1][0].length, context)
            # Rows of one call are padded to the longest: not more than twice what the shortest of them needs.
            together = [pair for pair in taken if 2 * min(pair[0].length, context) >= longest]
            together = together[-max(1, PREFILL_TOKENS // longest) :]
            del taken[-len(together) :]
            parts.append(self._read(together, cache))
        return parts

    def _read(self, together: list[tuple[Request, list[int]]], cache: KVCache) -> Tensor:
        context, first = self._model.config.context, len(self.rows)
        windows = [window_of(request.ids, context, request.kept) for request, _ in together]
        sources = [request.source for request, _ in together if request.source is not None]
        memory = self._decoder.encode(sources) if sources else None
        logits_BV = self._decoder.prefill(windows, cache.rows(first, len(windows)), memory)
        which = [index for index, (_, numbers) in enumerate(together) for _ in numbers]
        if len(which) > len(windows):  # several samples of a prompt: it is read once
            cache.rows(first, len(which)).select(which)
            logits_BV = logits_BV[torch.tensor(which, device=logits_BV.device)]
            memory = None if memory is None else memory.select(which)
        if memory is not None:
            self._memory = Memory.joined([self._memory, memory] if first and self._memory is not None else [memory])
        for (request, numbers), window in zip(together, windows, strict=True):
            for number, seed in zip(numbers, request.seeds, strict=True):
                if self._seen_BV is not None:
                    self._seen_BV[len(self.rows)] = False
                    self._seen_BV[len(self.rows), list(request.ids)] = True
                uniforms = None if self._sampling.temperature == 0.0 else Uniforms(seed)
                self.rows.append(_Row(number, list(window), request.kept, uniforms))
        return logits_BV

    @torch.inference_mode()
    def choose(self) -> list[float]:
        """Choose the next id of every row; returns log-probabilities. The only wait for the device in a step."""
        logits_BV = self._logits_BV.to(self._place)
        seen_BV = None if self._seen_BV is None else self._seen_BV[: len(self.rows)]
        compiled = self._decoder.compiled
        if compiled and self._sampling.temperature == 0.0 and seen_BV is None:
            ids, logprobs = ops.pick(logits_BV)
        else:
            kept_BV = filtered(logits_BV, seen_BV, self._sampling)
            if self._sampling.temperature == 0.0:
                next_B = greedy(kept_BV)
            else:
                uniforms = [row.uniforms.draw() for row in self.rows if row.uniforms is not None]
                next_B = draw(kept_BV, torch.tensor(uniforms, dtype=torch.float64))
            if seen_BV is not None:
                seen_BV.scatter_(1, next_B[:, None], True)
            if compiled:
                ids, logprobs = ops.pick(logits_BV, next_B.tolist())
            else:
                logprob_B = logits_BV.gather(1, next_B[:, None])[:, 0] - logits_BV.logsumexp(dim=-1)
                both = torch.stack([next_B.float(), logprob_B]).tolist()  # fp32 holds every id below 2^24
                ids, logprobs = [int(id) for id in both[0]], both[1]
        if min(ids) < 0 or not all(map(math.isfinite, logprobs)):  # as for every token then
            raise RunError(
                "the model's output is not finite: its weights are damaged, or the precision overflowed",
                hint="try --precision fp32; if that does not help, copy or train the model again",
            )
        for row, id in zip(self.rows, ids, strict=True):
            row.chosen = id
        return logprobs

    @torch.inference_mode()
    def keep(self, open: list[bool]) -> None:
        """Drop the other rows: the last one moves into the place of each."""
        places = list(range(len(self.rows)))
        for index in range(len(open) - 1, -1, -1):
            if open[index]:
                continue
            last = len(self.rows) - 1
            if index != last and self._cache is not None:
                self._cache.move(last, index)
                if self._seen_BV is not None:
                    self._seen_BV[index] = self._seen_BV[last]
                self.rows[index], places[index] = self.rows[last], places[last]
            self.rows.pop()
            places.pop()
        if self._memory is not None and 0 < len(places) < len(open):
            self._memory = self._memory.select(places)

    def _feed(self) -> Tensor:
        """Append the chosen ids and compute the logits of the next ones."""
        assert self._cache is not None
        context = self._model.config.context
        slid: list[int] = []
        for index, row in enumerate(self.rows):
            row.window.append(row.chosen)
            if len(row.window) > context:
                row.window = window_of(row.window, max(1, context // 2), row.kept)
                slid.append(index)
        cache = self._cache.rows(0, len(self.rows))
        for index in slid:
            cache.rows(index, 1).set_lengths([0])
        logits_BV = self._decoder.step([row.chosen for row in self.rows], cache, self._memory)
        for index in slid:  # a window that was cut is read anew; the step's result for it is not one
            logits_BV[index] = self._decoder.prefill([self.rows[index].window], cache.rows(index, 1))[0]
        return logits_BV


@torch.inference_mode()
def decode_reference(
    model: Transformer,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    seed: int,
    eos_id: int,
    source: Sequence[int] | None = None,
    kept: int = 0,
) -> list[tuple[int, float]]:
    """Ids and log-probabilities of one prompt, the window read anew for every token: the twin of ``decode``."""
    memory = None if source is None else model.encode(torch.tensor([source], device=model.device))
    context = model.config.context
    check_prompt(prompt, context, sampling)
    seen, window = list(prompt), window_of(prompt, context, kept)
    uniforms = Uniforms(seed)
    made: list[tuple[int, float]] = []
    while len(made) < (sampling.max_tokens or MAX_TOKENS):
        if len(window) > context:
            if sampling.overflow == "error":
                break
            window = window_of(window, max(1, context // 2), kept)
        hidden_1TD = model(torch.tensor([window], device=model.device), memory=memory)
        logits_1V = model.logits(hidden_1TD[:, -1]).float()
        seen_1V = torch.zeros_like(logits_1V, dtype=torch.bool)
        seen_1V[0, seen] = True
        kept_1V = filtered(logits_1V, seen_1V, sampling)
        if sampling.temperature == 0.0:
            id = int(greedy(kept_1V))
        else:
            id = int(draw(kept_1V, torch.tensor([uniforms.draw()], dtype=torch.float64)))
        if id == eos_id and not sampling.ignore_eos:
            break
        made.append((id, float(logits_1V.log_softmax(dim=-1)[0, id])))
        seen.append(id)
        window.append(id)
    return made
