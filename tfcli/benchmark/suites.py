"""The suites: tokenizer, loading, prefill, decoding, batches and the training step of one model on one machine.

A suite is a function that prepares a ``Case``. Generation goes through ``Engine`` as in ``tfcli generate``, so that
users get what is measured. The FLOPs and bytes of a case come from ``tfcli.model.cost``, so that a measured time gives
the share of the machine's peak.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tfcli.benchmark import fresh
from tfcli.benchmark.case import Case, Reading, Result, Side, stopwatch, taken, timed
from tfcli.benchmark.peers import Peer
from tfcli.benchmark.subject import Subject
from tfcli.benchmark.timing import measure
from tfcli.config.model import ModelConfig
from tfcli.config.options import OptimOptions, Sampling
from tfcli.errors import UserError, unknown
from tfcli.model import cost

if TYPE_CHECKING:
    from tfcli.infer.engine import Engine, Generation
    from tfcli.runtime import Runtime

PROMPT, DECODED = 512, 128
"""Prompt tokens and new tokens, if the context has room for them."""
ROWS, ROW_PROMPT, ROW_DECODED = 64, 256, 32
"""Prompts of the batch suite, tokens of the longest one, new tokens of each."""
PROCESSES = 3
"""The most processes that the memory suite starts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """Peaks measured on this machine: FLOP/s of a large product, bytes/s of reading a large tensor."""

    flops: float
    bytes: float


Suite = Callable[[Subject, "Runtime"], Case | Reading]


def chosen(names: Sequence[str], default: Sequence[str] = ("all",)) -> list[str]:
    """Return the suites in ``names``, which may be comma-separated, in our order; those of ``default`` if it is empty.

    Raises UserError for an unknown one.
    """
    listed = [name.strip() for item in names for name in item.split(",") if name.strip()] or list(default)
    for name in listed:
        if name not in SUITES and name != "all":
            raise unknown("suite", name, [*SUITES, "all"])
    return [name for name in SUITES if name in listed or "all" in listed]


def run(
    names: Sequence[str],
    subject: Subject,
    runtime: Runtime,
    *,
    repeats: int,
    peers: Sequence[Peer] = (),
    on_start: Callable[[str], None],
) -> Iterator[Result]:
    """Time one suite after the other and yield each result; ``on_start`` is called with the name of the next one."""
    import torch

    for name in names:
        on_start(name)
        if runtime.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(runtime.device)
        with runtime.active():
            work = SUITES[name](subject, runtime)
            if isinstance(work, Reading):
                result = taken(name, work, repeats=repeats)
            else:
                result = timed(name, work, runtime, repeats=repeats, peers=peers)
        yield result


def tokenize(subject: Subject, runtime: Runtime) -> Case:
    """Encode text with all threads."""
    lines, tokenizer = subject.text.splitlines(keepends=True), subject.engine.tokenizer
    size = len(subject.text.encode())
    return Case(
        start=lambda: lambda: tokenizer.encode_arrays(lines, threads=runtime.threads),
        amount=size / 1e6,
        unit="MB/s",
        what=f"{size / 1e6:.1f} MB of text, {runtime.threads} threads",
    )


def load(subject: Subject, runtime: Runtime) -> Case:
    """Load an engine from the path, repeatedly in one process."""
    return Case(start=lambda: subject.load, amount=None, unit="s", what="from the path to an engine")


def memory(subject: Subject, runtime: Runtime) -> Reading:
    """Measure the peak memory of a fresh process that loads the model and generates, and compare the estimate."""
    config = subject.config
    prompt, new = lengths(config)
    text, precision = subject.prompt(prompt), _precision(runtime)

    def read() -> tuple[float, Mapping[str, Any]]:
        seen = fresh.started(subject.path, runtime, quantize=subject.quantize, prompt=text, tokens=new)
        weights = subject.weight_bytes
        cache = (prompt + new) * cost.kv_bytes_per_token(config, precision)
        forecast = weights + cache + seen["program_bytes"]
        parts = {"forecast_bytes": forecast, "forecast_weights_bytes": weights, "forecast_cache_bytes": cache}
        return seen["peak_bytes"] / 1e6, {**parts, **seen}

    return Reading(read=read, unit="MB", what=f"{prompt} + {new} tokens in a fresh process", repeats=PROCESSES)


def decode(subject: Subject, runtime: Runtime) -> Case:
    """Stream new tokens after the first as ``generate`` does: batch 1, greedy, with their text."""
    config, engine = subject.config, subject.engine
    prompt, new = lengths(config)
    text, sampling = subject.prompt(prompt), _greedy(new)
    generated = engine.generate(text, sampling)
    positions = range(generated.prompt_tokens + 1, generated.prompt_tokens + len(generated.ids))

    def start() -> Callable[[], object]:
        events = engine.stream(text, sampling)
        next(events)  # prefill and the first token
        return lambda: deque(events, maxlen=0)

    return Case(
        start=start,
        amount=len(positions),
        unit="tokens/s",
        what=f"{len(generated.ids)} tokens after {generated.prompt_tokens}, batch 1, greedy",
        flops=sum(cost.decode_flops(config, length) for length in positions),
        bytes=sum(_step_bytes(subject, length, _precision(runtime)) for length in positions),
        ids=generated.ids,
        details={"step": _step(engine)},
    )


def prefill(subject: Subject, runtime: Runtime) -> Case:
    """Read a prompt and generate its first token."""
    from tfcli.benchmark.attention import watched

    engine = subject.engine
    text, sampling = subject.prompt(lengths(subject.config)[0]), _greedy(1)
    generated, attention = watched(lambda: engine.generate(text, sampling))
    return Case(
        start=lambda: lambda: list(engine.stream(text, sampling)),
        amount=generated.prompt_tokens,
        unit="tokens/s",
        what=f"a prompt of {generated.prompt_tokens} tokens",
        flops=cost.prefill_flops(subject.config, generated.prompt_tokens),
        ids=generated.ids,
        details={"attention": attention},
    )


def batch(subject: Subject, runtime: Runtime) -> Case:
    """Continue prompts of mixed length in one call, and the same ones one by one."""
    config, engine = subject.config, subject.engine
    new = max(1, min(ROW_DECODED, config.context // 2))
    longest = max(1, min(ROW_PROMPT, config.context - new))
    # From 8 tokens (or fewer) to the longest, log-uniform: short prompts are more frequent than long ones.
    shortest = min(8, longest)
    sizes = [round(shortest * (longest / shortest) ** (row / (ROWS - 1))) for row in range(ROWS)]
    random.Random(0).shuffle(sizes)
    prompts = [subject.prompt(size, at=row * 1024) for row, size in enumerate(sizes)]
    sampling, seconds = _greedy(new), stopwatch(runtime)

    def together() -> list[Generation]:
        return list(engine.generate_batch(prompts, sampling))

    alone: list[str] = []

    def apart() -> None:
        alone[:] = [engine.generate(prompt, sampling).text for prompt in prompts]

    def about() -> Mapping[str, Any]:
        same = sum(result.text == text for result, text in zip(results, alone, strict=True))
        return {"same_texts": same, "of_texts": ROWS}

    results = together()
    flops = sum(cost.prefill_flops(config, result.prompt_tokens) for result in results) + sum(
        cost.decode_flops(config, result.prompt_tokens + more)
        for result in results
        for more in range(1, len(result.ids))
    )
    return Case(
        start=lambda: together,
        amount=sum(len(result.ids) for result in results),
        unit="tokens/s",
        what=f"{ROWS} prompts of {min(sizes)} to {max(sizes)} tokens, {new} new ones each",
        flops=flops,
        beside=(Side(name="one by one", once=lambda: seconds(apart), about=about),),
    )


def train(subject: Subject, runtime: Runtime) -> Case:
    """Take a whole optimizer step as ``Trainer`` does: micro-batches, clipping, Muon and AdamW; eager, on random ids.

    The weights are random too, in fp32 as in a run; the time of a step does not depend on their values.
    """
    import torch

    from tfcli.model.transformer import Transformer, initialize
    from tfcli.tasks.lm import task as lm
    from tfcli.train.optim import Optimizers, clip

    options, plan = OptimOptions(), subject.plan
    config = plan.model
    model = Transformer(config)
    initialize(model, seed=0)
    model.to(runtime.device)
    optimizers = Optimizers(model, options, muon_lr=plan.muon_lr, lr=plan.lr)
    shape, generator = (plan.batch_size, config.context + 1), torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, shape, generator=generator).to(runtime.device)

    def work() -> None:
        for micro in torch.split(tokens, plan.micro_batch):
            loss, _ = lm.loss(model, micro, dtype=runtime.dtype, dropout=0.0)
            (loss / plan.tokens_per_step).backward()
        clip(optimizers.named.values(), options.clip)
        optimizers.step(1.0)

    return Case(
        start=lambda: work,
        amount=plan.tokens_per_step,
        unit="tokens/s",
        what=f"steps of {plan.batch_size} x {config.context} tokens",
        flops=plan.tokens_per_step * cost.training_flops(config, config.context),
    )


# Small peaks first: the peak of a process includes those of earlier suites.
SUITES: Mapping[str, Suite] = MappingProxyType(
    {suite.__name__: suite for suite in (tokenize, load, memory, decode, prefill, batch, train)}
)


def lengths(config: ModelConfig) -> tuple[int, int]:
    """Return the prompt tokens and new tokens that fit the context. Raises UserError for one that is too short."""
    new = min(DECODED, config.context // 2)
    if new < 2:
        raise UserError(f"a context of {config.context} has no room to generate", hint="choose suites with --suite")
    return min(PROMPT, config.context - new), new


def ceilings(runtime: Runtime) -> Ceilings:
    """Multiply two large matrices and read a large tensor; the fastest of a few repeats is the peak."""
    import torch

    cuda = runtime.device.type == "cuda"
    n, numbers = (8192, 1 << 29) if cuda else (2048, 1 << 26)
    seconds = stopwatch(runtime)
    a = torch.ones(n, n, dtype=runtime.dtype, device=runtime.device)
    with runtime.active():
        product = measure(lambda: seconds(lambda: a @ a), repeats=5)
        data = torch.ones(numbers, dtype=torch.float32, device=runtime.device)
        reading = measure(lambda: seconds(lambda: data.sum()), repeats=5)
    return Ceilings(flops=2 * n**3 / min(product.seconds), bytes=data.nbytes / min(reading.seconds))


def _step(engine: Engine) -> str:
    """Describe what runs a decoding step."""
    if (why := engine.decoder.eager_because) is not None:
        return f"PyTorch's operators, one by one: {why}"
    return "recorded CUDA graphs" if engine.runtime.device.type == "cuda" else "the compiled step"


def _step_bytes(subject: Subject, length: int, precision: cost.Precision) -> float:
    """Return ``cost.decode_bytes`` with the weights as they are held, quantized or not."""
    config = subject.config
    weights = cost.decode_bytes(config, 0, precision) - cost.kv_bytes_per_token(config, precision)
    cache = cost.decode_bytes(config, length, precision) - weights
    return cache + weights * subject.weight_bytes / cost.weight_bytes(config, precision)


def _greedy(tokens: int) -> Sampling:
    return Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)


def _precision(runtime: Runtime) -> cost.Precision:
    return "bf16" if runtime.precision == "bf16" else "fp32"
