"""LoRA adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``, without the base.

The head of a task, which is trained in full, lies with them, as PEFT's ``modules_to_save``. What PEFT has no field for
(it warns of fields that it does not know), labels and the like, is in ``task.json``, as config.json would have it.
Both say which base they belong to: PEFT's field its name, metadata of the weights a fingerprint of it, so that an
adapter is not put on another model. What PEFT has and the core has not (DoRA, biases, ...) is refused by name.
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
"""Settings of PEFT that change what is computed, with the values that the core has."""
PROBED_ROWS = 16
"""Rows of each matrix in the fingerprint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """What a model is known by, in whatever precision it was loaded: SHA-256 of numbers rounded to bf16."""

    norms: str
    """Of the norms, which no format quantizes."""
    matrices: str
    """Of the first rows of the blocks' matrices, as they stand for numbers here."""


@torch.no_grad()
def fingerprint(model: Transformer) -> Fingerprint:
    """That of a model without its adapters and its head."""
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
    """Write the adapters of a model, and its task head where it learns, each file whole or not at all, weights last.

    ``base`` is the name of what they belong to; ``weights`` {name: tensor} of the model's parameters where they are not
    those to write; ``about`` is what config.json would say of the task. Layers that a family stores as one tensor
    (GPT-2's queries, keys and values) become one adapter of their ranks together. Raises RunError where the disk is
    full.
    """
    from safetensors.torch import save as to_bytes

    directory, layers = Path(directory), lora.adapters(model)
    if not layers:
        raise ValueError("the model has no adapters")
    head, table = _learning(model)
    places = _places(model, None if table is None else table.prefix)
    stored: dict[str, list[str]] = {}
    for path in layers:
        stored.setdefault(_module(places[path]), []).append(path)
    tensors: dict[str, Tensor] = {}
    first = next(iter(layers.values()))
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, paths in stored.items():
        a, b, scale = _joined(layers, paths, places, weights or {})
        tensors[f"{BEGIN}{module}.lora_A.weight"] = a
        tensors[f"{BEGIN}{module}.lora_B.weight"] = b
        if len(a) != first.rank or scale * len(a) != first.alpha:
            ranks[module], alphas[module] = len(a), scale * len(a)
    if head is not None and table is not None:
        for name, parameter in head.named_parameters():
            given = (weights or {}).get(f"{heads.ATTRIBUTE}.{name}", parameter)
            tensors[f"{BEGIN}{_theirs(table, name)}"] = given.detach().to("cpu", torch.float32).contiguous()
    settings = {
        "peft_type": "LORA",
        "task_type": _type(model, head),
        "base_model_name_or_path": str(base),
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": 0.0,
        "target_modules": _targets(stored, {_module(place) for place in places.values()}),
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
        disk.write(directory / CONFIG, (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode())
        if chat_template is not None:
            disk.write(directory / TEMPLATE, chat_template.encode())
        if about is not None:
            disk.write(directory / TASK, (json.dumps(about, indent=2, ensure_ascii=False) + "\n").encode())
        disk.write(directory / WEIGHTS, to_bytes(tensors, metadata))
    except OSError as error:
        raise RunError(
            f"the adapters were not saved in {directory}: {error.strerror}", hint="free some space"
        ) from None


def _learning(model: Transformer) -> tuple[Head, HeadNames] | tuple[None, None]:
    """The head of a model where it learns, and its names in the model's family."""
    head = heads.of(model)
    if head is None or not any(parameter.requires_grad for parameter in head.parameters()):
        return None, None
    return head, families.head_names(families.written(model.config)[0], head.kind)


def _theirs(table: HeadNames, name: str) -> str:
    """The family's name of a parameter of a head."""
    part, _, end = name.rpartition(".")
    return f"{table.parts[part]}.{end}"


def _type(model: Transformer, head: Head | None) -> str:
    """PEFT's name of what a model does, by which it chooses its class."""
    if head is not None:
        return TYPES[head.kind]
    if model.config.encoder_depth:
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if model.config.architecture.causal else "FEATURE_EXTRACTION"


def _places(model: Transformer, prefix: str | None = None) -> dict[str, Place]:
    """{path: where the family has its matrix} of all layers that may have adapters."""
    names = families.written(model.config)[0].names
    paths = list(lora.layers(model))
    places = names.places([f"{path}.weight" for path in paths], names.prefixes[0] if prefix is None else prefix)
    return {path: places[f"{path}.weight"] for path in paths}


def _module(place: Place) -> str:
    return place.name.removesuffix(".weight")


def _joined(
    layers: Mapping[str, LoraLinear], paths: Sequence[str], places: Mapping[str, Place], weights: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, float]:
    """A (R, columns), B (rows, R) and alpha / R of what is stored as one tensor."""

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
    """The shortest ends of names, of two parts at least, by which PEFT finds these modules and no others."""
    wanted, everything = set(modules), set(known)
    for parts in range(2, max(len(name.split(".")) for name in wanted) + 1):
        ends = {".".join(name.split(".")[-parts:]) for name in wanted}
        found = {name for name in everything if any(f".{name}".endswith(f".{end}") for end in ends)}
        if found == wanted:
            return sorted(ends)
    return sorted(wanted)


# Reading.


def put_on(base: Loaded, directory: str | Path, *, on_note: Callable[[str], None] | None = None) -> Loaded:
    """A base with the adapters of a directory on it, in place, and what is said of their task; as ``load``."""
    load(directory, base.model, pooling=pooling_of(base.hf_config), on_note=on_note)
    template, said, kind = chat_template(directory), about(directory), kind_of(directory)
    codec = base.codec if template is None else with_template(base.codec, template)
    if said or kind is not None:
        said = {key: value for key, value in base.hf_config.items() if key not in TASK_KEYS} | said
    return Loaded(model=base.model, codec=codec, hf_config=said or base.hf_config, kind=kind or base.kind)


def load(
    directory: str | Path,
    model: Transformer,
    *,
    pooling: str = "cls",
    on_note: Callable[[str], None] | None = None,
) -> dict[str, LoraLinear]:
    """Put the adapters of a directory on the model that they belong to, in place, frozen apart from them.

    A head that lies with them becomes the model's, and is not frozen; what of it they leave to the base (a pooler) the
    model's head must have; ``pooling`` is the base's. ``on_note`` is told where the matrices of the base are not those
    that it was trained on, as quantized otherwise. Raises UserError for what is absent or damaged, what the core has
    not, and an adapter for another base.
    """
    directory = Path(directory)
    settings = read_config(directory)
    tensors, others = _read_tensors(directory)
    known = _metadata(directory / WEIGHTS)
    made = _layers(directory, model, settings, tensors)
    here = fingerprint(model)
    if known.get("tfcli_norms", here.norms) != here.norms:
        raise _other(directory, settings, "its norms are others")
    if known.get("tfcli_matrices", here.matrices) != here.matrices and on_note:
        on_note(
            f"{directory} was trained on other matrices: those of {settings.get('base_model_name_or_path')} in another "
            "precision, or changed since"
        )
    if lora.adapters(model):
        raise UserError("the model has adapters already", hint="merge them first: tfcli convert --merge")
    head = _head(directory, model, settings, others, pooling)
    lora.put(model, made)
    lora.freeze(model)
    if head is not None:
        head.requires_grad_(True)
    return made


@torch.no_grad()
def _head(
    directory: Path, model: Transformer, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], pooling: str
) -> Head | None:
    """The head that lies with adapters, made a part of the model; None where there is none."""
    kind, path = _kind(settings), directory / WEIGHTS
    table = None if kind is None else families.head_names(families.written(model.config)[0], kind)
    used = [] if table is None else [f"{BEGIN}{module}." for module in table.parts.values()]
    odd = [name for name in tensors if not name.startswith(tuple(used))]
    if odd:
        raise UserError(
            f"{path} holds what is no matrix of LoRA and no part of a head: {few(odd)}", hint="tfcli reads no others"
        )
    if kind is None or table is None:
        return None
    last = f"{BEGIN}{list(table.parts.values())[-1]}.weight"
    if last not in tensors:
        raise UserError(f"{path} lacks {last}, the head of its task", hint="save the adapter again")
    before = heads.of(model)
    head = heads.fresh(model, kind, len(tensors[last]), seed=0, pooling=pooling)
    for name, parameter in head.named_parameters():
        theirs = f"{BEGIN}{_theirs(table, name)}"
        if theirs in tensors:
            if tensors[theirs].shape != parameter.shape:
                shapes = [" x ".join(map(str, each.shape)) for each in (tensors[theirs], parameter)]
                raise _other(directory, settings, f"{theirs} is {shapes[0]}, here {shapes[1]}")
            parameter.copy_(tensors[theirs])
        elif head is not before and not hasattr(before, name.partition(".")[0]):
            raise UserError(
                f"{path} lacks {theirs}, and so does its base",
                hint="train it again, with that part among what is saved",
            )
    return head


def kind_of(directory: str | Path) -> str | None:
    """The kind of head that lies with adapters, None for none."""
    return _kind(read_config(directory))


def _kind(settings: Mapping[str, Any]) -> str | None:
    return next((kind for kind, named in TYPES.items() if named == settings.get("task_type")), None)


def about(directory: str | Path) -> dict[str, Any]:
    """What task.json says of the task, {} where there is none."""
    path = Path(directory) / TASK
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}", hint="save the adapter again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is a JSON {type(data).__name__}, expected an object")
    return data


def read_config(directory: str | Path) -> dict[str, Any]:
    """adapter_config.json; UserError where there is none, and for settings that the core has not."""
    path = Path(directory) / CONFIG
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"no {CONFIG} in {directory}", hint="an adapter is a directory in PEFT's format") from None
    except NotADirectoryError:
        raise UserError(f"{directory} is a file", hint="an adapter is a directory in PEFT's format") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}", hint="save the adapter again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is a JSON {type(data).__name__}, expected an object")
    if data.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {data.get('peft_type')!r}", hint="tfcli reads LORA")
    for key, values in PLAIN.items():
        if key in data and not any(data[key] == value and type(data[key]) is type(value) for value in values):
            raise UserError(f"{path}: {key} is {str(data[key])[:60]!r}, which tfcli does not have")
    if data.get("modules_to_save") and _kind(data) is None:
        raise UserError(
            f"{path}: modules_to_save is {str(data['modules_to_save'])[:60]!r}, which tfcli has of task heads alone",
            hint=f"those of task_type {', '.join(TYPES.values())}",
        )
    return data


def chat_template(directory: str | Path) -> str | None:
    """The template that its conversations were written by, where there is one beside the adapter."""
    return read_roles(Path(directory)).chat_template


def _read_tensors(directory: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """{module: {"A": tensor, "B": tensor}}, and {name: tensor} of what is no matrix of LoRA."""
    path = directory / WEIGHTS
    if not path.is_file():
        raise UserError(f"no {WEIGHTS} in {directory}", hint="an adapter is a directory in PEFT's format")
    weights = Weights(read_header(path), path)
    found: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for name in weights.entries:
        match, tensor = KEY.fullmatch(name), weights.read(name).float()
        if match is None:
            others[name] = tensor
        else:
            found.setdefault(match["module"], {})[match["part"]] = tensor
    for module, parts in found.items():
        a, b = parts.get("A"), parts.get("B")
        if a is None or b is None or a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1] or not len(a):
            raise UserError(f"{path}: lora_A and lora_B of {module} do not fit each other", hint="save it again")
    if not found:
        raise UserError(f"{path} holds no adapters", hint="save it again")
    return found, others


def _metadata(path: Path) -> dict[str, str]:
    """What the header says beside the tensors; the header was checked before."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    found = header.get("__metadata__")
    return found if isinstance(found, dict) else {}


def _layers(
    directory: Path, model: Transformer, settings: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, LoraLinear]:
    """{path: layer} with the adapter of each, not yet put in place."""
    places = _matching(directory, model, settings, tensors)
    bases = lora.layers(model)
    made: dict[str, LoraLinear] = {}
    for path, place in places.items():
        module = _module(place)
        if module not in tensors:
            continue
        a, b = tensors[module]["A"], tensors[module]["B"]
        rows, columns = lora.shape(bases[path])
        if a.shape[1] != columns or b.shape[0] != rows * place.parts:
            raise _other(
                directory, settings, f"{module} has {b.shape[0]} x {a.shape[1]}, here {rows * place.parts} x {columns}"
            )
        scale = _alpha(module, len(a), settings, directory)
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
        made[path] = layer
    return made


def _matching(
    directory: Path, model: Transformer, settings: Mapping[str, Any], modules: Iterable[str]
) -> dict[str, Place]:
    """The places of the model's layers, under the prefix by which the adapter names all of its own."""
    wanted = set(modules)
    for prefix in families.written(model.config)[0].names.prefixes:
        places = _places(model, prefix)
        if wanted <= {_module(place) for place in places.values()}:
            return places
    strange = wanted - {_module(place) for place in _places(model).values()}
    raise _other(directory, settings, f"this model has no {few(sorted(strange))}")


def _alpha(module: str, rank: int, settings: Mapping[str, Any], directory: Path) -> float:
    """What the product B A is multiplied by: alpha / R, or with use_rslora alpha / sqrt(R) (Kalajdzievski 2023)."""
    alpha = settings.get("lora_alpha", 8)
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{directory / CONFIG}: alpha_pattern is no object")
    for pattern, value in patterns.items():
        try:
            fits = re.fullmatch(rf"(.*\.)?({pattern})", module)
        except re.error as error:
            raise UserError(f"{directory / CONFIG}: alpha_pattern has {pattern!r}: {error}") from None
        if fits:
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UserError(f"{directory / CONFIG}: the alpha of {module} is {alpha!r}", hint="it must be a number")
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _other(directory: Path, settings: Mapping[str, Any], why: str) -> UserError:
    base = settings.get("base_model_name_or_path")
    return UserError(
        f"{directory} is an adapter for another model: {why}",
        hint=f"{directory / CONFIG} names {base} as its base; has that changed?"
        if base
        else "take the model that it was trained on",
    )
