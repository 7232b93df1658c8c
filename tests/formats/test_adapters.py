"""Adapters in PEFT's format: peft says what they compute, and none is put on a base that is not its own."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
import torch
from safetensors.torch import load_file, save_file
from tiny_models import cpu, foreign, model, save, tokenizer

from tfcli.config.options import LoraOptions
from tfcli.errors import UserError
from tfcli.formats import convert
from tfcli.formats.hf import adapters
from tfcli.formats.hf import directory as hf
from tfcli.formats.open import open_path
from tfcli.model import lora
from tfcli.model.transformer import Transformer

IDS = torch.randint(0, 90, (2, 12), generator=torch.Generator().manual_seed(1))
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gpt2", "bert"]


def base(family: str, directory: Path, **changes: Any) -> tuple[Any, Transformer]:
    """transformers' model and ours of the same weights."""
    theirs = foreign(family, **changes)
    theirs.save_pretrained(directory)
    return theirs, hf.load_model(directory, runtime=cpu())


def trained(core: Transformer, **options: Any) -> Transformer:
    generator = torch.Generator().manual_seed(5)
    for layer in lora.attach(core, LoraOptions(**{"rank": 3, **options}), seed=1).values():
        with torch.no_grad():
            layer.b.normal_(0.0, 0.3, generator=generator)
    return core


@torch.no_grad()
def ours(core: Transformer) -> torch.Tensor:
    hidden = core(IDS)
    return core.logits(hidden) if core.config.architecture.causal else hidden


@torch.no_grad()
def theirs_of(model: Any) -> torch.Tensor:
    out = model(IDS)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [(), ("q", "v"), ("ffn.down",)], ids=["all", "qv", "down"])
def test_peft_puts_ours_on_the_model_of_transformers(tmp_path: Path, family: str, targets: tuple[str, ...]) -> None:
    """Every name, scale and fused matrix of each family; would also catch targets that PEFT finds too many of."""
    peft = pytest.importorskip("peft")
    theirs, core = base(family, tmp_path / "base")
    trained(core, targets=targets)
    adapters.save(tmp_path / "adapter", core, base=tmp_path / "base")
    before = theirs_of(theirs)
    with warnings.catch_warnings():  # of missing keys, say, but not of what peft calls in transformers
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        tuned = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    expected = theirs_of(tuned)
    assert (expected - before).abs().max() > 0.05
    torch.testing.assert_close(ours(core), expected, atol=1e-4, rtol=1e-4)
    again = hf.load_model(tmp_path / "base", runtime=cpu())
    adapters.load(tmp_path / "adapter", again)
    torch.testing.assert_close(ours(again), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha_pattern": 3}], ids=["plain", "rs", "pattern"])
def test_what_peft_trained_is_read(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    theirs, core = base(family, tmp_path / "base")
    expected = theirs_of(theirs)
    if "alpha_pattern" in settings:  # of the second layer
        settings = {"alpha_pattern": {{"gpt2": r"h\.1\..*", "bert": r"layer\.1\..*"}.get(family, r"layers\.1\..*"): 3}}
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", fan_in_fan_out=family == "gpt2",
        exclude_modules=["pooler.dense"] if family == "bert" else None, **settings,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        tuned = peft.get_peft_model(theirs, config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)
    tuned.save_pretrained(tmp_path / "adapter")
    made = adapters.load(tmp_path / "adapter", core)
    assert all(layer.rank <= 4 for layer in made.values())
    out = theirs_of(tuned)
    assert (out - expected).abs().max() > 0.05
    torch.testing.assert_close(ours(core), out, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_convert_merges_what_peft_merges(tmp_path: Path, family: str) -> None:
    """The directory that --merge writes is peft's merge_and_unload, as transformers reads both."""
    peft = pytest.importorskip("peft")
    import transformers

    theirs, core = base(family, tmp_path / "base", vocab_size=400, bos_token_id=1, eos_token_id=2)
    tokenizer().save(tmp_path / "base" / "tokenizer.model")
    adapters.save(tmp_path / "adapter", trained(core), base=tmp_path / "base", chat_template="{{ messages }}")
    made = convert.convert(tmp_path / "base", tmp_path / "out", to="hf", merge=tmp_path / "adapter")
    assert made.merge_delta is not None and made.merge_delta <= 1e-4 * made.largest_logit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        expected = theirs_of(peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").merge_and_unload())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(theirs_of(again), expected, atol=1e-4, rtol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages }}"


@pytest.mark.parametrize("type", ["f16", "q8_0", "q4_1"])
def test_adapters_of_a_file_in_4_bits_are_merged_into_files(tmp_path: Path, type: str) -> None:
    """Matrices without adapters are requantized too; a directory of adapters converts by itself."""
    source = tiny_gguf.save(tmp_path / "m.gguf", tiny_gguf.config("llama"), type="Q4_1", tokenizer=tokenizer())
    core, _ = open_path(source).load(runtime=cpu())
    adapters.save(tmp_path / "adapter", trained(core, targets=("q", "v")), base=source)
    made = convert.convert(source, tmp_path / "a.gguf", to="gguf", type=type, merge=tmp_path / "adapter")
    assert made.merge_delta is not None and made.merge_delta <= 1e-4 * made.largest_logit
    assert made.logit_change <= {"f16": 0.01, "q8_0": 0.1, "q4_1": 1.0}[type] * made.largest_logit
    convert.convert(tmp_path / "adapter", tmp_path / "b", to="hf")
    again, _ = open_path(tmp_path / "b").load(runtime=cpu())
    torch.testing.assert_close(ours(again), ours(core), atol=1e-4, rtol=1e-4)


def test_a_merge_with_another_base_leaves_nothing(tmp_path: Path) -> None:
    save(tmp_path / "base", seed=1)
    with pytest.raises(UserError, match="an adapter for another model"):
        convert.convert(tmp_path / "base", tmp_path / "out", to="hf", merge=saved(tmp_path / "adapter"))
    assert not (tmp_path / "out").exists()


def saved(directory: Path, **options: Any) -> Path:
    adapters.save(directory, trained(model(), **options), base="some/base")
    return directory


def test_weights_that_are_given_are_those_that_are_written(tmp_path: Path) -> None:
    """The best of a run, not the last; and nothing of the base goes along."""
    core = trained(model())
    best = {name: torch.full_like(value, 0.5) for name, value in lora.trainable(core).items()}
    adapters.save(tmp_path, core, base="b", weights=best, chat_template="{{ messages }}")
    stored = load_file(tmp_path / adapters.WEIGHTS)
    assert all((value == 0.5).all() for value in stored.values())
    assert sum(value.numel() for value in stored.values()) == sum(value.numel() for value in best.values())
    assert (tmp_path / adapters.TEMPLATE).read_text() == "{{ messages }}"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [adapters.CONFIG, adapters.WEIGHTS, adapters.TEMPLATE]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "an adapter for another model: its norms are different.*names some/base as its base"),
        ({"depth": 1}, "another model: this model has no model.layers.1"),
        ({"ffn_width": 40}, "another model: .*mlp.gate_proj has 48 x 32, here 40 x 32"),
    ],
)
def test_another_base_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    core = model(**changes)
    with pytest.raises(UserError, match=message):
        adapters.load(saved(tmp_path), core)
    assert not lora.adapters(core)


def test_the_base_in_fewer_bits_is_the_same_base_and_is_named(tmp_path: Path) -> None:
    """All precisions of a model share the norms; a note says that its matrices differ."""
    from tfcli.model.quant.quantize import Quantization, quantize_model

    notes: list[str] = []
    saved(tmp_path)
    adapters.load(tmp_path, model().to(torch.bfloat16), on_note=notes.append)
    assert notes == []
    adapters.load(tmp_path, quantize_model(model(), Quantization(bits=4)), on_note=notes.append)
    assert len(notes) == 1 and "trained on other matrices: those of some/base" in notes[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is 'True', which tfcli does not support"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"lora_alpha": "x"}, "the alpha of .* is 'x'"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern has '\('"),
    ],
)
def test_settings_that_the_core_has_not_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = saved(tmp_path) / adapters.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        adapters.load(tmp_path, model())


def test_what_is_damaged_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    for name, message in ((adapters.WEIGHTS, "no adapter_model"), (adapters.CONFIG, "no adapter_config")):
        shutil.copytree(tmp_path / "a", tmp_path / name)
        (tmp_path / name / name).unlink()
        with pytest.raises(UserError, match=message):
            adapters.load(tmp_path / name, model())
    tensors = load_file(tmp_path / "a" / adapters.WEIGHTS)
    name = next(name for name in tensors if "lora_A" in name)
    for change, message in (
        ({name: tensors[name][:1].clone()}, "do not fit each other"),
        ({"base_model.model.lm_head.weight": torch.zeros(2, 2)}, "neither LoRA matrices"),
    ):
        save_file(tensors | change, tmp_path / "a" / adapters.WEIGHTS)
        with pytest.raises(UserError, match=message):
            adapters.load(tmp_path / "a", model())
    (tmp_path / "a" / adapters.WEIGHTS).write_bytes(b"\x08\0\0")
    with pytest.raises(UserError, match="cut short"):
        adapters.load(tmp_path / "a", model())


def test_a_quantized_file_learns_and_its_adapter_comes_back(tmp_path: Path) -> None:
    """QLoRA from a GGUF: a step lowers the loss, in bf16 too, and what was saved computes the same."""
    source = tiny_gguf.save(tmp_path / "m.gguf", tiny_gguf.config("llama"), type="Q4_1", tokenizer=tokenizer())
    for precision in ("fp32", "bf16"):
        core, _ = open_path(source).load(runtime=cpu(precision), dtype=torch.float32)
        lora.attach(core, LoraOptions(rank=4), seed=0)
        dtype = cpu(precision).dtype
        optimizer = torch.optim.AdamW(lora.trainable(core).values(), lr=0.01)
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = core.loss(core(IDS[:, :-1], dtype=dtype), IDS[:, 1:])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]
        adapters.save(tmp_path / precision, core, base=source)
        again, _ = open_path(source).load(runtime=cpu())
        adapters.load(tmp_path / precision, again)
        torch.testing.assert_close(ours(again), ours(core), atol=1e-5, rtol=1e-5)
