"""Every setting of tfcli: dataclasses, presets, and the one way they are put together.

Settings come in layers, each over the one before: default < preset < --config file (TOML) < --set < flags.
``resolve`` returns the settings and, for each, the layer it came from. ``None`` means "not fixed: the plan decides",
and the plan writes what it decided into ``run.json``. Standard library only, so that ``--help`` stays instant.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from tfcli.errors import UserError, unknown

C = TypeVar("C")


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched to a context longer than the one trained on; ``none`` leaves them."""

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_context: int = 0
    """Context before stretching (llama3, yarn)."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths longer than original_context / this are divided by ``factor``."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths shorter than original_context / this stay."""
    beta_fast: float = 32.0
    """yarn: rotations in the original context above which a frequency stays (Peng et al. 2023, 3.2)."""
    beta_slow: float = 1.0
    """yarn: rotations below which it is divided by ``factor``."""
    attention_factor: float = 1.0
    """yarn: what cos and sin are multiplied by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wiring:
    """How the parts of a model are put together: what distinguishes one family from another, as data.

    The defaults are tfcli's own decoder (Qwen3): causal, RMSNorm before each part, QK-norm, rotary positions, SwiGLU,
    no biases.
    """

    causal: bool = True
    """Each position sees those before it (a decoder); else all (an encoder)."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm (Ba et al. 2016)."""
    norm_bias: bool = False
    norm_place: Literal["pre", "post", "sandwich"] = "pre"
    """Before each part; after the sum (Vaswani et al. 2017); or before and after each part (Gemma 2)."""
    first_norm: bool = True
    """Whether the first block norms what its attention reads; not after an ``embed_norm`` of pre-norm (ModernBERT)."""
    qk_norm: bool = True
    """RMSNorm of queries and keys, per head (Henry et al. 2020)."""
    positions: Literal["rope", "learned"] = "rope"
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True
    """``act(gate) * up`` (Shazeer 2020) or ``act(up)``."""
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    embed_norm: bool = False
    """A norm right after the embedding (BERT)."""
    embed_scale: float = 1.0
    """What embeddings are multiplied by (Gemma: sqrt(width))."""
    token_types: int = 0
    """Segment embeddings (BERT: 2)."""
    attention_scale: float | None = None
    """What q k^T is multiplied by; left out: head_width^-1/2."""
    local_window: int = 0
    """Positions that a local layer sees, itself among them; an encoder's sees half to each side. 0: no local layers."""
    local_every: int = 0
    """Every this-many-th layer sees all, the others are local; 0: all are local."""
    global_first: bool = False
    """Of each ``local_every`` layers the first sees all (ModernBERT), not the last."""
    local_theta: float = 10_000.0
    """rope_theta of local layers, which are not stretched by ``rope_scaling``."""
    rope_scaling: RopeScaling = RopeScaling()


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The shape of one model; every field is needed to build it. Dimensions as in ``tfcli/model/__init__.py``."""

    vocab_size: int
    context: int
    depth: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    ffn_width: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tied: bool = True
    encoder_depth: int = 0
    """Blocks of an encoder beside the decoder, each of whose blocks then attends to what the encoder saw; 0: none."""
    wiring: Wiring = Wiring()

    @property
    def encoder(self) -> ModelConfig:
        """The shape of the encoder beside the decoder."""
        wiring = dataclasses.replace(self.wiring, causal=False)
        return dataclasses.replace(self, depth=self.encoder_depth, encoder_depth=0, wiring=wiring)

    def is_local(self, layer: int) -> bool:
        """Whether a layer sees only a window of positions."""
        window, every = self.wiring.local_window, self.wiring.local_every
        return window > 0 and (every == 0 or (layer + (not self.wiring.global_first)) % every != 0)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "depth", "width", "heads", "kv_heads", "head_width", "ffn_width"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"model.{name} is {value!r}", hint="it must be a whole number of at least 1")
        if not isinstance(self.encoder_depth, int) or self.encoder_depth < 0:
            raise UserError(f"model.encoder_depth is {self.encoder_depth!r}", hint="it must be 0 (no encoder) or more")
        if self.encoder_depth and not self.wiring.causal:
            raise UserError("an encoder has no other beside it", hint="model.encoder_depth goes with a decoder")
        if self.heads % self.kv_heads:
            raise UserError(
                f"model.heads {self.heads} is not a multiple of model.kv_heads {self.kv_heads}",
                hint="each key/value head serves the same number of query heads",
            )
        if self.head_width % 2 and self.wiring.positions == "rope":
            raise UserError(f"model.head_width is {self.head_width}", hint="rotary positions need an even head width")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """What a person may fix about a new model's shape; what is left out follows from ``depth``."""

    arch: Literal["gpt", "bert", "transformer", "lstm"] = "gpt"
    """A decoder that continues text, an encoder that fills in what is masked, an encoder-decoder that says what is
    hidden, or a recurrent yardstick with as many parameters as the decoder of the same settings."""
    depth: int | None = None
    """Number of blocks; the one dial: width, heads and learning rate follow from it."""
    context: int | None = None
    """Tokens the model sees at once."""
    width: int | None = None
    """Residual stream width; must be a multiple of ``heads``."""
    heads: int | None = None
    """Query heads."""
    kv_heads: int | None = None
    """Key/value heads; fewer than ``heads`` is grouped-query attention."""
    ffn_width: int | None = None
    """Inner width of the feed-forward layer."""
    tied: bool = True
    """Share the embedding with the output head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerOptions:
    """How a tokenizer is trained from a corpus (SentencePiece, Kudo and Richardson 2018)."""

    type: Literal["bpe", "unigram"] = "bpe"
    """Algorithm: byte-pair encoding (Sennrich et al. 2016) or unigram (Kudo 2018)."""
    vocab_size: int | None = None
    """Number of pieces; left out, it follows from the size of the corpus."""
    character_coverage: float = 0.9995
    """Share of characters that get a piece of their own; the rest become bytes."""
    user_symbols: tuple[str, ...] = ()
    """Strings that are always one piece."""
    sample_bytes: int = 50_000_000
    """Bytes of text that the trainer sees: a fair sample of the whole corpus."""
    trainer: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    """Any further option of SentencePiece's trainer, by its own name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOptions:
    """Which text is read, and how."""

    val_fraction: float = 0.1
    """Held-out part, from the end; unless set, at most 500 kB of text."""
    val: str | None = None
    """A file, directory or glob to hold out instead."""
    text_key: str | None = None
    """Field or column with the text; left out: text, content, or the only one with strings."""
    errors: Literal["strict", "replace"] = "strict"
    """Invalid UTF-8: stop and say where, or replace and count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimOptions:
    """Muon on the blocks' matrices (Jordan et al. 2024), AdamW (Loshchilov and Hutter 2019) on the rest."""

    muon_lr: float | None = None
    """Peak learning rate of the blocks' matrices."""
    lr: float | None = None
    """Peak learning rate of embeddings, head and norms."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices."""
    beta1: float = 0.8
    """AdamW's first-moment decay."""
    beta2: float = 0.95
    """AdamW's second-moment decay."""
    momentum: float = 0.95
    """Muon's Nesterov momentum."""
    warmup: int = 10
    """Steps of linear warm-up."""
    decay: float = 0.7
    """Last part of the run over which the rates fall to zero."""
    clip: float = 1.0
    """Largest gradient norm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraOptions:
    """Adapters beside frozen matrices: ``W + (alpha / rank) B A`` (Hu et al. 2021)."""

    on: bool = False
    """Whether they are what is trained, in place of all weights."""
    rank: int = 8
    """Inner width of an adapter."""
    alpha: float = 16.0
    """What the change is scaled by, over the rank."""
    targets: tuple[str, ...] = ()
    """Layers by the end of their name, as q,v or ffn.up; empty: all linear layers of the blocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """How long, how much at once, and how often to look."""

    steps: int | None = None
    """Optimizer steps."""
    tokens: int | None = None
    """Length as training tokens."""
    epochs: float | None = None
    """Length as passes over the training text."""
    budget: str | None = None
    """Length as wall-clock time: 90s, 10m, 1h30m."""
    batch_size: int | None = None
    """Sequences a step, over all micro-batches."""
    micro_batch: int | None = None
    """Sequences at once; the rest of the batch is accumulated."""
    dropout: float | None = None
    """Dropout from the second epoch on, when the text begins to repeat."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: only for a run long enough to repay it."""
    eval_every: int | None = None
    """Steps between evaluations; left out: often at first, then further apart."""
    sample_every: int | None = None
    """Steps between samples; left out: at every fourth evaluation."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; left out: about once a minute."""
    keep: int = 2
    """Newest checkpoints kept; the best model is in the run directory itself."""
    tensorboard: bool = False
    """Also write TensorBoard events."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskOptions:
    """What an encoder is to guess in pretraining (Devlin et al. 2019, 3.1)."""

    rate: float = 0.3
    """Share of the tokens: more to learn from a text than BERT's 0.15 (Wettig et al. 2023; ModernBERT)."""
    mask_share: float = 0.8
    """Of these, the share that is replaced by [MASK]."""
    random_share: float = 0.1
    """The share that is replaced by another piece; the rest stays as it is."""
    whole_words: bool = False
    """Choose words, and all pieces of each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanOptions:
    """What an encoder-decoder is to say in pretraining (Raffel et al. 2020, 3.1.4)."""

    rate: float = 0.15
    """Share of the tokens that is hidden."""
    mean_length: float = 3.0
    """Tokens of a hidden span, on average."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """Everything that decides a pretraining run, machine and paths apart."""

    model: ModelOptions = field(default_factory=ModelOptions)
    tokenizer: TokenizerOptions = field(default_factory=TokenizerOptions)
    data: DataOptions = field(default_factory=DataOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    mlm: MaskOptions = field(default_factory=MaskOptions)
    spans: SpanOptions = field(default_factory=SpanOptions)
    seed: int = 1337


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is drawn; the filters apply in the order of the fields."""

    max_tokens: int | None = None
    """New tokens at most; left out: 256, or what the context leaves."""
    repetition_penalty: float = 1.0
    """Divide the logits of tokens already seen (Keskar et al. 2019); 1 is off."""
    temperature: float = 0.8
    """Below 1 sharper, above 1 flatter; 0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens (Fan et al. 2018); 0 is off."""
    top_p: float = 0.95
    """Keep the likeliest tokens up to this mass (Holtzman et al. 2020); 1 is off."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the likeliest (Nguyen et al. 2024); 0 is off."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""
    ignore_eos: bool = False
    """Go on past the end-of-text token."""
    num_samples: int = 1
    """Continuations of each prompt."""
    seed: int | None = None
    """Same seed, same text; left out: drawn, and reported by --json."""
    overflow: Literal["error", "slide"] = "error"
    """When the context is full: stop there, or slide the window along."""


# Known points. Each is a few settings over the defaults; `--set` and flags go over it.
PRESETS: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {
        "tiny": {"model.depth": 2, "model.context": 64, "train.batch_size": 8, "train.steps": 60},
        "small": {"model.depth": 6, "model.context": 256},
        "nanogpt-cpu": {
            "model.depth": 4, "model.width": 128, "model.heads": 4, "model.context": 64,
            "train.batch_size": 12, "train.steps": 2000,
        },
        "12m": {
            "model.depth": 6, "model.width": 384, "model.heads": 6, "model.context": 256,
            "tokenizer.vocab_size": 4096, "train.batch_size": 8,
        },
        "gpt2-124m": {
            "model.depth": 12, "model.width": 768, "model.heads": 12, "model.context": 1024,
            "tokenizer.vocab_size": 32768, "train.batch_size": 64,
        },
    }
)  # fmt: skip


def resolve(
    cls: type[C],
    *,
    preset: str | None = None,
    file: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> tuple[C, dict[str, str]]:
    """Put the layers together into a ``cls`` and say where each setting came from.

    ``sets`` are ``key.path=value`` strings, ``flags`` map dotted keys to values (None: not given). Returns the
    configuration and {dotted key: "default" | "preset NAME" | "FILE" | "--set" | "flag"}. Raises UserError for an
    unknown key (with the nearest name) or a value of the wrong type.
    """
    sources = dict.fromkeys(known_keys(cls), "default")
    values: dict[str, Any] = {}

    def put(key: str, value: Any, source: str) -> None:
        parent = key.rpartition(".")[0]
        if key not in sources and sources.get(parent) is not None and _is_mapping(cls, parent):
            values.setdefault(parent, {})[key.rpartition(".")[2]] = _scalar(value)
            sources[parent] = source
            return
        if key not in sources:
            raise unknown("setting", key, sources)
        values[key] = _coerce(key, value, _type_of(cls, key))
        sources[key] = source

    if preset is not None:
        if preset not in PRESETS:
            raise unknown("preset", preset, PRESETS)
        for key, value in PRESETS[preset].items():
            put(key, value, f"preset {preset}")
    if file is not None:
        for key, value in _flatten(_read_toml(file), cls).items():
            put(key, value, str(file))
    for item in sets:
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--set {item!r} has no value", hint="write --set key=value, as in --set optim.lr=1e-3")
        put(key.strip(), value.strip(), "--set")
    for key, value in (flags or {}).items():
        if value is not None:
            put(key, value, "flag")
    return _build(cls, values), sources


def known_keys(cls: type[Any], prefix: str = "") -> list[str]:
    """Every dotted key of a configuration class, in order."""
    keys: list[str] = []
    for name, kind in _hints(cls).items():
        keys += (
            known_keys(typing.cast(type[Any], kind), f"{prefix}{name}.")
            if dataclasses.is_dataclass(kind)
            else [prefix + name]
        )
    return keys


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values, nested as its dataclasses are."""
    return {
        f.name: to_dict(value) if dataclasses.is_dataclass(value := getattr(config, f.name)) else _plain(value)
        for f in dataclasses.fields(config)
    }


def from_dict(cls: type[C], data: Mapping[str, Any]) -> C:
    """The configuration that ``to_dict`` wrote. Raises UserError for keys that ``cls`` does not know."""
    values: dict[str, Any] = {}
    for key, value in _flatten(data, cls).items():
        if key not in known_keys(cls):
            raise unknown("setting", key, known_keys(cls))
        values[key] = _coerce(key, value, _type_of(cls, key))
    return _build(cls, values)


def seconds(text: str) -> float:
    """A duration such as 90s, 10m or 1h30m in seconds. Raises UserError for anything else."""
    import re

    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    total = (
        sum(float(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else 0
    )
    if total <= 0:
        raise UserError(f"{text!r} is not a duration", hint="write 90s, 10m or 1h30m")
    return total


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def _hints(cls: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _type_of(cls: type[Any], key: str) -> Any:
    kind: Any = cls
    for part in key.split("."):
        kind = _hints(kind)[part]
    return kind


def _is_mapping(cls: type[Any], key: str) -> bool:
    return typing.get_origin(_type_of(cls, key)) is Mapping


def _flatten(data: Mapping[str, Any], cls: type[Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    keys = known_keys(cls)
    for name, value in data.items():
        key = prefix + name
        if isinstance(value, Mapping) and key not in keys:
            flat |= _flatten(value, cls, key + ".")
        else:
            flat[key] = value
    return flat


def _read_toml(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such file: {path}", hint="--config takes a TOML file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", hint="--config takes a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}", hint="for example: [train] newline steps = 500") from None


def _scalar(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    for convert in (int, float):
        try:
            return convert(value)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(value.lower(), value)


def _coerce(key: str, value: Any, kind: Any) -> Any:
    """``value`` (a string from the shell, or a TOML or JSON value) as the annotated type ``kind``."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "auto", "")):
            return None
        return _coerce(key, value, next(a for a in args if a is not type(None)))
    if origin is Literal:
        if value not in args:
            raise unknown(f"{key}", str(value), args)
        return value
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise UserError(f"{key} is {value!r}", hint="it must be a list")
        return tuple(_coerce(key, item, args[0]) for item in items)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise UserError(f"{key} is {value!r}", hint=f"it must be a table of settings, as in {key}.name = value")
        for name, item in value.items():
            if not isinstance(item, str | int | float):
                raise UserError(f"{key}.{name} is {item!r}", hint="it must be a number, a text, true or false")
        return dict(value)
    try:
        if kind is bool:
            return (
                value
                if isinstance(value, bool)
                else {"true": True, "1": True, "false": False, "0": False}[value.lower()]
            )
        if kind is int:
            if isinstance(value, bool) or int(float(value)) != float(value):
                raise ValueError
            return int(float(value)) if not isinstance(value, str) or not value.lstrip("+-").isdigit() else int(value)
        if kind is float:
            if isinstance(value, bool):
                raise ValueError
            return float(value)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise UserError(f"{key} is {value!r}", hint=f"it must be {expected}") from None
    if not isinstance(value, kind):
        raise UserError(
            f"{key} is {value!r}", hint="it must be a text" if kind is str else f"it must be a {kind.__name__}"
        )
    return value


def _build(cls: type[C], values: Mapping[str, Any], prefix: str = "") -> C:
    kwargs: dict[str, Any] = {}
    for name, kind in _hints(cls).items():
        if dataclasses.is_dataclass(kind):
            kwargs[name] = _build(typing.cast(type[Any], kind), values, f"{prefix}{name}.")
        elif prefix + name in values:
            kwargs[name] = values[prefix + name]
    return cls(**kwargs)
