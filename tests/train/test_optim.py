"""Optimizers: the update of torch's own Muon and AdamW, every parameter owned once, exact restoring, the schedule."""

from __future__ import annotations

import itertools
import math

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from tfcli.config.options import OptimOptions
from tfcli.train import optim
from tfcli.train.optim import Muon, Optimizers, schedule


def gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def twins(shapes: list[tuple[int, int]]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    return [nn.Parameter(v.clone()) for v in values], [nn.Parameter(v.clone()) for v in values]


@pytest.mark.parametrize("shapes", [[(16, 16)], [(8, 24), (24, 8), (8, 24)], [(5, 7), (33, 3), (1, 9), (9, 1)]])
def test_muon_is_torchs_muon(shapes: list[tuple[int, int]]) -> None:
    """Catches a wrong momentum, scale for tall and wide matrices, decay or coefficient.

    Batched and single bf16 products may round differently on another processor: 2 % of an update's size is allowed,
    while each mistake of that list changes it by more.
    """
    ours, theirs = twins(shapes)
    muon = Muon(ours, momentum=0.9, weight_decay=0.05)
    oracle = torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.05, adjust_lr_fn="original")
    for step in range(4):
        gradients(ours, step)
        gradients(theirs, step)
        muon.step(0.02)
        oracle.step()
        for a, b in zip(ours, theirs, strict=True):
            largest = 0.02 * math.sqrt(max(1.0, a.shape[0] / a.shape[1]))
            torch.testing.assert_close(a, b, rtol=0, atol=0.02 * largest * (step + 1))


def test_the_first_update_is_nearly_orthogonal() -> None:
    """Catches a Newton-Schulz that does not converge: singular values end in about 0.5 to 1.5."""
    generator = torch.Generator().manual_seed(1)
    for rows, columns in ((32, 32), (16, 64), (64, 16)):
        updates = optim.orthogonalize(torch.randn(3, rows, columns, generator=generator)).float()
        values = torch.linalg.svdvals(updates)
        # A square Gaussian matrix has a smallest singular value near 0, which five iterations do not lift to 1.
        assert values.max() < 1.5
        assert values.quantile(0.1) > 0.5


def test_a_zero_gradient_is_no_nan() -> None:
    """Catches 0 / 0 in the norm: at the first step everything behind a zero matrix has no gradient."""
    assert optim.orthogonalize(torch.zeros(1, 4, 8)).isfinite().all()


def test_every_parameter_has_one_owner() -> None:
    """Catches a parameter that nobody trains, or both do."""
    model = tiny_models.model()
    optimizers = Optimizers(model, OptimOptions(), muon_lr=0.02, lr=0.01)
    owned = [id(p) for group in optimizers._muon._shapes.values() for p in group]
    owned += [id(p) for owner in optimizers._adamw for p in owner.params]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients(list(model.parameters()), 0)
    optimizers.step(1.0)
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_the_matrices_of_an_encoder_beside_a_decoder_are_muon_s() -> None:
    """Catches half a model that learns by AdamW, which took three times the steps."""
    wide = torch.nn.Parameter(torch.empty(2, 2))
    assert [optim.rule(f"{stack}blocks.0.ffn.up.weight", wide) for stack in ("", "encoder.")] == ["muon", "muon"]
    assert optim.rule("encoder.positions.weight", wide) == "adamw"


def test_adamw_is_torchs_adamw() -> None:
    """Catches swapped betas or a missing bias correction."""
    model, twin = tiny_models.model(), tiny_models.model()
    options = OptimOptions(beta1=0.8, beta2=0.95)
    optimizers = Optimizers(model, options, muon_lr=0.02, lr=0.01)
    rest = [p for name, p in twin.named_parameters() if optim.rule(name, p) == optim.ADAMW]
    oracle = torch.optim.AdamW(rest, lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0)
    for step in range(3):
        gradients(list(model.parameters()), step)
        gradients(list(twin.parameters()), step)
        optimizers.step(1.0)
        oracle.step()
    theirs = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        if optim.rule(name, p) == optim.ADAMW:
            torch.testing.assert_close(p, theirs[name], rtol=0, atol=1e-6)  # fp32 rounding of numbers near 1


def test_restore_is_exact() -> None:
    """Catches state that a checkpoint forgets: after restoring, the next update is the same bit for bit."""

    def made() -> tuple[nn.Module, Optimizers]:
        model = tiny_models.model()
        return model, Optimizers(model, OptimOptions(), muon_lr=0.02, lr=0.01)

    model, optimizers = made()
    for step in range(3):
        gradients(list(model.parameters()), step)
        optimizers.step(1.0)
    saved: dict[str, Tensor] = {name: t.clone() for name, t in optimizers.tensors()}
    copy, restored = made()
    copy.load_state_dict(model.state_dict())
    restored.restore(saved)
    assert {name: t.tolist() for name, t in restored.tensors()} == {name: t.tolist() for name, t in saved.items()}
    for m, o in ((model, optimizers), (copy, restored)):
        gradients(list(m.parameters()), 9)
        o.step(0.5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters(), strict=True))


def test_schedule() -> None:
    """Catches a warm-up that starts at 0 or never ends, and a decay that does not reach 0 at the last step."""
    factors = [schedule(step, 100, warmup=10, decay=0.7) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[10:31] == [1.0] * 21
    assert factors[99] == pytest.approx(1 / 70)
    assert factors[100] == 0.0
    assert all(a >= b for a, b in itertools.pairwise(factors[30:]))
    assert max(factors) == 1.0


def test_schedule_of_an_unsettled_length() -> None:
    """Catches a rate that depends on the length before the length is known (2**40 stands for it)."""
    assert [schedule(s, 2**40, warmup=10, decay=0.7) for s in (0, 10, 30)] == [pytest.approx(1 / 11), 1.0, 1.0]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_schedule_of_a_very_short_run(steps: int) -> None:
    """Catches a run that is all warm-up or all zero."""
    factors = [schedule(step, steps, warmup=10, decay=0.7) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)


def test_plain_is_torchs_adamw_with_decay_of_matrices() -> None:
    """Catches Muon in a run without it, decay of norms and biases, and frozen parameters that move."""
    model, twin = tiny_models.model(), tiny_models.model()
    for each in (model, twin):
        each.blocks[0].requires_grad_(False)
    options = OptimOptions(beta1=0.9, beta2=0.999, weight_decay=0.1)
    optimizers = Optimizers(model, options, muon_lr=0.02, lr=0.01, plain=True, eps=1e-8)
    trained = [p for p in twin.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    oracle = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.999), eps=1e-8)
    for step in range(3):
        gradients([p for p in model.parameters() if p.requires_grad], step)
        gradients(trained, step)
        optimizers.step(1.0)
        oracle.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)  # fp32 rounding of numbers near 1
    assert not any(name.startswith("blocks.0.") for name, _ in optimizers.tensors())
