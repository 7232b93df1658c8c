"""Model directories: transformers reads what tfcli writes and the other way round, and lies are refused."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import config, cpu, model, save, tokenizer

from tfcli.errors import RunError, UserError
from tfcli.formats.hf import directory as hf
from tfcli.formats.hf import weights
from tfcli.text.tokenizers.sentencepiece import Tokenizer

FILES = {
    "config.json", "model.safetensors", "tokenizer.model", "tokenizer.json", "tokenizer_config.json",
    "generation_config.json", "README.md",
}  # fmt: skip

SHAPES: list[dict[str, Any]] = [
    {},
    {"heads": 3, "kv_heads": 1, "width": 24, "rope_theta": 500.0},
    {"heads": 5, "kv_heads": 5, "head_width": 10, "tied": False, "norm_eps": 1e-4},
    {"heads": 6, "kv_heads": 2, "head_width": 16, "depth": 3, "tied": False, "rope_theta": 1e6},
]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save(tmp_path / "model")


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def transformers_model(directory: Path) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@torch.no_grad()
def test_transformers_gives_the_same_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Would catch a wrong name, a transposed matrix, another rotary convention, an epsilon or theta not passed on."""
    core = model(**changes)
    hf.save(tmp_path, core, tokenizer())
    theirs = transformers_model(tmp_path)
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    assert theirs.dtype == torch.float32
    ids = torch.randint(0, 400, (2, 30), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(core.logits(core(ids)), theirs(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_what_transformers_saved_loads(tmp_path: Path, tied: bool) -> None:
    """Would catch a reader that only knows its own writer."""
    import transformers

    settings = transformers.Qwen3Config(
        vocab_size=90, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 777.0},
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.Qwen3ForCausalLM(settings).eval()
    theirs.save_pretrained(tmp_path)
    ours = hf.load_model(tmp_path, runtime=cpu())
    ids = torch.randint(0, 90, (2, 20))
    torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    assert ours.config.rope_theta == 777.0


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_round_trip_is_bitwise(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Would catch rounding on the way, a setting that is lost, and a tied head that comes back untied."""
    core = model(**changes)
    hf.save(tmp_path, core, tokenizer())
    assert {path.name for path in tmp_path.iterdir()} == FILES
    again, pieces = hf.load(tmp_path, runtime=cpu())
    assert again.config == core.config == hf.read_config(tmp_path)
    assert pieces.model_bytes == tokenizer().model_bytes
    for (name, a), (other, b) in zip(core.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b), name
    assert (again.head.weight is again.embed.weight) == core.config.tied
    assert ("lm_head.weight" in weights.read_header(tmp_path / "model.safetensors")) != core.config.tied


def test_weights_are_cast_once_at_load(directory: Path) -> None:
    """Inference has bf16 weights where the runtime says so; training asks for fp32."""
    assert {p.dtype for p in hf.load_model(directory, runtime=cpu("bf16")).parameters()} == {torch.bfloat16}
    wanted = hf.load_model(directory, runtime=cpu("bf16"), dtype=torch.float32)
    assert {p.dtype for p in wanted.parameters()} == {torch.float32}


def test_saved_in_bf16_reads_in_transformers(tmp_path: Path) -> None:
    """Would catch a dtype in config.json that is not the file's."""
    hf.save(tmp_path, model(), tokenizer(), dtype=torch.bfloat16)
    assert transformers_model(tmp_path).dtype == torch.bfloat16


def test_reading_the_configuration_needs_no_torch(directory: Path) -> None:
    """inspect and --help stay quick."""
    work = "from tfcli.formats.hf.directory import read_config; read_config(sys.argv[1])"
    program = f"import sys; {work}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program, directory], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_saving_again_replaces_and_leaves_other_files(directory: Path) -> None:
    """A run directory keeps its metrics when a better model is saved into it."""
    (directory / "metrics.jsonl").write_text("{}\n")
    save(directory, seed=1)
    assert {path.name for path in directory.iterdir()} == FILES | {"metrics.jsonl"}
    assert torch.equal(hf.load_model(directory, runtime=cpu()).embed.weight, model(1).embed.weight)


def test_a_full_disk_leaves_the_model_that_was_there(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch files renamed one by one before all are written."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="the disk is full"):
        save(directory, seed=1)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_card_has_the_header_hubs_read(directory: Path) -> None:
    """Would catch a header that is not first, or a way of use that is missing."""
    card = (directory / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "tfcli generate" in card
    assert "AutoModelForCausalLM" in card


# What must be refused, and what the message must say.


def refused(directory: Path) -> str:
    with pytest.raises(UserError) as error:
        hf.load(directory, runtime=cpu())
    return f"{error.value.message} {error.value.hint}"


def test_no_directory_suggests_the_nearest(directory: Path) -> None:
    """A typing error is the usual reason."""
    assert "did you mean" in refused(directory.with_name("modle"))


def test_a_file_is_not_a_model(directory: Path) -> None:
    """Would catch a traceback from a path that goes through a file."""
    assert "is a file, expected a model directory" in refused(directory / "config.json")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
def test_absent_file_is_named(directory: Path, name: str) -> None:
    """Would catch a FileNotFoundError that a person has to read."""
    (directory / name).unlink()
    assert name in refused(directory)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
@pytest.mark.parametrize("size", [0, 5, 300])
def test_truncated_file_is_named(directory: Path, name: str, size: int) -> None:
    """Would catch a copy that broke off and is noticed only by its strange text."""
    path = directory / name
    path.write_bytes(path.read_bytes()[:size])
    assert name in refused(directory)


def test_weights_cut_short_by_one_byte(directory: Path) -> None:
    """The header's sizes are compared with the file's."""
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "its header says" in refused(directory)


@pytest.mark.parametrize(
    ("content", "message"), [(b"[1]", "expected an object"), (b"\xff\xfe", "is not JSON"), (b"{}", "of type None")]
)
def test_config_of_another_kind(directory: Path, content: bytes, message: str) -> None:
    """Would catch an AttributeError on a list, and a decoding error."""
    (directory / "config.json").write_bytes(content)
    assert message in refused(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt_oss"}, "it reads: qwen3"),
        ({"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        ({"attention_bias": True}, "8 missing (model.layers.0.self_attn.q_proj.bias, "),
        ({"attention_bias": "no"}, "attention_bias is 'no'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, "'longrope'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_theta is 'x'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"num_hidden_layers": "two"}, "model.depth is 'two'"),
        ({"num_attention_heads": 3}, "not a multiple"),
        ({"num_hidden_layers": 3}, "11 missing (model.layers.2.input_layernorm.weight, "),
        ({"num_hidden_layers": 1}, "11 unexpected"),
        ({"intermediate_size": 50}, "mis-shaped (model.layers.0.mlp.gate_proj.weight [48, 32], expected [50, 32]"),
        ({"vocab_size": 300}, "the tokenizer has 400 pieces"),
        ({"tfcli": {"tokenizer_sha256": "00ff"}}, "is not the tokenizer"),
    ],
    ids=str,
)
def test_settings_that_do_not_hold_are_refused(directory: Path, changes: dict[str, Any], message: str) -> None:
    """Would catch a setting that is ignored, so that the model runs and is wrong."""
    edit(directory, **changes)
    assert message in refused(directory)


def test_another_tokenizer_of_the_same_size_is_refused(directory: Path) -> None:
    """The model would produce fluent nonsense: only the hash can tell."""
    other = tokenizer(user_symbols=("zzz",))
    assert other.vocab_size == tokenizer().vocab_size
    other.save(directory / "tokenizer.model")
    assert "is not the tokenizer that the model was trained with" in refused(directory)


def test_saving_refuses_a_tokenizer_with_too_many_pieces(tmp_path: Path) -> None:
    """Ids past the embedding: a device-side assertion, later."""
    with pytest.raises(UserError, match="only 300"):
        hf.save(tmp_path / "x", model(vocab_size=300), tokenizer())
    assert not (tmp_path / "x").exists()


def test_pickled_weights_are_refused(directory: Path) -> None:
    """Nothing from disk is ever executed."""
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    assert "can run code" in refused(directory)


def test_saving_where_a_file_is(tmp_path: Path) -> None:
    """Would catch a traceback for --out that names a file."""
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="is not a directory"):
        save(tmp_path / "taken")


def test_config_round_trip_of_a_plain_tokenizer(directory: Path) -> None:
    """The ids in config.json are the tokenizer's."""
    data = json.loads((directory / "config.json").read_text())
    pieces = Tokenizer.load(directory)
    assert (data["eos_token_id"], data["pad_token_id"]) == (pieces.eos_id, pieces.pad_id)
    assert data["max_position_embeddings"] == config().context
    assert data["rope_theta"] == data["rope_parameters"]["rope_theta"]


@pytest.mark.skipif(os.name == "nt", reason="no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o027, 0o640)])
def test_the_umask_decides_who_may_read(tmp_path: Path, umask: int, mode: int) -> None:
    """Would catch weights that others may read where nothing else is, and weights that they may not."""
    before = os.umask(umask)
    try:
        save(tmp_path / "model")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert modes == dict.fromkeys(FILES, mode)


@pytest.mark.skipif(os.name == "nt", reason="fcntl")
def test_files_are_synced_through_writable_handles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows refuses to sync a file that is open for reading only."""
    import fcntl
    import stat

    synced: list[int] = []

    def check(number: int) -> None:
        synced.append(number)
        if stat.S_ISREG(os.fstat(number).st_mode):
            assert fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY

    monkeypatch.setattr(os, "fsync", check)
    save(tmp_path / "model")
    assert len(synced) > len(FILES)
