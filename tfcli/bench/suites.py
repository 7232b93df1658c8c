"""What is timed: tokenizer, prompt reading, decoding and the training step of one model on one machine.

A suite is a function that prepares a ``Case``; what a case costs in FLOPs and bytes comes from ``tfcli.model.cost``, so
that a measured time divides into a share of what the machine can do. Each suite builds its own copy of the model, in
the precision that the command it stands for would use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from tfcli.bench.subject import Subject
from tfcli.bench.timing import Timing, measure
from tfcli.config import ModelConfig, OptimOptions, Sampling
from tfcli.errors import UserError, unknown
from tfcli.model import cost

if TYPE_CHECKING:
    import torch

    from tfcli.runtime import Runtime

DECODED = 128
"""Tokens that the decode suite makes in a call, if the context has room for them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Work ready to be timed, and what one call of it amounts to."""

    work: Callable[[], object]
    amount: float
    """Units (see ``unit``) done by one call."""
    unit: str
    what: str
    """The setting in words."""
    flops: float | None = None
    bytes: float | None = None
    """Bytes that must move through memory, where that is the limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """What this machine reached on the spot: FLOP/s of a large product, bytes/s of reading a large tensor."""

    flops: float
    bytes: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One suite's figures; ``low`` and ``high`` bound the median rate with 95 % confidence."""

    suite: str
    what: str
    unit: str
    amount: float
    timing: Timing
    flops_per_second: float | None
    bytes_per_second: float | None
    peak_memory: int

    @property
    def value(self) -> float:
        """Units a second at the median."""
        return self.amount / self.timing.median

    @property
    def interval(self) -> tuple[float, float]:
        """Units a second that bound the median."""
        fast, slow = self.timing.interval
        return self.amount / slow, self.amount / fast


Suite = Callable[[Subject, "Runtime"], Case]


def chosen(names: Sequence[str]) -> list[str]:
    """The suites that ``names`` (each perhaps several, with commas) ask for, in our order; none asks for all.

    Raises UserError for an unknown one, with the nearest name.
    """
    asked = [name.strip() for item in names for name in item.split(",") if name.strip()]
    for name in asked:
        if name not in SUITES and name != "all":
            raise unknown("suite", name, [*SUITES, "all"])
    return [name for name in SUITES if not asked or name in asked or "all" in asked]


def run(
    names: Sequence[str], subject: Subject, runtime: Runtime, *, repeats: int, on_start: Callable[[str], None]
) -> Iterator[Result]:
    """Time each suite in turn and yield its result as soon as it is there; ``on_start`` is told which comes next.

    Peak memory is the device's during the suite, or where it has none of its own the process's so far.
    """
    import torch

    for name in names:
        on_start(name)
        if runtime.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(runtime.device)
        case = SUITES[name](subject, runtime)
        timing = measure(case.work, repeats=repeats, synchronize=runtime.synchronize)
        yield Result(
            suite=name,
            what=case.what,
            unit=case.unit,
            amount=case.amount,
            timing=timing,
            flops_per_second=case.flops / timing.median if case.flops else None,
            bytes_per_second=case.bytes / timing.median if case.bytes else None,
            peak_memory=runtime.peak_memory(),
        )


def tokenize(subject: Subject, runtime: Runtime) -> Case:
    """Text to ids, by all threads."""
    lines = subject.text.splitlines(keepends=True)
    size = len(subject.text.encode())
    return Case(
        work=lambda: subject.tokenizer.encode_arrays(lines, threads=runtime.threads),
        amount=size / 1e6,
        unit="MB/s",
        what=f"{size / 1e6:.1f} MB of text, {runtime.threads} threads",
    )


def prefill(subject: Subject, runtime: Runtime) -> Case:
    """Reading a prompt as long as the context into a cache, batch 1, with the last position's logits."""
    import torch

    from tfcli.model.cache import KVCache

    config, model = subject.config, subject.build(runtime.dtype)
    tokens = _random_ids(config, (1, config.context), runtime)

    @torch.inference_mode()
    def work() -> torch.Tensor:
        cache = KVCache(config, batch=1, capacity=config.context, dtype=runtime.dtype, device=runtime.device)
        return model.logits(model(tokens, cache=cache)[:, -1])

    return Case(
        work=work,
        amount=config.context,
        unit="tokens/s",
        what=f"a prompt of {config.context} tokens",
        flops=cost.prefill_flops(config, config.context),
    )


def decode(subject: Subject, runtime: Runtime) -> Case:
    """New tokens after a prompt of one, batch 1, drawn as ``generate`` draws them."""
    from tfcli.infer.decode import decode as decode_tokens

    config, model = subject.config, subject.build(runtime.dtype)
    count = min(DECODED, config.context - 1)
    if count < 1:
        raise UserError("a context of one token has no room to decode", hint="leave the decode suite out")
    sampling = Sampling(max_tokens=count, ignore_eos=True)
    return Case(
        work=lambda: list(decode_tokens(model, [[0]], sampling, seeds=[0], eos_id=subject.tokenizer.eos_id)),
        amount=count,
        unit="tokens/s",
        what=f"{count} tokens, batch 1",
        flops=sum(cost.decode_flops(config, length) for length in range(1, count + 1)),
        bytes=sum(cost.decode_bytes(config, length, _precision(runtime)) for length in range(1, count + 1)),
    )


def train(subject: Subject, runtime: Runtime) -> Case:
    """A whole optimizer step as ``Trainer`` takes it: micro-batches, clipping, Muon and AdamW; eager, on random ids."""
    import torch

    from tfcli.tasks import lm
    from tfcli.train.optim import Optimizers, clip

    config, options, plan = subject.config, OptimOptions(), subject.plan
    model = subject.build(torch.float32)
    optimizers = Optimizers(model, options, muon_lr=plan.muon_lr, lr=plan.lr)
    tokens = _random_ids(config, (plan.batch_size, config.context + 1), runtime)

    def work() -> None:
        for micro in torch.split(tokens, plan.micro_batch):
            loss, _ = lm.loss(model, micro, dtype=runtime.dtype, dropout=0.0)
            (loss / plan.tokens_per_step).backward()
        clip(optimizers.named.values(), options.clip)
        optimizers.step(1.0)

    return Case(
        work=work,
        amount=plan.tokens_per_step,
        unit="tokens/s",
        what=f"steps of {plan.batch_size} x {config.context} tokens",
        flops=plan.tokens_per_step * cost.training_flops(config, config.context),
    )


# Small peaks first: where memory is the process's, a suite's peak holds that of those before it.
SUITES: Mapping[str, Suite] = MappingProxyType(
    {"tokenize": tokenize, "decode": decode, "prefill": prefill, "train": train}
)


def ceilings(runtime: Runtime) -> Ceilings:
    """Multiply two large matrices and read a large tensor; the fastest of a few times each is the ceiling."""
    import torch

    cuda = runtime.device.type == "cuda"
    n, numbers = (8192, 1 << 29) if cuda else (2048, 1 << 26)
    a = torch.ones(n, n, dtype=runtime.dtype, device=runtime.device)
    product = measure(lambda: a @ a, repeats=5, synchronize=runtime.synchronize)
    data = torch.ones(numbers, dtype=torch.float32, device=runtime.device)
    reading = measure(lambda: data.sum(), repeats=5, synchronize=runtime.synchronize)
    return Ceilings(flops=2 * n**3 / min(product.seconds), bytes=data.nbytes / min(reading.seconds))


def _random_ids(config: ModelConfig, shape: tuple[int, int], runtime: Runtime) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, shape, generator=generator).to(runtime.device)


def _precision(runtime: Runtime) -> cost.Precision:
    return "bf16" if runtime.precision == "bf16" else "fp32"
