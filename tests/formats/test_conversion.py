"""Models in other formats: what others read is the same model, and what is not the same is not left behind."""

import importlib.util
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
import torch
from test_llama2c import save as save_llama2c
from test_llama2c import save_tokenizer
from tiny_models import cpu, foreign, model, save, tokenizer

from tfcli.errors import RunError, UserError
from tfcli.formats import convert
from tfcli.formats.convert import Converted
from tfcli.formats.gguf import save as gguf_save
from tfcli.formats.gguf.file import open_gguf
from tfcli.formats.hf import directory as hf
from tfcli.formats.open import open_path
from tfcli.infer.engine import Engine
from tfcli.model.quant.quantize import Quantization, quantize_model
from tfcli.text.tokenizers.sentencepiece import Tokenizer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save(tmp_path / "run", ffn_width=64)


def written(source: Path, out: Path, **options: Any) -> Converted:
    return convert.convert(source, out, to="gguf" if out.suffix else "hf", **options)


def auto(kind: str, directory: Path) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(transformers, kind).from_pretrained(directory)


IDS = torch.randint(0, 400, (1, 30), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("type", ["f32", "f16", "bf16", "q8_0", "q4_1"])
def test_a_run_becomes_a_file_of_each_type(run: Path, type: str) -> None:
    """The types change the logits as much as they should and no more; the tokenizer comes along."""
    made = written(run, run / "m.gguf", type=type)
    file = open_gguf(made.path)
    assert made.bytes == made.path.stat().st_size
    types = {name: tensor.type for name, tensor in file.tensors.items() if len(tensor.shape) == 2}
    assert types.pop("token_embd.weight") == ("Q8_0" if type == "q4_1" else type.upper())
    assert set(types.values()) == {type.upper()}
    assert made.logit_delta <= 1e-5 * made.largest_logit
    least, most = {"f32": (0, 0), "f16": (1e-5, 0.02), "bf16": (1e-4, 0.1), "q8_0": (1e-4, 0.1), "q4_1": (0.01, 1)}[
        type
    ]
    assert least <= made.logit_change / made.largest_logit <= most
    _, codec = open_path(made.path).load(runtime=cpu())
    assert codec.encode("Who is there?\n 从前") == tokenizer().encode("Who is there?\n 从前")


def test_quantized_types_are_those_of_quantize_model(run: Path) -> None:
    """The same codes as ``--quantize`` at load: one meaning of 4 bits."""
    written(run, run / "m.gguf", type="q4_1")
    made, _ = open_path(run / "m.gguf").load(runtime=cpu())
    expected = quantize_model(model(ffn_width=64), Quantization(bits=4)).state_dict()
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("family", "changes", "settings"),
    [
        ("llama", {}, {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}, {"attention_bias": True, "mlp_bias": True}),
        (
            "llama",
            {
                "head_dim": 16,
                "rope_parameters": {
                    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32,
                    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                },
            },
            None,
        ),
        ("mistral", {}, {}),
        ("qwen2", {}, {}),
        ("qwen3", {}, {"head_dim": 10}),
        ("gemma3_text", {"sliding_window": 8, "query_pre_attn_scalar": 10}, None),
    ],
)  # fmt: skip
@torch.no_grad()
def test_models_of_others_become_files_that_transformers_reads(
    tmp_path: Path, family: str, changes: dict[str, Any], settings: dict[str, Any] | None
) -> None:
    """End to end: their weights, our file, their reading of it (with their own settings where it reads too few)."""
    theirs = foreign(family, vocab_size=400, bos_token_id=1, eos_token_id=2, **changes)
    theirs.save_pretrained(tmp_path / "hf")
    tokenizer().save(tmp_path / "hf" / "tokenizer.model")
    written(tmp_path / "hf", tmp_path / "m.gguf", type="f32")
    settings = theirs.config.to_dict() if settings is None else settings
    again = tiny_gguf.transformers_model(tmp_path / "m.gguf", **settings)
    torch.testing.assert_close(again(IDS).logits, theirs(IDS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("architecture", "type"), [("llama", "Q4_1"), ("qwen3", "Q8_0"), ("qwen2", "F16")])
@torch.no_grad()
def test_files_become_directories_that_transformers_reads(tmp_path: Path, architecture: str, type: str) -> None:
    """With the numbers that the blocks stand for, and a tokenizer that gives the same ids."""
    made = tiny_gguf.config(architecture, width=64, head_width=16)
    source = tiny_gguf.save(tmp_path / "m.gguf", made, type=type, tokenizer=tokenizer())
    result = written(source, tmp_path / "hf")
    assert (result.type, result.logit_change) == ("f32", 0.0)
    assert result.bytes == (tmp_path / "hf" / hf.WEIGHTS).stat().st_size
    core, _ = open_path(source).load(runtime=cpu())
    theirs = auto("AutoModelForCausalLM", tmp_path / "hf")
    torch.testing.assert_close(core.logits(core(IDS)), theirs(IDS).logits, atol=1e-4, rtol=0)
    if architecture != "qwen2":  # for which transformers cuts texts in its own way, whatever tokenizer.json says
        assert auto("AutoTokenizer", tmp_path / "hf")("a king\n 从前").input_ids == tokenizer().encode("a king\n 从前")
    narrow = written(source, tmp_path / "bf16", type="bf16")
    assert narrow.bytes < 0.6 * result.bytes
    assert 0 < narrow.logit_change < 0.1 * narrow.largest_logit


@torch.no_grad()
def test_a_checkpoint_of_llama2_c_becomes_a_directory(tmp_path: Path) -> None:
    """Its tokenizer puts <s> before a text there too, for tfcli and for transformers."""
    save_llama2c(tmp_path / "model.bin")
    save_tokenizer(tmp_path / "my.bin")
    written(tmp_path / "model.bin", tmp_path / "hf", tokenizer=tmp_path / "my.bin")
    made, codec = open_path(tmp_path / "hf").load(runtime=cpu())
    first, before = open_path(tmp_path / "model.bin").load(runtime=cpu(), tokenizer=tmp_path / "my.bin")
    text = "abc acq\n é"
    assert codec.prefix_ids == before.prefix_ids == (1,)
    assert codec.encode(text) == before.encode(text)
    assert codec.eos_ids == before.eos_ids
    assert auto("AutoTokenizer", tmp_path / "hf")(text).input_ids == [1, *before.encode(text)]
    ids = torch.tensor([[1, *before.encode(text)]])
    theirs = auto("AutoModelForCausalLM", tmp_path / "hf")
    torch.testing.assert_close(theirs(ids).logits, first.logits(first(ids)), atol=1e-4, rtol=0)
    torch.testing.assert_close(made.logits(made(ids)), first.logits(first(ids)), atol=1e-6, rtol=0)


LLAMA_CPP = """
import json, sys
import llama_cpp
path, texts, ids, count = json.loads(sys.argv[1])
llama = llama_cpp.Llama(path, n_ctx=64, verbose=False, n_threads=1)
tokens = [llama.tokenize(text.encode(), add_bos=False, special=False) for text in texts]
llama.eval(ids)
new = []
for _ in range(count):
    new.append(llama.sample(temp=0.0, repeat_penalty=1.0))
    llama.eval(new[-1:])
print(json.dumps([tokens, new]))
"""


def test_llama_cpp_gives_the_same_ids_and_text(tmp_path: Path) -> None:
    """Compare greedy text, and ids of difficult texts, if the bindings are installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama_cpp is not installed")
    run = save(tmp_path / "run", context=64, width=64, ffn_width=64, head_width=16)
    made = written(run, tmp_path / "m.gguf", type="f32")
    core, codec = open_path(run).load(runtime=cpu())
    texts = ["a king", "Who is there?\n  从前 é", "<|endoftext|> 12345", " ", "\n\n"]
    arguments = json.dumps([str(made.path), texts, codec.encode("Once upon a time"), 24])
    done = subprocess.run([sys.executable, "-c", LLAMA_CPP, arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tokens, new = json.loads(done.stdout)
    assert tokens == [codec.encode(text) for text in texts]
    ours = Engine(core, codec, cpu()).generate("Once upon a time", temperature=0.0, max_tokens=24, ignore_eos=True)
    assert new == ours.ids


def test_what_reads_differently_is_not_left_behind(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the writer is an error of the run, and the place stays as it was."""
    right = gguf_save.save

    def wrong(path: Path, made: Any, codec: Any, **options: Any) -> None:
        with torch.no_grad():
            made.blocks[1].attention.k.weight[3, 5] += 0.5
        right(path, made, codec, **options)

    (tmp_path / "m.gguf").write_text("before")
    monkeypatch.setattr(gguf_save, "save", wrong)
    with pytest.raises(RunError, match="gives other logits when it is loaded again"):
        written(run, tmp_path / "m.gguf", force=True)
    assert (tmp_path / "m.gguf").read_text() == "before"
    other = tokenizer(vocab_size=399)
    monkeypatch.setattr(gguf_save, "save", lambda path, made, codec, **options: right(path, made, other, **options))
    with pytest.raises(RunError, match="the written tokenizer gives other ids"):
        written(run, tmp_path / "n.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "run"]


def test_nothing_is_overwritten_unasked(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    written(run, out)
    before = out.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        written(run, out, type="q8_0")
    assert out.read_bytes() == before
    written(run, out, type="q8_0", force=True)
    assert len(out.read_bytes()) < len(before)
    directory = tmp_path / "hf"
    directory.mkdir()
    (directory / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        written(out, directory)
    written(out, directory, force=True)
    assert (directory / "notes.txt").read_text() == "mine"
    assert open_path(directory).config.architecture == model().config.architecture


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"to": "onnx", "out": "x"}, "unknown format 'onnx'"),
    ({"to": "gguf", "out": "x.gguf", "type": "q3_k"}, "unknown type 'q3_k'"),
    ({"to": "hf", "out": "x", "type": "q8_0"}, "cannot hold q8_0"),
    ({"to": "gguf", "out": "x"}, "does not end in .gguf"),
    ({"to": "hf", "out": "file"}, "is a file"),
    ({"to": "hf", "out": "run", "force": True}, "is the model that is read"),
    ({"to": "hf", "out": "file/under"}, "cannot be created"),
    ({"to": "hf", "out": "x", "tokenizer": "tok.bin"}, "has a tokenizer of its own"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_work_is_refused(run: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    """Before anything of size is loaded, with nothing left."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=message):
        convert.convert(run, tmp_path / options.pop("out"), **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


def test_models_that_a_format_does_not_have_are_refused(tmp_path: Path) -> None:
    for family, message in (("bert", "is an encoder"), ("gpt2", "norm is 'layer'")):
        foreign(family, vocab_size=400, bos_token_id=1, eos_token_id=1).save_pretrained(tmp_path / family)
        with pytest.raises(UserError, match=message):
            written(tmp_path / family, tmp_path / "m.gguf")
    source = tiny_gguf.save(tmp_path / "q.gguf", tiny_gguf.config("llama"), type="Q4_1", tokenizer=tokenizer())
    with pytest.raises(UserError, match=r"q\.gguf is quantized already, to 4 bits"):
        written(source, tmp_path / "m.gguf", type="q8_0")


def test_numbers_too_large_for_the_type_are_said(run: Path, tmp_path: Path) -> None:
    core = model(ffn_width=64)
    with torch.no_grad():
        core.blocks[0].attention.v.weight[0, 0] = 1e5
    shutil.rmtree(run)
    hf.save(run, core, tokenizer())
    with pytest.raises(UserError, match="too large for"):
        written(run, tmp_path / "m.gguf", type="f16")
    assert written(run, tmp_path / "m.gguf", type="bf16").logit_delta < 1e-3


def test_a_tokenizer_without_ids_around_a_text_stays_what_it_is() -> None:
    assert convert.portable(tokenizer()) is tokenizer()
    llama = Tokenizer(tokenizer().model_bytes, prefix_ids=(1,), suffix_ids=(2,))
    made = convert.portable(llama)
    assert (made.prefix_ids, made.suffix_ids) == ((1,), (2,))
    assert made.encode("Who is\n there") == llama.encode("Who is\n there")
