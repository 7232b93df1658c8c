"""The plan of a run from a corpus, a machine and a few settings, and settings that are impossible."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import tiny_models

from tfcli.config.options import PretrainConfig
from tfcli.config.resolve import resolve
from tfcli.errors import UserError
from tfcli.train import plan, shape


def config(**settings: Any) -> PretrainConfig:
    return resolve(PretrainConfig, flags={key.replace("__", "."): value for key, value in settings.items()})[0]


def make(tokens: int = 100_000, vocab_size: int = 512, **settings: Any) -> plan.Plan:
    return plan.make(config(**settings), vocab_size=vocab_size, train_tokens=tokens, runtime=tiny_models.cpu())


def test_one_dial() -> None:
    """Catches a shape that no longer follows from the depth."""
    for depth in (1, 4, 6, 9):
        model = make(10**7, model__depth=depth, train__steps=1).model
        assert (model.width, model.heads, model.kv_heads, model.head_width) == (64 * depth, depth, depth, 64)
        assert model.context == (128 if depth <= 4 else 256 if depth <= 8 else 512)
        assert model.ffn_width % 64 == 0
        assert 8 / 3 <= model.ffn_width / model.width <= 8 / 3 + 1


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"model__depth": 0}, "model.depth is 0"),
        ({"model__depth": -1}, "model.depth is -1"),
        ({"model__context": 0}, "model.context is 0"),
        ({"model__context": -5}, "model.context is -5"),
        ({"model__heads": 0}, "model.heads is 0"),
        ({"model__kv_heads": 0}, "model.kv_heads is 0"),
        ({"model__ffn_width": 0}, "model.ffn_width is 0"),
        ({"model__width": 0}, "model.width is 0"),
        ({"model__width": 100, "model__heads": 3}, "cannot be divided into 3 heads"),
        ({"model__depth": 2, "model__heads": 2, "model__kv_heads": 3}, "not a multiple of model.kv_heads"),
        ({"model__width": 6, "model__heads": 2}, "head_width is 3"),
        ({"train__batch_size": 0}, "train.batch_size is 0"),
        ({"train__micro_batch": 0}, "train.micro_batch is 0"),
        ({"train__steps": 0}, "train.steps is 0"),
        ({"train__tokens": -3}, "train.tokens is -3"),
        ({"train__epochs": 0}, "train.epochs is 0"),
        ({"train__epochs": float("nan")}, "train.epochs is nan"),
        ({"train__epochs": float("inf")}, "train.epochs is inf"),
        ({"train__budget": "-3"}, "not a duration"),
        ({"train__budget": "soon"}, "not a duration"),
        ({"train__eval_every": 0}, "train.eval_every is 0"),
        ({"train__sample_every": 0}, "train.sample_every is 0"),
        ({"train__checkpoint_every": 0}, "train.checkpoint_every is 0"),
        ({"train__keep": 0}, "train.keep is 0"),
        ({"train__dropout": 1.0}, "train.dropout is 1.0"),
        ({"optim__lr": -1.0}, "optim.lr is -1.0"),
        ({"optim__muon_lr": float("nan")}, "optim.muon_lr is nan"),
        ({"optim__beta1": 1.0}, "optim.beta1 is 1.0"),
        ({"optim__decay": 1.5}, "optim.decay is 1.5"),
        ({"optim__warmup": -1.0}, "optim.warmup is -1"),
        ({"optim__warmup": 10.0}, "optim.warmup is 10"),
        ({"optim__clip": 0.0}, "optim.clip is 0.0"),
        ({"seed": 2**70}, "seed is"),
        ({"train__steps": 5, "train__epochs": 2.0}, "two lengths are given: --steps and --epochs"),
        ({"train__tokens": 5, "train__budget": "1m"}, "two lengths are given: --tokens and --budget"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(settings: dict[str, Any], word: str) -> None:
    """Catches a 0 that is silently replaced by a default, an endless loop, and a traceback from deep inside."""
    with pytest.raises(UserError) as error:
        plan.check(resolve(PretrainConfig, flags={k.replace("__", "."): v for k, v in settings.items()})[0])
    assert word in error.value.message
    assert error.value.hint


def test_a_warm_up_is_a_share_of_the_run() -> None:
    """A share of the steps, as in finetuning; the default is ten steps, and a number of steps is refused."""
    assert [plan.warmup_steps(share, 200) for share in (None, 0.0, 0.1)] == [10, 0, 20]
    with pytest.raises(UserError) as error:
        resolve(PretrainConfig, flags={"optim.warmup": 10.0})
    assert "it is a share of the run" in str(error.value.hint)


def test_a_rate_of_zero_is_zero() -> None:
    """Catches `or`: a rate that was set to 0 to freeze one part became the default."""
    made = make(model__depth=1, train__steps=1, optim__muon_lr=0.0)
    assert made.muon_lr == 0.0
    assert made.lr > 0


def test_larger_than_the_text() -> None:
    """Catches a batch with the same example twice, and a context that the text cannot fill."""
    with pytest.raises(UserError, match="larger than the data") as error:
        make(1000, model__depth=1, model__context=100, train__batch_size=10, train__steps=1)
    assert "--batch-size 9" in str(error.value.hint)
    assert make(1000, model__depth=1, model__context=100, train__batch_size=9, train__steps=1).batch_size == 9
    with pytest.raises(UserError, match="too few for a context of 1000") as error:
        make(1000, model__depth=1, model__context=1000, train__steps=1)
    assert "--context 499" in str(error.value.hint)
    with pytest.raises(UserError, match="too few"):
        make(5, model__depth=1, train__steps=1)


def test_a_small_text_gets_a_small_context_and_says_so() -> None:
    """Catches a tiny file that is refused although it could be trained on, or shrunk without a word."""
    notes: list[str] = []
    made = plan.make(
        config(model__depth=1, train__steps=1),
        vocab_size=300,
        train_tokens=101,
        runtime=tiny_models.cpu(),
        on_note=notes.append,
    )
    assert made.model.context == 50
    assert made.batch_size == 1
    assert notes == ["context 50 instead of 128: the training text has only 101 tokens"]


def test_lengths() -> None:
    """Catches steps that are rounded down: fewer tokens than asked for."""
    size = {"model__depth": 1, "model__context": 10, "train__batch_size": 10}
    assert make(1001, **size, train__steps=7).steps == 7
    assert make(1001, **size, train__tokens=101).steps == 2
    assert make(1001, **size, train__epochs=1.0).steps == 10
    assert make(1001, **size, train__epochs=2.55).steps == 26
    assert make(1001, **size, train__budget="10s").steps is None
    assert make(1001, **size).budget == 600
    assert make(1001, **size).max_steps == 80
    assert make(1001, **size, train__budget="10s").max_steps == 400


@pytest.mark.parametrize(("text", "expected"), [("90s", 90), ("10m", 600), ("1h30m", 5400), ("45", 45), ("0.5m", 30)])
def test_budgets(text: str, expected: float) -> None:
    """Catches a unit that is read wrong."""
    assert make(model__depth=1, train__budget=text).budget == expected


def test_dropout_only_where_the_text_repeats() -> None:
    """Catches dropout in a run that sees its text once."""
    size = {"model__depth": 1, "model__context": 10, "train__batch_size": 10}
    assert make(1001, **size, train__epochs=3.0).dropout == 0.0
    assert make(1001, **size, train__epochs=9.0).dropout == 0.1
    assert make(1001, **size, train__epochs=9.0, train__dropout=0.0).dropout == 0.0


def test_the_ladder() -> None:
    """Catches evaluations that are rare at first, or so dense at the end that a long run mostly evaluates."""
    steps = list(itertools.takewhile(lambda at: at <= 3000, plan.evaluation_steps(3000)))
    assert steps[:5] == [70, 88, 109, 137, 171]
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert max(gaps) <= 201
    assert 15 <= len(steps) <= 30
    unfixed = list(itertools.islice(plan.evaluation_steps(None), 5))
    assert unfixed == steps[:5]


def test_which_evaluation() -> None:
    """Catches an evaluation at step 0, and an endless search for a step that never comes."""
    assert [plan.evaluation(step, steps=None, every=None) for step in (0, 69, 70, 71, 88)] == [None, None, 0, None, 1]
    assert [plan.evaluation(step, steps=9, every=3) for step in (0, 1, 3, 6, 7)] == [None, None, 0, 1, None]


def fixed(plan_: plan.Plan, **how: Any) -> int:
    return plan.fix_steps(plan_, **{"elapsed": 10.0, "step": 24, "step_seconds": 0.1, "evaluation_seconds": 2.0, **how})


def test_fixing_the_length_pays_for_everything() -> None:
    """Catches a budget that is overrun by its evaluations, whether by the ladder or at fixed steps."""
    made = make(10**7, model__depth=1, train__budget="100s")
    steps = fixed(made)
    looks = sum(1 for _ in itertools.takewhile(lambda at: at < steps, plan.evaluation_steps(steps))) + 1
    assert 80 <= 10 + (steps - 24) * 0.1 + looks * 2.0 <= 100
    regular = fixed(made, every=20)
    assert 80 <= 10 + (regular - 24) * 0.1 + (regular / 20 + 1) * 2.0 <= 100
    assert fixed(made, elapsed=500.0) == 25, "late already: one more step"
    assert fixed(make(1001, model__depth=1, model__context=10, train__budget="1h"), step_seconds=1e-6) <= 4000


def test_presets_can_be_planned() -> None:
    """Catches a preset that asks for what cannot be."""
    from tfcli.config.resolve import PRESETS

    for name in PRESETS:
        settings, _ = resolve(PretrainConfig, preset=name)
        made = plan.make(settings, vocab_size=1000, train_tokens=10**7, runtime=tiny_models.cpu())
        assert made.model.depth == settings.model.depth


def test_vocabulary_follows_the_text_and_what_the_model_can_carry() -> None:
    """Catches a head that costs more than the blocks: a gigabyte's 32768 pieces in a ten-minute model."""
    small = [shape.vocab_size(size, depth=None, budget=600.0) for size in (10_000, 10**6, 10**7, 10**9)]
    assert small == [1024, 4096, 8192, 8192]
    assert shape.vocab_size(10**9, depth=None, budget=7200.0) == 32768
    assert shape.vocab_size(10**9, depth=12, budget=None) == 32768


def test_a_length_replaces_that_of_a_lower_layer() -> None:
    """Catches --epochs refused with a preset's steps, and two lengths of one layer let through."""
    for sets in ({"train.epochs": 1.0}, {"train.budget": "9s"}):
        resolved, sources = resolve(PretrainConfig, preset="tiny", flags=sets)
        one = plan.one_length(resolved, sources)
        plan.check(one)
        assert one.train.steps is None
    both, sources = resolve(PretrainConfig, flags={"train.steps": 3, "train.epochs": 1.0})
    with pytest.raises(UserError, match="two lengths"):
        plan.check(plan.one_length(both, sources))


def test_automatic_depth_fits_the_heads_that_are_given() -> None:
    """Catches a size that the plan chose itself and then refuses."""
    assert make(10**6, model__heads=3, train__budget="1s").model.heads == 3
    assert make(10**6, model__kv_heads=2, train__budget="1s").model.kv_heads == 2


def test_the_rates_fall_when_the_schedule_says_so() -> None:
    """Catches a length that is looked at again after it has begun to matter."""
    from tfcli.train.optim import schedule

    for steps, decay in ((100, 0.7), (333, 0.5), (50, 1.0)):
        at = plan.decay_start(steps, decay)
        assert schedule(at, steps, warmup=0, decay=decay) == pytest.approx(1.0, abs=0.01)
        assert schedule(at + 2, steps, warmup=0, decay=decay) < 1.0
