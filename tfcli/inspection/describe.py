"""A description of what a path holds and costs, read from its files without loading a model: plain values for --json.

Keys that end in ``bytes`` are in bytes; FLOPs are those of ``tfcli.model.cost``. Imports no torch.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tfcli import disk
from tfcli.config.model import STORED_AS, Architecture, ModelConfig, flat
from tfcli.config.model import stored as stored_shape
from tfcli.config.options import DataOptions
from tfcli.errors import UserError
from tfcli.formats.gguf import families as gguf_families
from tfcli.formats.gguf.file import open_gguf
from tfcli.formats.gguf.vocab import from_gguf
from tfcli.formats.hf.stored import CONFIG, read_data, read_settings
from tfcli.formats.hf.tokenizers import load_tokenizer
from tfcli.formats.hf.weights import FILE, INDEX, Entry, Weights, read_header
from tfcli.model import cost
from tfcli.objectives.table import of_format
from tfcli.text.corpus import stats
from tfcli.text.corpus.shards import MAGIC, VERSION, Shard
from tfcli.text.read import files, sources
from tfcli.text.tokenizers.codec import Codec
from tfcli.text.tokenizers.sentencepiece import CONTROL, FILE_NAME, UNKNOWN, USER_DEFINED, Tokenizer
from tfcli.train.runs import MARKER, RUN_FILE

Description = dict[str, Any]

SCAN_BYTES = 64_000_000
"""Approximate bytes of a corpus that are read at most; the description says if that is only a part."""
SCAN_SECONDS = 5.0
"""Seconds after which reading a corpus stops."""
PREVIEW = 200
"""Characters shown of a corpus."""
RECORDED = ("command", "seed", "started", "finished", "versions", "git_commit")
"""Keys of run.json that are shown."""
RUNNING_SECONDS = 120.0
"""Without locks, an unfinished run that wrote something within this time counts as running."""
GGUF = b"GGUF"
TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}  # TrainerSpec.ModelType


def inspect(target: str | Path, *, on_note: Callable[[str], None] | None = None) -> Description:
    """Describe what ``target`` is and what it costs, without loading or running it.

    "kind" is run, model, tokenizer, shard, weights or corpus and determines the other keys; a model has "parameters",
    "flops_per_token" and "memory" beside its "shape". Raises UserError for a name that matches nothing, and for files
    that tfcli does not read.

    Example:
        >>> import tfcli
        >>> about = tfcli.inspect("runs/first")
        >>> about["kind"], about["architecture"], about["shape"]["depth"]
        ('model', 'decoder', 2)
    """
    path = Path(target)
    described = None
    if path.is_dir():
        described = _directory(path)
    elif path.is_file():
        described = _file(path)
    if described is not None:
        return described
    name = str(path if path.exists() else target)
    return {"target": name, "kind": "corpus", **corpus([name], on_note=on_note)}


def _directory(path: Path) -> Description | None:
    """Describe a directory, None if it is a corpus."""
    if (path / RUN_FILE).is_file():
        return {"target": str(path), "kind": "run", **run(path), **(model(path) if (path / CONFIG).is_file() else {})}
    if (path / CONFIG).is_file():
        return {"target": str(path), "kind": "model", **model(path)}
    if (path / FILE_NAME).is_file():
        return {"target": str(path / FILE_NAME), "kind": "tokenizer", **tokenizer(path / FILE_NAME)}
    held = sorted(path.glob("*.gguf"))
    if len(held) == 1:  # as ``compress`` writes them
        return {"target": str(held[0]), "kind": "model", **gguf_file(held[0])}
    return None


def _file(path: Path) -> Description | None:
    """Describe a file, None if it is a corpus."""
    try:
        with path.open("rb") as file:
            head = file.read(files.SNIFF)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if head.startswith(MAGIC):
        return {"target": str(path), "kind": "shard", **shard(path)}
    if head.startswith(GGUF) or path.suffix == ".gguf":
        return {"target": str(path), "kind": "model", **gguf_file(path)}
    if path.suffix == ".model":
        return {"target": str(path), "kind": "tokenizer", **tokenizer(path)}
    if path.suffix == ".safetensors":
        return {"target": str(path), "kind": "weights", **_tensors(read_header(path))}
    return None


def model(directory: Path) -> Description:
    """Describe shape, parameters, FLOPs, memory and tokenizer of a model directory."""
    hf_config = read_data(directory)
    own = of_format(hf_config)
    if own is not None:
        described: Description = {"architecture": own.name, "shape": own.sizes(hf_config)}
        config_size = None
    else:
        family, config, _ = read_settings(directory, hf_config)
        described, config_size = _shape(config, family.model_type), config.vocab_size
    if (directory / FILE).is_file() or (directory / INDEX).is_file():
        described["stored"] = _tensors(Weights.open(directory).entries)
    if (directory / FILE_NAME).is_file():
        described["tokenizer"] = tokenizer(directory / FILE_NAME)
    elif any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
        kind = "tokenizer.json" if (directory / "tokenizer.json").is_file() else "vocabulary"
        codec = load_tokenizer(directory, vocab_size=config_size, hf_config=hf_config)
        described["tokenizer"] = _codec(codec, kind)
    return described


def gguf_file(path: Path) -> Description:
    """Describe shape, costs, block types and tokenizer of a GGUF file, from its header."""
    file = open_gguf(path)
    family, config = gguf_families.read(file)
    types = Counter(tensor.type for tensor in file.tensors.values())
    return {
        **_shape(config, family.name),
        "stored": {
            "tensors": len(file.tensors),
            "numbers": sum(math.prod(tensor.shape) for tensor in file.tensors.values()),
            "dtype": ", ".join(name for name, _ in types.most_common()),
            "file_bytes": path.stat().st_size,
        },
        "tokenizer": _codec(from_gguf(file.metadata, name=str(path)), "GGUF"),
    }


def _shape(config: ModelConfig, family: str) -> Description:
    shape, theirs, ours = stored_shape(config), flat(config.architecture), flat(Architecture())
    settings = shape.pop(STORED_AS)
    architecture = "decoder" if config.architecture.causal else "encoder"
    if config.encoder_depth:
        architecture = "encoder-decoder"
    return {
        "architecture": architecture,
        "family": family,
        "shape": shape,
        STORED_AS: {name: settings[name] for name in settings if theirs[name] != ours[name]},
        **costs(config),
    }


def costs(config: ModelConfig) -> Description:
    """Return the costs of a model by ``tfcli.model.cost``, at its full context."""
    parts, context = cost.parameters(config), config.context
    decoder = config.architecture.causal
    kv = cost.kv_bytes_per_token(config, "bf16")
    return {
        "parameters": {
            "total": parts.total,
            **{name: getattr(parts, name) for name in parts.__slots__ if name != "biases" or parts.biases},
        },
        "flops_per_token": {
            "prefill": round(cost.prefill_flops(config, context) / context),
            **({"decode": round(cost.decode_flops(config, context))} if decoder else {}),
            "training": round(cost.training_flops(config, context)),
        },
        "memory": {
            "weights_fp32_bytes": cost.weight_bytes(config, "fp32"),
            "weights_bf16_bytes": cost.weight_bytes(config, "bf16"),
            **({"kv_cache_per_1000_tokens_bf16_bytes": 1000 * kv} if decoder else {}),
            **({"kv_cache_full_context_bf16_bytes": context * kv} if decoder else {}),
            "training_step_1_row_bf16_bytes": cost.training_memory(
                config, micro_batch=1, length=context, precision="bf16"
            ).total,
        },
    }


def _tensors(entries: Mapping[str, Entry]) -> Description:
    dtypes = Counter(entry.dtype for entry in entries.values())
    paths = {entry.path for entry in entries.values()}
    return {
        "tensors": len(entries),
        "numbers": sum(math.prod(entry.shape) for entry in entries.values()),
        "dtype": ", ".join(name for name, _ in dtypes.most_common()),
        **({"files": len(paths)} if len(paths) > 1 else {}),
        "file_bytes": sum(path.stat().st_size for path in paths),
    }


def tokenizer(path: Path) -> Description:
    """Describe a SentencePiece model: kind, size, special pieces and longest pieces."""
    loaded = Tokenizer.load(path)
    proto = loaded.proto()
    whole = (id for id in range(loaded.vocab_size) if not loaded.is_byte[id])
    texts = [loaded.id_bytes(id).decode("utf-8", "replace") for id in whole]
    return {
        "type": TYPES.get(proto.trainer_spec.model_type, "other"),
        "vocab_size": loaded.vocab_size,
        "byte_fallback": len(loaded.byte_ids) == 256,
        "lossless": loaded.lossless,
        "end_of_text_id": loaded.eos_id,
        "special": {piece.piece: id for id, piece in enumerate(proto.pieces) if piece.type in (UNKNOWN, CONTROL)},
        "user_symbols": [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED],
        "longest_pieces": sorted(texts, key=lambda text: (-len(text), text))[:8],
        "file_bytes": len(loaded.model_bytes),
        "hash": loaded.hash,
    }


def _codec(loaded: Codec, kind: str) -> Description:
    return {
        "type": kind,
        "vocab_size": loaded.vocab_size,
        "end_of_text_id": loaded.eos_id,
        "chat_template": loaded.chat_template is not None,
        "hash": loaded.hash,
    }


def shard(path: Path) -> Description:
    """Describe a token shard from its header."""
    opened = Shard.open(path)
    return {
        "tokens": opened.tokens,
        "documents": opened.documents,
        "text_bytes": opened.bytes,
        "bytes_per_token": opened.bytes / max(1, opened.tokens),
        "vocab_size": opened.vocab_size,
        "dtype": opened.ids.dtype.name,
        "version": VERSION,
        "tokenizer_hash": opened.tokenizer_hash,
        "file_bytes": path.stat().st_size,
    }


def corpus(specs: list[str], *, on_note: Callable[[str], None] | None = None) -> Description:
    """Describe files, text, scripts and the beginning of a corpus; at most 64 MB or five seconds of it are read."""
    with sources.spooling() as spool:
        inputs = sources.find(specs, spool=spool, on_note=on_note)
        script_of, names = stats.script_table()
        in_script = np.zeros(len(names), np.int64)
        read = documents = lines = characters = 0
        preview, deadline, complete = "", time.monotonic() + SCAN_SECONDS, True
        for chunk in sources.read(inputs, DataOptions(errors="replace")):
            codes = np.frombuffer(chunk.text.encode("utf-32-le"), np.uint32)
            in_script += np.bincount(script_of[codes], minlength=len(names))
            preview = preview or chunk.text[:PREVIEW]
            read += sources.utf8_length(chunk.text)
            documents += chunk.end
            lines += chunk.text.count("\n") + (chunk.end and not chunk.text.endswith("\n"))
            characters += len(codes)
            if read >= SCAN_BYTES or time.monotonic() > deadline:
                complete = False
                break
        ranked = sorted(zip(in_script.tolist(), names, strict=True), reverse=True)
        return {
            "files": len(inputs),
            "formats": dict(Counter(source.kind for source in inputs)),
            "file_bytes": sum(source.path.stat().st_size for source in inputs),
            "whole_text_read": complete,
            "text_bytes": read,
            "documents": documents,
            "lines": lines,
            "characters": characters,
            "scripts": {name: count / characters for count, name in ranked if count},
            "preview": preview,
        }


def run(directory: Path) -> Description:
    """Describe a run directory: command, seed, progress, best validation, data and checkpoints."""
    record = _json_object(directory / RUN_FILE)
    training: Description = {}
    evaluation: Description = {}
    best: float | None = None
    for metrics in _records(directory / "metrics.jsonl"):
        if "train_loss" in metrics:
            training = metrics
        value = metrics.get("val_bits_per_byte")
        if "val_loss" in metrics or value is not None:
            evaluation = metrics
        if isinstance(value, int | float):
            best = value if best is None else min(best, value)
    described: Description = {
        "status": _status(directory, record),
        "steps": max(int(metrics.get("step", 0)) for metrics in (training, evaluation)),
        "best_val_bits_per_byte": best,
        **{key: record[key] for key in RECORDED if key in record},
        "last_training": training,
        "last_evaluation": evaluation,
        "checkpoints": sorted(entry.parent.name for entry in (directory / "checkpoints").glob(f"[0-9]*/{MARKER}")),
    }
    if (directory / "data.json").is_file():
        data = _json_object(directory / "data.json")
        described["data"] = {key: value for key, value in data.items() if not isinstance(value, list)}
        described["data"]["sources"] = [_source(row) for row in data.get("sources") or data.get("files") or []]
    return described


def _source(row: Any) -> Any:
    """Return the name of a source in data.json; earlier versions had "file", or the name alone."""
    return row.get("name", row.get("file")) if isinstance(row, dict) else row


def _status(directory: Path, record: Description) -> str:
    """Return "finished", "running" while a process holds the run's lock, or else "stopped"."""
    if record.get("finished"):
        return "finished"
    running = disk.held(directory)
    if running is None:  # no locks on this system
        newest = max(path.stat().st_mtime for path in directory.iterdir())
        running = time.time() - newest < RUNNING_SECONDS
    return "running" if running else "stopped"


def _records(path: Path) -> Iterator[Description]:
    """Yield the objects of a JSON lines file, without a half-written last line."""
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict):
                    yield record
    except OSError:
        return


def _json_object(path: Path) -> Description:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}", hint="expected the JSON that tfcli wrote") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is a JSON {type(value).__name__}, expected an object")
    return value
