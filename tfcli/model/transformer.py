"""The Transformer: blocks over a residual stream, as ModelConfig describes.

A decoder, an encoder, and an encoder-decoder, where each decoder block attends to the encoder: the same ``Block``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfcli.config.model import ModelConfig
from tfcli.model import fused
from tfcli.model.attention import Attention, CrossAttention, Rope, additive, band_mask, causal_mask
from tfcli.model.base import Model
from tfcli.model.cache import KVCache, Memory
from tfcli.model.layers import NO_SCALING, FeedForward, Linear, make_norm, rope_table
from tfcli.native import ops

Cross = tuple[Tensor, Tensor, Tensor | None]
"""Keys, values and mask of an encoder's output for one layer."""


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream, with norms where the config places them.

    In an encoder-decoder (``config.encoder_depth``), attention to the encoder's output comes between the two.
    pre: ``x + f(norm(x))`` (Xiong et al. 2020); post: ``norm(x + f(x))`` (Vaswani et al. 2017); sandwich:
    ``x + post_norm(f(norm(x)))`` (Ding et al. 2021).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.place = config.architecture.norms.place
        normed = layer > 0 or config.architecture.norms.first
        self.attention_norm = make_norm(config, config.width) if normed else nn.Identity()
        self.attention = Attention(config, layer)
        crosses = config.encoder_depth > 0
        if crosses:
            self.cross_norm = make_norm(config, config.width)
            self.cross = CrossAttention(config)
        self.ffn_norm = make_norm(config, config.width)
        self.ffn = FeedForward(config)
        sandwich = self.place == "sandwich"
        self.attention_post_norm = make_norm(config, config.width) if sandwich else None
        self.ffn_post_norm = make_norm(config, config.width) if sandwich else None
        self.cross_post_norm = make_norm(config, config.width) if sandwich and crosses else None

    def forward(
        self, x_BTD: Tensor, rope: Rope | None, mask: Tensor | None, cache: KVCache | None, dropout: float,
        cross: Cross | None = None,
    ) -> Tensor:  # fmt: skip
        """(B, T, D) -> (B, T, D). ``cross`` are this layer's keys, values and mask of the encoder's output."""
        post = self.place == "post"
        y_BTD = self.attention(x_BTD if post else self.attention_norm(x_BTD), rope, mask, cache)
        x_BTD = self._add(x_BTD, y_BTD, self.attention_norm, self.attention_post_norm, dropout)
        if cross is not None:
            y_BTD = self.cross(x_BTD if post else self.cross_norm(x_BTD), *cross)
            x_BTD = self._add(x_BTD, y_BTD, self.cross_norm, self.cross_post_norm, dropout)
        y_BTD = self.ffn(x_BTD if post else self.ffn_norm(x_BTD))
        return self._add(x_BTD, y_BTD, self.ffn_norm, self.ffn_post_norm, dropout)

    def _add(
        self, x_BTD: Tensor, y_BTD: Tensor, norm: nn.Module, post_norm: nn.Module | None, dropout: float
    ) -> Tensor:
        """Add the output of a part to the residual stream, with the norm that follows it."""
        x_BTD = fused.add_dropout(x_BTD, y_BTD if post_norm is None else post_norm(y_BTD), dropout)
        return norm(x_BTD) if self.place == "post" else x_BTD


class Stack(nn.Module):
    """The layers between a token embedding and a head: positions, ``depth`` blocks and a final norm.

    Parts that a model does not have (positions, types, embed_norm, the final norm of post-norm blocks) have no
    parameters. ``embed``, where given, becomes its first part.
    """

    def __init__(self, config: ModelConfig, embed: nn.Embedding | None = None) -> None:
        super().__init__()
        self.config = config
        arch, D = config.architecture, config.width
        if embed is not None:
            self.embed = embed
        if arch.embedding.positions == "learned":
            self.positions = _embedding(config.context, D)
        if arch.embedding.token_types:
            self.types = _embedding(arch.embedding.token_types, D)
        if arch.embedding.norm:
            self.embed_norm = make_norm(config, D)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.norm = nn.Identity() if arch.norms.place == "post" else make_norm(config, D)

    def hidden(
        self, x_BTD: Tensor, *, cache: KVCache | None = None, dropout: float = 0.0, mask_BT: Tensor | None = None,
        types_BT: Tensor | None = None, memory: Memory | None = None, segments_BT: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Embedded tokens (B, T, D) -> hidden states (B, T, D) after the final norm, as ``Transformer.forward``."""
        T = x_BTD.shape[1]
        positions = torch.arange(T, device=x_BTD.device) if cache is None else cache.positions(T)
        if segments_BT is not None:
            positions = packed_positions(segments_BT)
        x_BTD = fused.dropout(self._embedded(x_BTD, positions, types_BT), dropout)
        kinds = [self.config.is_local(layer) for layer in range(self.config.depth)]
        views = {local: self._view(local, positions, x_BTD, cache, mask_BT, segments_BT) for local in set(kinds)}
        for layer, (local, block) in enumerate(zip(kinds, self.blocks, strict=True)):
            cross = None if memory is None else (memory.keys[layer], memory.values[layer], memory.mask)
            x_BTD = block(x_BTD, *views[local], cache, dropout, cross)
        if cache is not None:
            cache.advance(T)
        return self.norm(x_BTD)

    def _embedded(self, x_BTD: Tensor, positions: Tensor, types_BT: Tensor | None) -> Tensor:
        """Compute the input of the first block (B, T, D): scaled embeddings of tokens, types and positions, normed."""
        arch = self.config.architecture
        if arch.embedding.scale != 1.0:
            # Rounded to the dtype, as Gemma was trained: in bf16 sqrt(640) is 25.25.
            x_BTD = x_BTD * torch.tensor(arch.embedding.scale, dtype=x_BTD.dtype)
        if arch.embedding.token_types:
            if types_BT is None:
                types_BT = torch.zeros(x_BTD.shape[:2], dtype=torch.int64, device=x_BTD.device)
            x_BTD = x_BTD + self.types(types_BT).to(x_BTD.dtype)
        if arch.embedding.positions == "learned":
            x_BTD = x_BTD + self.positions(positions).to(x_BTD.dtype)
        if arch.embedding.norm:
            x_BTD = self.embed_norm(x_BTD)
        return x_BTD

    def _view(
        self, local: bool, positions: Tensor, x_BTD: Tensor, cache: KVCache | None, mask_BT: Tensor | None,
        segments_BT: Tensor | None,
    ) -> tuple[Rope | None, Tensor | None]:  # fmt: skip
        """Compute rotary tables and the mask of all local layers, or of all others."""
        config, arch, T = self.config, self.config.architecture, x_BTD.shape[1]
        rope, mask = None, None
        if arch.embedding.positions == "rope":
            theta, scaling = config.rope_theta, arch.attention.rope_scaling
            if local:
                theta, scaling = arch.windows.theta, NO_SCALING
            cos, sin = rope_table(positions, config.head_width, theta, scaling)
            rope = (cos.to(x_BTD.dtype).unsqueeze(-2), sin.to(x_BTD.dtype).unsqueeze(-2))
        window = arch.windows.size if local else 0
        if cache is not None:
            # One query per row of equal length needs none: attention slices off what is outside the window.
            mask = None if T == 1 and cache.uniform else cache.mask(T, window)
            if mask is None and T > 1 and cache.length:
                same_dtype = cache.keys(0).dtype == x_BTD.dtype
                if not (same_dtype and ops.attends_from(x_BTD, config.head_width, queries=T, causal=True)):
                    # For all kernels but the native one, which takes the offset of the queries.
                    mask = causal_mask(T, cache.length + T, x_BTD.device)
        else:
            reach = window if arch.causal else window // 2 + 1
            if window and reach < T:
                mask = band_mask(T, window, arch.causal, x_BTD.device)
            if mask_BT is not None and not arch.causal:
                real = mask_BT[:, None, None, :].bool()
                # A padded query whose window holds only padding must still attend to something: itself.
                mask = real if mask is None else mask & real | torch.eye(T, dtype=torch.bool, device=real.device)
            if segments_BT is not None:  # block-diagonal
                same = (segments_BT[:, None, :, None] == segments_BT[:, None, None, :]).tril()
                mask = same if mask is None else mask & same
        return rope, None if mask is None else additive(mask, x_BTD.dtype)


class Transformer(Stack, Model):
    """A decoder or an encoder: token embedding, ``depth`` blocks, a final norm and an output head.

    With ``config.encoder_depth`` it is an encoder-decoder: ``encoder`` is another stack, which shares the token
    embedding. One forward serves training and inference: the cache and the memory are values passed in. Constructors
    only declare parameters; ``initialize`` or loaded weights fill them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, _embedding(config.vocab_size, config.width))
        if config.encoder_depth:
            self.encoder = Stack(config.encoder)
        self.head = Linear(config.width, config.vocab_size)
        if config.tied:
            self.head.weight = self.embed.weight

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device  # norms, at least: quantized layers have none

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its norms, in which ``forward`` computes by default."""
        return self.get_parameter("blocks.0.ffn_norm.weight").dtype

    def forward(
        self, tokens_BT: Tensor, *, cache: KVCache | None = None, dtype: torch.dtype | None = None,
        dropout: float = 0.0, mask_BT: Tensor | None = None, types_BT: Tensor | None = None,
        memory: Memory | None = None, segments_BT: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Token ids (B, T) -> hidden states (B, T, D) after the final norm, in ``dtype`` (default: its own).

        With a cache (decoders only) the tokens follow the cached positions of each row, and it is advanced by T.
        ``mask_BT`` is False at the padding at the end of rows; a causal decoder needs none. ``types_BT`` are segment
        ids (default: 0). ``memory`` is the result of ``encode`` for these rows, or for every n-th of them, in an
        encoder-decoder. ``segments_BT`` numbers the texts packed into a row of a decoder: each attends only to itself
        and begins at position 0. Raises ValueError for a cache in an encoder, for segments in one or with a cache, and
        for a memory that is missing or not used.
        """
        if cache is not None and not self.config.architecture.causal:
            raise ValueError("an encoder reads its whole input at once: it has no cache")
        if segments_BT is not None and (cache is not None or not self.config.architecture.causal):
            raise ValueError("only a decoder without a cache reads several texts in a row")
        if (memory is not None) != (self.config.encoder_depth > 0):
            raise ValueError("an encoder-decoder needs the memory that encode() returns, and no other model takes one")
        x_BTD = self.embed(tokens_BT).to(dtype or self.dtype)
        return self.hidden(
            x_BTD, cache=cache, dropout=dropout, mask_BT=mask_BT, types_BT=types_BT, memory=memory,
            segments_BT=segments_BT,
        )  # fmt: skip

    def encode(
        self, tokens_BS: Tensor, *, mask_BS: Tensor | None = None, dtype: torch.dtype | None = None,
        dropout: float = 0.0,
    ) -> Memory:  # fmt: skip
        """Encode token ids (B, S) into keys and values for every layer of the decoder.

        ``mask_BS`` is False at the padding at the end of rows.
        """
        x_BSD = self.embed(tokens_BS).to(dtype or self.dtype)
        x_BSD = self.encoder.hidden(x_BSD, dropout=dropout, mask_BT=mask_BS)
        pairs = [block.get_submodule("cross").keys_values(x_BSD) for block in self.blocks]  # type: ignore[operator]
        mask = None if mask_BS is None else additive(mask_BS[:, None, None, :].bool(), x_BSD.dtype)
        return Memory([k for k, _ in pairs], [v for _, v in pairs], mask)

    def loss(self, hidden_BTD: Tensor, targets_BT: Tensor, *, smoothing: float = 0.0) -> Tensor:
        """Return the summed cross-entropy (nats, fp32) of the targets (B, T), or (N,), given the hidden states.

        ``smoothing`` is the part of a target's probability that the whole vocabulary shares.
        """
        head = self.head
        weight = head.weight if isinstance(head, Linear) else head.dequantized(hidden_BTD.dtype)
        hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        return fused.linear_cross_entropy(hidden_ND, weight, targets_BT.flatten(), smoothing=smoothing)

    def compiled_parts(self) -> list[nn.Module]:
        """Return every block, of the encoder too."""
        return [part for part in self.modules() if isinstance(part, Block)]

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Hidden states (..., D) -> logits (..., V) in the dtype of the hidden states."""
        return self.head(hidden_BTD)


def packed_positions(segments_BT: Tensor) -> Tensor:
    """Return positions (B, T) of packed texts: 0 again where the number of the text changes."""
    T = segments_BT.shape[1]
    at_T = torch.arange(T, device=segments_BT.device)
    new_BT = F.pad(segments_BT[:, 1:] != segments_BT[:, :-1], (1, 0), value=True)
    return at_T - torch.where(new_BT, at_T, 0).cummax(dim=1).values


def _embedding(rows: int, width: int) -> nn.Embedding:
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)  # which does not initialize


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> None:
    """Initialize every parameter for fast learning:

    | parameter | value |
    |---|---|
    | embeddings (and tied head) | normal, std 0.02 |
    | untied head | zero: the first prediction is uniform |
    | norms | 1 |
    | biases | 0 |
    | attention o, ffn down | zero: every block starts as the identity (Zhang et al. 2019, Fixup) |
    | other matrices | uniform, std fan_in^-1/2 |
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        value = torch.empty(parameter.shape)
        if name.removeprefix("encoder.") in ("embed.weight", "positions.weight", "types.weight"):
            value.normal_(0.0, 0.02, generator=generator)
        elif name.endswith("norm.weight"):
            value.fill_(1.0)
        elif name.endswith((".o.weight", ".down.weight", ".bias")) or name == "head.weight":
            value.zero_()
        else:
            bound = (3.0 / parameter.shape[1]) ** 0.5
            value.uniform_(-bound, bound, generator=generator)
        parameter.copy_(value)
