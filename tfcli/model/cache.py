"""The key/value cache: a value passed into the model, never stored on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tfcli.config.model import ModelConfig


class KVCache:
    """Keys and values of every layer for a number of rows, each filled from position 0 up to its own length.

    Rows are ragged on the right: positions beyond a row's length are never attended to and are overwritten as the row
    grows. So prompts of different length are read together padded at their end, a finished row is dropped by moving
    the last one into its place, and a new one is added after the others. ``rows(first, count)`` is a view of some rows.
    """

    def __init__(
        self, config: ModelConfig, *, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.buffers = Buffers(config, batch, capacity, dtype, device)
        self.first, self.batch = 0, batch

    @property
    def capacity(self) -> int:
        """The number of positions that a row can hold."""
        return self.buffers.capacity

    @property
    def lengths(self) -> list[int]:
        """The number of positions that each row holds."""
        return self.buffers.lengths[self.first : self.first + self.batch]

    @property
    def length(self) -> int:
        """The number of positions that the longest row holds."""
        return max(self.lengths)

    @property
    def uniform(self) -> bool:
        """True if all rows have the same length."""
        lengths = self.lengths
        return lengths.count(lengths[0]) == len(lengths)

    def rows(self, first: int, count: int) -> KVCache:
        """Return a view of ``count`` of these rows from ``first`` on."""
        if first < 0 or count < 1 or first + count > self.batch:
            raise ValueError(f"rows {first} to {first + count} of a cache of {self.batch}")
        view = KVCache.__new__(KVCache)
        view.buffers = self.buffers
        view.first, view.batch = self.first + first, count
        return view

    def keys(self, layer: int) -> Tensor:
        """Return the buffer of a layer's keys for these rows, (B, G, S, K), filled or not."""
        return self.buffers.keys[layer][self.first : self.first + self.batch]

    def values(self, layer: int) -> Tensor:
        """Return the buffer of a layer's values for these rows, (B, G, S, K), filled or not."""
        return self.buffers.values[layer][self.first : self.first + self.batch]

    def reserve(self, length: int) -> None:
        """Grow the buffers to ``length`` positions a row. Raises ValueError past the capacity."""
        if length > self.capacity:
            raise ValueError(f"{length} positions do not fit a cache of {self.capacity}")
        self.buffers.grow(length)

    def append(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Append T positions of one layer to each row; return keys and values up to the longest row, (B, G, S, K).

        Lengths change only with ``advance``, once every layer has appended. Raises ValueError past the capacity.
        """
        T, lengths = k_BGTK.shape[2], self.lengths
        end = max(lengths) + T
        self.reserve(end)
        keys, values = self.keys(layer), self.values(layer)
        if self.uniform:
            keys[:, :, lengths[0] : end] = k_BGTK
            values[:, :, lengths[0] : end] = v_BGTK
        else:
            row_B1 = torch.arange(self.batch, device=keys.device)[:, None]
            position_BT = self.positions(T)
            keys[row_B1, :, position_BT] = k_BGTK.transpose(1, 2).to(keys.dtype)
            values[row_B1, :, position_BT] = v_BGTK.transpose(1, 2).to(values.dtype)
        return keys[:, :, :end], values[:, :, :end]

    def positions(self, T: int) -> Tensor:
        """Return the positions of the next T tokens: (T,) where all rows have the same length, else (B, T)."""
        device = self.buffers.keys[0].device
        steps = torch.arange(T, device=device)
        if self.uniform:
            return steps + self.lengths[0]
        return torch.tensor(self.lengths, device=device)[:, None] + steps

    def mask(self, T: int, window: int = 0) -> Tensor | None:
        """Return a mask (B or 1, 1, T, S), True where the next T tokens attend; None where causality suffices.

        ``window`` limits each to that many positions, including its own; 0 is no limit.
        """
        if self.uniform and not (window and self.length + T > window):
            return None
        query = self.positions(T)
        query = query[None, None, :, None] if query.dim() == 1 else query[:, None, :, None]
        key = torch.arange(self.length + T, device=query.device)
        seen = key <= query
        return seen & (key > query - window) if window else seen

    def advance(self, positions: int) -> None:
        """Add ``positions`` to the length of every row."""
        self.set_lengths([length + positions for length in self.lengths])

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Set the length of each row: after reading rows padded at their end, or to drop positions."""
        if len(lengths) != self.batch:
            raise ValueError(f"{len(lengths)} lengths for {self.batch} rows")
        self.buffers.lengths[self.first : self.first + self.batch] = lengths

    def move(self, source: int, target: int) -> None:
        """Copy row ``source`` into row ``target``."""
        if source == target:
            return
        length = self.lengths[source]
        for buffer in (*self.buffers.keys, *self.buffers.values):
            buffer[self.first + target, :, :length] = buffer[self.first + source, :, :length]
        self.buffers.lengths[self.first + target] = length

    def select(self, rows: Sequence[int]) -> None:
        """Reorder or repeat rows in place: row ``rows[i]`` becomes row i, for the first len(rows) (beams)."""
        before = self.lengths
        filled = max((before[row] for row in rows), default=0)
        index = torch.tensor([self.first + row for row in rows], device=self.buffers.keys[0].device)
        for buffer in (*self.buffers.keys, *self.buffers.values):
            buffer[self.first : self.first + len(rows), :, :filled] = buffer[:, :, :filled].index_select(0, index)
        self.buffers.lengths[self.first : self.first + len(rows)] = [before[row] for row in rows]


class Memory:
    """Keys and values of an encoder's output for the cross-attention of every layer, computed once.

    ``keys[layer]`` and ``values[layer]`` are (B, G, S, K), the additive ``mask`` (B, 1, 1, S), or None without padding.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Tensor | None) -> None:
        self.keys, self.values, self.mask = tuple(keys), tuple(values), mask

    def select(self, rows: Sequence[int]) -> Memory:
        """Return a memory of these rows, in this order."""
        index = torch.tensor(list(rows), device=self.keys[0].device)
        keys, values = ([t.index_select(0, index) for t in tensors] for tensors in (self.keys, self.values))
        return Memory(keys, values, None if self.mask is None else self.mask.index_select(0, index))

    @classmethod
    def joined(cls, parts: Sequence[Memory]) -> Memory:
        """Concatenate the rows of several memories, padded to the longest source."""
        if len(parts) == 1:
            return parts[0]
        longest = max(part.keys[0].shape[2] for part in parts)

        def joined(parts: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
            padded = ([F.pad(t, (0, 0, 0, longest - t.shape[2])) for t in tensors] for tensors in parts)
            return [torch.cat(layer) for layer in zip(*padded, strict=True)]

        masks = []
        for part in parts:
            B, _, S, _ = part.keys[0].shape
            mask = part.keys[0].new_zeros(B, 1, 1, S) if part.mask is None else part.mask
            masks.append(F.pad(mask, (0, longest - S), value=float("-inf")))
        return cls(joined([p.keys for p in parts]), joined([p.values for p in parts]), torch.cat(masks))


class Buffers:
    """The memory that all views of a cache share: (rows, G, S, K) per layer, growing up to ``capacity`` positions."""

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity = capacity
        self.lengths = [0] * batch
        shape = (batch, config.kv_heads, min(capacity, 64), config.head_width)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.depth)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.depth)]

    def grow(self, length: int) -> None:
        """Reallocate every buffer, at least doubled, where it has less than ``length`` positions."""
        size, filled = self.keys[0].shape[2], max(self.lengths)
        if length <= size:
            return
        size = min(self.capacity, max(length, 2 * size))
        for buffers in (self.keys, self.values):
            for layer, buffer in enumerate(buffers):
                # Zeros, for 0 x NaN is NaN: a masked position has no weight, but must hold a number.
                buffers[layer] = buffer.new_zeros((*buffer.shape[:2], size, buffer.shape[3]))
                buffers[layer][:, :, :filled] = buffer[:, :, :filled]
