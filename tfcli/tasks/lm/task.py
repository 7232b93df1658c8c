"""Language modelling: predict each token from those before it; also on new text, with a tokenizer that is kept."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tfcli.config.options import DataOptions, Sampling
from tfcli.errors import UserError
from tfcli.infer.decode import decode
from tfcli.infer.score import evaluate
from tfcli.model.lstm import Lstm
from tfcli.model.transformer import Transformer
from tfcli.runtime import Runtime
from tfcli.tasks.common.batch import Rows
from tfcli.tasks.common.options import DecoderTrain, FinetuneConfig
from tfcli.tasks.common.windows import starts
from tfcli.tasks.task import Finetuning, Headline, Predictor, Start
from tfcli.text.corpus.shards import Shard
from tfcli.text.read.files import Counts
from tfcli.text.read.sources import find, read, spooling, utf8_length
from tfcli.text.tokenizers.codec import Codec

CONTEXT = 512
"""Tokens of a window in finetuning, where the settings do not say."""


def loss(
    model: Transformer | Lstm, tokens_BT: Tensor, *, dtype: torch.dtype, dropout: float = 0.0
) -> tuple[Tensor, int]:
    """Summed cross-entropy (nats, fp32) of every token but the first of each row, and how many they are.

    ``tokens_BT`` holds T + 1 ids a row: inputs are the first T, targets the last T.
    """
    hidden_BTD = model(tokens_BT[:, :-1], dtype=dtype, dropout=dropout)
    targets_BT = tokens_BT[:, 1:]
    return model.loss(hidden_BTD, targets_BT), targets_BT.numel()


@dataclass(frozen=True, kw_only=True)
class LanguageModeling:
    """Windows of ``context`` + 1 ids over one training shard; the cuts between them move every epoch."""

    train: Shard
    val: Shard
    tokenizer: Codec
    context: int
    runtime: Runtime
    receipt: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=lambda: {"tfcli": {"task": None}})
    """A model that reads on stays a model of text: generate and evaluate take it as before."""

    def __post_init__(self) -> None:
        if self.train.tokens < self.context + 1:
            raise UserError(
                f"the training text has {self.train.tokens} tokens, too few for a context of {self.context}",
                hint=f"use more text, or --context {max(1, self.train.tokens - 1)} at most",
            )
        if self.train.tokens and int(self.train.ids[:4096].max()) >= self.tokenizer.vocab_size:
            raise UserError(f"{self.train.path} has ids beyond the vocabulary", hint="delete it and encode again")

    @property
    def size(self) -> int:
        """Windows in one epoch; a last partial one waits for the next epoch's cuts."""
        return max(1, (self.train.tokens - 1) // self.context - 1)

    @property
    def lengths(self) -> None:
        """All windows have one length."""
        return

    @property
    def evaluation_tokens(self) -> int:
        """A third more than the held-out text: its windows overlap by a quarter."""
        return self.val.tokens * 4 // 3

    def rows(self, indices: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> Tensor:
        """Windows (B, context + 1) as int64; every epoch begins at an offset of its own, by the golden ratio."""
        ids = self.train.ids
        first = starts(indices, epochs, tokens=len(ids), size=self.size, step=self.context)
        return torch.from_numpy(np.stack([ids[start : start + self.context + 1] for start in first]).astype(np.int64))

    def count(self, rows: Rows) -> int:
        """Targets."""
        return len(rows) * self.context

    def tokens(self, rows: Rows) -> int:
        """Targets."""
        return len(rows) * self.context

    def loss(
        self, model: Transformer | Lstm, rows: Tensor, *, dtype: torch.dtype, dropout: float
    ) -> tuple[Tensor, int]:
        """Summed next-token cross-entropy of the rows, and the number of targets."""
        return loss(model, rows, dtype=dtype, dropout=dropout)

    def evaluate(self, model: Transformer | Lstm) -> dict[str, float]:
        """Bits per byte and loss of the whole held-out text."""
        scores = evaluate(
            model,
            self.val.ids,
            text_bytes=self.val.bytes,
            first=first_id(self.tokenizer),
            runtime=self.runtime,
        )
        return {"val_bits_per_byte": scores.bits_per_byte, "val_loss": scores.loss}

    def headline(self, scores: Mapping[str, float]) -> Headline:
        """Bits per byte."""
        return Headline(name="bits per byte", value=scores["val_bits_per_byte"])

    def sample(self, model: Transformer | Lstm, seed: int) -> str | None:
        """Up to 64 tokens from an empty document; None of an LSTM, which is only scored."""
        if isinstance(model, Lstm):
            return None
        sampling = Sampling(max_tokens=min(64, self.context), ignore_eos=True)
        steps = decode(model, [[first_id(self.tokenizer)]], sampling, seeds=[seed], eos_id=self.tokenizer.eos_id)
        ids = [step.id for row in steps for step in row if step.id is not None]
        return self.tokenizer.decode(ids)

    def report(self, model: Transformer | Lstm) -> tuple[dict[str, Any], list[str]]:
        """Loss, perplexity and bits per byte of the held-out text."""
        scores = evaluate(
            model, self.val.ids, text_bytes=self.val.bytes, first=first_id(self.tokenizer), runtime=self.runtime
        )
        line = f"loss {scores.loss:.4f}, perplexity {scores.perplexity:.3f}, {scores.bits_per_byte:.4f} bits per byte"
        return asdict(scores), [f"{line} ({scores.tokens:,} held-out tokens)"]


def first_id(tokenizer: Codec) -> int:
    """The id that a text begins after: the beginning of text where there is one, else the end of text."""
    return (tokenizer.prefix_ids or (tokenizer.eos_id,))[0]


# Reading on: finetuning on new text with the tokenizer kept.


@dataclass(frozen=True, kw_only=True, slots=True)
class LmOptions:
    """How the text is read."""

    text_key: str | None = None
    """Field or column with the text; left out: text, content, or the only one with strings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LmConfig(FinetuneConfig):
    """Everything that decides a run on text."""

    train: DecoderTrain = field(default_factory=DecoderTrain)
    lm: LmOptions = field(default_factory=LmOptions)


class Lm:
    """--task lm; ``Application``."""

    name = "lm"
    config = LmConfig

    def prepare(self, start: Start) -> Finetuning:
        """Read the text and encode it with the model's tokenizer, in memory."""
        config: LmConfig = start.config
        refuse(start.model, self.name)
        data = config.data
        if data.encoding.lower().replace("_", "-") not in ("utf-8", "utf8"):
            raise UserError(f"--task lm reads UTF-8, not {data.encoding}", hint="convert the files first, with iconv")
        options = DataOptions(text_key=config.lm.text_key, errors=data.errors)
        documents = _documents(start.data, options, start.note, strict=data.strict)
        if data.val is None:
            train, val = _split(documents, data.val_fraction)
        else:
            train, val = documents, _documents([data.val], options, start.note, strict=data.strict)
        context = min(data.context or CONTEXT, start.model.config.context)
        learnt, held = _shard(train, start.codec), _shard(val, start.codec)
        if not held.tokens:
            raise UserError("nothing is held out", hint="give more text, or a file with --val")
        whole = hashlib.sha256()
        for text in (*train, "\0", *val):
            whole.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
        receipt = {
            "files": [*start.data, *([data.val] if data.val is not None else [])],
            "content_hash": whole.hexdigest(),
            "context": context,
            **{
                name: {"documents": part.documents, "bytes": part.bytes, "tokens": part.tokens}
                for name, part in (("train", learnt), ("val", held))
            },
        }
        start.note(f"data: {learnt.tokens:,} tokens in windows of {context:,}, {held.tokens:,} held out")
        return LanguageModeling(
            train=learnt, val=held, tokenizer=start.codec, context=context, runtime=start.runtime, receipt=receipt
        )

    def predictor(self, model: Transformer, codec: Codec, about: Mapping[str, Any], runtime: Runtime) -> Predictor:
        """There is nothing to predict. Raises UserError."""
        raise UserError("a model of text continues it", hint="use: tfcli generate, or tfcli evaluate")


def refuse(model: Transformer, task: str) -> None:
    """UserError for a model that is no decoder alone."""
    config = model.config
    if config.architecture.causal and not config.encoder_depth:
        return
    kind = "an encoder-decoder" if config.encoder_depth else "an encoder"
    raise UserError(f"the model is {kind}, --task {task} needs a decoder", hint="such as one that pretrain made")


def _documents(specs: Sequence[str], options: DataOptions, note: Callable[[str], None], *, strict: bool) -> list[str]:
    """The documents that files hold, those without text left out, or a UserError where ``strict``."""
    documents: list[str] = []
    parts: list[str] = []
    counts = Counts()
    with spooling() as spool:
        for chunk in read(find(specs, spool=spool, on_note=note), options, counts):
            parts.append(chunk.text)
            if chunk.end:
                documents.append("".join(parts))
                parts = []
    for count in counts.sources:
        if strict and count.empty:
            raise UserError(
                f"{count.name}: {count.empty:,} empty documents", hint="without --strict they are said and left out"
            )
        for number, what in ((count.empty, "empty documents left out"), (count.replaced, "invalid bytes replaced")):
            if number:
                note(f"{count.name}: {number:,} {what}")
    documents = [text for text in documents if text]
    if not documents:
        raise UserError("the files hold no text", hint="name text, .jsonl, .csv, .tsv or .parquet files")
    return documents


def _split(documents: Sequence[str], fraction: float) -> tuple[list[str], list[str]]:
    """The last ``fraction`` of the text held out: whole documents where there are several, else from a line's end."""
    if len(documents) > 1:
        ends = np.cumsum([len(text) for text in documents])
        cut = int(np.abs(ends[:-1] - (1 - fraction) * ends[-1]).argmin()) + 1
        return list(documents[:cut]), list(documents[cut:])
    (text,) = documents
    at = int(len(text) * (1 - fraction))
    at = text.rfind("\n", 1, at) + 1 or at
    return [text[:at]], [text[at:]]


def _shard(documents: Sequence[str], codec: Codec) -> Shard:
    """Documents one behind the other, each with the end of text behind it and, but the first, what texts begin with."""
    parts: list[npt.NDArray[np.int32]] = []
    for ids in codec.encode_arrays(documents):
        before = codec.prefix_ids if parts else ()
        parts.append(np.concatenate([np.array(before, np.int32), ids, np.array([codec.eos_id], np.int32)]))
    ids = np.concatenate(parts)
    return Shard(
        path=Path(codec.name),
        ids=ids,
        tokenizer_hash=codec.hash,
        vocab_size=codec.vocab_size,
        tokens=len(ids),
        documents=len(documents),
        bytes=sum(utf8_length(text) for text in documents),
        checksum=zlib.crc32(ids.tobytes()),
    )


APPLICATION = Lm()
