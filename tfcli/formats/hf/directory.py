"""Hugging Face model directories, written and read, with the tokenizer next to the weights.

tfcli's own decoder is written as ``Qwen3ForCausalLM`` (Yang et al. 2025), which has the same pre-RMSNorm, rotary
positions, QK-norm, SwiGLU and grouped queries; ``families`` has the others. Reading is strict: a missing, unexpected or
mis-shaped tensor is an error, and so is a setting that tfcli does not support.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfcli import disk
from tfcli.config.model import ModelConfig
from tfcli.errors import UserError
from tfcli.formats.hf.card import of_model
from tfcli.formats.hf.families import registry as families
from tfcli.formats.hf.families.base import WRITTEN, Family, HeadNames
from tfcli.formats.hf.settings import json_text
from tfcli.formats.hf.stored import CONFIG, open_model, read_data, read_settings
from tfcli.formats.hf.stored import read_config as read_config
from tfcli.formats.hf.tokenizers import load_tokenizer
from tfcli.formats.hf.weights import FILE
from tfcli.formats.hf.weights import find as find_weights
from tfcli.text.tokenizers.codec import Codec
from tfcli.text.tokenizers.json import JsonTokenizer
from tfcli.text.tokenizers.sentencepiece import FILE_NAME, Tokenizer

if TYPE_CHECKING:
    import torch

    from tfcli.model.heads import Head
    from tfcli.model.quant.quantize import Quantization
    from tfcli.model.transformer import Transformer
    from tfcli.runtime import Runtime

WEIGHTS, TOKENIZER = FILE, FILE_NAME


def save(
    directory: str | Path,
    model: Transformer,
    tokenizer: Tokenizer | JsonTokenizer,
    *,
    card: str | None = None,
    dtype: torch.dtype | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a model directory that tfcli and transformers read; ``dtype`` of the weights (default: fp32).

    The family follows from the architecture, and its class from the model's task head, where it has one (the language
    model head is then left out). ``about`` are other entries of config.json, such as id2label; its "tfcli"
    is merged into what tfcli writes there. Every file is written aside and synced before the first is renamed into
    place, so that a full disk or a crash leaves what was there. ``card`` is the text of the README (default:
    ``card.of_model``). Raises UserError for a tokenizer with more ids than the model has and for an architecture that
    no family has, RunError for a full disk.
    """
    import torch
    from safetensors.torch import save_file

    from tfcli.model import heads

    directory, config = Path(directory), model.config
    dtype = dtype or torch.float32
    _fits(tokenizer, config, directory)
    family, settings = families.written(config)
    head = heads.of(model)
    names = None
    if head is not None and head.labels:  # one without labels only holds a pooler
        names = families.head_names(family, head.kind)
        settings["architectures"] = [names.architecture]
        settings |= _head_settings(head) if family.head_defaults else {}
    settings = _config(settings | _start(config, tokenizer), tokenizer, str(dtype).removeprefix("torch."), about or {})
    texts = {
        CONFIG: json_text(settings),
        **_tokenizer_texts(config, tokenizer),
        "README.md": card if card is not None else of_model(config),
    }
    if config.architecture.causal and names is None:
        texts["generation_config.json"] = json_text(_generation_config(config, tokenizer))
    tensors = _theirs(model, family, dtype, names)
    with _aside(directory) as aside:
        save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
        if isinstance(tokenizer, Tokenizer):
            tokenizer.save(aside / TOKENIZER)
        for name, text in texts.items():
            (aside / name).write_text(text, encoding="utf-8", newline="\n")
        shutil.copymode(aside / CONFIG, aside / WEIGHTS)  # safetensors makes it private; the umask should decide


def _head_settings(head: Head) -> dict[str, Any]:
    """Return the settings of a head in the config.json of a family with ``head_defaults`` (ModernBERT)."""
    from tfcli.model.heads import MaskedHead, SequenceHead, Transform

    transform = dict(head.named_children()).get("transform")
    if not isinstance(transform, Transform):
        return {}
    return {
        "classifier_bias": transform.dense.bias is not None,
        "classifier_activation": WRITTEN[transform.activation],
        "classifier_pooling": head.pooling if isinstance(head, SequenceHead) else "cls",
        "decoder_bias": isinstance(head, MaskedHead) and head.bias is not None,
    }


def _theirs(model: Transformer, family: Family, dtype: torch.dtype, head: HeadNames | None) -> dict[str, torch.Tensor]:
    """Return the tensors as the family stores them: the inverse of ``Stored.tensors``."""
    import torch

    from tfcli.model import heads

    state = model.state_dict()
    of_head = {name: state.pop(name) for name in list(state) if name.startswith(f"{heads.ATTRIBUTE}.")}
    if model.config.tied or head is not None:
        del state["head.weight"]
    places = family.names.places(state, family.names.prefixes[0] if head is None else head.prefix)
    parts: dict[str, list[torch.Tensor]] = {}
    for ours, place in places.items():
        tensor = state[ours].detach().to("cpu")
        tensor = (tensor.float() - place.plus if place.plus else tensor).to(dtype)
        if place.skip:
            tensor = torch.cat([tensor.new_zeros(place.skip, tensor.shape[1]), tensor])
        parts.setdefault(place.name, []).append(tensor)
    transposed = {place.name for place in places.values() if place.transposed}
    whole = {name: torch.cat(listed) if len(listed) > 1 else listed[0] for name, listed in parts.items()}
    out = {name: (value.T if name in transposed else value).contiguous() for name, value in whole.items()}
    if head is not None:
        for ours, tensor in of_head.items():
            part, _, end = ours.removeprefix(f"{heads.ATTRIBUTE}.").rpartition(".")
            out[f"{head.parts[part]}.{end}"] = tensor.detach().to("cpu", dtype).contiguous()
    return out


@contextlib.contextmanager
def _aside(directory: Path) -> Iterator[Path]:
    """Yield a folder whose files are moved to ``directory`` at the end, the weights last."""
    try:
        with disk.telling_full(f"the model was not saved in {directory}"):
            directory.mkdir(parents=True, exist_ok=True)
            with disk.whole_folder(directory, last=lambda name: name == WEIGHTS) as folder:
                yield folder
    except (NotADirectoryError, FileExistsError):
        raise UserError(f"{directory} is not a directory", hint="name a new or existing directory") from None


def _config(settings: dict[str, Any], tokenizer: Codec, dtype: str, about: Mapping[str, Any]) -> dict[str, Any]:
    ours = {"tokenizer_sha256": tokenizer.hash} if isinstance(tokenizer, Tokenizer) else {}
    ours |= about.get("tfcli", {})
    return {
        **settings,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "torch_dtype": dtype,
        **about,
        **({"tfcli": ours} if ours else {}),
    }


def _tokenizer_texts(config: ModelConfig, tokenizer: Tokenizer | JsonTokenizer) -> dict[str, str]:
    """Return tokenizer.json and its settings; a tokenizer that was read from a tokenizer.json keeps it unchanged."""
    from tfcli.formats.hf.tokenizer_json import tokenizer_json

    # CTranslate2 requires a bos_token; an encoder-decoder begins with the end-of-text piece.
    bos_id = tokenizer.eos_id if config.encoder_depth and tokenizer.bos_id is None else tokenizer.bos_id
    ids = {"bos": bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id, "unk": tokenizer.unk_id}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.context,
        **{f"{role}_token": None if id is None else tokenizer.piece(id) for role, id in ids.items()},
    }
    if isinstance(tokenizer, Tokenizer):
        settings |= {
            "add_bos_token": bool(tokenizer.prefix_ids),
            "add_eos_token": bool(tokenizer.suffix_ids),
            "split_special_tokens": True,  # "<|endoftext|>" in a text is text, as for SentencePiece
        }
        if tokenizer.mask_id is not None:  # an encoder's: users write [MASK]
            roles = {"cls": tokenizer.bos_id, "sep": tokenizer.eos_id, "mask": tokenizer.mask_id}
            settings |= {f"{role}_token": tokenizer.piece(id) for role, id in roles.items() if id is not None}
            settings["split_special_tokens"] = False
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    settings |= {
        "clean_up_tokenization_spaces": False,
        "padding_side": "left" if config.architecture.causal and not config.encoder_depth else "right",
    }
    if isinstance(tokenizer, Tokenizer):
        text = json.dumps(tokenizer_json(tokenizer), ensure_ascii=False)
    else:
        text = tokenizer.text
    return {"tokenizer.json": text, "tokenizer_config.json": json_text(settings)}


def _start(config: ModelConfig, tokenizer: Codec) -> dict[str, Any]:
    """Return how an encoder-decoder starts: with the end-of-text id, as in fairseq; no id is forced last."""
    return {"decoder_start_token_id": tokenizer.eos_id, "forced_eos_token_id": None} if config.encoder_depth else {}


def _generation_config(config: ModelConfig, tokenizer: Codec) -> dict[str, Any]:
    ends = list(tokenizer.eos_ids) if len(tokenizer.eos_ids) > 1 else tokenizer.eos_id
    common = {"eos_token_id": ends, "pad_token_id": tokenizer.pad_id}
    if config.encoder_depth:
        own = {"max_length": config.context, "num_beams": 4, "length_penalty": 1.0}
        return {**_start(config, tokenizer), **common, **own}
    return {"bos_token_id": tokenizer.bos_id, **common, "do_sample": True, "temperature": 0.8, "top_p": 0.95}


def load(
    directory: str | Path,
    *,
    runtime: Runtime,
    dtype: torch.dtype | None = None,
    hf_config: Mapping[str, Any] | None = None,
    quantize: Quantization | None = None,
    on_note: Callable[[str], None] | None = None,
) -> tuple[Transformer, Codec]:
    """Load a model, on the runtime's device, and its tokenizer; ``dtype`` of the weights (default: the runtime's).

    ``hf_config`` is the content of config.json, where it was read already. ``quantize`` quantizes one matrix at a time.
    ``on_note`` is told what was not read. Raises UserError for files that are absent, damaged, unsupported or do not
    belong together.
    """
    directory = Path(directory)
    hf_config = read_data(directory) if hf_config is None else hf_config
    _, config, extra = read_settings(directory, hf_config)
    find_weights(directory)  # first: missing weights say more about a directory than a missing tokenizer
    tokenizer = load_tokenizer(directory, vocab_size=config.vocab_size, hf_config=hf_config)
    _fits(tokenizer, config, directory)
    expected = extra.get("tokenizer_sha256")
    if expected is not None and expected != tokenizer.hash:
        hint = f"its SHA-256 begins with {tokenizer.hash[:12]}, config.json says {str(expected)[:12]}"
        raise UserError(f"{directory / TOKENIZER} is not the tokenizer that the model was trained with", hint=hint)
    model = load_model(directory, runtime=runtime, dtype=dtype, hf_config=hf_config, quantize=quantize, on_note=on_note)
    return model, tokenizer


def load_model(
    directory: str | Path,
    *,
    runtime: Runtime,
    dtype: torch.dtype | None = None,
    hf_config: Mapping[str, Any] | None = None,
    quantize: Quantization | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Transformer:
    """Load the model of a directory without its tokenizer; as ``load`` otherwise."""
    import torch

    from tfcli.model.quant.quantize import assign
    from tfcli.model.transformer import Transformer

    stored = open_model(directory, hf_config=hf_config, on_note=on_note)
    with torch.device("meta"):
        model = Transformer(stored.config)
    for name, tensor in stored.tensors():
        assign(model, name, tensor, runtime.device, dtype or runtime.dtype, quantize)
    return model


def _fits(tokenizer: Codec, config: ModelConfig, directory: Path) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, the model in {directory} only {config.vocab_size}",
            hint="the tokenizer in the directory must be the one that the model was trained with",
        )
