"""Beam search and greedy search for encoder-decoders. It knows ids, not text.

A beam is the beginning of an answer; for every source the ``width`` likeliest are continued together over one key/value
cache, whose rows are reordered as beams are replaced. They share one encoding of the source. The rules are those of
transformers' ``generate``, so that a model gives the same text with both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tfcli.errors import RunError, UserError
from tfcli.infer.batches import encode
from tfcli.model.cache import KVCache, Memory
from tfcli.model.transformer import Transformer

SOURCES = 32
"""The most sources that are answered together."""
SOURCE_TOKENS = 2048
"""The most tokens that they have together, with padding."""
Ids = tuple[int, ...]
Candidate = tuple[float, int, int]
"""The score of a continuation, its beam and id."""
NEVER = -1e9
"""The score of an unused beam: each source begins with a single one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Beams:
    """The settings of a search."""

    width: int = 4
    """Beams per source; 1 is greedy: always the likeliest token."""
    length_penalty: float = 1.0
    """alpha of log P(Y) / |Y|^alpha, by which finished answers are compared (Wu et al. 2016, eq. 14, with |Y| in place
    of 5 + |Y| as in transformers and CTranslate2); 0 compares probabilities, larger prefers longer answers."""
    max_tokens: int | None = None
    """The most new tokens, including the end; by default the rest of the context after the first."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise UserError(f"--beam is {self.width}", hint="it must be at least 1, which is greedy")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"--max-tokens is {self.max_tokens}", hint="it must be at least 1")


@dataclass(frozen=True, slots=True)
class Answer:
    """Ids without the end, and log P(Y) / |Y|^alpha (nats), including the end."""

    ids: tuple[int, ...]
    score: float


def answers(
    model: Transformer,
    sources: Sequence[Sequence[int]],
    beams: Beams,
    *,
    start_id: int,
    eos_ids: Collection[int],
    on_progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Return the best answer to each source, in their order; sources of similar length are searched together.

    ``start_id`` is the decoder's first input. ``on_progress`` gets the number of sources done. Raises UserError for a
    source that is empty or longer than the context, RunError for logits that are not finite.
    """
    context = model.config.context
    for number, source in enumerate(sources, 1):
        if not 0 < len(source) <= context:
            raise UserError(
                f"text {number} has {len(source)} tokens, the model reads 1 to {context}", hint="cut it into sentences"
            )
    order = sorted(range(len(sources)), key=lambda index: len(sources[index]))
    results: dict[int, Answer] = {}
    while order:
        longest = len(sources[order[-1]])
        together = order[-max(1, min(SOURCES, SOURCE_TOKENS // longest)) :]
        del order[-len(together) :]
        best = _Search(model, [sources[index] for index in together], beams, start_id, frozenset(eos_ids)).run()
        results.update(zip(together, best, strict=True))
        if on_progress:
            on_progress(len(results))
    return [results[index] for index in range(len(sources))]


class _Search:
    """The sources of one batch. Row ``i * width + j`` of the cache is the j-th beam of the i-th open source."""

    def __init__(
        self, model: Transformer, sources: Sequence[Sequence[int]], beams: Beams, start_id: int, eos_ids: frozenset[int]
    ) -> None:
        self._model, self._beams, self._eos = model, beams, eos_ids
        self._sources, self._start = sources, start_id
        most = max(1, model.config.context - 1)
        self._limit = min(beams.max_tokens or most, most)
        self._done: list[list[Answer]] = [[] for _ in sources]

    @torch.inference_mode()
    def run(self) -> list[Answer]:
        """Return the best answer to each source."""
        model, width = self._model, self._beams.width
        memory = encode(model, self._sources)
        cache = KVCache(
            model.config, batch=len(self._sources) * width, capacity=self._limit, dtype=model.dtype, device=model.device
        )
        open_: list[int] = list(range(len(self._sources)))
        ids: list[Ids] = [()] * (len(open_) * width)
        scores = [0.0, *[NEVER] * (width - 1)] * len(open_)
        for length in range(1, self._limit + 1):
            top = self._best(self._logprobs(ids, cache, memory), scores, len(open_))
            kept, rows, ids, scores = self._step(open_, top, ids, length)
            if not kept:
                break
            if rows != list(range(len(ids))) or len(kept) < len(open_):
                cache.select(rows)
                cache = cache.rows(0, len(rows))
            if len(kept) < len(open_):
                memory = memory.select(kept)
                open_ = [open_[place] for place in kept]
        return [max(answers, key=lambda answer: answer.score) for answers in self._done]

    def _logprobs(self, ids: Sequence[Ids], cache: KVCache, memory: Memory) -> Tensor:
        """Compute log-probabilities (rows, V) of the next token of each beam, fp32."""
        last_B1 = torch.tensor([[row[-1] if row else self._start] for row in ids], device=self._model.device)
        logits_BV = self._model.logits(self._model(last_B1, cache=cache, memory=memory)[:, -1]).float()
        if not torch.isfinite(logits_BV).all():
            raise RunError("the model's logits are not numbers", hint="its weights are damaged, or: --precision fp32")
        return logits_BV.log_softmax(dim=-1)

    def _best(self, logprobs_BV: Tensor, scores: Sequence[float], sources: int) -> list[list[Candidate]]:
        """Return (score, beam, id) of the likeliest continuations of each source.

        There are enough that ``width`` of them go on, however many others end.
        """
        V = logprobs_BV.shape[1]
        total_BV = logprobs_BV + torch.tensor(scores, device=logprobs_BV.device)[:, None]
        flat, candidates = total_BV.view(sources, -1), max(2, 1 + len(self._eos)) * self._beams.width
        top = flat.topk(min(flat.shape[1], candidates), dim=1)
        return [
            [(score, index // V, index % V) for score, index in zip(values, indices, strict=True)]
            for values, indices in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]

    def _step(
        self, open_: Sequence[int], top: Sequence[Sequence[Candidate]], ids: Sequence[Ids], length: int
    ) -> tuple[list[int], list[int], list[Ids], list[float]]:
        """Return what continues: places among the open sources; the row each of their beams extends, ids, scores."""
        width, penalty = self._beams.width, length**self._beams.length_penalty
        kept: list[int] = []
        beams: list[tuple[int, Ids, float]] = []
        for place, source in enumerate(open_):
            going: list[Candidate] = []
            for rank, (score, beam, id) in enumerate(top[place]):
                ends = id in self._eos
                if not ends and length < self._limit:
                    going.append((score, beam, id))
                elif rank < width:
                    text = ids[place * width + beam]
                    self._done[source].append(Answer(text if ends else (*text, id), score / penalty))
            if self._is_done(source, going, penalty):
                continue
            kept.append(place)
            rows = [(place * width + beam, id, score) for score, beam, id in going[:width]]
            beams += [(row, (*ids[row], id), score) for row, id, score in rows]
        return kept, [row for row, _, _ in beams], [text for _, text, _ in beams], [score for _, _, score in beams]

    def _is_done(self, source: int, going: Sequence[Candidate], penalty: float) -> bool:
        """Return whether no beam is left, or none likely to beat the finished answers: transformers' rule."""
        width, done = self._beams.width, self._done[source]
        done.sort(key=lambda answer: -answer.score)
        del done[width:]
        if width == 1 and done:
            return True
        return not going or (len(done) == width and going[0][0] / penalty <= done[-1].score)
