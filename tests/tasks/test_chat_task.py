"""Chat: only answers are learnt, packed or not the loss is the same, and it falls from the command to the directory."""

import json
from pathlib import Path
from typing import Any

import data_reports
import numpy as np
import pytest
import tiny_gguf
import torch
from safetensors.torch import load_file
from tiny_models import cpu, model, save, tokenizer

from tfcli.errors import Interrupted, UserError
from tfcli.formats.hf import adapters
from tfcli.formats.hf import directory as hf
from tfcli.formats.open import open_path
from tfcli.model.transformer import Transformer
from tfcli.tasks.chat import task as chat
from tfcli.tasks.chat.encode import Encoded, template_for
from tfcli.tasks.chat.task import APPLICATION, ChatConfig, ChatOptions
from tfcli.tasks.task import Start
from tfcli.text.chat.messages import prompt_ids, template_of
from tfcli.train.events import Event, Saved
from tfcli.train.finetune import finetune


def data(path: Path, count: int = 24) -> Path:
    rows = [{"prompt": f"who is {number}?", "response": f"the king {number % 3}"} for number in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def some(lengths: tuple[int, ...], seed: int = 0) -> list[Encoded]:
    random = np.random.default_rng(seed)
    made = []
    for length in lengths:
        answer = random.random(length) < 0.5
        answer[0], answer[-1] = False, True
        made.append(Encoded(ids=random.integers(3, 400, length).astype(np.int32), answer=answer))
    return made


def prepared(path: Path, core: Transformer | None = None, **options: Any) -> tuple[Any, list[str]]:
    notes: list[str] = []
    start = Start(
        model=core or model(context=128), codec=tokenizer(), data=[str(path)], config=ChatConfig(**options),
        runtime=cpu(), hf_config={}, note=notes.append,
    )  # fmt: skip
    return APPLICATION.prepare(start), notes


def test_packed_rows_have_the_loss_and_gradient_of_conversations_alone() -> None:
    """Would catch targets of a neighbour, attention to it, and padding that counts."""
    listed = some((9, 5, 12, 7, 3))
    alone, together = model(), model()
    total = torch.zeros(())
    number = 0
    for one in listed:
        part, found = chat.loss(alone, chat.examples([[one]]))
        part.backward()
        total, number = total + part.detach(), number + found
    assert number == sum(int(one.answer.sum()) for one in listed)
    packed, found = chat.loss(together, chat.examples([listed[:3], listed[3:]]))
    packed.backward()
    assert found == number
    torch.testing.assert_close(packed.detach(), total, atol=1e-3, rtol=1e-5)
    for (name, a), (_, b) in zip(alone.named_parameters(), together.named_parameters(), strict=True):
        assert a.grad is not None and b.grad is not None, name
        torch.testing.assert_close(a.grad, b.grad, atol=2e-4 * float(a.grad.abs().max()), rtol=1e-3)
    lost, ids, right = chat.score(alone, listed, cpu()).T
    assert lost.sum() == pytest.approx(float(total), rel=1e-5)
    assert ids.tolist() == [one.answer.sum() for one in listed] and (right <= ids).all()


def test_what_is_not_an_answer_is_not_in_the_loss() -> None:
    """Prompts are read, not predicted: one that is never followed by an answer changes nothing."""
    (one,) = some((12,))
    core = model()
    answer = np.zeros(12, bool)
    answer[4:8] = True
    ids = one.ids.copy()
    first, _ = chat.loss(core, chat.examples([[Encoded(ids=ids, answer=answer)]]))
    ids[8:] = 399
    second, _ = chat.loss(core, chat.examples([[Encoded(ids=ids, answer=answer)]]))
    torch.testing.assert_close(first, second)


def test_the_data_report_says_what_was_read_packed_cut_and_repeated(tmp_path: Path) -> None:
    path = data(tmp_path / "a.jsonl")
    with path.open("a") as file:
        file.write('{"messages": []}\n' + json.dumps({"prompt": "x", "response": "the sun " * 120}) + "\n")
    task, notes = prepared(path)
    data_report = task.data_report
    data_reports.check(data_report, "chat")
    assert data_report["train"]["documents"] + data_report["val"]["documents"] == 25
    lines = [f"{path}:25", f"{path}:26"]
    assert data_report["dropped"]["reasons"] == [
        {"reason": "empty conversations, left out", "count": 1, "places": lines[:1]}
    ]
    assert data_report["cut"]["reasons"] == [
        {"reason": "conversations cut at the context", "count": 1, "places": lines[1:]}
    ]
    assert data_report["train"]["rows"] == task.size < data_report["train"]["documents"]
    assert task.lengths.max() <= 128
    for said in ("has no chat template", "empty conversations"):
        assert any(said in note for note in notes)
    assert prepared(path, seed=1337)[0].held == task.held != prepared(path, seed=1)[0].held, "by the seed of the run"
    loose, _ = prepared(path, chat=ChatOptions(pack=False))
    assert loose.size == data_report["train"]["documents"]
    with pytest.raises(UserError, match=r"a\.jsonl:25: empty conversations"):
        prepared(path, data=chat.ChatConfig().data.__class__(strict=True))
    (tmp_path / "one.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"messages": []}\n')
    with pytest.raises(UserError, match="too few to hold some out; 1 empty conversations"):
        prepared(tmp_path / "one.jsonl")


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    from tfcli.config.model import Architecture

    with pytest.raises(UserError, match="is an encoder, --task chat needs a decoder"):
        prepared(data(tmp_path / "a.jsonl"), model(architecture=Architecture(causal=False)))


@pytest.mark.parametrize("options", [(), ("lora.on=true", "lora.rank=4")], ids=["full", "lora"])
def test_a_run_learns_and_leaves_what_answers_by_its_template(
    tmp_path: Path, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save(tmp_path / "base", scale=0.1, context=128)
    sets = ["train.epochs=12", "optim.lr=0.01", "train.batch_size=4", *options]
    result = finetune(base, data(tmp_path / "a.jsonl"), task="chat", out=tmp_path / "run", sets=sets, device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    assert result.scores["loss"] == pytest.approx(min(losses), rel=1e-3)
    assert (tmp_path / "run" / adapters.WEIGHTS).exists() == bool(options)
    assert (tmp_path / "run" / hf.WEIGHTS).exists() != bool(options)
    core, codec = open_path(tmp_path / "run").load(runtime=cpu())
    assert codec.chat_template == template_for(tokenizer())
    predictor = APPLICATION.predictor(core, codec, {}, cpu())
    scored = predictor.evaluate([str(data(tmp_path / "b.jsonl"))], ChatConfig(), limit=None)
    assert scored.scores["loss"] < 0.7 * losses[0]
    (answer,) = predictor.predict([predictor.plain("who is 4?")])
    assert answer["response"].startswith("the king")
    with monkeypatch.context() as patched:  # a window of prompts more makes no engine, which packs all weights
        patched.setattr("tfcli.tasks.chat.task.Engine", None)
        assert predictor.predict([predictor.plain("who is 4?")]) == [answer]


def test_transformers_writes_chats_of_the_directory_alike(tmp_path: Path) -> None:
    """The template is in the tokenizer's files: every engine asks in the way that was learnt."""
    import transformers

    base = save(tmp_path / "base", context=128)
    finetune(base, data(tmp_path / "a.jsonl"), task="chat", out=tmp_path / "run", sets=["train.steps=1"], device="cpu")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    _, codec = open_path(tmp_path / "run").load(runtime=cpu())
    messages = [{"role": "user", "content": "a king?"}]
    asked = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert codec.encode_special(asked) == prompt_ids(codec, template_of(codec), messages)


def test_adapters_are_trained_on_a_quantized_file(tmp_path: Path) -> None:
    """QLoRA from the command's library call: what is left is adapters, and the directory is the base with them."""
    source = tiny_gguf.save(tmp_path / "m.gguf", tiny_gguf.config("llama"), type="Q4_1", tokenizer=tokenizer())
    sets = ["lora.on=true", "lora.targets=q,v", "train.steps=4", "train.batch_size=4"]
    finetune(source, data(tmp_path / "a.jsonl"), task="chat", out=tmp_path / "run", sets=sets, device="cpu")
    made, codec = open_path(tmp_path / "run").load(runtime=cpu())
    plain, _ = open_path(source).load(runtime=cpu())
    assert codec.chat_template is not None
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert not torch.equal(made.logits(made(ids)), plain.logits(plain(ids)))
    assert not (tmp_path / "run" / hf.WEIGHTS).exists()
    moved = (tmp_path / "m.gguf").rename(tmp_path / "n.gguf")
    with pytest.raises(UserError, match=r"is an adapter for .*m\.gguf', which does not exist .*--merge"):
        open_path(tmp_path / "run").load(runtime=cpu())
    assert moved.exists()


def test_a_resumed_run_of_adapters_is_one_never_stopped(tmp_path: Path) -> None:
    """To the bit. Checkpoints hold adapters alone: the frozen base comes from its own place again."""
    base, rows = save(tmp_path / "base", context=128), data(tmp_path / "a.jsonl")
    sets = ["lora.on=true", "train.steps=6", "train.batch_size=4", "train.checkpoint_every=2", "train.eval_every=2"]

    def stop(event: Event) -> None:
        if isinstance(event, Saved) and event.step == 4:
            raise Interrupted("stopped")

    finetune(base, rows, task="chat", out=tmp_path / "whole", sets=sets, device="cpu")
    with pytest.raises(Interrupted):
        finetune(base, rows, task="chat", out=tmp_path / "halves", sets=sets, device="cpu", listen=stop)
    finetune(None, out=tmp_path / "halves", resume=True)
    whole, halves = (load_file(tmp_path / name / adapters.WEIGHTS) for name in ("whole", "halves"))
    assert whole.keys() == halves.keys() and all(torch.equal(whole[name], halves[name]) for name in whole)
    size = sum(path.stat().st_size for path in (tmp_path / "halves" / "checkpoints" / "00000006").iterdir())
    assert size < 4 * (tmp_path / "halves" / adapters.WEIGHTS).stat().st_size


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["lora.rank=4"], "settings of LoRA are given, but not --lora"),
        (["lora.on=true", "lora.rank=0"], "lora.rank is 0"),
        (["lora.on=true", "lora.targets=qq"], "unknown target of LoRA 'qq'"),
        (["data.prompt_key=asked"], "no conversations that can be used"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path: Path, sets: list[str], said: str) -> None:
    base = save(tmp_path / "base", context=128)
    with pytest.raises(UserError, match=said):
        finetune(base, data(tmp_path / "a.jsonl"), task="chat", out=tmp_path / "run", sets=sets, device="cpu")
