"""The token loop: prompts in, one id per row and step out. It knows ids, not text.

Every step feeds one token of each open row (``tfcli.infer.batching``) over a key/value cache. Without a cache, one by
one, the same ids result (``decode_reference``). An encoder-decoder also gets the source of each row, which its encoder
reads once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tfcli.config.options import MAX_TOKENS, Sampling
from tfcli.errors import RunError
from tfcli.infer import step as stepper
from tfcli.infer.batches import padded
from tfcli.infer.batching import PREFILL_TOKENS, Batch, Request, Waiting, check_prompt, most_tokens, window_of
from tfcli.infer.graph import GraphStepper
from tfcli.infer.sampling import Uniforms, draw, exact_device, filtered, greedy
from tfcli.model.cache import KVCache, Memory
from tfcli.model.transformer import Transformer
from tfcli.native import ops

Finish = Literal["stop", "stop_string", "length", "context"]
Ids = Sequence[int]
Ended = Callable[[int, int], bool]
"""A function of (row, id) that may finish a row."""


@dataclass(frozen=True, slots=True)
class Step:
    """The result of one step for one row. ``id`` is None for the end-of-text token, which is not part of the text.

    ``logprob`` is the natural logarithm of the token's probability under the model, before any filter.
    """

    row: int
    id: int | None
    logprob: float
    finish: Finish | None


def decode(
    model: Transformer,
    prompts: Sequence[Ids],
    sampling: Sampling,
    *,
    seeds: Ids,
    eos_id: int,
    ended: Ended | None = None,
) -> Iterator[list[Step]]:
    """Run ``Decoder`` on a few prompts: ``seeds`` has one seed per row, a prompt's samples side by side."""
    samples = sampling.num_samples
    requests = [Request(prompt, seeds[index * samples : (index + 1) * samples]) for index, prompt in enumerate(prompts)]
    return Decoder(model).run(requests, sampling, eos_ids=(eos_id,), ended=ended)


class Decoder:
    """A model prepared for decoding: on the CPU with the compiled step, on CUDA with recorded graphs, where possible.

    ``compiled=False`` always uses PyTorch's operators. The model's weights must not change.
    """

    def __init__(self, model: Transformer, *, compiled: bool = True) -> None:
        self.model = model
        self._stepper: stepper.Stepper | GraphStepper | None = None
        if compiled and stepper.supports(model):
            self._stepper = stepper.Stepper(model, exact=model.dtype == torch.float32)
        elif compiled and model.device.type == "cuda" and not model.config.encoder_depth:
            self._stepper = GraphStepper(model)

    def run(
        self, requests: Iterable[Request], sampling: Sampling, *, eos_ids: Collection[int], ended: Ended | None = None
    ) -> Iterator[list[Step]]:
        """Continue every request, a step of all open rows at a time; requests are taken as rows become free.

        Row numbers count samples, those of a request in sequence after those of the request before. ``ended(row, id)``
        may finish a row with "stop_string". Rows finish with "stop" at one of ``eos_ids`` unless that is ignored,
        "length" at ``max_tokens``, and "context" when the window is full. With ``overflow="slide"`` a full window is
        reduced to its beginning of text and its end, half of the context, and read again, so that positions never
        exceed those of training; an encoder-decoder instead stops one token below the context, as in ``beam``.
        Raises RunError for logits that are not finite.
        """
        batch = Batch(self, Waiting(requests, self.model, sampling), sampling)
        limit, context = most_tokens(self.model, sampling), self.model.config.context
        if self.model.config.encoder_depth:
            context = max(1, context - 1)
        while batch.next():
            steps: list[Step] = []
            for row, logprob in zip(batch.rows, self._choose(batch, sampling), strict=True):
                row.count += 1
                finish: Finish | None = None
                if row.chosen in eos_ids and not sampling.ignore_eos:
                    steps.append(Step(row.number, None, logprob, "stop"))
                    continue
                if ended is not None and ended(row.number, row.chosen):
                    finish = "stop_string"
                elif row.count >= limit:
                    finish = "length"
                elif len(row.window) >= context and sampling.overflow == "error":
                    finish = "context"
                steps.append(Step(row.number, row.chosen, logprob, finish))
            yield steps
            batch.keep([step.finish is None for step in steps])

    @torch.inference_mode()
    def _choose(self, batch: Batch, sampling: Sampling) -> list[float]:
        """Choose the next id of every row; return log-probabilities. The only wait for the device in a step."""
        # On MPS the logits go to the CPU at once, for float64 and for a single wait per step.
        logits_BV, seen_BV = batch.logits_BV.to(exact_device(self.model.device)), batch.seen
        compiled = isinstance(self._stepper, stepper.Stepper)
        if compiled and sampling.temperature == 0.0 and seen_BV is None:
            ids, logprobs = ops.pick(logits_BV)
        else:
            kept_BV = filtered(logits_BV, seen_BV, sampling)
            if sampling.temperature == 0.0:
                next_B = greedy(kept_BV)
            else:
                uniforms = [row.uniforms.draw() for row in batch.rows if row.uniforms is not None]
                next_B = draw(kept_BV, torch.tensor(uniforms, dtype=torch.float64))
            if seen_BV is not None:
                seen_BV.scatter_(1, next_B[:, None], True)
            if compiled:
                ids, logprobs = ops.pick(logits_BV, next_B.tolist())
            else:
                logprob_B = logits_BV.gather(1, next_B[:, None])[:, 0] - logits_BV.logsumexp(dim=-1)
                both = torch.stack([next_B.float(), logprob_B]).tolist()  # fp32 represents every id below 2^24
                ids, logprobs = [int(id) for id in both[0]], both[1]
        if min(ids) < 0 or not all(map(math.isfinite, logprobs)):  # true of every token then
            raise RunError(
                "the model's output is not finite: its weights are damaged, or the precision overflowed",
                hint="try --precision fp32; if that does not help, copy or train the model again",
            )
        for row, id in zip(batch.rows, ids, strict=True):
            row.chosen = id
        return logprobs

    @torch.inference_mode()
    def prefill(self, windows: Sequence[Ids], cache: KVCache, memory: Memory | None = None) -> Tensor:
        """Read windows into the rows of a cache, in parts, replacing their content: logits (B, V) after each, fp32."""
        model, lengths = self.model, [len(window) for window in windows]
        tokens_BT, _ = padded(windows, model.device)
        cache.set_lengths([0] * len(windows))
        size = max(1, PREFILL_TOKENS // len(windows))
        last_BD: list[Tensor | None] = [None] * len(windows)
        for start in range(0, max(lengths), size):
            hidden_BTD = model(tokens_BT[:, start : start + size], cache=cache, memory=memory)
            for row, length in enumerate(lengths):
                if start < length <= start + size:
                    last_BD[row] = hidden_BTD[row, length - 1 - start]
        cache.set_lengths(lengths)
        return model.logits(torch.stack([hidden for hidden in last_BD if hidden is not None])).float()

    @torch.inference_mode()
    def step(self, ids: Ids, cache: KVCache, memory: Memory | None = None) -> Tensor:
        """Append one id to each row of a cache; return the next logits (B, V), fp32."""
        if self._stepper is not None:
            return self._stepper.step(ids, cache)
        tokens_B1 = torch.tensor(ids, device=self.model.device)[:, None]
        return self.model.logits(self.model(tokens_B1, cache=cache, memory=memory)[:, -1]).float()

    @property
    def eager_because(self) -> str | None:
        """The reason why steps run as PyTorch operators; None where they run compiled or as a graph."""
        if self._stepper is not None:
            return None
        return ops.unavailable() or "this model has parts that the compiled step has not"


@torch.inference_mode()
def decode_reference(
    model: Transformer, prompt: Ids, sampling: Sampling, *, seed: int, eos_id: int, source: Ids | None = None,
    kept: int = 0,
) -> list[tuple[int, float]]:  # fmt: skip
    """Return ids and log-probabilities of one prompt, its window read again for every token: the twin of ``decode``."""
    memory = None if source is None else model.encode(torch.tensor([source], device=model.device))
    context = model.config.context
    check_prompt(prompt, context, sampling)
    seen, window = list(prompt), window_of(prompt, context, kept)
    uniforms = Uniforms(seed)
    steps: list[tuple[int, float]] = []
    while len(steps) < (sampling.max_tokens or MAX_TOKENS):
        if len(window) > context:
            if sampling.overflow == "error":
                break
            window = window_of(window, max(1, context // 2), kept)
        hidden_1TD = model(torch.tensor([window], device=model.device), memory=memory)
        logits_1V = model.logits(hidden_1TD[:, -1]).float()
        seen_1V = torch.zeros_like(logits_1V, dtype=torch.bool)
        seen_1V[0, seen] = True
        kept_1V = filtered(logits_1V, seen_1V, sampling)
        uniform_1 = torch.tensor([uniforms.draw()], dtype=torch.float64)
        id = int(greedy(kept_1V) if sampling.temperature == 0.0 else draw(kept_1V, uniform_1))
        if id == eos_id and not sampling.ignore_eos:
            break
        steps.append((id, float(logits_1V.log_softmax(dim=-1)[0, id])))
        seen.append(id)
        window.append(id)
    return steps
