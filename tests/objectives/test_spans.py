"""Masked spans, windows and scores of span corruption."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import TEXT, cpu

from tfcli.config.options import ModelOptions, SpanOptions, TokenizerOptions
from tfcli.errors import UserError
from tfcli.model.transformer import Transformer, initialize
from tfcli.objectives import spans
from tfcli.objectives.denoising import held_out
from tfcli.objectives.spans import Corruption, SpanCorruption
from tfcli.objectives.table import objective
from tfcli.tasks.common.forcing import IGNORED
from tfcli.text.corpus.shards import Shard, ShardWriter
from tfcli.text.read.sources import Chunk
from tfcli.text.tokenizers import training
from tfcli.text.tokenizers.sentencepiece import Tokenizer

OPTIONS = [SpanOptions(), SpanOptions(rate=0.5, mean_length=1.0), SpanOptions(rate=0.9), SpanOptions(mean_length=50.0)]


@functools.cache
def pieces(count: int = 12) -> Tokenizer:
    options = TokenizerOptions(vocab_size=400, trainer=training.sentinels(count))
    return training.train([Chunk(TEXT, True)], options)


def shard(path: Path, text: str) -> Shard:
    tokenizer = pieces()
    with ShardWriter(path, tokenizer_hash=tokenizer.hash, vocab_size=tokenizer.vocab_size) as writer:
        for part in text.split("\n"):
            writer.write(np.array([*tokenizer.encode(part), tokenizer.eos_id]))
        writer.count(documents=1, bytes=len(text.encode()))
    return Shard.open(path, tokenizer.hash)


@pytest.fixture
def task(tmp_path: Path) -> SpanCorruption:
    return SpanCorruption(
        train=shard(tmp_path / "train.bin", TEXT), val=shard(tmp_path / "val.bin", TEXT[:2000]), tokenizer=pieces(),
        context=32, runtime=cpu(), options=SpanOptions(), seed=7,
    )  # fmt: skip


def model() -> Transformer:
    options = ModelOptions(arch="transformer", width=32, heads=2, context=32)
    made = Transformer(objective("transformer").shape(options, depth=1, vocab_size=400))
    initialize(made, 0)
    return made


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("length", [1, 2, 3, 17, 200])
def test_source_and_target_together_are_the_text(options: SpanOptions, length: int) -> None:
    """Catches a token lost, repeated or put under another sentinel, two spans that touch, and wrong amounts."""
    tokenizer = pieces(120)
    ids = np.random.default_rng(0).choice(np.flatnonzero(tokenizer.piece_bytes > 0), length)
    for seed in range(20):
        source, target = Corruption(tokenizer=tokenizer, options=options).corrupt((ids, (seed,)))
        assert source.pop() == target.pop() == tokenizer.eos_id
        spans_of: dict[int, list[int]] = {}
        for id in target:
            if id in tokenizer.sentinel_ids:
                spans_of[id] = []
            else:
                spans_of[list(spans_of)[-1]].append(id)
        assert [id for id in source if id in tokenizer.sentinel_ids] == list(tokenizer.sentinel_ids[: len(spans_of)])
        assert [part for id in source for part in spans_of.get(id, [id])] == ids.tolist()
        assert not any({a, b} <= spans_of.keys() for a, b in itertools.pairwise(source))
        if length > 1:
            assert (sum(map(len, spans_of.values())), len(spans_of)) == spans.counts(length, options)
            assert all(spans_of.values())


def test_every_token_is_hidden_as_often() -> None:
    """Would catch spans that never begin a text, or always end it."""
    corruption = Corruption(tokenizer=pieces(), options=SpanOptions())
    hidden = np.zeros(60)
    for seed in range(3000):
        for start, length in zip(*corruption.starts(60, np.random.default_rng(seed)), strict=True):
            hidden[start : start + length] += 1
    assert hidden.sum() == 3000 * 9
    assert (np.abs(hidden / 3000 - 0.15) < 0.1).all()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("context", [16, 33, 128])
def test_windows_fill_the_context_and_no_more(options: SpanOptions, context: int) -> None:
    """Would catch a position that the model does not have, also of a window with ends of documents in it."""
    longest = spans.window(context, options)
    for length in range(2, longest + 1):
        masked, masked_spans = spans.counts(length, options)
        assert max(length - masked, masked) + masked_spans + 1 <= context
        assert masked_spans <= spans.sentinels(context, options)


def test_rows_are_a_function_of_seed_epoch_and_window(task: SpanCorruption) -> None:
    """Catches spans that depend on earlier draws; documents end only at the end of a side."""
    one, again = task.rows(np.array([3, 0]), np.array([0, 0])), task.rows(np.array([0]), np.array([0]))
    width = again["tokens_BT"].shape[1]
    assert torch.equal(one["tokens_BT"][1, :width], again["tokens_BT"][0])
    later, other = task.rows(np.array([0]), np.array([1])), replace(task, seed=8).rows(np.array([0]), np.array([0]))
    assert later["targets_BU"].tolist() != again["targets_BU"].tolist() != other["targets_BU"].tolist()
    many = task.rows(np.arange(task.size), np.zeros(task.size, np.int64))
    assert many["tokens_BT"].shape[1] <= 32
    eos = pieces().eos_id
    assert ((many["tokens_BT"] == eos) & many["mask_BT"]).sum(dim=1).tolist() == [1] * task.size
    assert (many["targets_BU"] == eos).sum(dim=1).tolist() == [1] * task.size


def test_the_loss_is_that_of_each_window_alone(task: SpanCorruption) -> None:
    """Against cross-entropy written out, in parts as well as whole."""
    made = model()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        rows = task.rows(np.arange(6), np.zeros(6, np.int64))
        loss, count = task.loss(made, rows, dtype=torch.float32, dropout=0.0)
        wanted = torch.zeros(())
        for tokens, real, targets in zip(rows["tokens_BT"], rows["mask_BT"], rows["targets_BU"], strict=True):
            wished = targets[targets != IGNORED]
            read = torch.cat([torch.tensor([pieces().eos_id]), wished[:-1]])
            logits = made.logits(made(read[None], memory=made.encode(tokens[real][None])))
            wanted += torch.nn.functional.cross_entropy(logits[0], wished, reduction="sum")
        parts = [task.loss(made, part, dtype=torch.float32, dropout=0.0) for part in rows.split(4)]
    torch.testing.assert_close(loss, wanted, atol=1e-2, rtol=1e-4)
    torch.testing.assert_close(sum(part for part, _ in parts), loss, atol=1e-2, rtol=1e-4)
    assert count == task.count(rows) == sum(number for _, number in parts)


def test_evaluation_covers_the_whole_text_with_the_same_holes(task: SpanCorruption) -> None:
    """Catches a last window left out, and spans that depend on the seed of the run."""
    made = model()
    scores = task.evaluate(made)
    assert scores == task.evaluate(made) == replace(task, seed=99).evaluate(made)
    special = (*pieces().sentinel_ids, pieces().eos_id)
    seen = 0
    for windows in held_out(task.val.ids, body=task.body, together=2, ragged=True):
        rows = task.batch(windows)
        real = torch.cat([rows["tokens_BT"][rows["mask_BT"]], rows["targets_BU"][rows["targets_BU"] != IGNORED]])
        seen += int((~torch.isin(real, torch.tensor(special))).sum())
    assert seen == int((pieces().piece_bytes[task.val.ids] > 0).sum())
    assert "[" in task.sample(made, 3)


def test_a_vocabulary_with_sentinels() -> None:
    """They are of no text, and text that names them comes back as it was."""
    text = "a <extra_id_0> b"
    assert len(pieces().sentinel_ids) == 12
    assert not set(pieces().sentinel_ids) & set(pieces().encode(text))
    assert pieces().decode(pieces().encode(text)) == text
    assert pieces().encode_special(text).count(pieces().sentinel_ids[0]) == 1


def test_refused(task: SpanCorruption, tmp_path: Path) -> None:
    """A tokenizer without sentinels or with too few, and a text that is too short."""
    import tiny_models

    with pytest.raises(UserError, match="no sentinel tokens for masked spans"):
        replace(task, tokenizer=tiny_models.tokenizer())
    with pytest.raises(UserError, match="has 1 sentinel tokens, a context of 64 needs 3"):
        replace(task, tokenizer=pieces(1), context=64)
    with pytest.raises(UserError, match="too few for a context"):
        replace(task, train=shard(tmp_path / "short.bin", "a"))
