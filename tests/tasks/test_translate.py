"""Translation: pairs from files, the loss, a run from scratch from the shell's side, answers and scores."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import data_reports
import pytest
import sacrebleu
import tiny_models
import torch

from tfcli.config.options import TokenizerOptions
from tfcli.errors import UserError
from tfcli.tasks.common.report import Report
from tfcli.tasks.task import Start
from tfcli.tasks.translate import data, scores
from tfcli.tasks.translate.new_model import make, shape
from tfcli.tasks.translate.options import NewModel, PairData, TranslateConfig, TranslateOptions
from tfcli.tasks.translate.task import APPLICATION, _halves, encode
from tfcli.train.finetune import finetune

WORDS = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "red": "rot", "blue": "blau", "big": "groß"}
SETTINGS: dict[str, Any] = {
    "model.depth": 1,
    "model.width": 32,
    "model.context": 32,
    "tokenizer.vocab_size": 300,
    "train.steps": 4,
    "train.batch_size": 16,
    "translate.watch": 4,
}


def pairs(count: int) -> list[data.Pair]:
    names = list(WORDS)
    made = []
    for n in range(count):
        words = [names[(n * 3 + k * (n % 5 + 1)) % len(names)] for k in range(2 + n % 3)]
        made.append(data.Pair(source=" ".join(words), target=" ".join(WORDS[word] for word in words)))
    return made


def table(path: Path, count: int = 60) -> Path:
    path.write_text("".join(f"{p.source}\t{p.target}\n" for p in pairs(count)), encoding="utf-8")
    return path


def config(**changes: Any) -> TranslateConfig:
    options = TokenizerOptions(vocab_size=300)
    return TranslateConfig(model=NewModel(depth=1, width=32, context=32), tokenizer=options, **changes)


def test_two_files_a_table_and_json_lines_are_the_same_pairs(tmp_path: Path) -> None:
    expected = pairs(9)
    (tmp_path / "a.en").write_text("".join(f"{p.source}\r\n" for p in expected), encoding="utf-8")
    with gzip.open(tmp_path / "a.de.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(p.target for p in expected))
    table(tmp_path / "a.tsv", 9)
    (tmp_path / "named.tsv").write_text(
        "id\ttarget\tsource\n" + "".join(f"{n}\t{p.target}\t{p.source}\n" for n, p in enumerate(expected)), "utf-8"
    )
    rows = [{"translation": {"en": p.source, "de": p.target}} for p in expected]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    for specs in (["a.en", "a.de.gz"], ["a.en,a.de.gz"], ["a.tsv"], ["named.tsv"], ["a.jsonl"]):
        given = [",".join(str(tmp_path / part) for part in spec.split(",")) for spec in specs]
        assert data.read(given, PairData(), Report())[0] == expected, specs
    swapped = data.read([str(tmp_path / "a.jsonl")], PairData(source="de", target="en"), Report())[0]
    assert swapped[0] == data.Pair(source=expected[0].target, target=expected[0].source)


def test_what_is_wrong_with_pairs_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_text("one\ntwo\nthree\n")
    (tmp_path / "a.de").write_text("eins\nzwei\n")
    with pytest.raises(UserError, match=r"a\.en has 3 lines, .*a\.de has 2"):
        data.read([str(tmp_path / "a.en"), str(tmp_path / "a.de")], PairData(), Report())
    (tmp_path / "b.tsv").write_text('"one" big\teins\n\ntwo\n')
    with pytest.raises(UserError, match=r"b\.tsv:3 has 1 fields"):
        data.read([str(tmp_path / "b.tsv")], PairData(), Report())
    (tmp_path / "c.tsv").write_text('"one" big\teins\n \tzwei\n')
    report = Report()
    assert data.read([str(tmp_path / "c.tsv")], PairData(), report)[0] == [
        data.Pair(source='"one" big', target="eins")
    ]  # quotes are text
    assert report.faults == {"pairs with an empty side, left out": 1}
    with pytest.raises(UserError, match="1 pairs are too few to hold some out; 1 pairs with an empty side, left out"):
        _halves([str(tmp_path / "c.tsv")], TranslateConfig(), Report())
    with pytest.raises(UserError, match=r"c\.tsv:2: pairs with an empty side"):
        data.read([str(tmp_path / "c.tsv")], PairData(), Report(strict=True))
    (tmp_path / "d.jsonl").write_text('{"a": "x", "b": "y", "c": "z"}\n')
    with pytest.raises(UserError, match="which of a, b, c is the source"):
        data.read([str(tmp_path / "d.jsonl")], PairData(), Report())


def test_scores_are_sacrebleus_with_its_signature() -> None:
    answers, right = ["a big red dog runs .", "the cat sits"], ["a big red dog ran .", "the cat sat down"]
    found, lines = scores.assess(answers, right)
    assert found["bleu"] == sacrebleu.corpus_bleu(answers, [right]).score == scores.score(answers, right)["bleu"]
    assert found["chrf"] == sacrebleu.corpus_chrf(answers, [right]).score
    assert "tok:13a" in found["signature"]["bleu"] and "nc:6" in lines[1]
    assert found["interval"]["bleu"][0] <= found["interval"]["bleu"][1]


def prepared(tmp_path: Path, **changes: Any) -> tuple[Any, Any]:
    runtime, settings = tiny_models.cpu(), config(**changes)
    specs = [str(table(tmp_path / "pairs.tsv"))]
    model, codec, _ = APPLICATION.fresh(specs, settings, runtime, lambda line: None)
    start = Start(
        model=model, codec=codec, data=specs, config=settings, runtime=runtime, hf_config={}, note=lambda line: None
    )
    return APPLICATION.prepare(start), model


def test_the_data_report_counts_each_of_two_files(tmp_path: Path) -> None:
    """Each language's file has its own tokens; a pair without a side is dropped, with its line."""
    for name in ("source", "target"):
        sides = [getattr(pair, name) for pair in pairs(30)]
        (tmp_path / name).write_text("\n".join([*sides, "" if name == "target" else "one"]) + "\n")
    runtime, settings = tiny_models.cpu(), config()
    specs = [str(tmp_path / "source"), str(tmp_path / "target")]
    model, codec, _ = APPLICATION.fresh(specs, settings, runtime, lambda line: None)
    start = Start(
        model=model, codec=codec, data=specs, config=settings, runtime=runtime, hf_config={}, note=lambda line: None
    )
    made = APPLICATION.prepare(start).data_report
    data_reports.check(made, "translate")
    of = [made[part] for part in ("train", "val")]
    sums = [sum(part[side]["tokens"] for part in of) for side in ("source", "target")]
    assert [row["tokens"] for row in made["sources"]] == sums
    assert made["dropped"]["reasons"][0]["places"] == [f"{specs[0]}:31"]


def test_the_loss_is_that_of_each_pair_alone(tmp_path: Path) -> None:
    import numpy as np

    task, model = prepared(tmp_path, translate=TranslateOptions(label_smoothing=0.2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        rows = task.rows(np.arange(12), np.zeros(12, dtype=np.int64))
        total, count = task.loss(model, rows, dtype=torch.float32, dropout=0.0)
        parts = [task.loss(model, part, dtype=torch.float32, dropout=0.0) for part in rows.split(5)]
        expected, tokens = 0.0, 0
        for example in task.train[:12]:
            read = torch.tensor([[task.codec.eos_id, *example.target[:-1]]])
            hidden = model(read, memory=model.encode(torch.tensor([example.source])))
            logprobs = model.logits(hidden)[0].log_softmax(-1)
            right = logprobs.gather(1, torch.tensor(example.target)[:, None]).sum()
            expected -= float(0.8 * right + 0.2 * logprobs.mean(-1).sum())
            tokens += len(example.target)
    assert count == task.count(rows) == tokens == sum(n for _, n in parts)
    assert float(total) == pytest.approx(expected, rel=1e-4)
    assert sum(float(part) for part, _ in parts) == pytest.approx(expected, rel=1e-4)


def test_pairs_that_do_not_fit_and_other_models_are_refused(tmp_path: Path) -> None:
    codec = tiny_models.tokenizer()
    assert [len(e.target) for e in encode(codec, [data.Pair(source="x", target="")])] == [1]
    start = Start(
        model=tiny_models.model(), codec=codec, data=[str(table(tmp_path / "a.tsv"))], config=config(),
        runtime=tiny_models.cpu(), hf_config={}, note=lambda line: None,
    )  # fmt: skip
    with pytest.raises(UserError, match="translate needs an encoder-decoder"):
        APPLICATION.prepare(start)
    with pytest.raises(UserError, match=r"model\.width is 100"):
        shape(NewModel(width=100), vocab_size=300, pairs=10)
    assert shape(NewModel(), vocab_size=300, pairs=10).encoder_depth == 3
    assert make(pairs(20), config(), tiny_models.cpu(), lambda line: None)[1].suffix_ids


def test_a_model_from_scratch_learns_translates_and_is_scored(tmp_path: Path) -> None:
    source = table(tmp_path / "pairs.tsv", 200)
    steps = {"train.steps": 150, "optim.lr": 5e-3, "train.dropout": 0.0, "model.width": 64, "train.eval_every": 50}
    lines: list[str] = []
    result = finetune(
        source, task="translate", out=tmp_path / "run", from_scratch=True, settings={**SETTINGS, **steps},
        device="cpu", precision="fp32", threads=1, listen=lambda event: lines.append(getattr(event, "text", "")),
    )  # fmt: skip
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["val_loss"] for row in metrics if "val_loss" in row]
    assert losses[-1] < 0.7 * losses[0] and result.scores["chrf"] > 0
    assert any("pairs to train on" in line for line in lines)
    made = json.loads((tmp_path / "run/data.json").read_text())
    data_reports.check(made, "translate")
    assert (made["split"]["seed"], made["train"]["documents"], made["val"]["documents"]) == (1337, 180, 20)
    from tfcli.formats.hf import heads

    loaded = heads.load(tmp_path / "run", runtime=tiny_models.cpu())
    predictor = APPLICATION.predictor(loaded.model, loaded.codec, loaded.hf_config, tiny_models.cpu())
    said = predictor.predict(["one two", "", "three " * 40])
    assert said[0]["translation"] and said[1]["translation"] == "" and said[2]["cut"]
    assert predictor.parse({"text": "x"}) == "x"
    with pytest.raises(UserError, match='no "source"'):
        predictor.parse({"label": 1})
    found = predictor.evaluate([str(source)], config(), limit=20)
    assert found.scores["examples"] == 20 and found.scores["chrf"] > 0
    assert found.predictions[0]["expected"] == pairs(1)[0].target
    import transformers

    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run")
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    batch = tokens(["one two"], return_tensors="pt", return_token_type_ids=False)
    text = tokens.decode(theirs.generate(**batch)[0], skip_special_tokens=True)
    assert text == said[0]["translation"]


def test_a_new_model_is_a_function_of_data_and_seed(tmp_path: Path) -> None:
    source = table(tmp_path / "pairs.tsv")
    options: dict[str, Any] = {"device": "cpu", "precision": "fp32", "threads": 1}
    for name in ("a", "b"):
        finetune(source, task="translate", out=tmp_path / name, from_scratch=True, settings=SETTINGS, **options)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    with pytest.raises(UserError, match="a model and data are needed"):
        finetune(None, source, task="translate", out=tmp_path / "c")


def test_adapters_of_an_encoder_decoder(tmp_path: Path) -> None:
    """--lora on a model that translates: peft computes the same, predict finds base, beams and adapters."""
    peft = pytest.importorskip("peft")
    import warnings

    import transformers

    from tfcli.apply.predict import TaskModel, task_of
    from tfcli.formats.open import open_path
    from tfcli.runtime import Machine

    data_file = table(tmp_path / "a.tsv")
    machine = {"device": "cpu", "precision": "fp32", "threads": 1}
    finetune(None, data_file, task="translate", out=tmp_path / "base", settings=SETTINGS, from_scratch=True, **machine)
    settings = {"train.steps": 4, "lora.on": True, "optim.lr": 0.1, "translate.watch": 4, "translate.beam": 2}
    finetune(tmp_path / "base", data_file, task="translate", out=tmp_path / "run", settings=settings, **machine)
    opened = open_path(tmp_path / "run")
    assert task_of(opened) == "translate"
    ours: Any = TaskModel.load(opened, machine=Machine(device="cpu", precision="fp32", threads=1)).predictor
    assert ours.beams.width == 2
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    sources = torch.tensor([[5, 9, 11, 7]])
    before = base(input_ids=sources, decoder_input_ids=sources).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run").eval()
    with torch.no_grad():
        expected = theirs(input_ids=sources, decoder_input_ids=sources).logits
        memory = ours.model.encode(sources)
        logits = ours.model.logits(ours.model(sources, memory=memory))
    assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
