"""Hugging Face model directories: what tfcli writes and reads, with the tokenizer beside the weights.

Written as ``Qwen3ForCausalLM`` (Yang et al. 2025), whose pre-RMSNorm, rotary positions, QK-norm, SwiGLU and grouped
queries are the core's own. Reading is strict: a tensor that is missing, unexpected or mis-shaped is an error, and so
is a setting that the core does not have.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfcli.config import ModelConfig
from tfcli.errors import RunError, UserError, nearest
from tfcli.formats import names
from tfcli.text.tokenizer import FILE_NAME, Tokenizer

if TYPE_CHECKING:
    import torch

    from tfcli.model.transformer import Transformer
    from tfcli.runtime import Runtime

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", FILE_NAME
ARCHITECTURE, MODEL_TYPE = "Qwen3ForCausalLM", "qwen3"
READS = ("qwen3",)
ASIDE = ".saving"


def save(
    directory: str | Path,
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    card: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model directory that tfcli and transformers read; ``dtype`` of the weights (default: fp32).

    Every file is written aside and synced before the first is renamed into place, so that a full disk or a crash
    leaves what was there. ``card`` is the text of the README (default: ``model_card``). Raises UserError for a
    tokenizer with more ids than the model has, RunError for a full disk.
    """
    import torch
    from safetensors.torch import save_file

    from tfcli.formats.tokenizer_json import tokenizer_json

    directory = Path(directory)
    dtype = dtype or torch.float32
    _fits(tokenizer, model.config, directory)
    ours = model.state_dict()
    tensors = {
        theirs: ours[name].detach().to("cpu", dtype).contiguous() for theirs, name in names.qwen3(model.config).items()
    }
    texts = {
        CONFIG: _json(_config(model.config, tokenizer, str(dtype).removeprefix("torch."))),
        "tokenizer.json": json.dumps(tokenizer_json(tokenizer), ensure_ascii=False),
        "tokenizer_config.json": _json(_tokenizer_config(model.config, tokenizer)),
        "generation_config.json": _json(_generation_config(tokenizer)),
        "README.md": card if card is not None else model_card(model.config, tokenizer),
    }
    with _aside(directory) as aside:
        save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
        tokenizer.save(aside / TOKENIZER)
        for name, text in texts.items():
            (aside / name).write_text(text, encoding="utf-8", newline="\n")
        shutil.copymode(aside / CONFIG, aside / WEIGHTS)  # safetensors makes it private; the umask decides


@contextlib.contextmanager
def _aside(directory: Path) -> Iterator[Path]:
    """A folder to write into, on the disk of ``directory``; at the end its files move there, the weights last."""
    aside = directory / ASIDE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        yield aside
        files = sorted(aside.iterdir(), key=lambda path: (path.name == WEIGHTS, path.name))
        for path in files:
            _sync(path)
        for path in files:
            path.replace(directory / path.name)
        _sync(directory)
    except Exception as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if full:
            raise RunError(
                f"the disk is full: the model was not saved in {directory}",
                hint="free some space, or choose another place; what was there before is whole",
            ) from None
        if isinstance(error, NotADirectoryError | FileExistsError):
            raise UserError(f"{directory} is not a directory", hint="name a new or existing directory") from None
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    if path.is_file():
        with path.open("r+b") as file:  # Windows syncs only what may be written
            os.fsync(file.fileno())
        return
    if os.name == "nt":
        return  # Windows has no handle on a directory
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _config(config: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **{theirs: getattr(config, ours) for theirs, ours in names.QWEN3_CONFIG.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": config.depth,
        "rope_theta": config.rope_theta,  # transformers 4, llama.cpp
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # transformers 5
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "torch_dtype": dtype,
        "tfcli": {"tokenizer_sha256": tokenizer.hash},
    }


def _tokenizer_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.context,
        "bos_token": None if tokenizer.bos_id is None else tokenizer.piece(tokenizer.bos_id),
        "eos_token": tokenizer.piece(tokenizer.eos_id),
        "pad_token": tokenizer.piece(tokenizer.pad_id),
        "unk_token": tokenizer.piece(tokenizer.unk_id),
        "add_bos_token": False,
        "add_eos_token": False,
        "split_special_tokens": True,  # "<|endoftext|>" in a text is text, as for SentencePiece
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.95,
    }


def model_card(config: ModelConfig, tokenizer: Tokenizer) -> str:
    """A README for the directory: what the model is and how to use it, with the header that model hubs read."""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- tfcli
---

# A small language model, made with tfcli

A decoder of {config.depth} blocks (width {config.width}, {config.heads} heads, {config.kv_heads} of keys and values),
a vocabulary of {tokenizer.vocab_size} pieces and a context of {config.context} tokens.
It continues text; it was not taught to follow instructions or to be right.

With tfcli:

```sh
tfcli generate --model . --prompt "Once upon a time"
```

With transformers (the tokenizer adds no tokens of its own; an empty prompt begins with the end-of-text token):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=100)[0], skip_special_tokens=True))
```
"""


def load(directory: str | Path, *, runtime: Runtime, dtype: torch.dtype | None = None) -> tuple[Transformer, Tokenizer]:
    """The model, on the runtime's device, and its tokenizer; ``dtype`` of the weights (default: the runtime's).

    Raises UserError for whatever is absent, damaged, not the core's architecture or does not belong together.
    """
    directory = Path(directory)
    config, extra = _read(directory)
    tokenizer = Tokenizer.load(directory)
    _fits(tokenizer, config, directory)
    expected = extra.get("tokenizer_sha256")
    if expected is not None and expected != tokenizer.hash:
        raise UserError(
            f"{directory / TOKENIZER} is not the tokenizer that the model was trained with",
            hint=f"its SHA-256 begins with {tokenizer.hash[:12]}, config.json says {str(expected)[:12]}",
        )
    return load_model(directory, runtime=runtime, dtype=dtype), tokenizer


def load_model(directory: str | Path, *, runtime: Runtime, dtype: torch.dtype | None = None) -> Transformer:
    """The model of a directory without its tokenizer; as ``load`` otherwise."""
    import torch
    from safetensors import SafetensorError, safe_open

    from tfcli.model.transformer import Transformer

    directory = Path(directory)
    config = read_config(directory)
    path = _weights(directory)
    table = names.qwen3(config)
    with torch.device("meta"):
        model = Transformer(config)
    shapes = {name: list(parameter.shape) for name, parameter in model.state_dict().items()}
    found = read_header(path)
    _check_tensors(path, {theirs: shapes[ours] for theirs, ours in table.items()}, found, config)
    state: dict[str, Any] = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for theirs, ours in table.items():
                state[ours] = file.get_tensor(theirs).to(runtime.device, dtype or runtime.dtype, copy=True)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}", hint="copy or save the model again") from None
    if config.tied:
        state["head.weight"] = state["embed.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    if config.tied:
        model.head.weight = model.embed.weight
    return model


def _fits(tokenizer: Tokenizer, config: ModelConfig, directory: Path) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, the model in {directory} only {config.vocab_size}",
            hint=f"the {TOKENIZER} beside the model must be the one that it was trained with",
        )


def _weights(directory: Path) -> Path:
    path = directory / WEIGHTS
    if path.is_file():
        return path
    if (directory / (WEIGHTS + ".index.json")).is_file():
        raise UserError(f"{directory} holds a model in several files", hint=f"join them into one {WEIGHTS}")
    if any(directory.glob("*.bin")):
        raise UserError(
            f"{directory} has its weights in a .bin file, which can run code when it is read",
            hint=f"convert them to {WEIGHTS} with transformers: save_pretrained(...)",
        )
    raise UserError(f"no {WEIGHTS} in {directory}", hint="a model directory holds config.json and model.safetensors")


def read_header(path: Path) -> dict[str, list[int]]:
    """{tensor: shape} of a safetensors file, after comparing the sizes that its header names with the file."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise UserError(f"{path} is cut short or not a safetensors file", hint="copy or save the model again")
            header = json.loads(file.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
        shapes = {name: [int(extent) for extent in entry["shape"]] for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise UserError(f"{path} has a damaged header", hint="copy or save the model again") from None
    if 8 + length + end != size:
        raise UserError(
            f"{path} has {size} bytes, its header says {8 + length + end}",
            hint="it was cut short or changed: copy or save the model again",
        )
    return shapes


def _check_tensors(
    path: Path, expected: dict[str, list[int]], found: dict[str, list[int]], config: ModelConfig
) -> None:
    if config.tied and "lm_head.weight" in found and found["lm_head.weight"] == found.get("model.embed_tokens.weight"):
        found = {name: shape for name, shape in found.items() if name != "lm_head.weight"}
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "mis-shaped": [
            f"{name} {found[name]}, expected {shape}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }
    said = [
        f"{len(listed)} {kind} ({', '.join(listed[:3])}{', ...' if len(listed) > 3 else ''})"
        for kind, listed in problems.items()
        if listed
    ]
    if said:
        raise UserError(
            f"{path} does not hold the tensors that its config.json describes: {'; '.join(said)}",
            hint="the two files must come from one model",
        )


def read_config(directory: str | Path) -> ModelConfig:
    """The shape of the model in a directory, without torch. Raises UserError for what the core does not have."""
    return _read(Path(directory))[0]


def _read(directory: Path) -> tuple[ModelConfig, dict[str, Any]]:
    path = directory / CONFIG
    if not directory.is_dir():
        raise _no_model(directory)
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"no {CONFIG} in {directory}", hint="name a directory that pretrain wrote") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}", hint="copy or save the model again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is a JSON {type(data).__name__}, expected an object")
    kind = data.get("model_type")
    if kind not in READS:
        raise UserError(
            f"{directory} holds a model of type {kind!r}, which tfcli does not read", hint=f"it reads: {READS[0]}"
        )
    for key, value in names.QWEN3_FIXED.items():
        if data.get(key, value) != value:
            raise UserError(f"{path}: {key} is {data[key]!r}, tfcli has only {value!r}")
    extra = data.get("tfcli")
    return ModelConfig(**_fields(path, data)), extra if isinstance(extra, dict) else {}


def _fields(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    """ModelConfig's fields; what transformers leaves out has the default of its Qwen3Config."""
    data = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "head_dim": 128, **data}
    if data.get("num_key_value_heads") is None:
        data["num_key_value_heads"] = data.get("num_attention_heads")
    fields: dict[str, Any] = {}
    for theirs, ours in names.QWEN3_CONFIG.items():
        if theirs not in data:
            raise UserError(f"{path} does not say {theirs}", hint="copy or save the model again")
        fields[ours] = data[theirs]
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind != "default":
        raise UserError(f"{path}: rotary positions of type {kind!r}, tfcli has only the default")
    theta = rope.get("rope_theta", data.get("rope_theta", 10_000.0))
    for name, value in (("rope_theta", theta), ("rms_norm_eps", fields["norm_eps"])):
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UserError(f"{path}: {name} is {value!r}", hint="it must be a number above 0")
    if not isinstance(fields["tied"], bool):
        raise UserError(f"{path}: tie_word_embeddings is {fields['tied']!r}", hint="it must be true or false")
    return fields | {"rope_theta": float(theta), "norm_eps": float(fields["norm_eps"])}


def _no_model(directory: Path) -> UserError:
    if directory.is_file():
        return UserError(f"{directory} is a file, expected a model directory", hint="such as one that pretrain wrote")
    try:
        beside = [entry.name for entry in directory.parent.iterdir() if entry.is_dir()]
    except OSError:
        beside = []
    guess = nearest(directory.name, beside)
    return UserError(
        f"no such model: {directory}",
        hint=f"did you mean {directory.parent / guess}?" if guess else "name a directory that pretrain wrote",
    )


def find_model(given: str | None) -> Path:
    """The model to use: ``given``, else $TFCLI_MODEL, else the run under ``runs/`` that finished last.

    Raises UserError where there is none. A command says on stderr which it is, where it was not given.
    """
    if given is not None:
        return Path(given)
    if os.environ.get("TFCLI_MODEL"):
        return Path(os.environ["TFCLI_MODEL"])
    finished: list[tuple[float | str, Path]] = []
    for path in Path("runs").glob("*/run.json"):
        if not (path.parent / WEIGHTS).is_file():
            continue
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stamp = json.loads(path.read_bytes()).get("finished")
            if isinstance(stamp, int | float | str) and stamp:
                finished.append((stamp, path.parent))
    if not finished:
        raise UserError(
            "no model was named, and no run under runs/ has finished",
            hint="name one with --model or $TFCLI_MODEL, or make one: tfcli pretrain corpus.txt",
        )
    return max(finished, key=lambda entry: (isinstance(entry[0], str), entry[0]))[1]
