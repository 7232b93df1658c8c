"""Keys and values of the positions already seen: a value passed into the model, never hung on it."""

from __future__ import annotations

import torch
from torch import Tensor

from tfcli.config import ModelConfig


class KVCache:
    """Preallocated keys and values of every layer, filled up to ``length`` positions.

    Rows may be left-padded: ``pad_B`` counts the positions at the start of each row that hold nothing and are never
    attended to (None: no row is padded). Buffers grow by doubling up to ``capacity`` positions.
    """

    def __init__(self, config: ModelConfig, *, batch: int, capacity: int, dtype: torch.dtype, device: torch.device,
                 pad_B: Tensor | None = None) -> None:  # fmt: skip
        self.capacity = capacity
        self.length = 0
        self.pad_B = pad_B
        size = min(capacity, 64)
        shape = (batch, config.kv_heads, size, config.head_width)
        self._keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.depth)]
        self._values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.depth)]

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self._keys[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held by the buffers."""
        return sum(t.numel() * t.element_size() for t in self._keys + self._values)

    def append(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new positions of one layer; returns all of its keys and values, (B, G, S, K) each.

        ``length`` moves only with ``advance``, once every layer has appended. Raises ValueError past the capacity.
        """
        end = self.length + k_BGTK.shape[2]
        if end > self.capacity:
            raise ValueError(f"{end} positions do not fit a cache of {self.capacity}")
        if end > self._keys[layer].shape[2]:
            self._keys[layer] = _grown(self._keys[layer], self.length, end, self.capacity)
            self._values[layer] = _grown(self._values[layer], self.length, end, self.capacity)
        keys, values = self._keys[layer], self._values[layer]
        keys[:, :, self.length : end] = k_BGTK
        values[:, :, self.length : end] = v_BGTK
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, positions: int) -> None:
        """Count ``positions`` more as filled."""
        self.length += positions

    def trim(self, positions: int) -> None:
        """Forget the last ``positions``."""
        self.length = max(0, self.length - positions)

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat rows: row i becomes what row ``rows[i]`` was (beams, samples, finished rows)."""
        self._keys = [t.index_select(0, rows) for t in self._keys]
        self._values = [t.index_select(0, rows) for t in self._values]
        if self.pad_B is not None:
            self.pad_B = self.pad_B.index_select(0, rows)


def _grown(buffer: Tensor, filled: int, needed: int, capacity: int) -> Tensor:
    size = min(capacity, max(needed, 2 * buffer.shape[2]))
    grown = buffer.new_empty((*buffer.shape[:2], size, buffer.shape[3]))
    grown[:, :, :filled] = buffer[:, :, :filled]
    return grown
