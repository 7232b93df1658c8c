"""The directory of an LSTM, which only tfcli reads: config.json, model.safetensors and the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfcli.config.model import ModelConfig
from tfcli.errors import UserError
from tfcli.formats.hf.stored import CONFIG, LSTM, read_data
from tfcli.formats.hf.weights import FILE
from tfcli.text.read import files
from tfcli.text.tokenizers.sentencepiece import FILE_NAME, Tokenizer

if TYPE_CHECKING:
    from tfcli.objectives.lstm import Lstm
    from tfcli.runtime import Runtime

SIZES = ("vocab_size", "context", "width")


def save(directory: Path, model: Lstm, tokenizer: Tokenizer) -> None:
    """Write the directory, the weights last."""
    from safetensors.torch import save

    directory.mkdir(parents=True, exist_ok=True)
    config = {"model_type": LSTM, **{name: getattr(model.config, name) for name in SIZES}, "layers": len(model.layers)}
    config["tfcli"] = {"tokenizer_sha256": tokenizer.hash}
    tokenizer.save(directory / FILE_NAME)
    files.write(directory / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    state = {name: tensor.detach().to("cpu").contiguous() for name, tensor in model.state_dict().items()}
    files.write(directory / FILE, save(state, metadata={"format": "pt"}))


def found(path: str | Path) -> bool:
    """Whether a path is the directory of an LSTM."""
    path = Path(path)
    return (path / CONFIG).is_file() and read_data(path).get("model_type") == LSTM


def read_config(directory: Path) -> ModelConfig:
    """The shape. Raises UserError for a config.json that does not hold it."""
    from tfcli.objectives import lstm

    data: dict[str, Any] = read_data(directory)
    sizes = {name: data.get(name) for name in SIZES}
    for name, value in {**sizes, "layers": data.get("layers")}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(
                f"{directory / CONFIG}: {name} is {value!r}", hint="it must be a whole number of at least 1"
            )
    if data["layers"] != lstm.LAYERS:
        raise UserError(f"{directory / CONFIG}: layers is {data['layers']}", hint=f"tfcli's have {lstm.LAYERS}")
    return lstm.shape(vocab_size=data["vocab_size"], context=data["context"], width=data["width"])


def load(directory: str | Path, *, runtime: Runtime) -> tuple[Lstm, Tokenizer]:
    """The model, with fp32 weights on the runtime's device, and its tokenizer. Raises UserError for damaged files."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from tfcli.objectives.lstm import Lstm

    directory = Path(directory)
    model, tokenizer = Lstm(read_config(directory)), Tokenizer.load(directory)
    try:
        model.load_state_dict(load_file(directory / FILE))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{directory / FILE} cannot be read: {str(error).splitlines()[0]}",
            hint="it must be the one that pretrain wrote beside config.json",
        ) from None
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"{directory} has a tokenizer of another model: {tokenizer.vocab_size} pieces")
    return model.to(runtime.device).requires_grad_(False), tokenizer
