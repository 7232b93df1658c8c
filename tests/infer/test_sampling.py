"""Filters against cases worked out by hand and against transformers' own processors."""

import inspect
import math
import re
from dataclasses import replace

import pytest
import torch
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tfcli.config.options import Sampling
from tfcli.errors import UserError
from tfcli.infer import decode, score
from tfcli.infer import sampling as s

OFF = Sampling(temperature=1.0, top_p=1.0)
INF = float("inf")


def logits(rows: int = 4, size: int = 50, seed: int = 0) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3


def of(probabilities: list[float]) -> Tensor:
    return torch.tensor([probabilities]).log()


def kept(filtered: Tensor) -> list[int]:
    return (filtered[0] > -INF).nonzero()[:, 0].tolist()


def test_top_p_by_hand() -> None:
    """0.5 + 0.3 reaches 0.8 exactly, 0.7 needs both, 0.5 the first alone; the order of ids does not matter."""
    given = of([0.1, 0.5, 0.05, 0.3, 0.05])
    assert kept(s.top_p(given, 0.7)) == [1, 3]
    assert kept(s.top_p(given, 0.49)) == [1]
    assert kept(s.top_p(given, 0.85)) == [0, 1, 3]
    assert kept(s.top_p(given, 1e-9)) == [1]


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("mass", [0.2, 0.9, 0.999])
def test_top_p_of_a_large_vocabulary(scale: float, mass: float) -> None:
    """Would catch the head of the vocabulary taken for the whole of it: flat distributions need all of it."""
    given = logits(3, 3000, 2) * scale
    none = torch.empty(3, 0, dtype=torch.long)
    ours, theirs = s.top_p(given, mass) > -INF, transformers.TopPLogitsWarper(mass)(none, given) > -INF
    assert (ours != theirs).sum() <= 3  # one token a row, where rounding of the sum decides
    probabilities = given.double().softmax(-1)
    assert ((probabilities * ours).sum(-1) > mass - 1e-5).all()


def test_top_k_and_min_p_by_hand() -> None:
    """min-p 0.3 of 0.5 is 0.15; ties at the k-th place stay."""
    given = of([0.1, 0.5, 0.05, 0.3, 0.05])
    assert kept(s.top_k(given, 2)) == [1, 3]
    assert kept(s.top_k(given, 4)) == [0, 1, 2, 3, 4]
    assert kept(s.top_k(given, 99)) == [0, 1, 2, 3, 4]
    assert kept(s.min_p(given, 0.3)) == [1, 3]
    assert kept(s.min_p(given, 0.19)) == [0, 1, 3]


def test_repetition_penalty_by_hand() -> None:
    """Positive logits shrink, negative ones grow, unseen ones stay."""
    given = torch.tensor([[2.0, -2.0, 2.0, 0.0]])
    seen = torch.tensor([[True, True, False, True]])
    assert s.repetition_penalty(given, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, 0.0]]


@pytest.mark.parametrize("k", [1, 5, 50])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("m", [0.02, 0.3])
def test_filters_equal_transformers(k: int, p: float, m: float) -> None:
    """The same words mean the same thing there."""
    given = logits()
    none = torch.empty(4, 0, dtype=torch.long)
    torch.testing.assert_close(s.top_k(given, k), transformers.TopKLogitsWarper(k)(none, given))
    torch.testing.assert_close(s.top_p(given, p), transformers.TopPLogitsWarper(p)(none, given))
    torch.testing.assert_close(s.min_p(given, m), transformers.MinPLogitsWarper(m)(none, given))


def test_the_whole_chain_equals_transformers() -> None:
    """Would catch another order: penalty, temperature, top-k, top-p, min-p."""
    given = logits()
    context = torch.tensor([[1, 2, 3], [4, 4, 4], [0, 49, 7], [9, 8, 7]])
    seen = torch.zeros(4, 50, dtype=torch.bool).scatter_(1, context, True)
    expected = given
    for step in (
        transformers.RepetitionPenaltyLogitsProcessor(1.3),
        transformers.TemperatureLogitsWarper(0.7),
        transformers.TopKLogitsWarper(20),
        transformers.TopPLogitsWarper(0.9),
        transformers.MinPLogitsWarper(0.05),
    ):
        expected = step(context, expected)
    all_on = Sampling(repetition_penalty=1.3, temperature=0.7, top_k=20, top_p=0.9, min_p=0.05)
    ours = s.filtered(given, seen, all_on)  # the same but for one number a row
    torch.testing.assert_close(ours.log_softmax(dim=-1), expected.log_softmax(dim=-1))
    assert torch.equal(s.filtered(given, None, OFF), given)


def test_greedy_takes_the_first_of_equals_and_ignores_filters() -> None:
    """Temperature 0 is not a division by a small number."""
    given = torch.tensor([[1.0, 3.0, 3.0]])
    assert s.greedy(s.filtered(given, None, Sampling(temperature=0.0))).tolist() == [1]


@pytest.mark.parametrize("value", [1e-5, 1e-38, 1e-40, 1e-300])
def test_the_smallest_temperatures_are_greedy(value: float) -> None:
    """Would catch logits / 1e-40 = inf, and 0 / 0: both ended in an index out of bounds."""
    given = logits(4, 50) + torch.tensor([[0.0], [50.0], [-50.0], [1e6]])
    kept = s.filtered(given, None, Sampling(temperature=value))
    assert not kept.isnan().any() and not (kept == INF).any()
    numbers = torch.tensor([s.Uniforms(seed).draw() for seed in (1, 2, 3, 4)], dtype=torch.float64)
    drawn_B1 = s.draw(kept, numbers)[:, None]
    assert torch.equal(given.gather(1, drawn_B1), given.amax(1, keepdim=True))


def test_a_tiny_penalty_does_not_overflow() -> None:
    """A draw from logits with inf is no draw."""
    kept = s.filtered(logits(), torch.ones(4, 50, dtype=torch.bool), Sampling(repetition_penalty=1e-45, top_p=1.0))
    assert kept.softmax(dim=-1).isfinite().all()


def test_draws_follow_the_distribution() -> None:
    """Chi-square of 20 000 draws over five tokens: below 18.5 for 99.9 % of seeds."""
    probabilities = torch.tensor([0.05, 0.4, 0.0, 0.3, 0.25])
    uniform = s.Uniforms(11)
    numbers = torch.tensor([uniform.draw() for _ in range(20_000)], dtype=torch.float64)
    ids = s.draw(probabilities.log().expand(20_000, 5), numbers)
    counts = torch.bincount(ids, minlength=5).double()
    assert counts[2] == 0
    expected = probabilities.double() * 20_000
    chi = ((counts - expected)[[0, 1, 3, 4]] ** 2 / expected[[0, 1, 3, 4]]).sum().item()
    assert chi < 18.5


def test_draws_at_the_edges_are_possible_tokens() -> None:
    """Would catch an id past the vocabulary, or one that was filtered out, at 0 and just below 1."""
    given = torch.tensor([[-INF, 0.0, -INF, 0.0, -INF]]).expand(2, 5)
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert s.draw(given, edges).tolist() == [1, 3]


class NoFloat64(TorchDispatchMode):
    """Raises for a float64 tensor on a device that has none, as MPS does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.device.type == "mps" and tensor.dtype == torch.float64:
                raise TypeError(f"{func} makes float64 on MPS")
        return made


def test_mps_is_not_asked_for_float64() -> None:
    """It has none: every draw there ended in a TypeError. Fake tensors have a device without the machine."""
    with FakeTensorMode(), NoFloat64():
        given = torch.empty(3, 50, device="mps")
        drawn = s.draw(given, torch.empty(3, dtype=torch.float64))
        assert drawn.device.type == "mps" and drawn.shape == (3,)
        with pytest.raises(TypeError, match="float64 on MPS"):
            given.double()
    assert s.exact_device(torch.device("mps")) == torch.device("cpu")
    assert s.exact_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    for module in (decode, score):
        assert not re.search(r"(?<!\.cpu\(\))\.double\(\)", inspect.getsource(module))


def test_uniforms_are_the_seed_s_own() -> None:
    """torch's generator of that seed, without gaps between blocks: what was drawn before stays reproducible."""
    uniforms = s.Uniforms(5)
    drawn = [uniforms.draw() for _ in range(2 * s.BLOCK)]
    generator = torch.Generator().manual_seed(5)
    blocks = [torch.rand(s.BLOCK, generator=generator, dtype=torch.float64) for _ in range(2)]
    assert drawn == torch.cat(blocks).tolist()


@pytest.mark.parametrize(
    ("field", "value", "option"),
    [
        ("max_tokens", 0, "--max-tokens"),
        ("temperature", -0.1, "--temperature"),
        ("temperature", math.nan, "--temperature"),
        ("temperature", INF, "--temperature"),
        ("top_p", 0.0, "--top-p"),
        ("top_p", 1.01, "--top-p"),
        ("top_k", -1, "--top-k"),
        ("min_p", 1.5, "--min-p"),
        ("repetition_penalty", 0.0, "--repetition-penalty"),
        ("num_samples", 0, "--num-samples"),
        ("seed", -1, "--seed"),
        ("stop", ("",), "--stop"),
    ],
)
def test_impossible_values_name_the_option(field: str, value: object, option: str) -> None:
    """Would catch NaN text, an endless loop, or an error of torch that a person has to read."""
    with pytest.raises(UserError, match=option):
        s.check(replace(OFF, **{field: value}))
    s.check(OFF)
