"""Compressed directories: small, the same model for tfcli and transformers, and scored from the written file."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
import torch
from tiny_models import TEXT, cpu, foreign, model, save, tokenizer

from tfcli.compression.quantize import Compressed, compress
from tfcli.errors import RunError, UserError
from tfcli.formats.gguf import save as gguf_save
from tfcli.formats.hf import directory as hf
from tfcli.formats.open import open_path
from tfcli.infer.engine import Engine
from tfcli.model import heads
from tfcli.model.quant.quantize import Quantization, quantize_model, weight_bytes

SHAPE: dict[str, Any] = {"width": 64, "ffn_width": 128, "head_width": 16, "vocab_size": 400}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save(tmp_path / "run", **SHAPE)


def smaller(source: Path, out: Path, kind: str, **options: Any) -> Compressed:
    return compress(source, out, quantize=kind, device="cpu", **{"precision": "fp32", **options})


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.29), ("int4", 0.22)])
@torch.no_grad()
def test_what_is_written_is_the_quantized_model(run: Path, tmp_path: Path, kind: str, share: float) -> None:
    """Bit by bit the model of ``--quantize``, in a directory that gives the same logits in transformers."""
    made = smaller(run, tmp_path / "out", kind)
    assert made.logit_delta <= 1e-5
    assert made.disk_before == (run / "model.safetensors").stat().st_size
    assert made.disk_after == (tmp_path / "out" / "model.gguf").stat().st_size
    again, codec = open_path(tmp_path / "out").load(runtime=cpu())
    expected = quantize_model(model(**SHAPE), Quantization.of(kind))
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    assert made.memory_after == weight_bytes(expected) < share * made.memory_before
    assert made.memory_before == weight_bytes(model(**SHAPE))
    assert made.plain == 0
    assert codec.encode("Who is there?\n") == tokenizer().encode("Who is there?\n")
    ids = torch.randint(0, 400, (1, 30), generator=torch.Generator().manual_seed(1))
    theirs, their_tokenizer = transformers(tmp_path / "out")
    torch.testing.assert_close(theirs(ids).logits, again.logits(again(ids)), atol=1e-4, rtol=0)
    assert their_tokenizer("Who is there?\n").input_ids == tokenizer().encode("Who is there?\n")


def transformers(directory: Path) -> Any:
    """Load a directory as its README says."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.AutoConfig.from_pretrained(directory)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            directory, gguf_file="model.gguf", config=config, dtype=torch.float32
        )
        return theirs, transformers.AutoTokenizer.from_pretrained(directory)


def test_scores_are_of_the_model_and_of_the_file(run: Path, tmp_path: Path) -> None:
    """Catches a score of the model in memory, or of another text."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8", newline="")
    made = smaller(run, tmp_path / "out", "int4", text=[str(tmp_path / "text.txt")])
    assert made.before is not None and made.after is not None
    for scores, path in ((made.before, run), (made.after, tmp_path / "out")):
        expected = Engine(*open_path(path).load(runtime=cpu()), cpu()).score(TEXT)
        assert scores.loss == pytest.approx(expected.loss, abs=1e-5)
        assert (scores.tokens, scores.bytes) == (expected.tokens, expected.bytes)
    assert made.before.loss != made.after.loss


def test_documents_are_joined_as_evaluate_does(run: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a king"}\n{"text": "who"}\n')
    made = smaller(run, tmp_path / "out", "int8", text=[str(tmp_path / "rows.jsonl")])
    assert made.before is not None
    assert made.before.bytes == 9
    assert made.before.tokens == len(tokenizer().encode("a king")) + len(tokenizer().encode("who")) + 2


def test_matrices_of_broken_groups_stay_in_16_bits(tmp_path: Path) -> None:
    """GGUF's blocks have no padding; the model is still written correctly."""
    save(tmp_path / "run", width=64, ffn_width=72)
    made = smaller(tmp_path / "run", tmp_path / "out", "int4", precision="bf16")
    assert made.plain == 2
    again, _ = open_path(tmp_path / "out").load(runtime=cpu())
    down = again.blocks[1].ffn.down.weight
    assert torch.equal(down, model(width=64, ffn_width=72).blocks[1].ffn.down.weight.half().float())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_models_of_others_too(tmp_path: Path, family: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 400}
    foreign(family, bos_token_id=1, eos_token_id=2, **sizes).save_pretrained(tmp_path / "hf")
    tokenizer().save(tmp_path / "hf" / "tokenizer.model")
    made = smaller(tmp_path / "hf", tmp_path / "out", "int8")
    assert made.plain == 0 and made.logit_delta <= 1e-5
    assert (tmp_path / "out" / "tokenizer.model").is_file()


def test_a_plain_gguf_file_too(tmp_path: Path) -> None:
    source = tiny_gguf.save(tmp_path / "m.gguf", tiny_gguf.config("llama"), type="F16", tokenizer=tokenizer())
    made = smaller(source, tmp_path / "out", "int4")
    assert made.disk_before == source.stat().st_size > made.disk_after


def test_what_cannot_be_compressed_is_refused(run: Path, tmp_path: Path) -> None:
    """With the reason, and nothing is left behind."""
    foreign("bert", vocab_size=400).save_pretrained(tmp_path / "bert")
    q4 = tiny_gguf.save(tmp_path / "q4.gguf", tiny_gguf.config("llama"), type="Q4_0", tokenizer=tokenizer())
    (tmp_path / "empty.txt").write_text("")
    classifier = model(**SHAPE)
    heads.fresh(classifier, "sequence", 2, seed=0)
    hf.save(tmp_path / "classifier", classifier, tokenizer())
    cases: list[tuple[Path, str, dict[str, Any], str]] = [
        (tmp_path / "bert", "int8", {}, "is an encoder, for which tfcli writes no GGUF file"),
        (tmp_path / "classifier", "int8", {}, "classifier has a task head, which a GGUF file cannot hold"),
        (q4, "int4", {}, r"is quantized already \(Q4_0\)"),
        (run, "int3", {}, "unknown kind of quantization 'int3'"),
        (run, "int4", {"text": [str(tmp_path / "none.txt")]}, "no such file"),
        (run, "int4", {"text": [str(tmp_path / "empty.txt")]}, "there is no text to score"),
    ]
    for source, kind, options, message in cases:
        with pytest.raises(UserError, match=message):
            smaller(source, tmp_path / "out", kind, **options)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*"))


def test_places_that_are_taken_are_refused(run: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other")
    for out, options, message in (
        (run, {"force": True}, "is the model that is read"),
        (other, {}, "exists already"),
        (other, {"force": True}, r"holds another model \(model.safetensors\)"),
    ):
        with pytest.raises(UserError, match=message):
            smaller(run, out, "int8", **options)
    smaller(run, tmp_path / "out", "int8")
    smaller(run, tmp_path / "out", "int4", force=True)
    assert open_path(tmp_path / "out").load(runtime=cpu())[0].blocks[0].ffn.up.bits == 4
    with pytest.raises(UserError, match="quantized already"):
        smaller(tmp_path / "out", tmp_path / "twice", "int4")


def test_what_reads_differently_is_not_left_behind(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gguf_save.save

    def wrong(path: Path, made: Any, codec: Any, **options: Any) -> None:
        made.blocks[1].attention.k.codes[0, 0] ^= 0xFF
        right(path, made, codec, **options)

    monkeypatch.setattr(gguf_save, "save", wrong)
    with pytest.raises(RunError, match="gives other logits when it is loaded again"):
        smaller(run, tmp_path / "out", "int8")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
