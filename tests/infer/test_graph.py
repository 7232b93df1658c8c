"""The step of fixed shapes that CUDA records, run without recording: equal to the one that follows lengths."""

import weakref

import pytest
import torch
from tiny_models import model

from tfcli.config.model import Architecture, FeedForwardConfig, NormConfig, WindowConfig
from tfcli.config.options import Sampling
from tfcli.infer.batching import Request
from tfcli.infer.decode import Decoder
from tfcli.infer.graph import GraphStepper
from tfcli.model.cache import KVCache

GEMMA = Architecture(
    norms=NormConfig(place="sandwich"),
    windows=WindowConfig(size=5, every=2),
    feed_forward=FeedForwardConfig(activation="gelu_tanh"),
)
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]


@pytest.mark.parametrize("architecture", [Architecture(), GEMMA], ids=["ours", "windows"])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["ragged", "one row"])
def test_fixed_shapes_decode_the_same(architecture: Architecture, prompts: list[list[int]]) -> None:
    """Over buffers that grow and rows that leave: would catch a stale mask, position or buffer."""
    core = model(architecture=architecture, context=200).requires_grad_(False)
    sampling = Sampling(temperature=0.0, max_tokens=90, ignore_eos=True)
    requests = [Request(prompt, [0]) for prompt in prompts]
    stops = [90, 30, 60]

    def run(decoder: Decoder) -> list[list[int | None]]:
        rows: list[list[int | None]] = [[] for _ in prompts]
        ended = lambda row, id: len(rows[row]) + 1 == stops[row]  # noqa: E731
        for steps in decoder.run(requests, sampling, eos_ids=(), ended=ended):
            for step in steps:
                rows[step.row].append(step.id)
        return rows

    graphs = Decoder(core, compiled=False)
    graphs._stepper = GraphStepper(core, record=False)
    assert run(graphs) == run(Decoder(core, compiled=False))


def test_graphs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch size has its own graph; old ones are freed, and all of them with their cache."""
    monkeypatch.setattr("tfcli.infer.graph.MOST_GRAPHS", 2)
    core = model(context=200).requires_grad_(False)
    stepper = GraphStepper(core, record=False)
    cache = KVCache(core.config, batch=4, capacity=200, dtype=core.dtype, device=core.device)
    for count in (1, 2, 3, 4):
        stepper.step([5] * count, cache.rows(0, count))
    ((_, graphs),) = stepper._recorded.values()
    assert list(graphs) == [(3, 0), (4, 0)]
    del graphs, cache, _
    assert not stepper._recorded


def test_graphs_of_outgrown_buffers_are_freed() -> None:
    """Up to eight graphs once kept as many buffers alive, each half the size of the next."""
    core = model(context=200).requires_grad_(False)
    stepper = GraphStepper(core, record=False)
    cache = KVCache(core.config, batch=1, capacity=200, dtype=core.dtype, device=core.device)
    outgrown: list[weakref.ref[torch.Tensor]] = []
    for _ in range(150):
        before = cache.buffers.keys[0]
        stepper.step([5], cache)
        if cache.buffers.keys[0] is not before:
            outgrown.append(weakref.ref(before))
        del before
    assert len(outgrown) == 2 and all(buffer() is None for buffer in outgrown)
    ((_, graphs),) = stepper._recorded.values()
    assert len(graphs) == 1
