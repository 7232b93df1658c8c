"""Checkpoints of llama2.c (Karpathy 2023): seven numbers, then the weights of a Llama in fp32; and its tokenizers.

The layout is that of its run.c, which its export.py calls version 0. Sizes are checked before a number is read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tfcli.config.model import Architecture, AttentionConfig, ModelConfig
from tfcli.errors import UserError
from tfcli.formats.gguf.rope import rotary_halves
from tfcli.formats.gguf.vocab import from_gguf
from tfcli.formats.hf.weights import pickled
from tfcli.text.tokenizers.codec import Codec
from tfcli.text.tokenizers.sentencepiece import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN

if TYPE_CHECKING:
    import torch

    from tfcli.model.quant.quantize import Quantization
    from tfcli.model.transformer import Transformer
    from tfcli.runtime import Runtime

HEADER = struct.Struct("<7i")
LATER = struct.pack("<I", 0x616B3432)
"""Magic number of later versions."""
LARGEST = 1 << 24
"""Above every dimension of a real checkpoint."""
LONGEST = 1 << 10
"""Longest piece in bytes."""
UNK_ID, BOS_ID, EOS_ID, BYTES = 0, 1, 2, 256
LAYER = (
    "attention_norm", "attention.q", "attention.k", "attention.v", "attention.o", "ffn_norm", "ffn.gate", "ffn.down",
    "ffn.up",
)  # fmt: skip
"""The parts of a block in the order of the file, each for all layers at once."""


def read_config(path: str | Path) -> ModelConfig:
    """Return the shape of a checkpoint, after comparing it with the size of the file.

    Raises UserError for other files: a pickle, a later version, one that was cut short.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEADER.size)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if head.startswith((b"PK\x03\x04", b"\x80")):
        raise pickled(f"{path} is a pickle", path.parent)
    if head.startswith(LATER):
        raise UserError(f"{path} is a later version of llama2.c's format", hint="export it again: --version 0")
    hint = "expected a checkpoint of llama2.c, version 0, or name a model directory"
    if len(head) < HEADER.size:
        raise UserError(f"{path} is not a model: it has {size} bytes", hint=hint)
    width, ffn_width, depth, heads, kv_heads, vocab_size, context = HEADER.unpack(head)
    numbers = (width, ffn_width, depth, heads, kv_heads, abs(vocab_size), context)
    if not all(0 < number < LARGEST for number in numbers) or width % heads or heads % kv_heads or width // heads % 2:
        raise UserError(f"{path} is not a model that tfcli reads", hint=hint)
    config = ModelConfig(
        vocab_size=abs(vocab_size),
        context=context,
        depth=depth,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_width=width // heads,
        ffn_width=ffn_width,
        norm_eps=1e-5,
        tied=vocab_size > 0,
        architecture=Architecture(attention=AttentionConfig(qk_norm=False)),
    )
    needed = HEADER.size + 4 * sum(prod(shape) for _, shape in _parts(config))
    if size != needed:
        raise UserError(f"{path} has {size} bytes, its header describes a model of {needed}", hint=hint)
    return config


def load(
    path: str | Path,
    tokenizer: str | Path | None = None,
    *,
    runtime: Runtime,
    dtype: torch.dtype | None = None,
    quantize: Quantization | None = None,
) -> tuple[Transformer, Codec]:
    """Load the model in a checkpoint, on the runtime's device, and its tokenizer.

    ``tokenizer`` (default: ``tokN.bin``, N the vocabulary, or ``tokenizer.bin`` next to the checkpoint) is its file.
    """
    import torch

    from tfcli.model.quant.quantize import assign
    from tfcli.model.transformer import Transformer

    path = Path(path)
    config = read_config(path)
    codec = read_tokenizer(_default_tokenizer(path, config) if tokenizer is None else tokenizer, config.vocab_size)
    with torch.device("meta"):
        model = Transformer(config)
    for name, values in _tensors(path, config):
        assign(model, name, torch.from_numpy(values), runtime.device, dtype or runtime.dtype, quantize)
    return model, codec


def _parts(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (part, shape) in the order of the file; parts of blocks have all layers in their first dimension."""
    L, D, F, K = config.depth, config.width, config.ffn_width, config.head_width
    queries, keys = config.heads * K, config.kv_heads * K
    yield "embed", (config.vocab_size, D)
    shapes = ((D,), (queries, D), (keys, D), (keys, D), (D, queries), (D,), (F, D), (D, F), (F, D))
    yield from ((part, (L, *shape)) for part, shape in zip(LAYER, shapes, strict=True))
    yield "norm", (D,)
    yield "", (2, config.context, K // 2)  # tables of cosines and sines
    if not config.tied:
        yield "head", (config.vocab_size, D)


def _tensors(path: Path, config: ModelConfig) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Yield (tfcli's name, numbers) of every weight, one at a time."""
    at = HEADER.size
    for part, shape in _parts(config):
        layered = part in LAYER
        for layer in range(shape[0] if layered else 1):
            inner = shape[1:] if layered else shape
            values = np.fromfile(path, "<f4", prod(inner), offset=at).astype(np.float32, copy=False).reshape(inner)
            at += 4 * prod(inner)
            heads = {"attention.q": config.heads, "attention.k": config.kv_heads}.get(part)
            if heads:  # run.c rotates neighbors
                values = values[rotary_halves(heads, config.head_width)]
            if part:
                yield f"blocks.{layer}.{part}.weight" if layered else f"{part}.weight", values


def _default_tokenizer(path: Path, config: ModelConfig) -> Path:
    names = (f"tok{config.vocab_size}.bin", "tokenizer.bin")
    for name in names:
        if (path.parent / name).is_file():
            return path.parent / name
    hint = f"put the tokenizer there, or convert both: tfcli convert {path} OUT --to hf --tokenizer FILE"
    raise UserError(f"{path} holds only weights, and there is no {' or '.join(names)} next to it", hint=hint)


def read_tokenizer(path: str | Path, vocab_size: int) -> Codec:
    """Read the tokenizer in a file of llama2.c: a score and a text of each of ``vocab_size`` pieces.

    <s> begins a text, and also ends one. Raises UserError for a file that is incomplete or of another model.
    """
    path = Path(path)
    try:
        if path.stat().st_size > 4 + vocab_size * (8 + LONGEST):
            raise UserError(f"{path} is larger than a tokenizer of {vocab_size} pieces can be")
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no such tokenizer: {path}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    wrong = UserError(
        f"{path} is not a tokenizer of llama2.c with {vocab_size} pieces",
        hint="expected the tokenizer.bin (or tok512.bin ...) that the model was trained with",
    )
    if vocab_size < 3 + BYTES:
        raise wrong
    pieces: list[str] = []
    scores: list[float] = []
    at = 4
    try:
        for _ in range(vocab_size):
            score, length = struct.unpack_from("<fi", data, at)
            if not 0 < length <= LONGEST or len(data) < at + 8 + length:
                raise wrong
            pieces.append(data[at + 8 : at + 8 + length].decode("utf-8"))
            scores.append(score)
            at += 8 + length
    except (struct.error, UnicodeDecodeError):
        raise wrong from None
    if at != len(data) or pieces[3 : 3 + BYTES] != [f"<0x{byte:02X}>" for byte in range(BYTES)]:
        raise wrong
    return from_gguf(_metadata(pieces, scores), name=str(path))


def _metadata(pieces: list[str], scores: list[float]) -> dict[str, Any]:
    """Return the vocabulary as metadata of a GGUF file."""
    named = ["<unk>", "<s>", "</s>"]  # its own have line breaks around them
    described = {
        "model": "llama",
        "tokens": named + [piece.replace(" ", SPACE) for piece in pieces[3:]],
        "scores": scores,
        "token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * BYTES + [NORMAL] * (len(pieces) - 3 - BYTES),
        "unknown_token_id": UNK_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": BOS_ID,
        "eot_token_id": EOS_ID,
        "add_bos_token": True,
        "add_space_prefix": True,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in described.items()}
