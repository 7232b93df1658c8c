"""A decoder with an encoder beside it: one forward with and without the cache, and what each position may see."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import tiny_models
import torch

from tfcli.config.model import Architecture, NormConfig
from tfcli.errors import UserError
from tfcli.model import cost
from tfcli.model.cache import KVCache
from tfcli.model.transformer import Transformer, initialize

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "written": {},
    "ours": {"architecture": Architecture(), "kv_heads": 2},  # rotary, grouped, gated
    "post": {
        "architecture": dataclasses.replace(
            tiny_models.SEQ2SEQ, norms=dataclasses.replace(tiny_models.SEQ2SEQ.norms, place="post")
        )
    },
    "sandwich": {"architecture": Architecture(norms=NormConfig(place="sandwich")), "kv_heads": 2},
}
LONG = torch.tensor([[7, 9, 11, 13, 15], [8, 10, 12, 14, 16]])
REAL = torch.tensor([[True] * 5, [True, True, False, False, False]])
TARGET = torch.tensor([[1, 20, 21, 22], [1, 30, 31, 32]])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_step_by_step_is_all_at_once(architecture: str) -> None:
    model = tiny_models.encoder_decoder(1, **ARCHITECTURES[architecture])
    memory = model.encode(LONG, mask_BS=REAL)
    expected = model(TARGET, memory=memory)
    cache = KVCache(model.config, batch=2, capacity=8, dtype=torch.float32, device=torch.device("cpu"))
    steps = [model(TARGET[:, t : t + 1], memory=memory, cache=cache) for t in range(4)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_padding_of_a_source_is_not_seen() -> None:
    model = tiny_models.encoder_decoder(2)
    both = model(TARGET, memory=model.encode(LONG, mask_BS=REAL))
    alone = model(TARGET[1:], memory=model.encode(LONG[1:, :2]))
    torch.testing.assert_close(both[1:], alone, atol=2e-5, rtol=1e-4)
    other = model(TARGET, memory=model.encode(torch.where(REAL, LONG, 99), mask_BS=REAL))
    torch.testing.assert_close(both, other, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_source_is_seen_from_its_first_token_to_its_last() -> None:
    model = tiny_models.encoder_decoder(2)
    before = model(TARGET, memory=model.encode(LONG))
    for place in (0, 4):
        changed = LONG.clone()
        changed[:, place] = 99
        assert ((model(TARGET, memory=model.encode(changed)) - before).abs().amax(-1) > 1e-3).all()


@torch.no_grad()
def test_one_row_of_memory_serves_several_that_follow_each_other() -> None:
    model = tiny_models.encoder_decoder(3, kv_heads=2)
    memory = model.encode(LONG, mask_BS=REAL)
    rows = TARGET.repeat_interleave(3, dim=0)
    expected = model(rows, memory=memory.select([0, 0, 0, 1, 1, 1]))
    torch.testing.assert_close(model(rows, memory=memory), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_is_counted_filled_and_learns(architecture: str) -> None:
    model = tiny_models.encoder_decoder(0, **ARCHITECTURES[architecture])
    assert cost.parameters(model.config).total == sum(parameter.numel() for parameter in model.parameters())
    loss = model.loss(model(TARGET, memory=model.encode(LONG, mask_BS=REAL)), TARGET)
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    initialize(model, 0)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_memory_goes_with_an_encoder() -> None:
    model = tiny_models.encoder_decoder(0)
    with pytest.raises(ValueError, match="needs the memory"):
        model(TARGET)
    with pytest.raises(ValueError, match="no other model takes one"):
        tiny_models.model()(TARGET, memory=model.encode(LONG))
    with pytest.raises(UserError, match="an encoder cannot have another encoder"):
        tiny_models.config(encoder_depth=1, architecture=Architecture(causal=False))
    with pytest.raises(UserError, match="encoder_depth is -1"):
        tiny_models.config(encoder_depth=-1)
    assert isinstance(model, Transformer)


def test_flops_are_those_of_the_products_that_are_run() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_models.encoder_decoder(0).requires_grad_(False)
    L = 4
    memory = model.encode(LONG[:1, :L])
    with FlopCounterMode(display=False) as counter:
        cache = KVCache(model.config, batch=1, capacity=8, dtype=torch.float32, device=torch.device("cpu"))
        model.logits(model(TARGET[:1, :1], memory=memory, cache=cache))
    # A first token sees itself and the four of the source; the counter misses the fused attention kernel on CPU.
    config = model.config
    key = config.depth * 2 * 2 * config.heads * config.head_width
    counted = counter.get_total_flops()
    assert cost.decode_flops(config, L) - (L - 1) * key in (counted, counted + (1 + L) * key)
