"""Task heads read from Hugging Face directories; ``hf.save`` writes them with the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfcli.errors import UserError
from tfcli.formats.hf import directory as hf
from tfcli.formats.hf.families import registry as families
from tfcli.formats.hf.families.base import ACTIVATIONS, Family
from tfcli.formats.hf.settings import Settings
from tfcli.formats.hf.stored import CONFIG, read_data
from tfcli.formats.hf.weights import Weights
from tfcli.text.tokenizers.codec import Codec

if TYPE_CHECKING:
    import torch

    from tfcli.model.heads import Head
    from tfcli.model.transformer import Transformer
    from tfcli.runtime import Runtime

TASK_KEYS = ("id2label", "label2id", "problem_type", "tfcli")
"""Keys of config.json that describe a task."""


def of_task(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a config.json that describe a task, for another model of the same task."""
    task = {key: hf_config[key] for key in TASK_KEYS if key in hf_config}
    if isinstance(task.get("tfcli"), dict):  # without the hash of the tokenizer next to it
        task["tfcli"] = {key: value for key, value in task["tfcli"].items() if key != "tokenizer_sha256"}
    return task


def pooling_of(hf_config: Mapping[str, Any]) -> str:
    """Return how a new sequence head of the model with this config.json pools its hidden states."""
    return "mean" if hf_config.get("classifier_pooling") == "mean" else "cls"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model with its head (``heads.of(model)``), its tokenizer, and the content of its config.json."""

    model: Transformer
    codec: Codec
    hf_config: Mapping[str, Any]
    kind: str | None
    """The kind of its head."""


def load(
    directory: str | Path,
    *,
    runtime: Runtime,
    dtype: torch.dtype | None = None,
    hf_config: Mapping[str, Any] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Loaded:
    """Load a model directory with its task head; arguments as those of ``hf.load``.

    A bare BERT with a pooler gets a sequence head without labels, which holds that pooler. Raises UserError as
    ``hf.load`` does, and for a head that config.json names and the weights lack.
    """
    from tfcli.model import heads

    directory = Path(directory)
    hf_config = read_data(directory) if hf_config is None else hf_config
    family, kind, weights = families.find(hf_config), families.kind_of(hf_config), Weights.open(directory)
    poolers = family.poolers if family is not None and kind is None else ()
    pooler = next((name for name in poolers if f"{name}.weight" in weights.entries), None)
    if kind is not None or pooler is not None:  # what hf.load does not read is read here
        on_note = None
    model, codec = hf.load(directory, runtime=runtime, dtype=dtype, hf_config=hf_config, on_note=on_note)
    if family is not None and kind is not None:
        settings = Settings(directory / CONFIG, hf_config, {"classifier_pooling": "cls", **family.head_defaults})
        heads.attach(model, _read(weights, family, kind, model, settings))
    elif pooler is not None and not model.config.architecture.causal:
        head = heads.make("sequence", model.config.width, 0, causal=False)
        _fill(head, {f"pooler.{end}": weights.read(f"{pooler}.{end}") for end in ("weight", "bias")}, weights.path)
        heads.attach(model, head)
    attached = heads.of(model)
    if attached is not None:
        attached.to(dtype or runtime.dtype)
    return Loaded(model=model, codec=codec, hf_config=hf_config, kind=kind)


def _read(weights: Weights, family: Family, kind: str, model: Transformer, settings: Settings) -> Head:
    """Return the head that the weights hold."""
    from tfcli.model import heads
    from tfcli.model.heads import MaskedHead, Transform

    table = families.head_names(family, kind)

    def lacks(name: str) -> UserError:
        return UserError(
            f"{weights.path} lacks {name}, which a {table.architecture} has", hint="copy or save the model again"
        )

    transform = None
    if "transform.dense" in table.parts:
        act = model.config.architecture.feed_forward.activation
        if "classifier_activation" in family.head_defaults:
            act = settings.one_of("classifier_activation", ACTIVATIONS)
        transform = Transform(
            model.config.width,
            model.config.norm_eps,
            norm_bias=f"{table.parts['transform.norm']}.bias" in weights.entries,
            bias=f"{table.parts['transform.dense']}.bias" in weights.entries,
            activation=act,
        )
    last = list(table.parts.values())[-1]
    if transform is not None and kind == MaskedHead.kind:
        head: Head = MaskedHead(model.config.vocab_size, transform, bias=f"{last}.bias" in weights.entries)
    elif f"{last}.weight" not in weights.entries:
        raise lacks(f"{last}.weight")
    else:
        labels, causal = weights.entries[f"{last}.weight"].shape[0], model.config.architecture.causal
        pooling = settings.one_of("classifier_pooling", {"cls": "cls", "mean": "mean"})
        head = heads.make(kind, model.config.width, labels, causal=causal, transform=transform, pooling=pooling)
    tensors = {}
    for ours in head.state_dict():
        part, _, end = ours.rpartition(".")
        theirs = f"{table.parts[part]}.{end}"
        if theirs not in weights.entries:
            raise lacks(theirs)
        tensors[ours] = weights.read(theirs)
    _fill(head, tensors, weights.path)
    return head


def _fill(head: Head, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    parameters = dict(head.named_parameters())
    for name, tensor in tensors.items():
        if tensor.shape != parameters[name].shape:
            raise UserError(
                f"{path}: the head's {name} is {list(tensor.shape)}, expected {list(parameters[name].shape)}",
                hint="config.json and weights must come from one model",
            )
        parameters[name].data = tensor.to(parameters[name].dtype)
