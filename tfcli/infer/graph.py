"""The decode step on CUDA as a graph: recorded once for a shape, then replayed without Python between its kernels.

A graph needs shapes that do not change, so the step attends to the whole of the cache's buffers under a mask, and
positions are a tensor that lives on the device. The same step runs without recording wherever a test wants it to.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tfcli.model.cache import KVCache
from tfcli.model.transformer import Transformer

MOST_GRAPHS = 8
"""Recorded over one cache at once: each holds the memory of its intermediate results."""


class FixedView(KVCache):
    """A cache for one step of T = 1 whose shapes do not depend on how full it is: lengths are on the device."""

    def __init__(self, cache: KVCache, lengths_B: Tensor) -> None:
        # The buffers must outlive what is recorded over them, for it has their addresses; the cache itself need not.
        self._store = copy.copy(cache._store)
        self._store.keys, self._store.values = [*cache._store.keys], [*cache._store.values]
        self.first, self.batch = cache.first, cache.batch
        self._lengths_B = lengths_B
        self._row_B1 = torch.arange(self.batch, device=lengths_B.device)[:, None]

    @property
    def uniform(self) -> bool:
        """Never: what is beyond a row's length is masked, not cut off."""
        return False

    def positions(self, T: int) -> Tensor:
        """(B, 1): where each row's token goes."""
        return self._lengths_B[:, None]

    def mask(self, T: int, window: int = 0) -> Tensor:
        """(B, 1, 1, S) over the whole buffer."""
        query = self._lengths_B[:, None, None, None]
        key = torch.arange(self.keys(0).shape[2], device=query.device)
        seen = key <= query
        return seen & (key > query - window) if window else seen

    def append(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store one position a row; returns the whole buffers."""
        keys, values = self.keys(layer), self.values(layer)
        position_B1 = self.positions(1)
        keys[self._row_B1, :, position_B1] = k_BGTK.transpose(1, 2).to(keys.dtype)
        values[self._row_B1, :, position_B1] = v_BGTK.transpose(1, 2).to(values.dtype)
        return keys, values

    def advance(self, positions: int) -> None:
        """Left to the caller, outside the graph."""


class _Graph:
    """One recorded step: what it reads and writes stays where it is."""

    def __init__(self, model: Transformer, cache: KVCache, *, record: bool) -> None:
        B, device = cache.batch, model.device
        self._tokens_B1 = torch.zeros(B, 1, dtype=torch.int64, device=device)
        self._lengths_B = torch.zeros(B, dtype=torch.int64, device=device)
        self._model, self._view = model, FixedView(cache, self._lengths_B)
        self._logits_BV = torch.empty(0)
        self._graph: torch.cuda.CUDAGraph | None = None
        if record:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # once before recording: libraries allocate at their first call
                self._run()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # What other threads do on the device meanwhile is no part of it, and no error.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._run()

    def _run(self) -> None:
        hidden_B1D = self._model(self._tokens_B1, cache=self._view)
        self._logits_BV = self._model.logits(hidden_B1D[:, -1]).float()

    def __call__(self, ids: Sequence[int], lengths: Sequence[int]) -> Tensor:
        self._tokens_B1.copy_(torch.tensor(ids)[:, None], non_blocking=True)
        self._lengths_B.copy_(torch.tensor(lengths), non_blocking=True)
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()
        return self._logits_BV.clone()


@dataclass(kw_only=True)
class _Recorded:
    """Graphs over the buffers of one cache, of which ``keys`` are the first."""

    keys: Tensor
    graphs: dict[tuple[int, int], _Graph] = field(default_factory=dict)


class GraphStepper:
    """Steps of a model on CUDA by recorded graphs; ``record=False`` runs the same steps without recording."""

    def __init__(self, model: Transformer, *, record: bool = True) -> None:
        self._model, self._record = model, record
        self._recorded: WeakKeyDictionary[object, _Recorded] = WeakKeyDictionary()
        """By the cache that they were recorded over: with it they are let go."""
        self._lock = threading.Lock()
        """Held by the one step that may use the graphs, whose inputs and outputs are their own."""

    @torch.inference_mode()
    def step(self, ids: Sequence[int], cache: KVCache) -> Tensor:
        """Append one id to each row: its logits (B, V), fp32; the cache is advanced by one."""
        with self._lock:
            logits_BV = self._step(ids, cache)
        cache.advance(1)
        return logits_BV

    def _step(self, ids: Sequence[int], cache: KVCache) -> Tensor:
        lengths = cache.lengths
        cache.reserve(max(lengths) + 1)
        graphs, key = self._graphs(cache), (len(ids), cache.first)
        if key not in graphs:
            while len(graphs) >= MOST_GRAPHS:
                del graphs[next(iter(graphs))]
            # Recording runs the step on what the graph's inputs hold then: position 0, which is put back.
            graphs[key] = _Graph(self._model, cache, record=False)
            first = graphs[key](ids, lengths)
            if not self._record:
                return first
            saved = [(buffer, buffer[:, :, :1].clone()) for buffer in (*cache._store.keys, *cache._store.values)]
            graphs[key] = _Graph(self._model, cache, record=True)
            for buffer, before in saved:
                buffer[:, :, :1] = before
            return first
        return graphs[key](ids, lengths)

    def _graphs(self, cache: KVCache) -> dict[tuple[int, int], _Graph]:
        """What is recorded over a cache, by (rows, first row); none any more where its buffers have grown."""
        keys = cache._store.keys[0]
        recorded = self._recorded.get(cache._store)
        if recorded is None or recorded.keys is not keys:
            recorded = self._recorded[cache._store] = _Recorded(keys=keys)
        return recorded.graphs
