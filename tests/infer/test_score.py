"""Scores: every token once, and transformers agrees."""

import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import TEXT, cpu, model, save, tokenizer
from tiny_models import foreign as foreign_model

from tfcli.infer.score import evaluate

sys.path.append(str(Path(__file__).parent.parent / "text"))
import foreign


def token_ids(length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 400, length)


@torch.no_grad()
def by_hand(length: int, stride: int) -> float:
    """The mean loss with one forward for each window, scoring what the one before did not reach."""
    core, ids = model(), [1, *token_ids(length).tolist()]
    total, done = 0.0, 0
    ends = [min(32, length)]
    while ends[-1] < length:
        ends.append(min(length, ends[-1] + stride))
    for end in ends:
        window = torch.tensor([ids[max(0, end - 32) : end]])
        targets = torch.tensor(ids[max(0, end - 32) + 1 : end + 1])
        losses = torch.nn.functional.cross_entropy(core.logits(core(window))[0], targets, reduction="none")
        total += losses[-(end - done) :].sum().item()
        done = end
    return total / length


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 65, 200, 1000])
@pytest.mark.parametrize("stride", [None, 1, 7, 32])
def test_every_token_is_scored_once(length: int, stride: int | None) -> None:
    """Would catch a window's first token left out, a last partial window dropped, and tokens counted twice."""
    if stride == 1 and length > 200:
        return
    scores = evaluate(
        model(), token_ids(length), text_bytes=3 * length, codec=tokenizer(), runtime=cpu(), stride=stride
    )
    assert scores.tokens == length
    assert scores.loss == pytest.approx(by_hand(length, stride or 24), abs=1e-5)
    assert scores.perplexity == pytest.approx(math.exp(scores.loss))
    assert scores.bits_per_byte == pytest.approx(scores.loss / math.log(2) / 3)


@torch.no_grad()
def test_perplexity_equals_transformers(tmp_path: Path) -> None:
    """Plain windows that do not overlap, each with the token before it as its first input."""
    import transformers

    save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = token_ids(32 * 5)
    inputs = torch.tensor([1, *ids[:-1]]).view(5, 32)
    logits = theirs(inputs).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(ids)).exp().item()
    scores = evaluate(model(), ids, text_bytes=1, codec=tokenizer(), runtime=cpu(), stride=32)
    assert scores.perplexity == pytest.approx(expected, rel=1e-4)


def test_progress_ends_at_the_end() -> None:
    """Would catch a rate over another unit than tokens."""
    said: list[tuple[int, int]] = []
    evaluate(
        model(), token_ids(500), text_bytes=1, codec=tokenizer(), runtime=cpu(), on_progress=lambda *at: said.append(at)
    )
    assert said[-1] == (500, 500)
    assert said == sorted(said)


def test_an_encoder_is_not_scored() -> None:
    """Would catch a perplexity of a model that sees what it is to predict: near 1, and no score at all."""
    from tfcli.config.model import Architecture
    from tfcli.errors import UserError

    encoder = model(architecture=Architecture(causal=False))
    with pytest.raises(UserError, match="does not read text from left to right"):
        evaluate(encoder, token_ids(20), text_bytes=20, codec=tokenizer(), runtime=cpu())


def beginning(folder: Path, family: str) -> Path:
    """A small model of transformers with its tokenizer, whose texts begin with a token of their own."""
    name = {"llama": "llama3", "gemma3_text": "llama2"}[family]
    more = {"sliding_window": 8} if family == "gemma3_text" else {}
    sizes = {"vocab_size": 800, "max_position_embeddings": 32}
    foreign_model(family, bos_token_id=1, eos_token_id=2, **sizes, **more).save_pretrained(folder)
    return foreign.write(folder, name)


@torch.no_grad()
def sliding_window(directory: Path, text: str, *, context: int, stride: int) -> tuple[float, int]:
    """The loop of https://huggingface.co/docs/transformers/perplexity: nats per token, and tokens.

    Each window begins with the beginning of text, and each has ``context`` tokens, also the last.
    """
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    bos, *ids = tokenizer(text).input_ids
    assert bos == tokenizer.bos_token_id
    ids.append(tokenizer.eos_token_id)
    nats, scored = 0.0, 0
    ends = [*range(context, len(ids), stride), len(ids)] if len(ids) > context else [len(ids)]
    for end in ends:
        input_ids = torch.tensor([[bos, *ids[max(0, end - context) : end]]])
        labels = input_ids.clone()
        labels[:, : -(end - scored)] = -100
        nats += float(model(input_ids, labels=labels).loss) * (end - scored)
        scored = end
    return nats / len(ids), len(ids)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("stride", [None, 32, 5])
def test_sliding_windows_equal_transformers(tmp_path: Path, family: str, stride: int | None) -> None:
    """Would catch windows without the beginning of text, which such models have never read."""
    import tfcli

    directory = beginning(tmp_path, family)
    text = TEXT[:700]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, tokens = sliding_window(directory, text, context=32, stride=stride or 24)
    assert tokens > 100
    engine = tfcli.load(directory, device="cpu", precision="fp32")
    scores = engine.score(text, stride=stride)
    assert scores.tokens == tokens
    assert scores.loss == pytest.approx(expected, abs=1e-5)
    assert scores.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
