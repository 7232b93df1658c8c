"""The other side of ``tfcli bench --against``: a program that loads a peer and runs it on request.

It imports only the standard library and the peer, so that any interpreter can run this file: a peer may be installed in
an environment of its own. Each line of stdin is a JSON object and is answered by one on stdout:

    {"do": "prepare", "peer": "llama.cpp", "model": FILE, "prompt": [ids], "tokens": 128, "threads": 2,
     "device": "cpu", "precision": "bf16"}       ->  {"versions": {...}, "weights": "Q4_1", "threads": 2}
                                                 or  {"missing": "llama_cpp"} where the peer is not installed
    {"do": "run", "tokens": 128}                 ->  {"first": seconds, "rest": seconds, "ids": [...]}

A run reads the prompt again and continues it greedily, past the end-of-text token: ``first`` is the time to the first
new token, ``rest`` that of all others. Errors are left to Python: a traceback on stderr and exit code 1.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

Run = tuple[float, float, list[int]]
"""Seconds to the first token, seconds of the others, all ids."""


class LlamaCpp:
    """llama.cpp through llama-cpp-python, with its defaults."""

    package = "llama_cpp"

    def __init__(self, task: dict[str, Any]) -> None:
        self._library = importlib.import_module(self.package)
        self._prompt, self._threads = task["prompt"], task["threads"]
        self._llama = self._library.Llama(
            model_path=task["model"],
            n_ctx=len(self._prompt) + task["tokens"],
            n_threads=self._threads,
            n_threads_batch=self._threads,
            n_gpu_layers=0 if task["device"] == "cpu" else -1,
            verbose=False,
        )

    def about(self) -> dict[str, Any]:
        """Return versions, the type of the file's weights, threads."""
        kinds = {
            value: name.removeprefix("LLAMA_FTYPE_").removeprefix("MOSTLY_").removeprefix("ALL_")
            for name, value in vars(self._library).items()
            if name.startswith("LLAMA_FTYPE_")
        }
        kind = self._llama.metadata.get("general.file_type", "")
        return {
            "versions": {"llama-cpp-python": self._library.__version__},
            "weights": kinds.get(int(kind), kind) if kind.isdigit() else "unknown",
            "threads": self._threads,
        }

    def run(self, tokens: int) -> Run:
        """Continue the prompt by ``tokens`` tokens."""
        self._llama.reset()
        start = time.perf_counter()
        stream = self._llama.generate(self._prompt, temp=0.0)
        ids = [next(stream)]
        first = time.perf_counter()
        while len(ids) < tokens:
            ids.append(next(stream))
        return first - start, time.perf_counter() - first, [int(id) for id in ids]


class Transformers:
    """transformers' ``generate``, with its defaults; a GGUF file is dequantized by transformers."""

    package = "transformers"

    def __init__(self, task: dict[str, Any]) -> None:
        self._library = importlib.import_module(self.package)
        self._torch = importlib.import_module("torch")
        torch = self._torch
        torch.set_num_threads(task["threads"])
        self._precision = task["precision"]
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[self._precision]
        path = Path(task["model"])
        folder, file = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
        model = self._library.AutoModelForCausalLM.from_pretrained(str(folder), **file, dtype=dtype)
        self._model = model.to(task["device"]).eval()
        # Not the model's own settings: they may sample, or stop at an end-of-text token.
        self._model.generation_config = self._library.GenerationConfig(pad_token_id=0)
        self._prompt = torch.tensor([task["prompt"]], device=task["device"])

    def about(self) -> dict[str, Any]:
        """Return versions, precision, threads."""
        return {
            "versions": {"transformers": self._library.__version__, "torch": str(self._torch.__version__)},
            "weights": self._precision,
            "threads": self._torch.get_num_threads(),
        }

    def run(self, tokens: int) -> Run:
        """Continue the prompt by ``tokens`` tokens."""
        marks = _Marks()
        start = time.perf_counter()
        with self._torch.inference_mode():
            out = self._model.generate(
                self._prompt,
                attention_mask=self._torch.ones_like(self._prompt),
                max_new_tokens=tokens,
                do_sample=False,
                streamer=marks,
            )
        ids = out[0, self._prompt.shape[1] :].tolist()  # waits for the device
        end = time.perf_counter()
        first = marks.times[1]  # the first mark is the prompt itself
        return first - start, end - first, ids


class _Marks:
    """A transformers streamer that records when each token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Record a token, already on the CPU; the first call is for the prompt."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: there is no text to flush."""


def serve(requests: TextIO, replies: TextIO) -> None:
    """Answer requests until there are no more."""
    kinds: dict[str, Any] = {"llama.cpp": LlamaCpp, "transformers": Transformers}
    peer: Any = None
    for line in requests:
        request = json.loads(line)
        if request["do"] == "prepare":
            kind = kinds[request["peer"]]
            try:
                importlib.import_module(kind.package)
            except ModuleNotFoundError as error:
                reply = {"missing": error.name}
            else:
                peer = kind(request)
                reply = peer.about()
        else:
            first, rest, ids = peer.run(request["tokens"])
            reply = {"first": first, "rest": rest, "ids": ids}
        print(json.dumps(reply), file=replies, flush=True)


def main() -> None:
    """Serve over stdin and stdout; whatever else the peer prints goes to stderr."""
    here = str(Path(__file__).parent)
    sys.path[:] = [
        entry for entry in sys.path if entry != here
    ]  # files next to this one must not shadow the peer's modules
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)
        serve(sys.stdin, replies)


if __name__ == "__main__":
    main()
