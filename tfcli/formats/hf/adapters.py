"""LoRA adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``, without the base.

The head of a task, which is trained in full, is stored with them, as PEFT's ``modules_to_save``. Labels and other
settings of the task, for which PEFT has no field (it warns of fields that it does not know), are in ``task.json``, in
the form of config.json. The files identify their base: PEFT's field by its name, metadata of the weights by a
fingerprint, so that an adapter is not put on another model. Features of PEFT that tfcli does not support (DoRA,
biases, ...) are refused by name.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfcli import disk
from tfcli.errors import RunError, UserError
from tfcli.formats.hf.families import registry as families
from tfcli.formats.hf.families.base import HeadNames, Place
from tfcli.formats.hf.heads import TASK_KEYS, Loaded, pooling_of
from tfcli.formats.hf.settings import json_object, json_text
from tfcli.formats.hf.stored import ADAPTER, few
from tfcli.formats.hf.tokenizers import read_roles
from tfcli.formats.hf.weights import Weights, read_header
from tfcli.model import heads, lora
from tfcli.model.heads import Head
from tfcli.model.lora import LoraLinear
from tfcli.model.quant.matrix import QuantMatrix
from tfcli.model.transformer import Transformer
from tfcli.text.chat.messages import with_template

CONFIG, WEIGHTS, TEMPLATE = ADAPTER, "adapter_model.safetensors", "chat_template.jinja"
TASK = "task.json"
BEGIN = "base_model.model."
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
TYPES = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS", "span": "QUESTION_ANS"}
"""{kind of head: PEFT's task_type}."""
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others change the base
}
"""Settings of PEFT that change what is computed, with the values that tfcli supports."""
AGAIN, EXPECTED = "save the adapter again", "an adapter is a directory in PEFT's format"
PROBED_ROWS = 16
"""Rows of each matrix in the fingerprint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """The identity of a model in any precision: SHA-256 of its numbers rounded to bf16."""

    norms: str
    """Hash of the norms, which no format quantizes."""
    matrices: str
    """Hash of the first rows of the blocks' matrices, dequantized."""


@torch.no_grad()
def fingerprint(model: Transformer) -> Fingerprint:
    """Return the fingerprint of a model without its adapters and its head."""
    norms, matrices = hashlib.sha256(), hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name.endswith("norm.weight") and not name.startswith(f"{heads.ATTRIBUTE}."):
            _feed(norms, name, parameter)
    for path, base in lora.layers(model).items():
        if isinstance(base, QuantMatrix):
            index = torch.arange(min(base.rows, PROBED_ROWS), device=base.codes.device)
            _feed(matrices, path, base.dequantized(torch.float32, index))
        else:
            _feed(matrices, path, base.weight[:PROBED_ROWS])
    return Fingerprint(norms=norms.hexdigest(), matrices=matrices.hexdigest())


def _feed(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {list(tensor.shape)} ".encode())
    digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())


def save(
    directory: str | Path,
    model: Transformer,
    *,
    base: str | Path,
    weights: Mapping[str, Tensor] | None = None,
    about: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
) -> None:
    """Write the adapters of a model, and its task head if it is trained, each file whole or not at all, weights last.

    ``base`` is the name of the base model; ``weights`` {name: tensor} replace parameters of the model; ``about`` is
    what config.json would say of the task. Layers that a family stores as one tensor (GPT-2's queries, keys and
    values) become one adapter with the sum of their ranks. Raises RunError where the disk is full.
    """
    from safetensors.torch import save as to_bytes

    directory, layers = Path(directory), lora.adapters(model)
    if not layers:
        raise ValueError("the model has no adapters")
    head, table = _trained_head(model)
    places = _places(model, None if table is None else table.prefix)
    modules: dict[str, list[str]] = {}
    for path in layers:
        modules.setdefault(_module(places[path]), []).append(path)
    tensors: dict[str, Tensor] = {}
    first = next(iter(layers.values()))
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, paths in modules.items():
        a, b, scale = _joined(layers, paths, places, weights or {})
        tensors[f"{BEGIN}{module}.lora_A.weight"] = a
        tensors[f"{BEGIN}{module}.lora_B.weight"] = b
        if len(a) != first.rank or scale * len(a) != first.alpha:
            ranks[module], alphas[module] = len(a), scale * len(a)
    if head is not None and table is not None:
        for name, parameter in head.named_parameters():
            given = (weights or {}).get(f"{heads.ATTRIBUTE}.{name}", parameter)
            tensors[_theirs(table, name)] = given.detach().to("cpu", torch.float32).contiguous()
    settings = {
        "peft_type": "LORA",
        "task_type": _type(model, head),
        "base_model_name_or_path": str(base),
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": 0.0,
        "target_modules": _targets(modules, {_module(place) for place in places.values()}),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "fan_in_fan_out": any(places[path].transposed for path in layers),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None if table is None else list(table.parts.values()),
        "inference_mode": True,
    }
    known = fingerprint(model)
    metadata = {"format": "pt", "tfcli_norms": known.norms, "tfcli_matrices": known.matrices}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        disk.write(directory / CONFIG, json_text(settings).encode())
        if chat_template is not None:
            disk.write(directory / TEMPLATE, chat_template.encode())
        if about is not None:
            disk.write(directory / TASK, json_text(about).encode())
        disk.write(directory / WEIGHTS, to_bytes(tensors, metadata))
    except OSError as error:
        message = f"the adapters were not saved in {directory}: {error.strerror}"
        raise RunError(message, hint="free some space") from None


def _trained_head(model: Transformer) -> tuple[Head, HeadNames] | tuple[None, None]:
    """Return the head of a model if it is trained, and its names in the model's family."""
    head = heads.of(model)
    if head is None or not any(parameter.requires_grad for parameter in head.parameters()):
        return None, None
    return head, families.head_names(families.written(model.config)[0], head.kind)


def _theirs(table: HeadNames, name: str) -> str:
    part, _, end = name.rpartition(".")
    return f"{BEGIN}{table.parts[part]}.{end}"


def _type(model: Transformer, head: Head | None) -> str:
    """Return PEFT's task_type of a model, by which it chooses its class."""
    if head is not None:
        return TYPES[head.kind]
    if model.config.encoder_depth:
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if model.config.architecture.causal else "FEATURE_EXTRACTION"


def _places(model: Transformer, prefix: str | None = None) -> dict[str, Place]:
    """Return {path: place of its matrix in the family} of all layers that may have adapters."""
    names = families.written(model.config)[0].names
    paths = list(lora.layers(model))
    places = names.places([f"{path}.weight" for path in paths], names.prefixes[0] if prefix is None else prefix)
    return {path: places[f"{path}.weight"] for path in paths}


def _module(place: Place) -> str:
    return place.name.removesuffix(".weight")


def _joined(
    layers: Mapping[str, LoraLinear], paths: Sequence[str], places: Mapping[str, Place], weights: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, float]:
    """Return A (R, columns), B (rows, R) and alpha / R of layers that are stored as one tensor."""

    def numbers(path: str, part: str) -> Tensor:
        given = weights.get(f"{path}.{part}", getattr(layers[path], part))
        return given.detach().to("cpu", torch.float32).contiguous()

    place = places[paths[0]]
    scale = layers[paths[0]].scale
    if place.parts == 1:
        return numbers(paths[0], "a").clone(), numbers(paths[0], "b").clone(), scale
    a = torch.cat([numbers(path, "a") for path in paths])
    rows = layers[paths[0]].b.shape[0]
    b, at = torch.zeros(place.parts * rows, len(a)), 0
    for path in paths:
        part, rank = places[path].part, layers[path].rank
        b[part * rows : (part + 1) * rows, at : at + rank] = numbers(path, "b") * (layers[path].scale / scale)
        at += rank
    return a, b, scale


def _targets(modules: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return the shortest suffixes, of at least two parts, by which PEFT finds these modules and no others."""
    wanted, everything = set(modules), set(known)
    for parts in range(2, max(len(name.split(".")) for name in wanted) + 1):
        ends = {".".join(name.split(".")[-parts:]) for name in wanted}
        if wanted == {name for name in everything if any(f".{name}".endswith(f".{end}") for end in ends)}:
            return sorted(ends)
    return sorted(wanted)


# Reading.


def put_on(base: Loaded, directory: str | Path, *, on_note: Callable[[str], None] | None = None) -> Loaded:
    """Put the adapters of a directory on a base, in place, with their task and chat template; as ``load``."""
    load(directory, base.model, pooling=pooling_of(base.hf_config), on_note=on_note)
    template, task, kind = read_roles(Path(directory)).chat_template, about(directory), kind_of(directory)
    codec = base.codec if template is None else with_template(base.codec, template)
    if task or kind is not None:
        task = {key: value for key, value in base.hf_config.items() if key not in TASK_KEYS} | task
    return Loaded(model=base.model, codec=codec, hf_config=task or base.hf_config, kind=kind or base.kind)


def load(
    directory: str | Path,
    model: Transformer,
    *,
    pooling: str = "cls",
    on_note: Callable[[str], None] | None = None,
) -> dict[str, LoraLinear]:
    """Put the adapters of a directory on the model that they belong to, in place; everything else is frozen.

    A head that is stored with them becomes the model's, and is not frozen; parts of it that they leave to the base (a
    pooler) must be in the model's head; ``pooling`` is the base's. ``on_note`` is told if the matrices of the base are
    not those that the adapters were trained on, such as quantized differently. Raises UserError for what is absent,
    damaged or not supported, and for an adapter of another base.
    """
    adapter = _Adapter(Path(directory))
    layers, here = adapter.layers(model), fingerprint(model)
    if adapter.metadata.get("tfcli_norms", here.norms) != here.norms:
        raise adapter.other_base("its norms are different")
    if adapter.metadata.get("tfcli_matrices", here.matrices) != here.matrices and on_note:
        on_note(
            f"{directory} was trained on other matrices: those of {adapter.base} in another precision, or changed since"
        )
    if lora.adapters(model):
        raise UserError("the model has adapters already", hint="merge them first: tfcli convert --merge")
    head = adapter.head(model, pooling)
    lora.put(model, layers)
    lora.freeze(model)
    if head is not None:
        head.requires_grad_(True)
    return layers


def kind_of(directory: str | Path) -> str | None:
    """Return the kind of head that is stored with adapters, None for none."""
    return _kind(read_config(directory))


def _kind(settings: Mapping[str, Any]) -> str | None:
    return next((kind for kind, named in TYPES.items() if named == settings.get("task_type")), None)


def about(directory: str | Path) -> dict[str, Any]:
    """Return the content of task.json, {} if there is none."""
    path = Path(directory) / TASK
    return json_object(path, path.read_bytes(), hint=AGAIN) if path.is_file() else {}


def read_config(directory: str | Path) -> dict[str, Any]:
    """Return adapter_config.json. Raises UserError if there is none, and for unsupported settings."""
    path = Path(directory) / CONFIG
    try:
        data = json_object(path, path.read_bytes(), hint=AGAIN)
    except FileNotFoundError:
        raise UserError(f"no {CONFIG} in {directory}", hint=EXPECTED) from None
    except NotADirectoryError:
        raise UserError(f"{directory} is a file", hint=EXPECTED) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if data.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {data.get('peft_type')!r}", hint="tfcli reads LORA")
    for key, values in PLAIN.items():
        if key in data and not any(data[key] == value and type(data[key]) is type(value) for value in values):
            raise UserError(f"{path}: {key} is {str(data[key])[:60]!r}, which tfcli does not support")
    if data.get("modules_to_save") and _kind(data) is None:
        saved = str(data["modules_to_save"])[:60]
        hint = f"those of task_type {', '.join(TYPES.values())}"
        raise UserError(f"{path}: modules_to_save is {saved!r}, which tfcli supports for task heads only", hint=hint)
    return data


class _Adapter:
    """The files of an adapter, read and checked."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.path, self.settings = directory, directory / WEIGHTS, read_config(directory)
        self.base = self.settings.get("base_model_name_or_path")
        if not self.path.is_file():
            raise UserError(f"no {WEIGHTS} in {directory}", hint=EXPECTED)
        weights = Weights(read_header(self.path), self.path)
        self.matrices: dict[str, dict[str, Tensor]] = {}
        """{module: {"A": tensor, "B": tensor}}."""
        self.others: dict[str, Tensor] = {}
        """{name: tensor} of what is not a LoRA matrix."""
        for name in weights.entries:
            match, tensor = KEY.fullmatch(name), weights.read(name).float()
            if match is None:
                self.others[name] = tensor
            else:
                self.matrices.setdefault(match["module"], {})[match["part"]] = tensor
        for module, parts in self.matrices.items():
            a, b = parts.get("A"), parts.get("B")
            if a is None or b is None or a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1] or not len(a):
                raise UserError(f"{self.path}: lora_A and lora_B of {module} do not fit each other", hint=AGAIN)
        if not self.matrices:
            raise UserError(f"{self.path} holds no adapters", hint=AGAIN)
        with self.path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))  # checked by read_header
        metadata = header.get("__metadata__")
        self.metadata: dict[str, str] = metadata if isinstance(metadata, dict) else {}

    def other_base(self, why: str) -> UserError:
        """Return the error for a model that is not the adapter's base."""
        return UserError(
            f"{self.directory} is an adapter for another model: {why}",
            hint=f"{self.directory / CONFIG} names {self.base} as its base; has that changed?"
            if self.base
            else "take the model that it was trained on",
        )

    def layers(self, model: Transformer) -> dict[str, LoraLinear]:
        """Return {path: layer} with the adapter of each, not yet put in place."""
        bases = lora.layers(model)
        layers: dict[str, LoraLinear] = {}
        for path, place in self._places(model).items():
            module = _module(place)
            if module not in self.matrices:
                continue
            a, b = self.matrices[module]["A"], self.matrices[module]["B"]
            rows, columns = lora.shape(bases[path])
            stored = rows * place.parts
            if a.shape[1] != columns or b.shape[0] != stored:
                raise self.other_base(f"{module} has {b.shape[0]} x {a.shape[1]}, here {stored} x {columns}")
            scale = self._scale(module, len(a))
            if place.parts > 1:
                b = b[place.part * rows : (place.part + 1) * rows]
                used = b.abs().amax(0) > 0  # of joined ranks, those of this part
                if not used.any():
                    continue
                a, b = a[used], b[:, used]
            layer = LoraLinear(bases[path], rank=len(a), alpha=scale * len(a))
            with torch.no_grad():
                layer.a.copy_(a)
                layer.b.copy_(b)
            layers[path] = layer
        return layers

    def _places(self, model: Transformer) -> dict[str, Place]:
        """Return the places of the model's layers, under the prefix that all modules of the adapter have."""
        for prefix in families.written(model.config)[0].names.prefixes:
            places = _places(model, prefix)
            if self.matrices.keys() <= {_module(place) for place in places.values()}:
                return places
        strange = self.matrices.keys() - {_module(place) for place in _places(model).values()}
        raise self.other_base(f"this model has no {few(sorted(strange))}")

    def _scale(self, module: str, rank: int) -> float:
        """Return the factor of B A: alpha / R, or with use_rslora alpha / sqrt(R) (Kalajdzievski 2023)."""
        path, alpha = self.directory / CONFIG, self.settings.get("lora_alpha", 8)
        patterns = self.settings.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise UserError(f"{path}: alpha_pattern is not an object")
        for pattern, value in patterns.items():
            try:
                fits = re.fullmatch(rf"(.*\.)?({pattern})", module)
            except re.error as error:
                raise UserError(f"{path}: alpha_pattern has {pattern!r}: {error}") from None
            if fits:
                alpha = value
                break
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise UserError(f"{path}: the alpha of {module} is {alpha!r}", hint="it must be a number")
        return alpha / math.sqrt(rank) if self.settings.get("use_rslora") else alpha / rank

    @torch.no_grad()
    def head(self, model: Transformer, pooling: str) -> Head | None:
        """Attach the head that is stored with the adapters to the model, and return it; None if there is none."""
        kind = _kind(self.settings)
        table = None if kind is None else families.head_names(families.written(model.config)[0], kind)
        used = () if table is None else tuple(f"{BEGIN}{module}." for module in table.parts.values())
        odd = [name for name in self.others if not name.startswith(used)]
        if odd:
            raise UserError(
                f"{self.path} holds tensors that are neither LoRA matrices nor parts of a head: {few(odd)}",
                hint="tfcli reads no others",
            )
        if kind is None or table is None:
            return None
        last = f"{BEGIN}{list(table.parts.values())[-1]}.weight"
        if last not in self.others:
            raise UserError(f"{self.path} lacks {last}, the head of its task", hint=AGAIN)
        before = heads.of(model)
        head = heads.fresh(model, kind, len(self.others[last]), seed=0, pooling=pooling)
        for name, parameter in head.named_parameters():
            theirs = _theirs(table, name)
            if theirs in self.others:
                if self.others[theirs].shape != parameter.shape:
                    shapes = [" x ".join(map(str, each.shape)) for each in (self.others[theirs], parameter)]
                    raise self.other_base(f"{theirs} is {shapes[0]}, here {shapes[1]}")
                parameter.copy_(self.others[theirs])
            elif head is not before and (before is None or name not in before.state_dict()):
                hint = "train it again, with that part among what is saved"
                raise UserError(f"{self.path} lacks {theirs}, and so does its base", hint=hint)
        return head
