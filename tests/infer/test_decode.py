"""The token loop: cached equals uncached, a batch equals its rows one by one."""

from collections.abc import Iterator

import pytest
import torch
from tiny_models import model

from tfcli.config.options import Sampling
from tfcli.errors import RunError, UserError
from tfcli.infer import step as stepper
from tfcli.infer.batching import Request
from tfcli.infer.decode import Decoder, Step, decode, decode_reference
from tfcli.model.cache import KVCache
from tfcli.model.transformer import Transformer
from tfcli.native import ops

EOS = 1
GREEDY = Sampling(temperature=0.0, max_tokens=20, ignore_eos=True)
SAMPLED = Sampling(temperature=0.9, top_p=0.9, repetition_penalty=1.2, max_tokens=20, ignore_eos=True)
SETTINGS = pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randint(3, 400, (length,), generator=generator).tolist() for length in lengths]


def run(core: Transformer, given: list[list[int]], sampling: Sampling, seeds: list[int] | None = None, eos: int = EOS,
        stop_at: int | None = None) -> list[list[Step]]:  # fmt: skip
    """The steps of every row."""
    rows: list[list[Step]] = [[] for _ in range(len(given) * sampling.num_samples)]
    seeds = seeds or list(range(len(rows)))
    ended = None if stop_at is None else (lambda row, id: len(rows[row]) + 1 == stop_at)
    for steps in decode(core, given, sampling, seeds=seeds, eos_id=eos, ended=ended):
        for step in steps:
            rows[step.row].append(step)
    return rows


@pytest.fixture(params=[True, False], ids=["compiled", "eager"], autouse=True)
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs with the compiled step and with PyTorch's operators."""
    if request.param:
        assert ops.ready(), ops.unavailable()
    else:
        monkeypatch.setattr(stepper, "supports", lambda core: False)


def ids(rows: list[list[Step]]) -> list[list[int | None]]:
    return [[step.id for step in row] for row in rows]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@SETTINGS
def test_damaged_weights_are_said(sampling: Sampling, bad: float) -> None:
    """Would catch "index out of bounds", and text made of nothing."""
    core = model()
    with torch.no_grad():
        core.norm.weight[3] = bad
    with pytest.raises(RunError, match="not finite"):
        run(core, prompts(5, 9), sampling)


@SETTINGS
def test_cached_equals_uncached(sampling: Sampling) -> None:
    """Would catch a stale key, a wrong position, and log-probabilities of the filtered distribution."""
    core = model()
    for seed, prompt in enumerate(prompts(1, 5, 12)):
        expected = decode_reference(core, prompt, sampling, seed=seed, eos_id=EOS)
        (row,) = run(core, [prompt], sampling, [seed])
        assert [step.id for step in row] == [id for id, _ in expected]
        logprobs = [step.logprob for step in row]
        assert logprobs == pytest.approx([logprob for _, logprob in expected], abs=1e-4)


@SETTINGS
def test_batch_equals_single(sampling: Sampling) -> None:
    """Padding, other rows and rows that leave change nothing: the most reported bug of batched generation."""
    core = model()
    given = prompts(3, 12, 1, 7, 12, 5)
    together = run(core, given, sampling, [4, 5, 6, 7, 8, 9])
    for index, prompt in enumerate(given):
        (alone,) = run(core, [prompt], sampling, [4 + index])
        assert ids([alone]) == ids([together[index]])
        assert [s.finish for s in alone] == [s.finish for s in together[index]]


def test_bf16_batch_agrees_with_single_where_there_is_a_margin() -> None:
    """Sums in bf16 differ in the last bits: the same token must win wherever it leads by more than that."""
    core = model().to(torch.bfloat16)
    given = prompts(3, 12, 1, 7)
    together = run(core, given, GREEDY)
    for prompt, row in zip(given, together, strict=True):
        window = list(prompt)
        for step in row:
            with torch.no_grad():
                logits = core.logits(core(torch.tensor([window]))[:, -1])[0].float()
            top = logits.topk(2).values
            if top[0] - top[1] > 0.25:
                assert step.id == int(logits.argmax())
            assert step.id is not None
            assert top[0] - logits[step.id] <= 0.25
            window.append(step.id)


@SETTINGS
def test_rows_enter_as_others_leave(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    """Continuous batching: three places for eleven prompts, more than fit at once; each as if it were alone."""
    monkeypatch.setattr("tfcli.infer.batching.ROWS", 3)
    core, given = model(), prompts(3, 12, 1, 7, 20, 5, 2, 9, 30, 4, 6)
    stops = [2, 20, 5, 20, 1, 9, 20, 20, 20, 3, 20]
    seen: dict[int, list[int | None]] = {}
    taken = 0

    def requests() -> Iterator[Request]:
        nonlocal taken
        for number, prompt in enumerate(given):
            taken += 1
            yield Request(prompt, [number])

    monkeypatch.setattr("tfcli.infer.batching.LOOK_AHEAD", 2)
    widest = 0
    for steps in Decoder(core).run(
        requests(), sampling, eos_ids=(EOS,), ended=lambda row, id: len(seen.get(row, [])) + 1 == stops[row]
    ):
        widest = max(widest, len(steps))
        assert taken <= len(seen) + 3 + 2, "requests are taken as there is room, not before"
        for step in steps:
            seen.setdefault(step.row, []).append(step.id)
    assert widest == 3
    for number, prompt in enumerate(given):
        (alone,) = ids(run(core, [prompt], sampling, [number]))
        assert seen[number] == alone[: stops[number]]


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch 64 rows of a whole context each: as many rows as the bytes allow, and one at least."""
    core = model()
    row = 2 * 2 * 2 * 8 * 4  # bytes of a position: keys and values, layers, heads, width, fp32
    widest: list[int] = []
    for allowed in (4 * 25 * row, 1):
        monkeypatch.setattr("tfcli.infer.batching.CACHE_BYTES", allowed)
        requests = [Request(prompt, [0]) for prompt in prompts(5, 5, 5, 5, 5, 5)]
        widest.append(max(map(len, Decoder(core).run(requests, GREEDY, eos_ids=()))))
    assert widest == [4, 1]


def test_samples_share_the_bounded_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch samples of one prompt that take more rows than the bytes allow; they come in turns, all the same."""
    core, row = model(), 2 * 2 * 2 * 8 * 4  # bytes of a position, as above
    sampling = Sampling(temperature=1.0, max_tokens=8, ignore_eos=True, num_samples=7)
    given, seeds = prompts(5, 9), list(range(14))
    expected = ids(run(core, given, sampling, seeds))
    caches: list[int] = []
    made = KVCache.__init__

    def watched(self: KVCache, *args: object, **options: int) -> None:
        caches.append(options["batch"])
        made(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(KVCache, "__init__", watched)
    monkeypatch.setattr("tfcli.infer.batching.CACHE_BYTES", 3 * 17 * row)
    assert ids(run(core, given, sampling, seeds)) == expected
    assert caches and max(caches) == 3


def test_samples_are_rows_of_their_own() -> None:
    """num_samples repeats the prompt's cache: would catch samples in another order, or all alike."""
    core, given = model(), prompts(4, 9)
    sampling = Sampling(temperature=1.0, max_tokens=8, ignore_eos=True, num_samples=3)
    rows = ids(run(core, given, sampling, [1, 2, 3, 4, 5, 6]))
    for index in range(6):
        one = Sampling(temperature=1.0, max_tokens=8, ignore_eos=True)
        assert ids(run(core, [given[index // 3]], one, [index + 1])) == [rows[index]]
    assert len({tuple(row) for row in rows}) == 6


def test_rows_finish_each_for_its_own_reason() -> None:
    """Would catch a row that goes on after its end, and an end token among the ids."""
    core, given = model(), prompts(3, 6, 9)
    free = ids(run(core, given, GREEDY))
    eos = free[1][4]
    assert eos is not None
    rows = run(core, given, Sampling(temperature=0.0, max_tokens=15), eos=eos)
    for row, whole in zip(rows, free, strict=True):
        ends = whole.index(eos) if eos in whole[:15] else None
        if ends is None:
            assert [step.id for step in row] == whole[:15]
            assert row[-1].finish == "length"
        else:
            assert [step.id for step in row] == [*whole[:ends], None]
            assert row[-1].finish == "stop"
        assert all(step.finish is None for step in row[:-1])
    assert rows[1][-1].finish == "stop"


def test_ended_stops_a_row() -> None:
    """The text edge decides; the loop reports it."""
    (row,) = run(model(), prompts(3), GREEDY, stop_at=4)
    assert len(row) == 4
    assert row[-1].finish == "stop_string"


@pytest.mark.parametrize("length", [1, 20, 31, 32])
def test_the_context_is_used_whole(length: int) -> None:
    """32 tokens are read and one more is predicted: 33 - length new ones, in a batch with shorter rows as well."""
    core = model()
    sampling = Sampling(temperature=0.0, max_tokens=100, ignore_eos=True)
    given = prompts(length, 5)
    rows = run(core, given, sampling)
    assert len(rows[0]) == 33 - length
    assert len(rows[1]) == 28
    assert rows[0][-1].finish == rows[1][-1].finish == "context"
    expected = decode_reference(core, given[0], sampling, seed=0, eos_id=EOS)
    assert [step.id for step in rows[0]] == [id for id, _ in expected]


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    """Would catch a prompt cut in silence."""
    with pytest.raises(UserError, match="the prompt has 33 tokens, the model's context is 32") as error:
        run(model(), prompts(33), GREEDY)
    assert "--overflow slide" in str(error.value.hint)


@SETTINGS
def test_slide_equals_reference(sampling: Sampling) -> None:
    """A full window keeps its last half, read anew: exact, in a batch whose rows slide at different times."""
    from dataclasses import replace

    core = model()
    sampling = replace(sampling, max_tokens=70, overflow="slide")
    given = prompts(40, 3, 32, 20)
    rows = run(core, given, sampling, [1, 2, 3, 4])
    for seed, (prompt, row) in enumerate(zip(given, rows, strict=True), 1):
        expected = decode_reference(core, prompt, sampling, seed=seed, eos_id=EOS)
        assert [step.id for step in row] == [id for id, _ in expected]
        assert len(row) == 70
        assert row[-1].finish == "length"


@SETTINGS
@pytest.mark.parametrize("kept", [1, 2])
def test_slide_keeps_the_beginning_of_text(sampling: Sampling, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a window that slides off what the model's every text begins with, also from a long prompt."""
    from dataclasses import replace

    core = model()
    sampling = replace(sampling, max_tokens=70, overflow="slide")
    windows: list[list[int]] = []
    prefill = Decoder.prefill

    def watched(self: Decoder, given: list[list[int]], *more: object) -> torch.Tensor:
        windows.extend(list(window) for window in given)
        return prefill(self, given, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "prefill", watched)
    given = prompts(40, 3, 32, 20)
    requests = [Request(prompt, [seed], kept=kept) for seed, prompt in enumerate(given, 1)]
    rows: list[list[int | None]] = [[] for _ in given]
    for steps in Decoder(core).run(requests, sampling, eos_ids=(EOS,)):
        for step in steps:
            rows[step.row].append(step.id)
    begins = {tuple(prompt[:kept]) for prompt in given}
    assert len(windows) > 12 and {tuple(window[:kept]) for window in windows} == begins
    for seed, (prompt, row) in enumerate(zip(given, rows, strict=True), 1):
        expected = decode_reference(core, prompt, sampling, seed=seed, eos_id=EOS, kept=kept)
        assert row == [id for id, _ in expected]


def test_nothing_is_left_switched_by_an_unfinished_generator() -> None:
    """Would catch inference mode that leaks into the caller between two steps."""
    core = model()
    steps = decode(core, prompts(3), GREEDY, seeds=[0], eos_id=EOS)
    next(steps)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    core.embed.weight.sum().backward()


def test_the_global_generator_is_not_touched() -> None:
    """Generation during training must not change the training."""
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    run(model(), prompts(3), SAMPLED)
    assert torch.equal(torch.rand(1), expected)
