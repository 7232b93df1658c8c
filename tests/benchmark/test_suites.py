"""The work of each suite, counted, and the models it runs on."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tfcli.benchmark import case, fresh, suites
from tfcli.benchmark.attention import watched
from tfcli.benchmark.case import Case, Reading
from tfcli.benchmark.subject import Subject, from_config, from_model, read_text, synthetic_text
from tfcli.config.options import PretrainConfig, Sampling
from tfcli.config.resolve import resolve
from tfcli.errors import RunError, UserError
from tfcli.formats.open import open_path
from tfcli.infer.decode import Decoder
from tfcli.infer.engine import load
from tfcli.model import cost
from tfcli.runtime import Runtime

ALL = ["tokenize", "load", "memory", "decode", "prefill", "batch", "train"]
SETTINGS = ["model.depth=2", "model.width=32", "model.context=16", "tokenizer.vocab_size=320", "train.batch_size=3",
            "train.micro_batch=2"]  # fmt: skip


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime.detect(device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def subject(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    config, _ = resolve(PretrainConfig, sets=SETTINGS)
    folder = tmp_path_factory.mktemp("subject") / "model"
    return from_config(config, "tiny", runtime, folder=folder, text=synthetic_text(20_000))


def timed_case(suite: suites.Suite, subject: Subject, runtime: Runtime) -> Case:
    made = suite(subject, runtime)
    assert isinstance(made, Case)
    return made


def test_chosen_keeps_our_order_and_names_the_nearest() -> None:
    assert suites.chosen([]) == suites.chosen(["all"]) == list(suites.SUITES) == ALL
    assert suites.chosen(["train, decode"]) == suites.chosen(["train", "decode"]) == ["decode", "train"]
    assert suites.chosen([], default=["prefill", "decode"]) == ["decode", "prefill"]
    with pytest.raises(UserError, match="unknown suite 'prefil'") as error:
        suites.chosen(["prefil"])
    assert error.value.hint == "did you mean 'prefill'?"


def test_results_come_one_by_one(subject: Subject, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "ROWS", 4)
    started: list[str] = []
    names = [name for name in ALL if name != "memory"]  # a process of its own, below
    for number, result in enumerate(suites.run(names, subject, runtime, repeats=2, on_start=started.append), 1):
        assert len(started) == number and result.suite == started[-1]
        low, high = result.interval
        assert 0 < low <= result.value <= high and len(result.timing.seconds) == 2
        assert result.peak_memory > 0
        assert [other.name for other in result.against] == (["one by one"] if result.suite == "batch" else [])
    assert started == names


def test_tokenize_encodes_the_whole_text(subject: Subject, runtime: Runtime) -> None:
    case = timed_case(suites.tokenize, subject, runtime)
    ids = [id for line in case.start()() for id in line.tolist()]  # type: ignore[attr-defined]
    assert subject.engine.tokenizer.decode(ids) == subject.text
    assert case.amount == len(subject.text) / 1e6


def test_prefill_and_train_do_the_products_that_cost_says(subject: Subject, runtime: Runtime) -> None:
    for suite in (suites.prefill, suites.train):
        case = timed_case(suite, subject, runtime)
        with FlopCounterMode(display=False) as counter:
            case.start()()
        # torch counts whole T x T attention or (fused) none; Muon's products are not the model's. Within a fifth of
        # the forecast either way at this small a size, once Muon's are taken off.
        extra = 0 if suite is suites.prefill else _muon_flops(subject)
        assert counter.get_total_flops() - extra == pytest.approx(case.flops, rel=0.2)


def _muon_flops(subject: Subject) -> float:
    from tfcli.model.transformer import Transformer
    from tfcli.train.optim import orthogonalize

    total = 0
    for parameter in Transformer(subject.plan.model).blocks.parameters():
        if parameter.ndim == 2:
            with FlopCounterMode(display=False) as counter:
                orthogonalize(torch.ones_like(parameter.detach()[None]))
            total += counter.get_total_flops()
    return total


@pytest.mark.parametrize(
    ("context", "expected"), [(2048, (512, 128)), (600, (472, 128)), (64, (32, 32)), (5, (3, 2)), (4, (2, 2))]
)
def test_a_short_context_is_shared_out(context: int, expected: tuple[int, int]) -> None:
    assert suites.lengths(tiny_models.config(context=context)) == expected
    assert sum(expected) <= context


def test_a_context_without_room_says_so() -> None:
    with pytest.raises(UserError, match="a context of 3 has no room"):
        suites.lengths(tiny_models.config(context=3))


def test_decode_times_the_tokens_after_the_first(
    subject: Subject, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same ids as ``generate``, one step per counted token, and no prefill in the timed part."""
    case = timed_case(suites.decode, subject, runtime)
    prompt, new = subject.prompt(8), 8
    assert subject.engine.generate(prompt, Sampling(max_tokens=new, temperature=0, ignore_eos=True)).ids == case.ids
    assert case.amount == new - 1 and case.what == "8 tokens after 8, batch 1, greedy"
    assert case.flops == sum(cost.decode_flops(subject.config, length) for length in range(9, 16))
    assert case.bytes is not None and case.bytes > 7 * cost.weight_bytes(subject.config, "fp32")
    assert case.details["step"] == "the compiled step" or "operators" in case.details["step"]
    steps: list[int] = []
    step, read = Decoder.step, Decoder.prefill
    monkeypatch.setattr(Decoder, "step", lambda *given: steps.append(1) or step(*given))
    monkeypatch.setattr(Decoder, "prefill", lambda *given: steps.append(8) or read(*given))
    work = case.start()
    assert steps == [8]
    work()
    assert steps == [8] + 7 * [1]


def test_prompts_are_as_long_as_they_are_asked_to_be(subject: Subject) -> None:
    for tokens, at in ((1, 0), (7, 5), (100, 19_990), (3, 10**6)):
        assert len(subject.ids(subject.prompt(tokens, at))) == tokens
    assert subject.prompt(7, 5) != subject.prompt(7, 50)


def test_batch_is_beside_the_same_prompts_one_by_one(subject: Subject, runtime: Runtime) -> None:
    case = timed_case(suites.batch, subject, runtime)
    (side,) = case.beside
    assert case.amount == 64 * 8 and case.what == "64 prompts of 8 to 8 tokens, 8 new ones each"
    results = case.start()()
    assert len({result.prompt for result in results}) > 40  # type: ignore[attr-defined]
    assert side.once() > 0 and side.about() == {"same_texts": 64, "of_texts": 64}


def test_load_makes_an_engine_anew(subject: Subject, runtime: Runtime) -> None:
    case = timed_case(suites.load, subject, runtime)
    engine = case.start()()
    assert engine is not subject.engine and case.unit == "s" and case.amount is None
    assert engine.generate("a", max_tokens=2, seed=1) == subject.engine.generate("a", max_tokens=2, seed=1)  # type: ignore[attr-defined]


def test_memory_is_that_of_a_process_of_its_own(
    subject: Subject, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('a file of the current folder was run')\n")
    monkeypatch.chdir(tmp_path)
    reading = suites.memory(subject, runtime)
    assert isinstance(reading, Reading)
    result = case.taken("memory", reading, repeats=1)
    seen = result.details
    assert result.unit == "MB" and result.value == seen["peak_bytes"] / 1e6 and result.peak_memory == seen["peak_bytes"]
    assert seen["peak_bytes"] >= seen["resident_bytes"] > seen["program_bytes"] > 1e7
    weights = cost.weight_bytes(subject.config, "fp32")
    assert subject.weight_bytes == weights, "each tensor once, a tied one too"
    assert (
        seen["forecast_bytes"] == weights + 16 * cost.kv_bytes_per_token(subject.config, "fp32") + seen["program_bytes"]
    )
    assert seen["first_token_seconds"] > 0


def test_a_process_that_fails_says_why(runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"a process that generates failed: .*no such model"):
        fresh.started(tmp_path / "none", runtime, quantize=None, prompt="a", tokens=2)


def test_train_moves_the_weights_by_micro_batches(
    subject: Subject, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tfcli.model import transformer

    built: list[transformer.Transformer] = []
    monkeypatch.setattr(transformer, "initialize", lambda model, seed: built.append(model) or _fill(model))
    case = timed_case(suites.train, subject, runtime)
    before = [parameter.detach().clone() for parameter in built[0].parameters()]
    case.start()()
    assert case.amount == 3 * 16
    assert any(not torch.equal(a, b) for a, b in zip(before, built[0].parameters(), strict=True))


@torch.no_grad()
def _fill(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.1)


def test_attention_kernels_are_named() -> None:
    """By the operator's own choice of backend, and by its parts where autograd decomposes it."""
    q = torch.ones(1, 2, 4, 8)

    def whole() -> torch.Tensor:
        with torch.inference_mode():
            return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    out, seen = watched(whole)
    assert seen == ["flash_attention"] and torch.equal(out, torch.ones_like(q))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert watched(whole)[1] == ["math"]
    assert watched(lambda: F.scaled_dot_product_attention(q, q, q))[1] == ["flash_attention"]
    assert watched(lambda: q + q)[1] == []


def test_ceilings_are_rates(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    peak = suites.ceilings(runtime)
    assert peak.flops > 1e8 and peak.bytes > 1e7


def test_a_model_is_measured_in_its_own_shape(subject: Subject, runtime: Runtime, tmp_path: Path) -> None:
    path = tiny_models.save(tmp_path / "m", context=1024)
    loaded = from_model(open_path(path), runtime, batch_size=2, text="Some text.\n")
    assert loaded.config == load(path, device="cpu", precision="fp32").model.config
    # A step of training is no longer than ours are, whatever the model could see.
    assert loaded.plan.batch_size == 2 and loaded.plan.model.context == 512 and loaded.config.context == 1024
    with pytest.raises(UserError, match="no such model"):
        from_model(open_path(tmp_path / "n"), runtime)


def test_synthetic_text_is_the_same_for_a_seed_and_follows_zipf() -> None:
    text = synthetic_text(200_000)
    assert text == synthetic_text(200_000) != synthetic_text(200_000, seed=1)
    assert 200_000 <= len(text.encode()) < 201_000
    words = text.lower().replace(".", "").split()
    counts = sorted((words.count(word) for word in set(words[:3000])), reverse=True)
    # The k-th most frequent word is about 1 / k as frequent as the first.
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.3)


def test_text_of_a_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tfcli.benchmark.subject.TEXT_BYTES", 100)
    path = tmp_path / "a.txt"
    path.write_text("all work\n" * 50)
    assert read_text(path) == ("all work\n" * 50)[:100]
    path.write_text("")
    with pytest.raises(UserError, match="no text"):
        read_text(path)


def test_text_of_a_pipe_leaves_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    reading, writing = os.pipe()
    os.write(writing, b"words")
    os.close(writing)
    assert read_text(Path(f"/dev/fd/{reading}")) == "words"
    os.close(reading)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_other_families_and_fewer_bits_are_measured_too(family: str, runtime: Runtime, tmp_path: Path) -> None:
    """Everything that ``generate`` loads can be measured; 4-bit weights count as such."""
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    tiny_models.foreign(family, vocab_size=400, **ends).save_pretrained(tmp_path)
    tiny_models.tokenizer().save(tmp_path / "tokenizer.model")
    subject = from_model(open_path(tmp_path), runtime, text="The king had three daughters.\n" * 40, quantize="int4")
    whole = from_model(open_path(tmp_path), runtime, text=subject.text)
    assert subject.weight_bytes < whole.weight_bytes == cost.weight_bytes(whole.config, "fp32")
    for result in suites.run(["tokenize", "decode", "prefill", "train"], subject, runtime, repeats=1, on_start=str):
        assert result.value > 0
    few, many = (timed_case(suites.decode, each, runtime).bytes for each in (subject, whole))
    assert few is not None and many is not None and few < many
