"""Settings: layers and their order, names, types, and there and back again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfcli.config.model import (
    STORED,
    Architecture,
    AttentionConfig,
    EmbeddingConfig,
    FeedForwardConfig,
    ModelConfig,
    NormConfig,
    RopeScaling,
    WindowConfig,
    flat,
    from_flat,
    from_stored,
    stored,
)
from tfcli.config.options import DataOptions, ModelOptions, PretrainConfig, Sampling, TokenizerOptions, TrainOptions
from tfcli.config.ranges import Count, check_ranges
from tfcli.config.resolve import PRESETS, from_dict, known_keys, resolve, seconds, to_dict
from tfcli.errors import UserError
from tfcli.tasks.applications import configs

SHAPE: dict[str, Any] = {
    "vocab_size": 64, "context": 8, "depth": 1, "width": 8, "heads": 2, "kv_heads": 1, "head_width": 4, "ffn_width": 16,
}  # fmt: skip


def toml(directory: Path, text: str) -> Path:
    path = directory / "my.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_each_layer_goes_over_the_one_before(tmp_path: Path) -> None:
    file = toml(tmp_path, "seed = 3\n[model]\ndepth = 3\ncontext = 99\n[train]\nsteps = 7\n")
    config, sources = resolve(
        PretrainConfig, preset="tiny", file=file, sets=["train.steps=8", "model.context=100"],
        flags={"train.steps": 9, "model.width": None},
    )  # fmt: skip
    assert config.optim.lr is None and sources["optim.lr"] == "default"
    assert config.train.batch_size == 8 and sources["train.batch_size"] == "preset tiny"
    assert config.model.depth == 3 and sources["model.depth"] == str(file)
    assert config.model.context == 100 and sources["model.context"] == "--set"
    assert config.train.steps == 9 and sources["train.steps"] == "flag"
    assert config.model.width is None and sources["model.width"] == "default"  # a flag of None was not given
    assert sources.keys() == set(known_keys(PretrainConfig))


def test_a_later_set_goes_over_an_earlier_one() -> None:
    assert resolve(PretrainConfig, sets=["seed=1", "seed=2"])[0].seed == 2


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_resolves(preset: str) -> None:
    config, sources = resolve(PretrainConfig, preset=preset)
    assert config.model.depth and {k for k, v in sources.items() if v == f"preset {preset}"} == PRESETS[preset].keys()


@pytest.mark.parametrize(
    ("how", "says", "hint"),
    [
        ({"sets": ["optim.lrr=1"]}, "unknown setting 'optim.lrr'", "did you mean 'optim.lr'?"),
        ({"sets": ["train.step=1"]}, "unknown setting 'train.step'", "did you mean 'train.steps'?"),
        ({"flags": {"modell.depth": 2}}, "unknown setting 'modell.depth'", "did you mean 'model.depth'?"),
        ({"preset": "smal"}, "unknown preset 'smal'", "did you mean 'small'?"),
        ({"sets": ["optim.lr"]}, "--set 'optim.lr' has no value", "write --set key=value, as in --set optim.lr=1e-3"),
        ({"sets": ["model=3"]}, "unknown setting 'model'", None),
        ({"sets": ["=3"]}, "unknown setting ''", None),
    ],
)
def test_unknown_keys_name_the_nearest(how: dict[str, Any], says: str, hint: str | None) -> None:
    with pytest.raises(UserError) as error:
        resolve(PretrainConfig, **how)
    assert error.value.message == says and (hint is None or error.value.hint == hint)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("train.steps=12", 12),
        ("train.steps=+12", 12),
        ("train.steps=1e3", 1000),
        ("train.steps=2.0", 2),
        ("train.steps=none", None),
        ("train.steps=auto", None),
        ("train.steps=", None),
        ("train.epochs=2", 2.0),
        ("optim.lr=3e-4", 3e-4),
        ("optim.clip=1", 1.0),
        ("train.tensorboard=true", True),
        ("train.tensorboard=0", False),
        ("model.tied=False", False),
        ("train.budget=1h30m", "1h30m"),
        ("train.compile=off", "off"),
        ("tokenizer.user_symbols=<a>,<b>", ("<a>", "<b>")),
        ("data.val= held out.txt ", "held out.txt"),
    ],
)
def test_text_from_the_shell_becomes_the_fields_type(item: str, expected: object) -> None:
    config, _ = resolve(PretrainConfig, sets=[item])
    value: Any = config
    for part in item.partition("=")[0].split("."):
        value = getattr(value, part)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("item", "says", "hint"),
    [
        ("train.steps=ten", "train.steps is 'ten'", "it must be a whole number"),
        ("train.steps=1.5", "train.steps is '1.5'", "it must be a whole number"),
        ("train.steps=inf", "train.steps is 'inf'", "it must be a whole number"),
        ("train.steps=nan", "train.steps is 'nan'", "it must be a whole number"),
        ("optim.lr=fast", "optim.lr is 'fast'", "it must be a number"),
        ("train.tensorboard=maybe", "train.tensorboard is 'maybe'", "it must be true or false"),
        ("train.compile=onn", "unknown train.compile 'onn'", "did you mean 'on'?"),
    ],
)
def test_text_that_is_not_of_the_type_is_refused(item: str, says: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(PretrainConfig, sets=[item])
    assert (error.value.message, error.value.hint) == (says, hint)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[train]\nsteps = '5x'", "train.steps is '5x'"),
        ("[train]\nsteps = true", "train.steps is True"),
        ("[train]\nsteps = [1]", r"train.steps is \[1\]"),
        ("[optim]\nlr = true", "optim.lr is True"),
        ("[train]\nbudget = 10", "train.budget is 10"),
        ("[train]\ntensorboard = 1", "train.tensorboard is 1"),
        ("[tokenizer]\nuser_symbols = 3", "tokenizer.user_symbols is 3"),
        ("[tokenizer]\nuser_symbols = [3]", "tokenizer.user_symbols is 3"),
        ("[tokenizer]\ntrainer = 3", "tokenizer.trainer is 3"),
        ("[tokenizer]\ntrainer = {x = [1]}", r"tokenizer.trainer.x is \[1\]"),
        ("model = 3", "unknown setting 'model'"),
        ("[train.steps]\nx = 1", "train.steps is {'x': 1}"),
        ("[train]\nstep = 1", "unknown setting 'train.step'"),
        ("[train\nsteps = 1", "is not valid TOML"),
    ],
)
def test_a_file_that_is_wrong_says_where(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        resolve(PretrainConfig, file=toml(tmp_path, text))
    assert error.value.hint


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        resolve(PretrainConfig, file=tmp_path / "none.toml")
    with pytest.raises(UserError, match="cannot be read"):
        resolve(PretrainConfig, file=tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'[data]\nval = "\xe9"\n')
    with pytest.raises(UserError, match="is not valid TOML"):
        resolve(PretrainConfig, file=tmp_path / "latin.toml")


def test_mapping_keys_go_through(tmp_path: Path) -> None:
    file = toml(tmp_path, "[tokenizer.trainer]\nsplit_digits = true\nseed_sentencepiece_size = 5\n")
    more = ["num_sub_iterations=3", "split_digits=false", "name=a b", "shrinking_factor=0.5"]
    config, sources = resolve(PretrainConfig, file=file, sets=[f"tokenizer.trainer.{item}" for item in more])
    assert dict(config.tokenizer.trainer) == {
        "split_digits": False,
        "seed_sentencepiece_size": 5,
        "num_sub_iterations": 3,
        "name": "a b",
        "shrinking_factor": 0.5,
    }
    assert sources["tokenizer.trainer"] == "--set"


def test_defaults_are_the_dataclasses() -> None:
    config, sources = resolve(PretrainConfig)
    assert config == PretrainConfig() and set(sources.values()) == {"default"}


CONFIGS = [
    PretrainConfig(),
    PretrainConfig(
        model=ModelOptions(depth=3, tied=False),
        tokenizer=TokenizerOptions(
            type="unigram", user_symbols=("<a>", "b,c"), trainer={"split_digits": True, "x": 1.5}
        ),
        data=DataOptions(val="a.txt", errors="replace"),
        train=TrainOptions(steps=5, budget="10m", epochs=1.5, compile="off"),
        seed=0,
    ),
    ModelConfig(**SHAPE, rope_theta=5e5, tied=False),
    Sampling(stop=("\n", "a,b"), seed=3, max_tokens=9),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_there_and_back_again_through_json(config: Any) -> None:
    data = json.loads(json.dumps(to_dict(config)))
    assert from_dict(type(config), data) == config


@given(
    st.builds(
        Sampling,
        max_tokens=st.none() | st.integers(1, 10**9),
        temperature=st.floats(0, 10),
        top_p=st.floats(0, 1),
        stop=st.lists(st.text()).map(tuple),
        ignore_eos=st.booleans(),
    )
)
def test_there_and_back_again_for_any_sampling(config: Sampling) -> None:
    assert from_dict(Sampling, json.loads(json.dumps(to_dict(config)))) == config


def test_from_dict_refuses_what_it_does_not_know() -> None:
    with pytest.raises(UserError, match=r"unknown setting 'model\.deep'"):
        from_dict(PretrainConfig, {"model": {"deep": 3}})


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90s", 90), ("90", 90), ("10m", 600), ("1h30m", 5400), ("1h", 3600), ("1.5m", 90), ("2h5s", 7205), (" 3s ", 3)],
)
def test_seconds(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "0", "0s", "ten minutes", "5d", "-5m", "10 m", "m", "5s3m", "1e3", "nan"])
def test_what_is_not_a_duration(text: str) -> None:
    with pytest.raises(UserError, match="is not a duration") as error:
        seconds(text)
    assert error.value.hint == "write 90s, 10m or 1h30m"


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("depth", 0, "model.depth is 0"),
        ("vocab_size", -1, "model.vocab_size is -1"),
        ("width", 2.0, "model.width is 2.0"),
        ("context", True, "model.context is True"),
        ("context", None, "model.context is None"),
        ("kv_heads", 3, "model.heads 2 is not a multiple of model.kv_heads 3"),
        ("head_width", 3, "model.head_width is 3"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(field: str, value: Any, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        ModelConfig(**{**SHAPE, field: value})
    assert error.value.hint


def test_configurations_are_frozen_keyword_only_and_small() -> None:
    for cls in (ModelConfig, ModelOptions, TokenizerOptions, DataOptions, TrainOptions, PretrainConfig, Sampling):
        fields = dataclasses.fields(cls)
        assert all(field.kw_only for field in fields) and len(fields) <= 16, cls
        assert cls.__dataclass_params__.frozen, cls  # type: ignore[attr-defined]


OLD_RUN = {
    "vocab_size": 40, "context": 16, "depth": 4, "width": 8, "heads": 2, "kv_heads": 2, "head_width": 4,
    "ffn_width": 16, "rope_theta": 160000.0, "norm_eps": 1e-06, "tied": True, "encoder_depth": 0,
    "wiring": {
        "causal": False, "norm": "layer", "norm_bias": False, "norm_place": "pre", "first_norm": False,
        "qk_norm": False, "positions": "rope", "activation": "gelu", "gated": True, "qkv_bias": False,
        "out_bias": True, "ffn_bias": False, "embed_norm": True, "embed_scale": 2.0, "token_types": 0,
        "attention_scale": 0.5, "local_window": 6, "local_every": 3, "global_first": True, "local_theta": 500.0,
        "rope_scaling": {
            "kind": "linear", "factor": 2.0, "original_context": 0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.0,
        },
    },
}  # fmt: skip
"""The model in a run.json that was written before settings were grouped."""


def test_a_shape_is_stored_as_older_runs_have_it() -> None:
    """Would catch a run that cannot be resumed, and a setting that lands on another."""
    config = from_stored(OLD_RUN)
    assert config.architecture == Architecture(
        causal=False,
        norms=NormConfig(kind="layer", first=False),
        attention=AttentionConfig(
            qk_norm=False, out_bias=True, scale=0.5, rope_scaling=RopeScaling(kind="linear", factor=2.0)
        ),
        feed_forward=FeedForwardConfig(activation="gelu"),
        embedding=EmbeddingConfig(norm=True, scale=2.0),
        windows=WindowConfig(size=6, every=3, global_first=True, theta=500.0),
    )
    assert json.dumps(stored(config)) == json.dumps(OLD_RUN)
    assert from_flat(flat(config.architecture)) == config.architecture


def test_a_stored_shape_with_an_unknown_setting_is_refused() -> None:
    for wrong in ({"no_such": 1}, {"norms": 3, "norm": "layer"}, {"norm": "mean"}):
        with pytest.raises(UserError, match=r"no_such|norms"):
            from_stored({**OLD_RUN, "wiring": wrong})


def test_every_setting_of_an_architecture_has_a_name_in_files() -> None:
    leaves = {key for key in known_keys(Architecture) if not key.startswith("attention.rope_scaling.")}
    assert set(STORED.values()) == leaves | {"attention.rope_scaling"}


@pytest.mark.parametrize(
    ("key", "value", "says", "hint"),
    [
        ("train.batch_size", 0, "train.batch_size is 0", "it must be at least 1"),
        ("train.dropout", 1.0, "train.dropout is 1.0", "it must be at least 0 and below 1"),
        ("train.epochs", float("inf"), "train.epochs is inf", "it must be more than 0"),
        ("optim.lr", float("nan"), "optim.lr is nan", "it must be at least 0"),
        ("optim.warmup", 1.5, "optim.warmup is 1.5", "it is a share of the run, from 0 to 1"),
        ("data.val_fraction", 1.0, "data.val_fraction is 1.0", "it must be more than 0 and below 1"),
        ("lora.rank", 0, "lora.rank is 0", "it must be at least 1"),
        ("seed", 2**63, f"seed is {2**63}", "it must fit into 64 bits"),
    ],
)
def test_numbers_outside_their_range_are_refused_for_every_task(key: str, value: float, says: str, hint: str) -> None:
    """Would catch a subclass that gives a field another default and forgets its range, and the edges of ranges."""
    for config in configs().values():
        with pytest.raises(UserError) as error:
            resolve(config, flags={key: value})
        assert (error.value.message, error.value.hint) == (says, hint)


def test_the_defaults_are_inside_their_ranges_and_edges_that_mean_something_are_too() -> None:
    for config in (PretrainConfig, Sampling, *configs().values()):
        resolve(config)
    edges = {"train.margin": 0, "train.dropout": 0, "optim.lr": 0, "optim.decay": 1, "seed": -(2**63)}
    for config in configs().values():
        resolve(config, flags=edges)


@dataclasses.dataclass
class Flags:
    limit: Count | None = None


def test_none_is_inside_every_range_and_a_prefix_names_flags() -> None:
    check_ranges(Flags(), "--")
    with pytest.raises(UserError, match=r"--limit is 0 \(it must be at least 1\)"):
        check_ranges(Flags(limit=0), "--")
