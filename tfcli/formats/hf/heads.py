"""Task heads read from Hugging Face directories; ``hf.save`` writes them with the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfcli.errors import UserError
from tfcli.formats.hf import directory as hf
from tfcli.formats.hf.families import registry as families
from tfcli.formats.hf.families.base import ACTIVATIONS, Activation, Family, HeadNames
from tfcli.formats.hf.settings import Settings
from tfcli.formats.hf.stored import CONFIG, read_data
from tfcli.formats.hf.weights import Weights
from tfcli.text.tokenizers.codec import Codec

if TYPE_CHECKING:
    import torch

    from tfcli.model.heads import Head, Transform
    from tfcli.model.transformer import Transformer
    from tfcli.runtime import Runtime

TASK_KEYS = ("id2label", "label2id", "problem_type", "tfcli")
"""What config.json says of a task, beside the shape of its model."""


def of_task(about: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says of the task of its model, for another that answers the same."""
    found = {key: about[key] for key in TASK_KEYS if key in about}
    if isinstance(found.get("tfcli"), dict):  # without the mark of the tokenizer that lies beside it
        found["tfcli"] = {key: value for key, value in found["tfcli"].items() if key != "tokenizer_sha256"}
    return found


def pooling_of(about: Mapping[str, Any]) -> str:
    """How a model pools its hidden states for a new sequence head, by its config.json."""
    return "mean" if about.get("classifier_pooling") == "mean" else "cls"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model with its head (``heads.of(model)``), its tokenizer, and what its config.json says."""

    model: Transformer
    codec: Codec
    hf_config: Mapping[str, Any]
    kind: str | None
    """That of its head."""


def load(
    directory: str | Path,
    *,
    runtime: Runtime,
    dtype: torch.dtype | None = None,
    hf_config: Mapping[str, Any] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Loaded:
    """A model directory with its task head; the other arguments as those of ``hf.load``.

    A bare BERT with a pooler gets a sequence head of no labels, which holds that pooler. Raises UserError as
    ``hf.load`` does, and for a head that config.json names and the weights lack.
    """
    from tfcli.model import heads

    directory = Path(directory)
    hf_config = read_data(directory) if hf_config is None else hf_config
    family, kind, weights = families.find(hf_config), families.kind_of(hf_config), Weights.open(directory)
    poolers = family.poolers if family is not None and kind is None else ()
    pooler = next((name for name in poolers if f"{name}.weight" in weights.entries), None)
    read = kind is not None or pooler is not None
    model, codec = hf.load(
        directory, runtime=runtime, dtype=dtype, hf_config=hf_config, on_note=None if read else on_note
    )
    if family is not None and kind is not None:
        settings = Settings(directory / CONFIG, hf_config, {"classifier_pooling": "cls", **family.head_defaults})
        heads.attach(model, _read(weights, family, kind, model, settings))
    elif pooler is not None and not model.config.architecture.causal:
        head = heads.make("sequence", model.config.width, 0, causal=False)
        found = {f"pooler.{end}": weights.read(f"{pooler}.{end}") for end in ("weight", "bias")}
        _fill(head, found, weights.path, partly=True)
        heads.attach(model, head)
    head_of = heads.of(model)
    if head_of is not None:
        head_of.to(dtype or runtime.dtype)
    return Loaded(model=model, codec=codec, hf_config=hf_config, kind=kind)


def _read(weights: Weights, family: Family, kind: str, model: Transformer, settings: Settings) -> Head:
    """The head that the weights hold."""
    from tfcli.model import heads
    from tfcli.model.heads import MaskedHead

    table = families.head_names(family, kind)

    def lacks(name: str) -> UserError:
        return UserError(
            f"{weights.path} lacks {name}, which a {table.architecture} has", hint="copy or save the model again"
        )

    act = model.config.architecture.feed_forward.activation
    if "classifier_activation" in family.head_defaults:
        act = settings.one_of("classifier_activation", ACTIVATIONS)
    transform = _transform(weights, table, model, act) if "transform.dense" in table.parts else None
    last = list(table.parts.values())[-1]
    if transform is not None and kind == MaskedHead.kind:
        head: Head = MaskedHead(model.config.vocab_size, transform, bias=f"{last}.bias" in weights.entries)
    elif f"{last}.weight" not in weights.entries:
        raise lacks(f"{last}.weight")
    else:
        labels, causal = weights.entries[f"{last}.weight"].shape[0], model.config.architecture.causal
        pooling = settings.one_of("classifier_pooling", {"cls": "cls", "mean": "mean"})
        head = heads.make(kind, model.config.width, labels, causal=causal, transform=transform, pooling=pooling)
    found = {}
    for ours in head.state_dict():
        part, _, end = ours.rpartition(".")
        theirs = f"{table.parts[part]}.{end}"
        if theirs not in weights.entries:
            raise lacks(theirs)
        found[ours] = weights.read(theirs)
    _fill(head, found, weights.path)
    return head


def _transform(weights: Weights, table: HeadNames, model: Transformer, activation: Activation) -> Transform:
    """The transform of a head, with the biases that the weights have, not yet filled."""
    from tfcli.model.heads import Transform

    def has_bias(part: str) -> bool:
        return f"{table.parts[part]}.bias" in weights.entries

    return Transform(
        model.config.width,
        model.config.norm_eps,
        norm_bias=has_bias("transform.norm"),
        bias=has_bias("transform.dense"),
        activation=activation,
    )


def _fill(head: Head, found: Mapping[str, torch.Tensor], path: Path, *, partly: bool = False) -> None:
    for name, parameter in head.named_parameters():
        if name not in found and partly:
            continue
        if found[name].shape != parameter.shape:
            raise UserError(
                f"{path}: the head's {name} is {list(found[name].shape)}, expected {list(parameter.shape)}",
                hint="config.json and weights must come from one model",
            )
        parameter.data = found[name].to(parameter.dtype)
