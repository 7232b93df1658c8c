"""Language modeling: predict each token from those before it. ``--task lm`` continues pretraining on new text."""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tfcli.config.options import WINDOW_TOKENS, DataOptions, Sampling
from tfcli.errors import UserError
from tfcli.infer.decode import decode
from tfcli.infer.score import Scores, evaluate
from tfcli.model.base import Model
from tfcli.model.transformer import Transformer
from tfcli.runtime import Runtime
from tfcli.tasks.common.batch import Rows
from tfcli.tasks.common.report import duplicates
from tfcli.tasks.common.split import GIVEN, last
from tfcli.tasks.common.windows import starts
from tfcli.tasks.lm.options import LmConfig
from tfcli.tasks.task import Application, Finetuning, Headline, Predictor, Start
from tfcli.text.corpus.encoding import Encoded, encode, fallback_pieces
from tfcli.text.corpus.shards import Shard
from tfcli.text.data_report import DataReport, Part, Source
from tfcli.text.read.files import Count, Counts, changes
from tfcli.text.read.sources import Chunk, find, read, spooling
from tfcli.text.tokenizers.codec import Codec
from tfcli.text.tokenizers.sentencepiece import Tokenizer

CONTEXT = 512
"""Default tokens of a window in finetuning."""


def loss(model: Model, tokens_BT: Tensor, *, dtype: torch.dtype, dropout: float = 0.0) -> tuple[Tensor, int]:
    """Return the summed cross-entropy (nats, fp32) of every token but the first of each row, and their number.

    ``tokens_BT`` holds T + 1 ids a row: inputs are the first T, targets the last T.
    """
    hidden_BTD = model(tokens_BT[:, :-1], dtype=dtype, dropout=dropout)
    targets_BT = tokens_BT[:, 1:]
    return model.loss(hidden_BTD, targets_BT), targets_BT.numel()


@dataclass(frozen=True, kw_only=True)
class LanguageModeling(Finetuning):
    """Windows of ``context`` + 1 ids over one training shard, cut at other places in every epoch."""

    train: Shard
    val: Shard
    tokenizer: Codec
    context: int
    runtime: Runtime
    window: int | None = None
    """Tokens of a window in evaluations; None: the model's context."""
    data_report: dict[str, Any] = field(default_factory=dict)

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
        """Number of windows in one epoch, without a last partial one."""
        return max(1, (self.train.tokens - 1) // self.context - 1)

    @property
    def evaluation_tokens(self) -> int:
        """Number of tokens, a third more than the held-out text has: its windows overlap by a quarter."""
        return self.val.tokens * 4 // 3

    def rows(self, indices: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> Tensor:
        """Return windows (B, context + 1) as int64; each epoch has an offset of its own."""
        ids = self.train.ids
        first = starts(indices, epochs, tokens=len(ids), size=self.size, step=self.context)
        return torch.from_numpy(np.stack([ids[start : start + self.context + 1] for start in first]).astype(np.int64))

    def count(self, rows: Rows) -> int:
        """Return the number of targets."""
        return len(rows) * self.context

    def tokens(self, rows: Rows) -> int:
        """Return the number of targets."""
        return len(rows) * self.context

    def loss(self, model: Model, rows: Tensor, *, dtype: torch.dtype, dropout: float) -> tuple[Tensor, int]:
        """Return the summed next-token cross-entropy of the rows, and the number of targets."""
        return loss(model, rows, dtype=dtype, dropout=dropout)

    def evaluate(self, model: Model) -> dict[str, float]:
        """Return bits per byte and loss of the whole held-out text."""
        scores = self._scores(model)
        return {"val_bits_per_byte": scores.bits_per_byte, "val_loss": scores.loss}

    def headline(self, scores: Mapping[str, float]) -> Headline:
        """Return bits per byte."""
        return Headline(name="bits per byte", value=scores["val_bits_per_byte"])

    def sample(self, model: Transformer, seed: int) -> str | None:
        """Return up to 64 tokens from an empty document."""
        sampling = Sampling(max_tokens=min(64, self.context), ignore_eos=True)
        steps = decode(model, [[self.tokenizer.first_id]], sampling, seeds=[seed], eos_id=self.tokenizer.eos_id)
        ids = [step.id for row in steps for step in row if step.id is not None]
        return self.tokenizer.decode(ids)

    @property
    def hf_config(self) -> dict[str, Any]:
        """No task: the model stays a language model, for generate and evaluate."""
        return {"tfcli": {"task": None}}

    def report(self, model: Model) -> tuple[dict[str, Any], list[str]]:
        """Return loss, perplexity and bits per byte of the held-out text."""
        scores = self._scores(model)
        line = f"loss {scores.loss:.4f}, perplexity {scores.perplexity:.3f}, {scores.bits_per_byte:.4f} bits per byte"
        return asdict(scores), [f"{line} ({scores.tokens:,} held-out tokens)"]

    def _scores(self, model: Model) -> Scores:
        val, codec = self.val, self.tokenizer
        return evaluate(model, val.ids, text_bytes=val.bytes, codec=codec, runtime=self.runtime, context=self.window)


class Lm(Application):
    """``--task lm``: continued pretraining."""

    name = "lm"
    config = LmConfig

    def prepare(self, start: Start) -> Finetuning:
        """Read the text and encode it with the model's tokenizer, in memory."""
        config: LmConfig = start.config
        check_decoder(start.model, self.name)
        data = config.data
        if data.encoding.lower().replace("_", "-") not in ("utf-8", "utf8"):
            raise UserError(f"--task lm reads UTF-8, not {data.encoding}", hint="convert the files first, with iconv")
        options = DataOptions(text_key=config.lm.text_key, errors=data.errors)
        texts = [_read(start.data, options, start.note, strict=data.strict)]
        if data.val is None:
            train, val, how = last(texts[0].documents, data.val_fraction)
            apart = [Chunk(text, True) for text in val]
        else:  # in the chunks that `evaluate` reads: a tokenizer may depend on where a text is cut
            texts.append(_read([data.val], options, start.note, strict=data.strict))
            train, val, how = *(each.documents for each in texts), GIVEN
            apart = texts[1].chunks
        most = start.model.config.context
        context = min(data.context or CONTEXT, most)
        parts = [encode(chunks, start.codec, begin=True) for chunks in ([Chunk(text, True) for text in train], apart)]
        train_shard, val_shard = (_shard(part, start.codec) for part in parts)
        if not val_shard.tokens:
            raise UserError("nothing is held out", hint="give more text, or a file with --val")
        data_report = _data_report(texts, how, parts, (train, val), start.codec, context)
        start.note(f"data: {train_shard.tokens:,} tokens in windows of {context:,}, {val_shard.tokens:,} held out")
        return LanguageModeling(
            train=train_shard, val=val_shard, tokenizer=start.codec, context=context, runtime=start.runtime,
            window=min(most, WINDOW_TOKENS), data_report=data_report,
        )  # fmt: skip

    def predictor(self, model: Transformer, codec: Codec, hf_config: Mapping[str, Any], runtime: Runtime) -> Predictor:
        """Raise UserError: a language model has nothing to predict."""
        raise UserError("a language model continues text", hint="use: tfcli generate, or tfcli evaluate")

    def next_step(self, directory: Path) -> str:
        """Return the command that continues a prompt."""
        return f"tfcli generate --model {directory}"


def check_decoder(model: Transformer, task: str) -> None:
    """Raise UserError for a model that is not a decoder alone."""
    config = model.config
    if config.architecture.causal and not config.encoder_depth:
        return
    kind = "an encoder-decoder" if config.encoder_depth else "an encoder"
    raise UserError(f"the model is {kind}, --task {task} needs a decoder", hint="such as one that pretrain made")


@dataclass(frozen=True, kw_only=True)
class _Text:
    """The text of files, and what was counted of each."""

    chunks: list[Chunk]
    counts: list[Count]

    @property
    def documents(self) -> list[str]:
        """Whole documents."""
        documents, parts = [], list[str]()
        for chunk in self.chunks:
            parts.append(chunk.text)
            if chunk.end:
                documents.append("".join(parts))
                parts = []
        return documents

    @property
    def owners(self) -> list[int]:
        """The file of each document."""
        return [chunk.source for chunk in self.chunks if chunk.end]


def _read(specs: Sequence[str], options: DataOptions, note: Callable[[str], None], *, strict: bool) -> _Text:
    """Return the text of files without empty documents, which raise UserError where ``strict``."""
    counts = Counts()
    with spooling() as spool:
        chunks = list(read(find(specs, spool=spool, on_note=note), options, counts))
    for count in counts.sources:
        if strict and count.empty:
            raise UserError(f"{count.name}: {count.empty:,} empty documents", hint="without --strict they are skipped")
        for number, what in ((count.empty, "empty documents skipped"), (count.replaced, "invalid bytes replaced")):
            if number:
                note(f"{count.name}: {number:,} {what}")
    if not chunks:
        raise UserError("the files hold no text", hint="name text, .jsonl, .csv, .tsv or .parquet files")
    return _Text(chunks=chunks, counts=counts.sources)


def _shard(text: Encoded, codec: Codec) -> Shard:
    """Return the ids of a text as a shard in memory."""
    return Shard(
        path=Path(codec.name), ids=text.ids, tokenizer_hash=codec.hash, vocab_size=codec.vocab_size,
        tokens=len(text.ids), documents=text.documents, bytes=text.bytes, checksum=zlib.crc32(text.ids.tobytes()),
    )  # fmt: skip


def _data_report(
    texts: Sequence[_Text],
    how: Mapping[str, Any],
    encoded: Sequence[Encoded],
    parts: Sequence[Sequence[str]],
    codec: Codec,
    context: int,
) -> dict[str, Any]:
    """Return data.json; ``texts`` are one, or two where the held-out part has files of its own."""
    train, val = encoded
    whole = hashlib.sha256()
    for text in (*parts[0], "\0", *parts[1]):
        whole.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    fallback = unknown = None
    if isinstance(codec, Tokenizer):  # others have no byte tokens
        ids = np.concatenate([train.ids, val.ids])
        fallback, unknown = float(fallback_pieces(codec)[ids].mean()), float((ids == codec.unk_id).mean())
    twice = duplicates(*parts)
    return DataReport(
        task="lm", unit="documents", sources=list(_sources(texts, [part.lengths for part in encoded])), split=how,
        train=Part(documents=train.documents, tokens=len(train.ids), bytes=train.bytes),
        val=Part(documents=val.documents, tokens=len(val.ids), bytes=val.bytes),
        changes=changes([count for text in texts for count in text.counts]), within_train=twice["within_train"],
        across_splits=twice["across_splits"], content_hash=whole.hexdigest(), tokenizer_hash=codec.hash,
        byte_fallback_rate=fallback, unknown_rate=unknown, details={"context": context},
    ).as_json()  # fmt: skip


def _sources(texts: Sequence[_Text], lengths: Sequence[list[int]]) -> Iterator[Source]:
    """Yield each file with its tokens and its part; a single document that is cut in two belongs to both."""
    owners = [(number, owner) for number, text in enumerate(texts) for owner in text.owners]
    owners = owners if len(owners) == sum(map(len, lengths)) else owners * 2
    tokens: Counter[tuple[int, int]] = Counter()
    held_out: dict[tuple[int, int], set[bool]] = {}
    for index, (owner, number) in enumerate(zip(owners, chain(*lengths), strict=True)):
        tokens[owner] += number
        held_out.setdefault(owner, set()).add(index >= len(lengths[0]))
    for number, text in enumerate(texts):
        for index, count in enumerate(text.counts):
            parts = held_out.get((number, index), {number > 0})
            yield Source(
                name=count.name,
                part="both" if len(parts) > 1 else "val" if True in parts else "train",
                bytes=count.bytes,
                documents=count.documents,
                tokens=tokens[number, index],
            )


APPLICATION = Lm()
