"""Language modelling as a task: windows of the text, its loss, its metrics, its samples."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tfcli.errors import UserError
from tfcli.tasks.lm import task as lm
from tfcli.tasks.lm.task import LanguageModeling
from tfcli.text.corpus.shards import Shard, ShardWriter


def shard(path: Path, ids: list[int]) -> Shard:
    tokenizer = tiny_models.tokenizer()
    with ShardWriter(path, tokenizer_hash=tokenizer.hash, vocab_size=tokenizer.vocab_size) as writer:
        writer.write(np.array(ids, dtype=np.int64))
        writer.count(documents=1, bytes=3 * len(ids))
    return Shard.open(path)


def task(folder: Path, tokens: int, context: int) -> LanguageModeling:
    return LanguageModeling(
        train=shard(folder / "train.bin", [i % 400 for i in range(tokens)]),
        val=shard(folder / "val.bin", [(7 * i) % 400 for i in range(50)]),
        tokenizer=tiny_models.tokenizer(),
        context=context,
        runtime=tiny_models.cpu(),
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(tokens=st.integers(2, 399), context=st.integers(1, 50), epoch=st.integers(0, 10_000))
def test_windows(tmp_path: Path, tokens: int, context: int, epoch: int) -> None:
    """Catches a window past the end of the text, one that is short, and windows of an epoch that overlap."""
    if tokens < context + 1:
        with pytest.raises(UserError, match="too few for a context"):
            task(tmp_path, tokens, context)
        return
    made = task(tmp_path, tokens, context)
    indices = np.arange(made.size, dtype=np.int64)
    rows = made.rows(indices, np.full(made.size, epoch, dtype=np.int64))
    assert rows.shape == (made.size, context + 1)
    assert rows.dtype == torch.int64
    assert (rows.diff(dim=1) == 1).all(), "each is a piece of the text, which counts up"
    targets = rows[:, 1:].flatten().tolist()
    assert len(set(targets)) == len(targets)
    assert max(targets) < tokens


def test_cuts_move_every_epoch(tmp_path: Path) -> None:
    """Catches tokens that are always the first of a window, and so are never predicted from what is before them."""
    made = task(tmp_path, 399, 10)
    zero = np.zeros(1, dtype=np.int64)
    starts = [int(made.rows(zero, np.array([epoch]))[0, 0]) for epoch in range(10)]
    assert starts[0] == 0
    assert len(set(starts)) > 7


@pytest.mark.parametrize(("tokens", "context"), [(399, 10), (80, 39), (290, 100), (11, 10)])
def test_the_whole_text_is_learnt(tmp_path: Path, tokens: int, context: int) -> None:
    """Catches an end of the text that no epoch reaches: once it was a third of a small one."""
    made = task(tmp_path, tokens, context)
    every = np.arange(made.size)
    targets = {int(i) for epoch in range(400) for i in made.rows(every, np.full(made.size, epoch))[:, 1:].flatten()}
    assert targets == set(range(1, tokens))


def test_loss_is_a_sum_and_a_count(tmp_path: Path) -> None:
    """Catches a mean, or a count of inputs instead of targets."""
    model = tiny_models.model()
    rows = torch.arange(22).reshape(2, 11)
    total, count = lm.loss(model, rows, dtype=torch.float32)
    assert count == 20
    parts = [lm.loss(model, row[None], dtype=torch.float32)[0] for row in rows]
    torch.testing.assert_close(total, parts[0] + parts[1])  # fp32
    logits = model.logits(model(rows[:, :-1]))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)  # fp32, another kernel


def test_evaluation(tmp_path: Path) -> None:
    """Catches bits per token called bits per byte: here a token stands for three bytes."""
    made = task(tmp_path, 200, 16)
    scores = made.evaluate(tiny_models.model(context=16))
    assert list(scores) == ["val_bits_per_byte", "val_loss"]
    assert scores["val_bits_per_byte"] == pytest.approx(scores["val_loss"] / math.log(2) / 3)


@pytest.mark.parametrize("context", [1, 2, 8, 100])
def test_samples(tmp_path: Path, context: int) -> None:
    """Catches a sample longer than a tiny context can hold, and one that differs for the same seed."""
    made = task(tmp_path, 200, context)
    model = tiny_models.model(context=context)
    assert made.sample(model, 3) == made.sample(model, 3)


def test_ids_of_another_tokenizer(tmp_path: Path) -> None:
    """Catches an index error from deep inside the embedding."""
    (tmp_path / "x").mkdir()
    writer = ShardWriter(tmp_path / "x/a.bin", tokenizer_hash="0" * 64, vocab_size=1000)
    with writer:
        writer.write(np.full(100, 900))
    foreign = Shard.open(tmp_path / "x/a.bin")
    with pytest.raises(UserError, match="beyond the vocabulary"):
        LanguageModeling(
            train=foreign, val=foreign, tokenizer=tiny_models.tokenizer(), context=8, runtime=tiny_models.cpu()
        )
