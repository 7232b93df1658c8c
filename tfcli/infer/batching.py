"""Continuous batching (Yu et al. 2022, Orca): the requests that wait, and the open rows over one key/value cache.

Row i of a batch is row i of its cache. A finished row leaves at once, and waiting prompts are read into free rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from tfcli.config.options import MAX_TOKENS, Sampling
from tfcli.errors import UserError
from tfcli.infer.batches import encode
from tfcli.infer.sampling import Uniforms, exact_device
from tfcli.model.cache import KVCache, Memory
from tfcli.model.transformer import Transformer

ROWS = 64
"""The most rows that are decoded together."""
CACHE_BYTES = 512 << 20
"""The most bytes of keys and values for them."""
LOOK_AHEAD = 512
"""Requests that are read ahead, to choose the size of the cache."""
PREFILL_TOKENS = 2048
"""Positions that are read at once, over all rows."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt (at least one id), and the seed of each of its samples.

    ``source`` is the input of an encoder, if there is one; ``ids`` are then the beginning of the decoder's text. The
    first ``kept`` of ``ids``, a beginning of text, stay where a full window slides.
    """

    ids: Sequence[int]
    seeds: Sequence[int]
    source: Sequence[int] | None = None
    kept: int = 0

    @property
    def length(self) -> int:
        """The number of positions that are read at once."""
        return len(self.ids if self.source is None else self.source)


class Forward(Protocol):
    """The model calls that a batch needs: ``tfcli.infer.decode.Decoder``."""

    model: Transformer

    def prefill(self, windows: Sequence[Sequence[int]], cache: KVCache, memory: Memory | None = None) -> Tensor:
        """Read windows into the rows of a cache; return the logits (B, V) after each."""

    def step(self, ids: Sequence[int], cache: KVCache, memory: Memory | None = None) -> Tensor:
        """Append one id to each row of a cache; return the next logits (B, V)."""


def window_of(ids: Sequence[int], size: int, kept: int) -> list[int]:
    """Return the last ids, up to ``size``, after the first ``kept`` of them."""
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


def most_tokens(model: Transformer, sampling: Sampling) -> int:
    """Return the limit of new tokens: by default MAX_TOKENS, for an encoder-decoder the context."""
    return sampling.max_tokens or (model.config.context if model.config.encoder_depth else MAX_TOKENS)


class Row:
    """An open row: its number, window of ids and how many of them stay, random numbers, last id and count of ids."""

    __slots__ = ("chosen", "count", "kept", "number", "uniforms", "window")

    def __init__(self, number: int, window: list[int], kept: int, uniforms: Uniforms | None) -> None:
        self.number, self.window, self.kept, self.uniforms = number, window, kept, uniforms
        self.chosen, self.count = -1, 0


class Waiting:
    """Requests that are not open yet, read ahead to know how much memory they need."""

    def __init__(self, requests: Iterable[Request], model: Transformer, sampling: Sampling) -> None:
        config = model.config
        self._source = iter(requests)
        self._queue: deque[Request] = deque()
        self._context, self._sampling, self._new = config.context, sampling, most_tokens(model, sampling)
        self._row_bytes = 2 * config.depth * config.kv_heads * config.head_width * model.dtype.itemsize
        self._numbers = count()

    def fill(self) -> bool:
        """Read ahead; return whether any request is waiting."""
        while len(self._queue) < LOOK_AHEAD and (request := next(self._source, None)) is not None:
            check_prompt(request.ids if request.source is None else request.source, self._context, self._sampling)
            self._queue.append(request)
        return bool(self._queue)

    def _positions(self, request: Request) -> int:
        return min(self._context, len(request.ids) + self._new)

    def cache_size(self) -> tuple[int, int]:
        """Return (rows, positions) of a cache for the waiting requests, with as many rows as CACHE_BYTES allow."""
        longest = max(map(self._positions, self._queue))
        sources = max(len(request.source or ()) for request in self._queue)
        rows = max(1, min(ROWS, CACHE_BYTES // ((longest + sources) * self._row_bytes)))
        if len(self._queue) < LOOK_AHEAD:  # these are all
            rows = min(rows, sum(len(request.seeds) for request in self._queue))
        return rows, longest

    def take(self, rows: int, cache: KVCache) -> list[tuple[Request, list[int]]]:
        """Take the next requests, with the numbers of their rows, that fit into ``rows`` free rows of ``cache``.

        One with more samples than the cache has rows is taken in parts.
        """
        taken: list[tuple[Request, list[int]]] = []
        while self.fill():
            request = self._queue[0]
            seeds, later = request.seeds[: cache.batch], request.seeds[cache.batch :]
            if len(seeds) > rows or self._positions(request) > cache.capacity:
                break
            self._queue.popleft()
            if later:
                self._queue.appendleft(replace(request, seeds=later))
            taken.append((replace(request, seeds=seeds), [next(self._numbers) for _ in seeds]))
            rows -= len(seeds)
        return taken


class Batch:
    """The open rows, their cache and the logits of their next tokens."""

    def __init__(self, forward: Forward, waiting: Waiting, sampling: Sampling) -> None:
        self._forward, self._waiting, self._sampling = forward, waiting, sampling
        self._model = forward.model
        self.rows: list[Row] = []
        self.logits_BV = torch.empty(0)
        self._cache: KVCache | None = None
        self._memory: Memory | None = None
        self._seen_BV: Tensor | None = None

    @property
    def seen(self) -> Tensor | None:
        """A mask (B, V) of the tokens of each row so far, where the repetition penalty needs it."""
        return None if self._seen_BV is None else self._seen_BV[: len(self.rows)]

    @torch.inference_mode()
    def next(self) -> bool:
        """Compute the next logits: feed the chosen ids, and read new prompts. Return False once all is done."""
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
        self.logits_BV = torch.cat(parts) if len(parts) > 1 else parts[0]
        return True

    def _new_cache(self) -> KVCache:
        rows, positions = self._waiting.cache_size()
        model = self._model
        if self._sampling.repetition_penalty != 1.0:
            device = exact_device(model.device)
            self._seen_BV = torch.zeros(rows, model.config.vocab_size, dtype=torch.bool, device=device)
        return KVCache(model.config, batch=rows, capacity=positions, dtype=model.dtype, device=model.device)

    def _admit(self, taken: list[tuple[Request, list[int]]], cache: KVCache) -> list[Tensor]:
        """Read requests into the rows after the open ones, those of similar length together."""
        context, parts = self._model.config.context, []
        taken.sort(key=lambda pair: pair[0].length)
        while taken:
            longest = min(taken[-1][0].length, context)
            # Rows of one call are padded to the longest: to no more than twice the length of the shortest.
            together = [pair for pair in taken if 2 * min(pair[0].length, context) >= longest]
            together = together[-max(1, PREFILL_TOKENS // longest) :]
            del taken[-len(together) :]
            parts.append(self._read(together, cache))
        return parts

    def _read(self, together: list[tuple[Request, list[int]]], cache: KVCache) -> Tensor:
        context, first = self._model.config.context, len(self.rows)
        windows = [window_of(request.ids, context, request.kept) for request, _ in together]
        sources = [request.source for request, _ in together if request.source is not None]
        memory = encode(self._model, sources) if sources else None
        logits_BV = self._forward.prefill(windows, cache.rows(first, len(windows)), memory)
        which = [index for index, (_, numbers) in enumerate(together) for _ in numbers]
        if len(which) > len(windows):  # a prompt with several samples is read once
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
                self.rows.append(Row(number, list(window), request.kept, uniforms))
        return logits_BV

    @torch.inference_mode()
    def keep(self, open: list[bool]) -> None:
        """Drop the other rows: the last row moves into the place of each."""
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
        """Append the chosen ids and compute the next logits."""
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
        logits_BV = self._forward.step([row.chosen for row in self.rows], cache, self._memory)
        for index in slid:  # a window that slid is read again, in place of the step's result
            logits_BV[index] = self._forward.prefill([self.rows[index].window], cache.rows(index, 1))[0]
        return logits_BV
