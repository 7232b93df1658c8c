"""The encoder-decoder as a directory: transformers' and CTranslate2's answers for what tfcli writes, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from tfcli.errors import UserError
from tfcli.formats import convert
from tfcli.formats.gguf import families as gguf_families
from tfcli.formats.hf import directory as hf
from tfcli.infer.beam import Beams, answers
from tfcli.text.tokenizers.sentencepiece import Tokenizer

SOURCE = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(0))
TARGET = torch.randint(3, 90, (3, 7), generator=torch.Generator().manual_seed(1))
REAL = torch.arange(9) < torch.tensor([[9], [5], [1]])


def tokenizer() -> Tokenizer:
    plain = tiny_models.tokenizer()
    return Tokenizer(plain.model_bytes, suffix_ids=(plain.eos_id,))


@torch.no_grad()
def same(ours: Any, theirs: Any) -> None:
    expected = theirs(input_ids=SOURCE, attention_mask=REAL.long(), decoder_input_ids=TARGET).logits
    got = ours.logits(ours(TARGET, memory=ours.encode(SOURCE, mask_BS=REAL)))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def foreign(seed: int = 0, **changes: Any) -> Any:
    """Return a model of transformers with random numbers."""
    import transformers

    torch.manual_seed(seed)
    sizes = {"vocab_size": 400, "d_model": 24, "max_position_embeddings": 32, "encoder_layers": 2, "decoder_layers": 3}
    sizes |= {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
    sizes |= {f"{part}_ffn_dim": 40 for part in ("encoder", "decoder")}
    made = transformers.MBartForConditionalGeneration(transformers.MBartConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.3)
    return made


@pytest.mark.parametrize(
    "changes", [{}, {"scale_embedding": True, "activation_function": "relu"}, {"activation_function": "gelu_new"}]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_logits_are_those_of_transformers(tmp_path: Path, changes: dict[str, Any], seed: int) -> None:
    theirs = foreign(seed, **changes)
    theirs.save_pretrained(tmp_path)
    ours = hf.load_model(tmp_path, runtime=tiny_models.cpu())
    same(ours, theirs)


def test_what_is_written_is_read_by_transformers_and_by_us(tmp_path: Path) -> None:
    import transformers

    model = tiny_models.encoder_decoder(4)
    hf.save(tmp_path, model, tokenizer())
    same(model, transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval())
    again, codec = hf.load(tmp_path, runtime=tiny_models.cpu())
    assert again.config == model.config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert codec.suffix_ids == (codec.eos_id,)
    text = "Once upon a time"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text).input_ids == [*codec.encode(text), codec.eos_id]


def test_ctranslate2_gives_the_same_greedy_text(tmp_path: Path) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2")
    model, codec = tiny_models.encoder_decoder(5).requires_grad_(False), tokenizer()
    with torch.no_grad():
        model.embed.weight[codec.eos_id] += 0.24
    hf.save(tmp_path / "hf", model, codec)
    ctranslate2.converters.TransformersConverter(str(tmp_path / "hf")).convert(str(tmp_path / "ct2"))
    translator = ctranslate2.Translator(str(tmp_path / "ct2"), inter_threads=1, intra_threads=1)
    sources = [[*codec.encode(text), codec.eos_id] for text in ("Once upon a time", "a king", "the youngest was", "?")]
    pieces = [[codec.piece(id) for id in source] for source in sources]
    theirs = translator.translate_batch(pieces, beam_size=1, max_decoding_length=12)
    ours = answers(model, sources, Beams(width=1, max_tokens=12), start_id=codec.eos_id, eos_ids=codec.eos_ids)
    assert [[codec.piece(id) for id in answer.ids] for answer in ours] == [r.hypotheses[0] for r in theirs]


def test_older_files_repeat_the_embedding(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    theirs = foreign()
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for name in ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors["model.shared.weight"].clone()
    save_file(tensors | {"final_logits_bias": torch.zeros(1, 400)}, path, metadata={"format": "pt"})
    same(hf.load_model(tmp_path, runtime=tiny_models.cpu()), theirs)
    save_file(tensors | {"final_logits_bias": torch.ones(1, 400)}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="final_logits_bias is not zero"):
        hf.load_model(tmp_path, runtime=tiny_models.cpu())


def test_shapes_that_the_core_has_not_are_refused(tmp_path: Path) -> None:
    foreign(encoder_ffn_dim=48).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="encoder_ffn_dim is 48"):
        hf.read_config(tmp_path)


def test_converted_and_compared(tmp_path: Path) -> None:
    hf.save(tmp_path / "a", tiny_models.encoder_decoder(6), tokenizer())
    done = convert.convert(tmp_path / "a", tmp_path / "b", to="hf", type="bf16")
    assert done.logit_delta < 1e-4
    with pytest.raises(UserError, match="encoder-decoder, for which tfcli writes no GGUF"):
        gguf_families.written(tiny_models.encoder_decoder().config)
