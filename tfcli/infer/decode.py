"""The token loop: prompts in, one id a row and step out. It knows ids, not text.

The whole batch is prefilled at once, left-padded; then each step feeds one token a row over a key/value cache. Rows
that are finished leave the batch. Without a cache, one by one, the same ids come out (``decode_reference``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tfcli.config import Sampling
from tfcli.errors import RunError, UserError
from tfcli.infer.sampling import Uniforms, draw, exact_device, filtered, greedy
from tfcli.model.cache import KVCache
from tfcli.model.transformer import Transformer

Finish = Literal["stop", "stop_string", "length", "context"]
MAX_TOKENS = 256
"""New tokens where ``Sampling.max_tokens`` is left out."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one step gave one row. ``id`` is None for the end-of-text token, which is not part of the result.

    ``logprob`` is the natural logarithm of the probability that the model itself gave the token, before any filter.
    """

    row: int
    id: int | None
    logprob: float
    finish: Finish | None


def check_prompt(ids: Sequence[int], context: int, sampling: Sampling) -> None:
    """Raise UserError for a prompt that is longer than the context, unless the window may slide."""
    if len(ids) > context and sampling.overflow == "error":
        raise UserError(
            f"the prompt has {len(ids)} tokens, the model's context is {context}",
            hint="shorten it, or keep only its end with --overflow slide",
        )


def decode(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    seeds: Sequence[int],
    eos_id: int,
    ended: Callable[[int, int], bool] | None = None,
) -> Iterator[list[Step]]:
    """Continue every prompt (at least one id each) ``sampling.num_samples`` times, a step of all open rows at a time.

    Row ``i * num_samples + j`` is sample j of prompt i; ``seeds`` has one seed a row. ``ended(row, id)`` may finish a
    row with "stop_string". Rows finish with "stop" at ``eos_id`` unless it is ignored, "length" at ``max_tokens``, and
    "context" when the window is full. With ``overflow="slide"`` a full window is cut to the last half of the context,
    which is read anew, so that positions never exceed what the model was trained on. Raises RunError for logits that
    are not finite.
    """
    for prompt in prompts:
        check_prompt(prompt, model.config.context, sampling)
    batch = _Batch(model, prompts, sampling, seeds)
    limit = sampling.max_tokens or MAX_TOKENS
    made = 0
    while batch.rows:
        made += 1
        ids, logprobs = batch.choose()
        steps: list[Step] = []
        for index, (row, id, logprob) in enumerate(zip(batch.rows, ids, logprobs, strict=True)):
            finish: Finish | None = None
            if id == eos_id and not sampling.ignore_eos:
                steps.append(Step(row, None, logprob, "stop"))
                continue
            if ended is not None and ended(row, id):
                finish = "stop_string"
            elif made >= limit:
                finish = "length"
            elif batch.full(index) and sampling.overflow == "error":
                finish = "context"
            steps.append(Step(row, id, logprob, finish))
        yield steps
        batch.keep([index for index, step in enumerate(steps) if step.finish is None])
        if batch.rows:
            batch.feed()


class _Batch:
    """The open rows: their windows, cache, random numbers and the logits of their next token."""

    def __init__(
        self, model: Transformer, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> None:
        self._model = model
        self._sampling = sampling
        # On MPS the logits go to the CPU as soon as they are there, for float64 and for one wait a step only.
        self._place = exact_device(model.device)
        context, samples = model.config.context, sampling.num_samples
        self.rows = list(range(len(prompts) * samples))
        windows = [list(prompt[-context:]) for prompt in prompts]
        self._seen_BV: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            seen_BV = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool)
            for index, prompt in enumerate(prompts):
                seen_BV[index, list(prompt)] = True
            self._seen_BV = seen_BV.repeat_interleave(samples, dim=0).to(self._place)
        self._uniforms = None if sampling.temperature == 0.0 else Uniforms(list(seeds))
        self._pads: list[int] = []
        self._chosen: list[int] = []
        self._prefill(windows)
        self._windows = [list(window) for window in windows for _ in range(samples)]
        if samples > 1:
            self._select(torch.arange(len(prompts), device=model.device).repeat_interleave(samples))
            self._pads = [pad for pad in self._pads for _ in range(samples)]

    @torch.inference_mode()
    def _prefill(self, windows: list[list[int]]) -> None:
        """Read the windows into a new cache."""
        model = self._model
        longest = max(map(len, windows))
        self._pads = [longest - len(window) for window in windows]
        tokens_BT = torch.tensor(
            [[0] * pad + window for pad, window in zip(self._pads, windows, strict=True)], device=model.device
        )
        self._cache = KVCache(
            model.config,
            batch=len(windows),
            # A short row may go on for a whole context after the padding before it.
            capacity=model.config.context + max(self._pads),
            dtype=model.embed.weight.dtype,
            device=model.device,
            pad_B=torch.tensor(self._pads, device=model.device) if any(self._pads) else None,
        )
        self._logits_BV = model.logits(model(tokens_BT, cache=self._cache)[:, -1])

    @torch.inference_mode()
    def choose(self) -> tuple[list[int], list[float]]:
        """The next id of every row and its log-probability; the only wait for the device in a step."""
        logits_BV = self._logits_BV.float().to(self._place)
        kept_BV = filtered(logits_BV, self._seen_BV, self._sampling)
        if self._uniforms is None:
            self._next_B = greedy(kept_BV)
        else:
            self._next_B = draw(kept_BV, self._uniforms.draw())
        chosen_B = logits_BV.gather(1, self._next_B[:, None])[:, 0]
        logprob_B = chosen_B - logits_BV.logsumexp(dim=-1)
        if self._seen_BV is not None:
            self._seen_BV.scatter_(1, self._next_B[:, None], True)
        both = torch.stack([self._next_B.float(), logprob_B]).tolist()  # fp32 holds every id below 2^24
        if not all(map(math.isfinite, both[1])):  # as for every token then
            raise RunError(
                "the model's output is not finite: its weights are damaged, or the precision overflowed",
                hint="try --precision fp32; if that does not help, copy or train the model again",
            )
        self._chosen = [int(id) for id in both[0]]
        return self._chosen, both[1]

    def full(self, index: int) -> bool:
        """Whether the window of the open row at ``index`` has no room for the token just chosen."""
        return len(self._windows[index]) >= self._model.config.context

    def keep(self, indices: list[int]) -> None:
        """Drop all but these of the open rows."""
        if len(indices) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in indices]
        self._windows = [self._windows[index] for index in indices]
        self._chosen = [self._chosen[index] for index in indices]
        self._pads = [self._pads[index] for index in indices]
        if not indices:
            return
        if self._uniforms is not None:
            self._uniforms.select(indices)
        which = torch.tensor(indices, device=self._place)
        self._next_B = self._next_B[which]
        if self._seen_BV is not None:
            self._seen_BV = self._seen_BV[which]
        self._select(which.to(self._model.device))

    @torch.inference_mode()
    def _select(self, which: Tensor) -> None:
        self._cache.select(which)
        self._logits_BV = self._logits_BV[which]

    @torch.inference_mode()
    def feed(self) -> None:
        """Append the chosen tokens and compute the logits of the next ones."""
        context = self._model.config.context
        slides = any(len(window) >= context for window in self._windows)
        for window, id in zip(self._windows, self._chosen, strict=True):
            window.append(id)
            if len(window) > context:
                del window[: len(window) - max(1, context // 2)]
        if slides:
            self._prefill(self._windows)
            return
        if self._cache.pad_B is not None and not any(self._pads):
            self._cache.pad_B = None  # the padded rows are done: no mask is needed any more
        hidden_B1D = self._model(self._next_B.to(self._model.device)[:, None], cache=self._cache)
        self._logits_BV = self._model.logits(hidden_B1D[:, -1])


@torch.inference_mode()
def decode_reference(
    model: Transformer, prompt: Sequence[int], sampling: Sampling, *, seed: int, eos_id: int
) -> list[tuple[int, float]]:
    """Ids and log-probabilities of one prompt, the window read anew for every token: the twin of ``decode``."""
    context = model.config.context
    check_prompt(prompt, context, sampling)
    seen, window = list(prompt), list(prompt[-context:])
    uniforms = Uniforms([seed])
    made: list[tuple[int, float]] = []
    while len(made) < (sampling.max_tokens or MAX_TOKENS):
        if len(window) > context:
            if sampling.overflow == "error":
                break
            window = window[-max(1, context // 2) :]
        logits_1V = model.logits(model(torch.tensor([window], device=model.device))[:, -1]).float()
        seen_1V = torch.zeros_like(logits_1V, dtype=torch.bool)
        seen_1V[0, seen] = True
        kept_1V = filtered(logits_1V, seen_1V, sampling)
        if sampling.temperature == 0.0:
            id = int(greedy(kept_1V))
        else:
            id = int(draw(kept_1V, uniforms.draw()))
        if id == eos_id and not sampling.ignore_eos:
            break
        made.append((id, float(logits_1V.log_softmax(dim=-1)[0, id])))
        seen.append(id)
        window.append(id)
    return made
