"""Masks, windows and scores of masked language modelling."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import TEXT, cpu

from tfcli.config.options import MaskOptions, ModelOptions, TokenizerOptions
from tfcli.errors import UserError
from tfcli.model.transformer import Transformer, initialize
from tfcli.objectives import masked as mlm
from tfcli.objectives.masked import NONE, MaskedLanguageModeling, Masking
from tfcli.objectives.table import objective
from tfcli.tasks.common.batch import Batch
from tfcli.text.corpus.shards import Shard, ShardWriter
from tfcli.text.read.sources import Chunk
from tfcli.text.tokenizers import training
from tfcli.text.tokenizers.sentencepiece import Tokenizer


@functools.cache
def pieces() -> Tokenizer:
    """An encoder's vocabulary of ``TEXT``."""
    return training.train([Chunk(TEXT, True)], TokenizerOptions(vocab_size=400, trainer=training.ENCODER))


def masking(**changes: float | bool) -> Masking:
    return Masking(tokenizer=pieces(), options=replace(MaskOptions(), **changes))


def shard(path: Path, text: str) -> Shard:
    tokenizer = pieces()
    with ShardWriter(path, tokenizer_hash=tokenizer.hash, vocab_size=tokenizer.vocab_size) as writer:
        writer.write(np.array([*tokenizer.encode(text), tokenizer.eos_id]))
        writer.count(documents=1, bytes=len(text.encode()))
    return Shard.open(path, tokenizer.hash)


@pytest.fixture
def task(tmp_path: Path) -> MaskedLanguageModeling:
    return MaskedLanguageModeling(
        train=shard(tmp_path / "train.bin", TEXT), val=shard(tmp_path / "val.bin", TEXT[:3000]), tokenizer=pieces(),
        context=32, runtime=cpu(), options=MaskOptions(), seed=7,
    )  # fmt: skip


def test_an_encoders_vocabulary() -> None:
    """BERT's special pieces, which no text makes, and text that comes back as it was."""
    tokenizer = pieces()
    named = {role: tokenizer.piece(id) for role, id in {
        "bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": tokenizer.unk_id, "pad": tokenizer.pad_id,
        "mask": tokenizer.mask_id}.items() if id is not None}  # fmt: skip
    assert named == {"bos": "[CLS]", "eos": "[SEP]", "unk": "[UNK]", "pad": "[PAD]", "mask": "[MASK]"}
    text = "a [MASK] b [CLS][SEP]"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not {tokenizer.mask_id, tokenizer.bos_id, tokenizer.eos_id} & set(tokenizer.encode(text))
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == ((tokenizer.bos_id,), (tokenizer.eos_id,))


def test_a_mask_takes_the_space_before_it() -> None:
    """Pieces begin with their space: "a [MASK]" is what masking " b" in "a b" leaves."""
    tokenizer = pieces()
    assert tokenizer.encode_special("a \n[MASK] b") == [
        *tokenizer.encode("a"),
        tokenizer.mask_id,
        *tokenizer.encode(" b"),
    ]


def test_shares() -> None:
    """The rate, and 80/10/10 of it, over many windows; what stays is a target as well."""
    made, ids = masking(rate=0.3), np.array(pieces().encode(TEXT * 4))[:4096]
    pairs = [made.mask(ids, np.random.default_rng(seed)) for seed in range(30)]
    inputs, targets = (np.stack(part) for part in zip(*pairs, strict=True))
    chosen = targets != NONE
    assert (chosen.sum(axis=1) == round(0.3 * len(ids))).all()
    assert (targets[chosen] == np.broadcast_to(ids, inputs.shape)[chosen]).all()
    assert (inputs[~chosen] == np.broadcast_to(ids, inputs.shape)[~chosen]).all()
    masked = (inputs == pieces().mask_id)[chosen].mean()
    same = (inputs == ids)[chosen].mean()
    assert masked == pytest.approx(0.8, abs=0.01)
    assert same == pytest.approx(0.1, abs=0.01)
    others = inputs[chosen & (inputs != pieces().mask_id)]
    assert (pieces().piece_bytes[others] > 0).all(), "no special piece is put anywhere"


def test_special_pieces_are_not_guessed() -> None:
    """The end of a document between two is not a target."""
    ids = np.array([5, pieces().eos_id, 300, 301, pieces().eos_id, 302] * 30)
    for seed in range(20):
        _, targets = masking(rate=0.5).mask(ids, np.random.default_rng(seed))
        assert (targets[ids == pieces().eos_id] == NONE).all()


def test_whole_words() -> None:
    """All pieces of a word or none; its pieces are found by their texts, across signs and line breaks."""
    made, ids = masking(whole_words=True), np.array(pieces().encode(TEXT[:2000]))
    words = made.words(ids)
    texts = ["".join(pieces().decode(ids[words == word])) for word in np.unique(words)]
    assert all(len(text.split()) <= 1 for text in texts)
    together = [text.strip() for text in texts]
    assert {"daughters", "youngest", "forest", "castle"} <= set(together)
    assert "," in together and "lovely" in together
    for seed in range(10):
        chosen = made.choose(ids, np.random.default_rng(seed))
        assert all(len(set(chosen[words == word])) == 1 for word in np.unique(words))
        assert 0.25 < chosen.mean() <= 0.301


def test_rows_are_a_function_of_seed_epoch_and_window(task: MaskedLanguageModeling) -> None:
    """Would catch masks that depend on what was drawn before; every epoch has its own."""

    def rows(made: MaskedLanguageModeling, indices: list[int], epochs: list[int]) -> Batch:
        found = made.rows(np.array(indices), np.array(epochs))
        assert isinstance(found, Batch)
        return found

    one, again = rows(task, [3, 0], [0, 0]), rows(task, [0], [0])
    assert torch.equal(one["tokens_BT"][1], again["tokens_BT"][0])
    assert torch.equal(one["targets_BT"][1], again["targets_BT"][0])
    later, other = rows(task, [0], [1]), rows(replace(task, seed=8), [0], [0])
    assert not torch.equal(later["targets_BT"], again["targets_BT"])
    assert not torch.equal(other["targets_BT"], again["targets_BT"])
    assert one["tokens_BT"].shape == (2, 32)
    assert one["tokens_BT"][:, 0].tolist() == [pieces().bos_id] * 2
    assert one["tokens_BT"][:, -1].tolist() == [pieces().eos_id] * 2


def test_loss_is_over_the_covered_pieces_alone(task: MaskedLanguageModeling) -> None:
    """Against cross-entropy written out, in parts as well as whole."""
    model = Transformer(objective("bert").shape(ModelOptions(arch="bert", width=32, heads=2), depth=1, vocab_size=400))
    head = mlm.attach(model)
    initialize(model, 0)
    with torch.no_grad():
        model.get_parameter("blocks.0.attention.o.weight").normal_(0, 0.1)
    assert head.bias is not None
    rows = task.rows(np.arange(6), np.zeros(6, np.int64))
    loss, count = task.loss(model, rows, dtype=torch.float32, dropout=0.0)  # type: ignore[arg-type]
    tokens, targets = rows["tokens_BT"], rows["targets_BT"]  # type: ignore[index]
    logits = head(model(tokens)) @ model.embed.weight.T + head.bias
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=NONE, reduction="sum"
    )
    torch.testing.assert_close(loss, wanted, atol=1e-3, rtol=1e-5)
    assert count == task.count(rows) == int((targets != NONE).sum())
    parts = [task.loss(model, part, dtype=torch.float32, dropout=0.0) for part in rows.split(4)]  # type: ignore[arg-type]
    assert sum(number for _, number in parts) == count
    torch.testing.assert_close(sum(part for part, _ in parts), loss, atol=1e-3, rtol=1e-5)


def test_evaluation_covers_the_whole_text_with_the_same_masks(task: MaskedLanguageModeling) -> None:
    """Would catch a last window left out, and masks that follow the seed of the run."""
    model = Transformer(objective("bert").shape(ModelOptions(arch="bert", width=32, heads=2), depth=1, vocab_size=400))
    mlm.attach(model)
    initialize(model, 0)
    scores = task.evaluate(model)
    assert scores == task.evaluate(model) == replace(task, seed=99).evaluate(model)
    windows = list(task.masking.whole(task.val.ids, task.context))
    covered = sum(int(rows["tokens_BT"].numel()) - 2 * len(rows) for rows in windows)
    assert covered == task.val.tokens
    assert scores["val_loss"] == pytest.approx(np.log(400), abs=0.5)
    assert "[" in task.sample(model, 3)


def test_refused(task: MaskedLanguageModeling, tmp_path: Path) -> None:
    """A tokenizer of a decoder, a context without room, and a text that is too short."""
    import tiny_models

    with pytest.raises(UserError, match=r"has no \[MASK\]"):
        replace(task, tokenizer=tiny_models.tokenizer())
    with pytest.raises(UserError, match="too short for an encoder"):
        replace(task, context=4)
    with pytest.raises(UserError, match="too few for a context"):
        replace(task, train=shard(tmp_path / "short.bin", "a"))
