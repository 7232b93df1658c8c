"""Directories of other families: transformers' numbers, there and back, and what is refused."""

import contextlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import cpu, foreign

from tfcli.config.model import Architecture, ModelConfig, NormConfig
from tfcli.errors import UserError
from tfcli.formats.hf import directory as hf
from tfcli.formats.hf.families import registry as families
from tfcli.formats.hf.stored import open_model, read_config
from tfcli.inspection.describe import inspect
from tfcli.model.cache import KVCache
from tfcli.model.transformer import Transformer
from tfcli.text.tokenizers.json import JsonTokenizer

ROPE: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16, "rope_theta": 500.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 500.0},
    "yarn weighed": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 500.0,
        "mscale": 0.8, "mscale_all_dim": 0.4, "beta_fast": 4.0, "beta_slow": 0.5,
    },
}  # fmt: skip
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
MODERNBERT_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 500.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"head_dim": 10, "num_attention_heads": 6, "num_key_value_heads": 3, "rms_norm_eps": 1e-3}),
    ("llama", {"hidden_act": "gelu", "num_key_value_heads": 4}),
    *[("llama", {"rope_parameters": rope}) for rope in ROPE.values()],
    ("mistral", {"head_dim": 14}),
    ("mistral", {"sliding_window": 5}),
    ("qwen2", {"tie_word_embeddings": True, "rope_parameters": ROPE["yarn"]}),
    ("qwen2", {}),
    ("qwen3", {"attention_bias": True, "rope_parameters": ROPE["linear"]}),
    ("gemma3_text", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    ("gemma3_text", {"sliding_window": 6, "query_pre_attn_scalar": 17, "attention_bias": True}),
    ("gemma3_text", {"layer_types": ["full_attention"] * 3, "rope_parameters": GEMMA_ROPE}),
    ("gpt2", {}),
    ("gpt2", {"hidden_size": 20, "n_inner": 33, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3}),
    ("gpt2", {"activation_function": "relu", "scale_attn_weights": False}),
    ("bert", {}),
    ("bert", {"hidden_size": 20, "hidden_act": "gelu_new", "type_vocab_size": 3, "layer_norm_eps": 1e-3}),
    ("modernbert", {"layer_types": ["full_attention"] * 3}),
    ("modernbert", {"local_attention": 6, "num_hidden_layers": 5}),
    (
        "modernbert",
        {
            "local_attention": 9,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "attention_bias": True,
            "mlp_bias": True,
            "norm_bias": True,
            "norm_eps": 1e-3,
            "hidden_activation": "silu",
            "rope_parameters": MODERNBERT_ROPE,
        },
    ),
]
ENCODERS = ("bert", "modernbert")
KINDS = {**dict.fromkeys(ENCODERS, "encoder"), "mbart": "encoder-decoder"}
IDS = [f"{family} {','.join(map(str, changes))}{n}" for n, (family, changes) in enumerate(SHAPES)]


def saved(directory: Path, family: str, **changes: Any) -> Any:
    """A model of transformers, and its directory written by transformers."""
    model = foreign(family, **changes)
    model.save_pretrained(directory)
    return model


def expected(model: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Logits, or of an encoder the hidden states."""
    out = model(ids, **inputs)
    result: torch.Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return result


def ours(core: Transformer, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    hidden = core(ids, **inputs)
    return core.logits(hidden) if core.config.architecture.causal else hidden


def pieces() -> JsonTokenizer:
    """A vocabulary of one piece."""
    from tokenizers import Tokenizer, models

    return JsonTokenizer(Tokenizer(models.WordLevel({"</s>": 0}, unk_token="</s>")).to_str(), name="test")


def tokens(rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 90, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("family", "changes"), SHAPES, ids=IDS)
@torch.no_grad()
def test_numbers_are_those_of_transformers(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    """Would catch a wrong name, a matrix not transposed, a bias, scale, window, norm or rotation left out."""
    theirs, ids = saved(tmp_path, family, **changes), tokens()
    core = hf.load_model(tmp_path, runtime=cpu())
    torch.testing.assert_close(ours(core, ids), expected(theirs, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "changes"), [shape for shape in SHAPES if shape[0] not in ENCODERS])
@torch.no_grad()
def test_cached_and_ragged_equal_whole(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    """Would catch a window, positions or a rotation that forget what the cache holds."""
    saved(tmp_path, family, **changes)
    core, ids = hf.load_model(tmp_path, runtime=cpu()), tokens()
    cache = KVCache(core.config, batch=2, capacity=64, dtype=torch.float32, device=core.device)
    pieces = [core(part, cache=cache) for part in ids.split([9, 1, 1, 4, 1, 8], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), core(ids), atol=1e-4, rtol=1e-4)
    cache.set_lengths([15, 8])
    after = [core(part, cache=cache) for part in tokens(2, 5).split([1, 4], dim=1)]
    for row, length in enumerate((15, 8)):
        whole = core(torch.cat([ids[row, :length], tokens(2, 5)[row]])[None])[0, length:]
        torch.testing.assert_close(torch.cat(after, dim=1)[row], whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "changes"), SHAPES, ids=IDS)
def test_training_takes_the_same_step(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    """Would catch a fused product or a hand-written gradient that leaves a bias or a norm out."""
    theirs, ids = saved(tmp_path, family, **changes), tokens()
    core = hf.load_model(tmp_path, runtime=cpu())
    for result in (ours(core, ids), expected(theirs, ids)):
        result.square().mean().backward()
    name = open_model(tmp_path).places["blocks.1.attention.v.weight"].name
    theirs_grad = dict(theirs.named_parameters())[name].grad
    if family == "gpt2":
        theirs_grad = theirs_grad.T
    theirs_grad = theirs_grad[-len(core.get_parameter("blocks.1.attention.v.weight")) :]
    mine = core.get_parameter("blocks.1.attention.v.weight").grad
    torch.testing.assert_close(mine, theirs_grad, atol=1e-4, rtol=1e-3)
    assert all(parameter.grad is not None for name, parameter in core.named_parameters() if name != "head.weight")


@pytest.mark.parametrize(("family", "changes"), SHAPES, ids=IDS)
@torch.no_grad()
def test_there_and_back(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    """transformers reads what tfcli writes, with the same numbers, and so does tfcli, bitwise."""
    import transformers

    theirs, ids = saved(tmp_path / "theirs", family, **changes), tokens()
    core = hf.load_model(tmp_path / "theirs", runtime=cpu())
    hf.save(tmp_path / "ours", core, pieces())
    again = hf.load_model(tmp_path / "ours", runtime=cpu())
    assert again.config == core.config
    for (name, a), (_, b) in zip(core.state_dict().items(), again.state_dict().items(), strict=True):
        # Gemma's norms are stored less one, which rounds.
        torch.testing.assert_close(a, b, atol=1e-6 if family == "gemma3_text" else 0, rtol=0, msg=name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = type(theirs).from_pretrained(tmp_path / "ours")
    assert isinstance(back, transformers.PreTrainedModel)
    torch.testing.assert_close(expected(back, ids), expected(theirs, ids), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_encoder_reads_padded_rows_and_segments_as_transformers_does(tmp_path: Path) -> None:
    """Would catch padding that is attended to, and segments that are ignored."""
    theirs, ids = saved(tmp_path, "bert"), tokens(3)
    core = hf.load_model(tmp_path, runtime=cpu())
    mask = torch.arange(24) < torch.tensor([[24], [7], [1]])
    types = (torch.arange(24) > 4).long().expand(3, 24)
    result = core(ids, mask_BT=mask, types_BT=types)
    wanted = theirs(ids, attention_mask=mask.long(), token_type_ids=types).last_hidden_state
    torch.testing.assert_close(result[mask], wanted[mask], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "architecture", "left"),
    [
        ("bert", "BertForMaskedLM", "cls.predictions.bias"),
        ("bert", "BertForSequenceClassification", "classifier.weight"),
        ("bert", "BertModel", "pooler.dense.weight"),
        ("llama", "LlamaModel", None),
        ("gpt2", "GPT2Model", None),
    ],
)
@torch.no_grad()
def test_bodies_and_heads(tmp_path: Path, family: str, architecture: str, left: str | None) -> None:
    """Names with and without their prefix; a head that the core does not have is not dropped without a word."""
    theirs, ids = saved(tmp_path, family, architecture=architecture, tie_word_embeddings=True), tokens()
    notes: list[str] = []
    core = hf.load_model(tmp_path, runtime=cpu(), on_note=notes.append)
    body = theirs.base_model(ids).last_hidden_state
    torch.testing.assert_close(core(ids), body, atol=1e-4, rtol=1e-4)
    not_read = open_model(tmp_path).not_read
    assert (left in not_read) if left else not not_read
    assert len(notes) == (1 if left else 0)


def rewrite(directory: Path, change: Any) -> None:
    """Save the tensors anew as ``change`` of them."""
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path)


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value != "left out"}))


@torch.no_grad()
def test_old_bert_files(tmp_path: Path) -> None:
    """google-bert's own files call a norm's numbers gamma and beta, and many hold a table of positions."""
    theirs, ids = saved(tmp_path, "bert"), tokens()

    def old(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {}
        for name, tensor in tensors.items():
            if "LayerNorm" in name:
                name = name.replace("weight", "gamma").replace("bias", "beta")
            found[name] = tensor
        return {**found, "embeddings.position_ids": torch.arange(64)[None]}

    rewrite(tmp_path, old)
    edit(tmp_path, position_embedding_type="absolute", type_vocab_size="left out", hidden_act="left out")
    core = hf.load_model(tmp_path, runtime=cpu())
    torch.testing.assert_close(core(ids), theirs(ids).last_hidden_state, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_old_gpt2_files(tmp_path: Path) -> None:
    """openai's own file has no prefix, holds the causal mask as a buffer, and its config.json says little."""
    theirs, ids = saved(tmp_path, "gpt2"), tokens()

    def old(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        buffers = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) for layer in range(3)}
        return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()} | buffers

    rewrite(tmp_path, old)
    stored = {"model_type": "gpt2", "n_ctx": 64, "n_positions": 64, "n_embd": 24, "n_head": 4, "n_layer": 3}
    (tmp_path / "config.json").write_text(json.dumps({**stored, "vocab_size": 90}))
    core = hf.load_model(tmp_path, runtime=cpu())
    torch.testing.assert_close(ours(core, ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_settings_as_transformers_4_wrote_them(tmp_path: Path) -> None:
    """The files on hubs: rope_theta and rope_scaling apart, Gemma's pattern as a number."""
    theirs, ids = saved(tmp_path / "l", "llama", rope_parameters=ROPE["llama3"]), tokens()
    scaling = {key: value for key, value in ROPE["llama3"].items() if key != "rope_theta"}
    edit(tmp_path / "l", rope_parameters="left out", rope_theta=500.0, rope_scaling=scaling)
    core = hf.load_model(tmp_path / "l", runtime=cpu())
    torch.testing.assert_close(ours(core, ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    edit(tmp_path / "l", rope_scaling={"type": "linear", "factor": 2})
    assert read_config(tmp_path / "l").architecture.attention.rope_scaling.kind == "linear"

    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    theirs = saved(tmp_path / "g", "gemma3_text", sliding_window=6, layer_types=kinds, rope_parameters=GEMMA_ROPE)
    edit(
        tmp_path / "g", rope_parameters="left out", layer_types="left out", sliding_window_pattern=2,
        rope_theta=1e6, rope_local_base_freq=100.0, rope_scaling={"rope_type": "linear", "factor": 8.0},
    )  # fmt: skip
    core = hf.load_model(tmp_path / "g", runtime=cpu())
    torch.testing.assert_close(ours(core, ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_gemma_in_bf16_scales_embeddings_as_it_was_trained(tmp_path: Path) -> None:
    """sqrt(24) is rounded to bf16 first: the product with the exact one rounds elsewhere."""
    theirs = saved(tmp_path, "gemma3_text").to(torch.bfloat16)
    core = hf.load_model(tmp_path, runtime=cpu("bf16"))
    ids = tokens()
    assert torch.equal(core._embedded(core.embed(ids), torch.arange(24), None), theirs.model.embed_tokens(ids))


# Files.


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


@torch.no_grad()
def test_shards_are_one_model(tmp_path: Path) -> None:
    """Would catch a reader that stops at the first, and one that holds more than the model and a tensor of it."""
    from torch.profiler import ProfilerActivity, profile

    theirs, ids = foreign("qwen2", vocab_size=2000, tie_word_embeddings=True), tokens()
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(shards(tmp_path)) > 2
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        core = hf.load_model(tmp_path, runtime=cpu("bf16"))
    assert core.embed.weight.dtype == torch.bfloat16
    live = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    largest = max(parameter.numel() for parameter in core.parameters())
    assert peak <= 2 * sum(parameter.numel() for parameter in core.parameters()) + 4 * largest + 1000
    core = hf.load_model(tmp_path, runtime=cpu())
    torch.testing.assert_close(ours(core, ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    assert inspect(tmp_path)["stored"]["files"] == len(shards(tmp_path))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    foreign("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(shards(tmp_path)) > 2
    return tmp_path


def refused(directory: Path) -> str:
    with pytest.raises(UserError) as error:
        hf.load_model(directory, runtime=cpu())
    return f"{error.value.message} {error.value.hint}"


def test_a_missing_shard_is_named(sharded: Path) -> None:
    """A download that broke off."""
    shards(sharded)[1].unlink()
    assert f"lacks 1 of {len(shards(sharded)) + 1} shards: model-00002-of" in refused(sharded)


def test_a_cut_shard_is_named(sharded: Path) -> None:
    """Would catch shards whose sizes nobody compares."""
    path = shards(sharded)[1]
    path.write_bytes(path.read_bytes()[:-4])
    assert f"{path} has" in refused(sharded)


def change_index(directory: Path, change: Any) -> None:
    path = directory / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    change(data["weight_map"])
    path.write_text(json.dumps(data))


def test_an_index_that_disagrees_with_its_shards(sharded: Path) -> None:
    """Would catch a tensor taken from whichever shard comes last."""
    first, second = (path.name for path in shards(sharded)[:2])
    change_index(sharded, lambda where: where.update({"model.norm.weight": first, "more.weight": second}))
    message = refused(sharded)
    assert "model.norm.weight" in message or "more.weight" in message
    change_index(sharded, lambda where: where.pop("model.norm.weight"))
    assert "says None" in refused(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    """Two numbers for one place."""
    import shutil

    shutil.copy(shards(sharded)[0], sharded / "again.safetensors")
    change_index(sharded, lambda where: where.update({"x": "again.safetensors"}))
    assert " and in " in refused(sharded)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", 3])
def test_an_index_that_points_elsewhere(sharded: Path, name: object) -> None:
    """Nothing outside the directory is read because a file in it says so."""
    change_index(sharded, lambda where: where.update({"model.norm.weight": name}))
    assert "names a shard" in refused(sharded)


@pytest.mark.parametrize(
    "content", [b"{}", b"[]", b'{"weight_map": 3}', b"\xff", b'{"weight_map": {"a": "b", "a": "c"}}']
)
def test_an_index_that_is_none(sharded: Path, content: bytes) -> None:
    """Would catch a traceback from a file of another kind."""
    (sharded / "model.safetensors.index.json").write_bytes(content)
    assert "model.safetensors.index.json" in refused(sharded)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    saved(tmp_path, "llama")
    return tmp_path


def change_header(directory: Path, change: Any) -> None:
    path = directory / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text: bytes = change(data[8 : 8 + length].rstrip())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def changed(**changes: Any) -> Any:
    """A change of the header's entry of the final norm, whose shape is [24]."""

    def change(text: bytes) -> bytes:
        header = json.loads(text)
        header["model.norm.weight"] |= changes
        return json.dumps(header).encode()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(shape=[25]), "gives model.norm.weight other bytes"),
        (changed(shape=[1 << 62, 1 << 62]), "gives model.norm.weight other bytes"),
        (changed(shape=[-24]), "damaged header"),
        (changed(shape=[24.0]), "damaged header"),
        (changed(shape="24"), "damaged header"),
        (changed(data_offsets=[0, 96]), "other bytes than its shape needs"),
        (changed(data_offsets=[1 << 60, (1 << 60) + 96]), "other bytes than its shape needs"),
        (changed(dtype="F64"), "gives model.norm.weight other bytes"),
        (changed(dtype="F128"), "damaged header"),
        (changed(dtype="F16", shape=[48]), "mis-shaped (model.norm.weight [48], expected [24])"),
        (changed(dtype="I32"), "model.norm.weight is stored as I32"),
        (lambda text: text.replace(b'"model.norm.weight"', b'"lm_head.weight"'), "lists lm_head.weight twice"),
        (lambda text: b"[1]", "damaged header"),
        (lambda text: b"[" * 100_000, "damaged header"),
    ],
)
def test_headers_that_lie(llama: Path, change: Any, message: str) -> None:
    """Would catch memory reserved for a shape that the file has no numbers for, and numbers read twice."""
    change_header(llama, change)
    assert message in refused(llama)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1_000_000_000},
        {"hidden_size": 1 << 60},
        {"vocab_size": 1 << 62},
        {"intermediate_size": 10**30},
    ],
    ids=str,
)
def test_sizes_are_compared_before_anything_is_made(llama: Path, changes: dict[str, Any]) -> None:
    """Would catch a billion layers being built before the file is looked at."""
    edit(llama, **changes)
    assert "describes" in refused(llama)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "does not say factor"),
        ("llama", {"rope_scaling": 3}, "the rotary settings are 3"),
        ("llama", {"rope_parameters": {**ROPE["yarn"], "truncate": False}}, "truncate is False"),
        ("llama", {"rope_parameters": {**ROPE["llama3"], "high_freq_factor": 1.0}}, "high_freq_factor is 1.0"),
        ("llama", {"rope_parameters": {**ROPE["yarn"], "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ("llama", {"head_dim": 9}, "even head width"),
        ("llama", {"head_dim": None, "num_attention_heads": 5}, "it does not divide hidden_size"),
        ("llama", {"hidden_size": "left out"}, "does not say hidden_size"),
        ("llama", {"vocab_size": 90.0}, "model.vocab_size is 90.0"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ("mistral", {"sliding_window": -1}, "sliding_window is -1"),
        ("mistral", {"sliding_window": 5, "rope_parameters": ROPE["yarn"]}, "no windows where rotary"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "no other order"),
        ("gemma3_text", {"layer_types": ["full_attention"]}, "expected 3 of"),
        ("gemma3_text", {"layer_types": [["full_attention"]] * 3}, "expected 3 of"),
        ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("gpt2", {"n_head": 5}, "it does not divide n_embd"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("bert", {"is_decoder": True}, "is_decoder is True"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ("bert", {"hidden_act": "tanh"}, "hidden_act is 'tanh'"),
        ("bert", {"model_type": "t5"}, "it reads: qwen3, llama, qwen2, mistral, gemma3_text, gpt2, bert, modernbert"),
    ],
    ids=str,
)
def test_settings_that_the_core_does_not_have(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    """Would catch a setting that is ignored, so that the model runs and is wrong."""
    foreign(family).config.save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        read_config(tmp_path)
    assert message in f"{error.value.message} {error.value.hint}"


def test_pickles_are_refused_with_what_to_do(llama: Path) -> None:
    """Nothing from disk is ever executed."""
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    message = refused(llama)
    assert "can run code" in message
    assert "save_pretrained" in message


def test_a_tokenizer_with_more_ids_than_the_embedding(llama: Path) -> None:
    """Ids past the embedding would be an assertion on the device, later; a padded embedding is fine."""
    from tokenizers import Tokenizer, models

    for size in (90, 91):
        vocab = {"</s>": 0} | {f"w{id}": id for id in range(1, size)}
        Tokenizer(models.WordLevel(vocab, unk_token="</s>")).save(str(llama / "tokenizer.json"))
        if size == 90:
            assert hf.load(llama, runtime=cpu())[1].vocab_size == 90
    with pytest.raises(UserError, match=r"the tokenizer has 91 pieces, the model in .* only 90"):
        hf.load(llama, runtime=cpu())


def test_an_architecture_that_no_family_has() -> None:
    """Would catch a model that is written as one which computes something else."""
    sizes = {"vocab_size": 9, "context": 8, "depth": 2, "width": 8, "heads": 2, "kv_heads": 2, "head_width": 4}
    config = ModelConfig(**sizes, ffn_width=8, architecture=Architecture(norms=NormConfig(kind="layer")))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no family of transformers has this model's architecture"):
        families.written(config)


@pytest.mark.parametrize("family", [family.model_type for family in families.FAMILIES])
def test_no_value_of_a_setting_is_a_traceback(tmp_path: Path, family: str) -> None:
    """Every setting in turn is each kind of nonsense: it is read, or refused as bad input."""
    foreign(family).config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())
    more = ("rope_scaling", "rope_theta", "sliding_window_pattern", "partial_rotary_factor", "type_vocab_size")
    nonsense = [
        None,
        True,
        "x",
        -1,
        0,
        1.5,
        float("inf"),
        10**400,
        [],
        {},
        [[]],
        {"rope_type": []},
        {"rope_type": "yarn"},
    ]
    nonsense += [{"full_attention": 3}, {"rope_type": "yarn", "factor": 10**400}]
    for key in (*data, *more):
        for value in nonsense:
            with contextlib.suppress(UserError):
                families.read(path, {**data, key: value})


@pytest.mark.parametrize("family", [family.model_type for family in families.FAMILIES])
def test_inspect_knows_every_family(tmp_path: Path, family: str) -> None:
    """Would catch costs that are those of another architecture: the count of parameters is transformers' own."""
    theirs = saved(tmp_path, family)
    described = inspect(tmp_path)
    pooler = sum(p.numel() for name, p in theirs.named_parameters() if "pooler" in name)
    # Each of mBART's two tables of positions begins with two rows that nothing reads.
    unread = 2 * 2 * 24 if family == "mbart" else pooler
    assert described["parameters"]["total"] == theirs.num_parameters() - unread
    assert described["architecture"] == KINDS.get(family, "decoder")
    assert described["family"] == family
    assert (described["wiring"] == {}) == (family == "qwen3")  # only what is not our own decoder's
    assert ("decode" in described["flops_per_token"]) == (family not in ENCODERS)
