"""One step: the gradient of a batch however it is split, dropout, clipping, and the order of the work."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_trainer import rows, trainer
from torch import Tensor

from tfcli.errors import Interrupted, RunError
from tfcli.tasks.common.batch import Rows
from tfcli.tasks.lm.task import LanguageModeling
from tfcli.tasks.task import Headline
from tfcli.train import checkpoint, order
from tfcli.train.events import Evaluated, Event, Progress, Sampled, Saved
from tfcli.train.metrics import read
from tfcli.train.trainer import Trainer


def gradient(made: Trainer, examples: Rows, dropout: float = 0.0) -> dict[str, Tensor]:
    made.model.zero_grad(set_to_none=True)
    made.gradients(examples, dropout=dropout)
    return {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4])
def test_accumulation_is_one_big_batch(tmp_path: Path, micro_batch: int) -> None:
    """Catches a mean of means: 1 x 8 = 2 x 4 = 8 x 1, and 3 + 3 + 2 as well."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, cut = trainer(tmp_path / "a", micro_batch=8), trainer(tmp_path / "b", micro_batch=micro_batch)
    whole._step()  # so that no gradient is zero
    cut.model.load_state_dict(whole.model.state_dict())
    expected, got = gradient(whole, rows(whole)), gradient(cut, rows(cut))
    assert expected.keys() == got.keys() == dict(whole.model.named_parameters()).keys()
    for name, values in expected.items():
        # fp32 sums of 128 terms in another order: 128 * 2^-24 = 8e-6 of the largest.
        torch.testing.assert_close(got[name], values, rtol=0, atol=1e-5 * float(values.abs().max()), msg=name)


def test_the_gradient_is_of_the_mean_loss(tmp_path: Path) -> None:
    """Catches a division by rows instead of tokens, twice, or not at all."""
    made = trainer(tmp_path, micro_batch=2)
    made._step()
    examples = rows(made)
    got = gradient(made, examples)
    made.model.zero_grad(set_to_none=True)
    logits = made.model.logits(made.model(examples[:, :-1]))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), examples[:, 1:].flatten()).backward()
    for name, p in made.model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(got[name], p.grad, rtol=1e-3, atol=1e-6, msg=name)  # our loss kernel is fp32 too


def test_the_sum_and_the_count(tmp_path: Path) -> None:
    """Catches a count that is not that of the targets."""
    made = trainer(tmp_path)
    loss_sum, count = made.gradients(rows(made, 3), dropout=0.0)
    assert count == 3 * 16
    # The head is tied to an embedding of std 0.02: the first prediction is nearly uniform.
    assert float(loss_sum) / count == pytest.approx(math.log(400), abs=0.1)


def test_dropout_is_decided_by_the_step(tmp_path: Path) -> None:
    """Catches dropout from a generator whose state a resumed run does not have."""
    made = trainer(tmp_path, dropout=0.5)
    made._step()
    first = gradient(made, rows(made), dropout=0.5)
    torch.manual_seed(99)
    second = gradient(made, rows(made), dropout=0.5)
    assert all(torch.equal(first[name], second[name]) for name in first)
    made.state.step += 1
    assert any(not torch.equal(first[name], g) for name, g in gradient(made, rows(made), dropout=0.5).items())


def test_dropout_waits_for_the_second_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches dropout on text that is seen for the first time, and none after."""
    made = trainer(tmp_path, dropout=0.25, steps=20)
    used: list[float] = []
    gradients = Trainer.gradients

    def spy(self: Trainer, examples: Rows, *, dropout: float) -> tuple[Tensor, int]:
        used.append(dropout)
        return gradients(self, examples, dropout=dropout)

    monkeypatch.setattr(Trainer, "gradients", spy)
    made.train()
    begins = [order.batch(step, seed=1337, size=made.task.size, batch=8)[1][0] for step in range(20)]
    assert used == [0.25 if epoch else 0.0 for epoch in begins]
    assert {0.0, 0.25} == set(used)


def test_the_gradient_is_clipped(tmp_path: Path) -> None:
    """Catches clipping that is done a micro-batch at a time, or not at all."""
    made = trainer(tmp_path, settings={"optim.clip": 1e-3})
    seen: list[float] = []
    step = made.optimizers.step

    def spy(factor: float) -> None:
        norms = [p.grad.norm() for p in made.optimizers.named.values() if p.grad is not None]
        seen.append(float(torch.stack(norms).norm()))
        step(factor)

    made.optimizers.step = spy  # type: ignore[method-assign]
    made._step()
    assert seen == [pytest.approx(1e-3, rel=1e-3)]


def test_the_order_of_a_run(tmp_path: Path) -> None:
    """Catches an evaluation after its checkpoint (a resumed run would lose it), and work that is due and not done."""
    events: list[Event] = []
    settings = {"train.eval_every": 6, "train.checkpoint_every": 6, "train.sample_every": 12}
    trainer(tmp_path, steps=20, settings=settings, listen=events.append).train()
    kinds = [(type(event).__name__, event.step) for event in events if not isinstance(event, Progress)]  # type: ignore[union-attr]
    assert kinds == [
        ("Evaluated", 6), ("Saved", 6),
        ("Evaluated", 12), ("Sampled", 12), ("Saved", 12),
        ("Evaluated", 18), ("Saved", 18),
        ("Evaluated", 20), ("Sampled", 20), ("Saved", 20),
    ]  # fmt: skip
    assert all(isinstance(event, Progress | Evaluated | Sampled | Saved) for event in events)


def test_metrics_lines(tmp_path: Path) -> None:
    """Catches a key that other programs rely on and that is gone, and a loss that is not averaged over its steps."""
    trainer(tmp_path, steps=20, settings={"train.eval_every": 15}).train()
    lines = read(tmp_path)
    assert [(line["step"], "train_loss" in line) for line in lines] == [
        (10, True), (15, False), (20, True), (20, False),
    ]  # fmt: skip
    assert list(lines[0]) == ["step", "seconds", "tokens", "train_loss", "lr", "tokens_per_second"]
    assert set(lines[1]) == {"step", "seconds", "tokens", "val_loss", "val_bits_per_byte"}
    assert [line["tokens"] for line in lines] == [line["step"] * 128 for line in lines]
    assert lines[2]["lr"] == 0.0
    assert lines[2]["train_loss"] < lines[0]["train_loss"] - 0.1
    assert lines[1]["val_bits_per_byte"] == pytest.approx(lines[1]["val_loss"] / math.log(2) / 2), "2 bytes a token"


def test_stopping_saves_first(tmp_path: Path) -> None:
    """Catches steps that a stopped run has to take again, and a stop that is heard only at the next checkpoint."""
    calls = iter(range(100))
    saved: list[dict[str, Any]] = []
    made = trainer(tmp_path, stop=lambda: next(calls) == 7)
    made.save_model = saved.append
    with pytest.raises(Interrupted, match="after step 7") as error:
        made.train()
    assert error.value.exit_code == 130
    assert "--resume" in str(error.value.hint)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["00000007"]
    assert len(saved) == 1, "a model to use, although none was scored yet"


def test_a_bad_weight_stops_the_run_and_is_named(tmp_path: Path) -> None:
    """Catches an update with NaN that destroys the weights."""
    made = trainer(tmp_path, settings={"train.checkpoint_every": 3})
    step = made.optimizers.step

    def poison(factor: float) -> None:
        step(factor)
        if made.state.step == 4:
            with torch.no_grad():
                made.model.blocks[1].ffn.down.weight[0, 0] = math.nan  # type: ignore[union-attr, index]

    made.optimizers.step = poison  # type: ignore[method-assign]
    with pytest.raises(
        RunError, match=r"step 6: the loss is nan; first in the weights of blocks.1.ffn.down.weight"
    ) as e:
        made.train()
    assert "step 3" in e.value.message
    assert e.value.exit_code == 1
    state, weights, _ = checkpoint.load(checkpoint.complete(tmp_path)[-1])
    assert state.step == 3
    assert all(t.isfinite().all() for t in weights.values())


def test_a_bad_gradient_is_named(tmp_path: Path) -> None:
    """Catches blame on any module but the one: clipping by a norm of NaN makes every gradient NaN."""
    made = trainer(tmp_path)
    made._step()
    weight = made.model.blocks[0].ffn.down.weight  # type: ignore[union-attr]
    weight.register_hook(lambda gradient: gradient * math.nan)  # type: ignore[operator]
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    with pytest.raises(
        RunError, match=r"step 2: the gradient is nan; first in the gradient of blocks.0.ffn.down.weight"
    ):
        made._step()
    assert all(torch.equal(before[name], p) for name, p in made.model.named_parameters())


def test_a_bad_output_is_named(tmp_path: Path) -> None:
    """Catches a message that names the loss only."""
    made = trainer(tmp_path)
    made._step()
    made.model.blocks[1].attention.register_forward_hook(lambda module, inputs, output: output * math.inf)  # type: ignore[union-attr]
    with pytest.raises(RunError, match=r"first in the output of blocks.1"):
        made._step()


def test_weights_that_are_bad_at_the_very_end(tmp_path: Path) -> None:
    """Catches a run that ends well with a model of NaN: after the last update no step follows to notice."""
    made = trainer(tmp_path, steps=5)
    step = made.optimizers.step

    def poison(factor: float) -> None:
        step(factor)
        if made.state.step == 4:
            with torch.no_grad():
                made.model.norm.weight[0] = math.nan

    made.optimizers.step = poison  # type: ignore[method-assign]
    with pytest.raises(RunError, match=r"after step 5 the held-out loss is nan; first in the weights of norm.weight"):
        made.train()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text(), "which is not JSON"


def test_memory_does_not_grow(tmp_path: Path) -> None:
    """Catches a graph or a list kept from step to step: tensors alive are as many after 30 steps as after 10."""
    import gc

    made = trainer(tmp_path, steps=100)

    def alive() -> int:
        gc.collect()
        return sum(type(thing) in (Tensor, torch.nn.Parameter) for thing in gc.get_objects())

    counts = []
    for _ in range(3):
        for _ in range(10):
            made._step()
        counts.append(alive())
    assert counts[1] == counts[2]


@pytest.mark.parametrize(("margin", "kept"), [(1.0, [1, 2, 3, 3, 5, 6]), (0.0, [1, 2, 2, 2, 5, 5])])
def test_a_later_model_gives_way_only_to_one_that_is_surely_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, margin: float, kept: list[int]
) -> None:
    """Catches the luckiest of a few evaluations on few examples that is kept, and a slow fall that nothing stops."""
    made = trainer(tmp_path)
    made.plan = replace(made.plan, margin=margin)
    seen = iter([0.90, 0.92, 0.90, 0.85, 0.95, 0.93])  # of 100 examples: the error is 0.028 and less
    monkeypatch.setattr(LanguageModeling, "evaluate", lambda task, model: {"acc": next(seen)})
    monkeypatch.setattr(LanguageModeling, "headline", lambda task, scores: Headline.share("acc", scores["acc"], 100))
    steps, stale = [], []
    for step in range(1, 7):
        made.state.step = step
        made._evaluate()
        steps.append(made.state.best_step)
        stale.append(made.state.stale)
    assert steps == kept
    assert stale == [0, 0, 1, 2, 0, 1], "patience counts from the best"
    assert made.state.best == -0.95
