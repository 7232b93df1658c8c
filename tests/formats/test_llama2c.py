"""Checkpoints of llama2.c: run.c's own arithmetic gives the same logits, and what is no checkpoint is refused."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tiny_models import cpu

from tfcli.errors import UserError
from tfcli.formats import llama2c
from tfcli.formats.open import open_path

D, F, L, H, G, V, S = 24, 44, 2, 4, 2, 280, 32
K = D // H


def save(path: Path, *, tied: bool = True, seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    """A checkpoint of random numbers, and they by run.c's names."""
    rng = np.random.default_rng(seed)

    def random(*shape: int) -> npt.NDArray[np.float32]:
        return rng.normal(0, 0.3, shape).astype(np.float32)

    weights = {
        "token_embedding_table": random(V, D), "rms_att_weight": 1 + random(L, D), "wq": random(L, H * K, D),
        "wk": random(L, G * K, D), "wv": random(L, G * K, D), "wo": random(L, D, H * K),
        "rms_ffn_weight": 1 + random(L, D), "w1": random(L, F, D), "w2": random(L, D, F), "w3": random(L, F, D),
        "rms_final_weight": 1 + random(D), "freq_cis": random(2, S, K // 2),
    }  # fmt: skip
    if not tied:
        weights["wcls"] = random(V, D)
    header = struct.pack("<7i", D, F, L, H, G, V if tied else -V, S)
    path.write_bytes(header + b"".join(values.tobytes() for values in weights.values()))
    return weights


def save_tokenizer(path: Path, pieces: int = V) -> list[str]:
    """Write a tokenizer as llama2.c's tokenizer.py does; later pieces have lower scores."""
    texts = ["<unk>", "\n<s>\n", "\n</s>\n"] + [f"<0x{byte:02X}>" for byte in range(256)]
    texts += [" ", "a", "b", "c", " a", "ab", " ab", "é", "abc", " abc", "bc", "cc", "ca", "ba", "aa", "bb", "ac"]
    texts += [f"{letter}{other}" for letter in "xyz" for other in "xyz"][: pieces - len(texts)]
    assert len(texts) == pieces
    entries = [struct.pack("<fi", -float(at), len(text.encode())) + text.encode() for at, text in enumerate(texts)]
    path.write_bytes(struct.pack("<I", 8) + b"".join(entries))
    return texts


def run_c(weights: dict[str, Any], ids: list[int]) -> npt.NDArray[np.float64]:
    """``forward`` of llama2.c's run.c, position by position, in float64: logits (T, V)."""
    w = {name: values.astype(np.float64) for name, values in weights.items()}

    def rmsnorm(x: Any, weight: Any) -> Any:
        return weight * x / np.sqrt((x * x).mean() + 1e-5)

    def rotated(x: Any, position: int) -> Any:
        out = x.copy()
        for i in range(0, len(x), 2):
            angle = position / 10000.0 ** ((i % K) / K)
            out[i] = x[i] * np.cos(angle) - x[i + 1] * np.sin(angle)
            out[i + 1] = x[i] * np.sin(angle) + x[i + 1] * np.cos(angle)
        return out

    keys: list[list[Any]] = [[] for _ in range(L)]
    values: list[list[Any]] = [[] for _ in range(L)]
    logits = []
    for position, id in enumerate(ids):
        x = w["token_embedding_table"][id].copy()
        for layer in range(L):
            y = rmsnorm(x, w["rms_att_weight"][layer])
            q = rotated(w["wq"][layer] @ y, position).reshape(H, K)
            keys[layer].append(rotated(w["wk"][layer] @ y, position).reshape(G, K))
            values[layer].append((w["wv"][layer] @ y).reshape(G, K))
            heads = []
            for h in range(H):
                scores = np.array([q[h] @ k[h // (H // G)] for k in keys[layer]]) / np.sqrt(K)
                att = np.exp(scores - scores.max())
                att /= att.sum()
                heads.append(sum(a * v[h // (H // G)] for a, v in zip(att, values[layer], strict=True)))
            x += w["wo"][layer] @ np.concatenate(heads)
            y = rmsnorm(x, w["rms_ffn_weight"][layer])
            gate = w["w1"][layer] @ y
            x += w["w2"][layer] @ (gate / (1 + np.exp(-gate)) * (w["w3"][layer] @ y))
        logits.append(w.get("wcls", w["token_embedding_table"]) @ rmsnorm(x, w["rms_final_weight"]))
    return np.array(logits)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_logits_are_run_c_s(tmp_path: Path, tied: bool) -> None:
    """Would catch weights in another order, rotary rows left as they are, a forgotten table of cosines."""
    weights = save(tmp_path / "model.bin", tied=tied)
    save_tokenizer(tmp_path / "tok280.bin")
    model, _ = open_path(tmp_path / "model.bin").load(runtime=cpu())
    assert open_path(tmp_path / "model.bin").config == model.config
    assert model.config.tied == tied and (model.head.weight is model.embed.weight) == tied
    ids = [1, 260, 5, 270, 279, 0, 33, 262]
    ours = model.logits(model(torch.tensor([ids])))[0].double().numpy()
    np.testing.assert_allclose(ours, run_c(weights, ids), atol=1e-4)


@torch.no_grad()
def test_quantized_at_load(tmp_path: Path) -> None:
    weights = save(tmp_path / "model.bin")
    save_tokenizer(tmp_path / "tokenizer.bin")
    model, _ = open_path(tmp_path / "model.bin").load(runtime=cpu(), quantize="int8")
    assert not hasattr(model.embed, "weight")
    ids = [1, 260, 5, 270]
    ours = model.logits(model(torch.tensor([ids])))[0].double().numpy()
    assert 1e-6 < np.abs(ours - run_c(weights, ids)).max() < 0.2


def test_texts_are_cut_as_run_c_cuts_them(tmp_path: Path) -> None:
    """Merges by score, a space before the text, bytes for what has no piece, <s> before what a model is fed."""
    save_tokenizer(tmp_path / "tok.bin")
    codec = llama2c.read_tokenizer(tmp_path / "tok.bin", V)
    names = ["<unk>", "<s>", "</s>"]
    assert [codec.piece(id) for id in range(3)] == names
    assert codec.prefix_ids == (1,)
    assert codec.eos_ids == (1, 2)  # its training text has <s> between stories and nothing after them
    assert [codec.piece(id) for id in codec.encode("abc acq")] == ["▁abc", "▁a", "c", "<0x71>"]
    assert codec.decode(codec.encode("abc abcq\né")) == "abc abcq\né"


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    """Sizes are compared before anything is allocated."""
    path = tmp_path / "model.bin"
    save(path)
    whole = path.read_bytes()
    cases = {
        "header describes a model of": whole[:-4],
        "its header describes a model": whole + b"\0\0\0\0",
        "is not a model: it has 9 bytes": whole[:9],
        "is not a model that tfcli reads": struct.pack("<7i", D, F, L, 5, G, V, S) + whole[28:],
        "is a pickle": b"PK\x03\x04" + whole,
        "is a pickle, which": b"\x80\x02}q\x00." + whole,
        "is a later version": struct.pack("<II", 0x616B3432, 1) + whole,
        "bytes, its header": struct.pack("<7i", D, F, 2**20, H, G, V, S) + whole[28:],
    }
    for message, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            _ = open_path(path).config
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"no tok280.bin or tokenizer.bin next to it"):
        open_path(path).load(runtime=cpu())


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tok.bin"
    save_tokenizer(path)
    whole = path.read_bytes()
    for data in (b"", whole[:-1], whole + b"x", whole.replace(b"<0x41>", b"<0x42>"), whole.replace(b"\xc3", b"\xff")):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"is not a tokenizer of llama2\.c with 280 pieces"):
            llama2c.read_tokenizer(path, V)
    with pytest.raises(UserError, match="no such tokenizer"):
        llama2c.read_tokenizer(tmp_path / "none.bin", V)
