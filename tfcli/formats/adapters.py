"""LoRA adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``, without the base.

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

from tfcli.errors import RunError, UserError
from tfcli.formats import families
from tfcli.formats.names import Place
from tfcli.formats.stored import few
from tfcli.formats.weights import Weights, read_header
from tfcli.model import lora
from tfcli.model.lora import LoraLinear
from tfcli.model.quant import QuantMatrix
from tfcli.model.transformer import Transformer
from tfcli.text import files
from tfcli.text.hub import read_roles

CONFIG, WEIGHTS, TEMPLATE = "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
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
    """That of a model without its adapters."""
    norms, matrices = hashlib.sha256(), hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name.endswith("norm.weight"):
            _feed(norms, name, parameter)
    for path, base in lora.layers(model).items():
        if isinstance(base, QuantMatrix):
            index = torch.arange(min(base.rows, PROBED_ROWS), device=base.codes.device)
            _feed(matrices, path, base.widened(torch.float32, index))
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
    task: str = "CAUSAL_LM",
    chat_template: str | None = None,
) -> None:
    """Write the adapters of a model, each file whole or not at all, the weights last.

    ``base`` is the name of what they belong to; ``weights`` {name: tensor} of the model's parameters where they are not
    those to write; ``task`` is PEFT's name of it. Layers that a family stores as one tensor (GPT-2's queries, keys and
    values) become one adapter of their ranks together. Raises RunError where the disk is full.
    """
    from safetensors.torch import save as to_bytes

    directory, layers = Path(directory), lora.adapters(model)
    if not layers:
        raise ValueError("the model has no adapters")
    places = _places(model)
    stored: dict[str, list[str]] = {}
    for path in layers:
        stored.setdefault(_module(places[path]), []).append(path)
    tensors: dict[str, Tensor] = {}
    first = next(iter(layers.values()))
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, paths in stored.items():
        a, b, scale = _joined(layers, paths, places, weights or {})
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        if len(a) != first.rank or scale * len(a) != first.alpha:
            ranks[module], alphas[module] = len(a), scale * len(a)
    settings = {
        "peft_type": "LORA",
        "task_type": task,
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
        "modules_to_save": None,
        "inference_mode": True,
    }
    known = fingerprint(model)
    metadata = {"format": "pt", "tfcli_norms": known.norms, "tfcli_matrices": known.matrices}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        files.write(directory / CONFIG, (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode())
        if chat_template is not None:
            files.write(directory / TEMPLATE, chat_template.encode())
        files.write(directory / WEIGHTS, to_bytes(tensors, metadata))
    except OSError as error:
        raise RunError(
            f"the adapters were not saved in {directory}: {error.strerror}", hint="free some space"
        ) from None


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


def load(
    directory: str | Path, model: Transformer, *, on_note: Callable[[str], None] | None = None
) -> dict[str, LoraLinear]:
    """Put the adapters of a directory on the model that they belong to, in place, frozen apart from them.

    ``on_note`` is told where the matrices of the base are not those that it was trained on, as quantized otherwise.
    Raises UserError for what is absent or damaged, what the core has not, and an adapter for another base.
    """
    directory = Path(directory)
    settings = read_config(directory)
    tensors = _read_tensors(directory)
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
    lora.put(model, made)
    lora.freeze(model)
    return made


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
    return data


def chat_template(directory: str | Path) -> str | None:
    """The template that its conversations were written by, where there is one beside the adapter."""
    return read_roles(Path(directory)).chat_template


def _read_tensors(directory: Path) -> dict[str, dict[str, Tensor]]:
    """{module: {"A": tensor, "B": tensor}}."""
    path = directory / WEIGHTS
    if not path.is_file():
        raise UserError(f"no {WEIGHTS} in {directory}", hint="an adapter is a directory in PEFT's format")
    weights = Weights(read_header(path), path)
    odd = [name for name in weights.entries if KEY.fullmatch(name) is None]
    if odd:
        raise UserError(f"{path} holds what is no matrix of LoRA: {few(odd)}", hint="tfcli reads lora_A and lora_B")
    found: dict[str, dict[str, Tensor]] = {}
    for name in weights.entries:
        match = KEY.fullmatch(name)
        assert match is not None
        found.setdefault(match["module"], {})[match["part"]] = weights.read(name).float()
    for module, parts in found.items():
        a, b = parts.get("A"), parts.get("B")
        if a is None or b is None or a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1] or not len(a):
            raise UserError(f"{path}: lora_A and lora_B of {module} do not fit each other", hint="save it again")
    if not found:
        raise UserError(f"{path} holds no adapters", hint="save it again")
    return found


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
        hint=f"it was made for {base}" if base else "take the model that it was trained on",
    )
