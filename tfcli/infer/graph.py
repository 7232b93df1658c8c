"""The decode step on CUDA as a graph: recorded once per shape, then replayed without Python between its kernels.

A graph needs fixed shapes, so the step attends to the whole of the cache's buffers under a mask, and positions are a
tensor on the device. The same step also runs without recording, for tests.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tfcli.model.cache import Buffers, KVCache
from tfcli.model.transformer import Transformer

MOST_GRAPHS = 8
"""Graphs kept per cache: each holds the memory of its intermediate results."""


class FixedView(KVCache):
    """A view of a cache for steps of T = 1 whose shapes do not depend on the lengths, which are on the device."""

    def __init__(self, cache: KVCache, lengths_B: Tensor) -> None:
        # The tensors must outlive the graphs recorded over them, which hold their addresses; the cache need not.
        self.buffers = copy.copy(cache.buffers)
        self.buffers.keys, self.buffers.values = [*cache.buffers.keys], [*cache.buffers.values]
        self.first, self.batch = cache.first, cache.batch
        self._lengths_B = lengths_B
        self._row_B1 = torch.arange(self.batch, device=lengths_B.device)[:, None]

    @property
    def uniform(self) -> bool:
        """False: positions beyond a row's length are masked, not sliced off."""
        return False

    def positions(self, T: int) -> Tensor:
        """Return the position (B, 1) of each row's token."""
        return self._lengths_B[:, None]

    def mask(self, T: int, window: int = 0) -> Tensor:
        """Return a mask (B, 1, 1, S) over the whole buffer."""
        query = self._lengths_B[:, None, None, None]
        key = torch.arange(self.keys(0).shape[2], device=query.device)
        seen = key <= query
        return seen & (key > query - window) if window else seen

    def append(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store one position per row; return the whole buffers."""
        keys, values = self.keys(layer), self.values(layer)
        position_B1 = self.positions(1)
        keys[self._row_B1, :, position_B1] = k_BGTK.transpose(1, 2).to(keys.dtype)
        values[self._row_B1, :, position_B1] = v_BGTK.transpose(1, 2).to(values.dtype)
        return keys, values

    def advance(self, positions: int) -> None:
        """Do nothing: the caller advances the cache, outside the graph."""


class _Graph:
    """One recorded step, whose inputs and outputs have fixed addresses."""

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
            # Work of other threads on the device meanwhile is neither recorded nor an error.
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


_Graphs = dict[tuple[int, int], _Graph]
"""By (rows, first row)."""


class GraphStepper:
    """Steps of a model on CUDA by recorded graphs; ``record=False`` runs the same steps without recording."""

    def __init__(self, model: Transformer, *, record: bool = True) -> None:
        self._model, self._record = model, record
        self._recorded: WeakKeyDictionary[Buffers, tuple[Tensor, _Graphs]] = WeakKeyDictionary()
        """The graphs over each cache's buffers, with which they are freed, and the first buffer."""
        self._lock = threading.Lock()
        """Held during a step: the inputs and outputs of a graph serve one step at a time."""

    @torch.inference_mode()
    def step(self, ids: Sequence[int], cache: KVCache) -> Tensor:
        """Append one id to each row and advance the cache; return the logits (B, V), fp32."""
        with self._lock:
            logits_BV = self._step(ids, cache)
        cache.advance(1)
        return logits_BV

    def _step(self, ids: Sequence[int], cache: KVCache) -> Tensor:
        lengths = cache.lengths
        cache.reserve(max(lengths) + 1)
        first_buffer, graphs = self._recorded.get(cache.buffers, (None, {}))
        if first_buffer is not cache.buffers.keys[0]:  # new, or grown
            graphs = {}
            self._recorded[cache.buffers] = (cache.buffers.keys[0], graphs)
        key = (len(ids), cache.first)
        if key not in graphs:
            while len(graphs) >= MOST_GRAPHS:
                del graphs[next(iter(graphs))]
            # Recording runs the step on the graph's initial inputs, position 0, which is then restored.
            graphs[key] = _Graph(self._model, cache, record=False)
            first = graphs[key](ids, lengths)
            if not self._record:
                return first
            saved = [(buffer, buffer[:, :, :1].clone()) for buffer in (*cache.buffers.keys, *cache.buffers.values)]
            graphs[key] = _Graph(self._model, cache, record=True)
            for buffer, before in saved:
                buffer[:, :, :1] = before
            return first
        return graphs[key](ids, lengths)
