"""Tagging: logits and loss as transformers', a run that learns, predictions with offsets, and data that is odd."""

import json
import random
from pathlib import Path
from typing import Any

import data_reports
import pytest
import small_bert
import tiny_models
import torch

from tfcli.errors import UserError
from tfcli.formats.hf import heads as head_files
from tfcli.tasks.common.batch import head_logits
from tfcli.tasks.common.report import Report
from tfcli.tasks.tag import task as tag
from tfcli.tasks.tag.chunks import Cutter
from tfcli.tasks.tag.options import TagConfig
from tfcli.tasks.tag.predictor import TagPredictor
from tfcli.tasks.tag.words import joined
from tfcli.train.finetune import finetune

NAMES = ["O", "B-person", "I-person", "B-place", "I-place"]
PEOPLE, PLACES, OTHERS = ["ada", "grace", "alan"], ["paris", "rome", "york"], ["is", "in", "the", "and", "far", "from"]
SECOND = {"person": "lovelace", "place": "city"}


def conll(path: Path, count: int, seed: int) -> Path:
    """Sentences in which each word alone decides its tag."""
    rng = random.Random(seed)
    lines = []
    for _ in range(count):
        for _ in range(rng.randrange(1, 5)):
            lines += [f"{word} O" for word in rng.choices(OTHERS, k=rng.randrange(0, 3))]
            kind, names = rng.choice([("person", PEOPLE), ("place", PLACES)])
            lines.append(f"{rng.choice(names)} B-{kind}")
            lines += [f"{SECOND[kind]} I-{kind}"] * rng.randrange(2)
            lines.append("is O")
        lines.append("")
    path.write_text("\n".join(lines))
    return path


def predictor(directory: Path) -> TagPredictor:
    loaded = head_files.load(directory, runtime=tiny_models.cpu())
    return tag.APPLICATION.predictor(loaded.model, loaded.codec, loaded.hf_config, tiny_models.cpu())


def labelled_bert(directory: Path) -> Any:
    names = dict(enumerate(NAMES))
    return small_bert.save(directory, architecture="BertForTokenClassification", id2label=names)


def test_logits_and_loss_equal_transformers(tmp_path: Path) -> None:
    """Padding, words of several pieces, the first piece alone labelled; fp32, 1e-4."""
    theirs = labelled_bert(tmp_path)
    ours = predictor(tmp_path)
    assert ours.names == tuple(NAMES)
    sentences = [["ada", "lovelace", "is", "in", "paris"], ["rome"]]
    chunks = ours.cutter.chunks([joined(words) for words in sentences])
    part = tag.examples(chunks, [[1, 2, 0, 0, 3], [3]])
    with torch.no_grad():
        expected = theirs(input_ids=part["tokens_BT"], attention_mask=part["mask_BT"].long(), labels=part["labels_BT"])
        logits = head_logits(ours.model, part)
        loss, count = tag.loss(ours.model, part)
    assert count == 6
    real = part["mask_BT"]
    assert (logits - expected.logits)[real].abs().max() < 1e-4
    assert float(loss) / count == pytest.approx(float(expected.loss), abs=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over a tiny BERT, long enough to overfit the words."""
    folder = tmp_path_factory.mktemp("tag")
    words = (*PEOPLE, *PLACES, *OTHERS, *SECOND.values())
    small_bert.save(folder / "base", words=words, initializer_range=0.1)
    settings = {"train.epochs": 8, "optim.lr": 3e-3, "train.batch_size": 8, "train.dropout": 0.0}
    finetune(
        folder / "base",
        conll(folder / "train.conll", 300, 1),
        task="tag",
        out=folder / "run",
        settings={**settings, "data.val": str(conll(folder / "val.conll", 30, 2))},
        device="cpu",
        precision="fp32",
    )
    return folder


def test_a_run_learns_and_is_scored(trained: Path) -> None:
    """Would catch labels beside their words, a head that is not trained, and metrics that are not written."""
    record = json.loads((trained / "run" / "run.json").read_text())
    assert record["scores"]["val_f1"] > 0.95
    last = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["val_f1"] > 0.95
    assert last["val_loss"] < 0.2
    data_report = json.loads((trained / "run" / "data.json").read_text())
    data_reports.check(data_report, "tag")
    assert data_report["train"]["documents"] == 300
    assert data_report["val"]["entities"].keys() == {"person", "place"}
    assert data_report["dropped"] == {"count": 0, "reasons": []}


def test_the_directory_is_a_model_of_transformers(trained: Path) -> None:
    """Under its own class, with the labels' names and the same logits."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(trained / "run").eval()
    assert type(theirs).__name__ == "BertForTokenClassification"
    assert [theirs.config.id2label[index] for index in range(5)] == NAMES
    ours = predictor(trained / "run")
    chunks = ours.cutter.chunks([joined(["ada", "is", "in", "new", "york"])])
    part = tag.examples(chunks, [[0] * 5])
    with torch.no_grad():
        difference = head_logits(ours.model, part) - theirs(input_ids=part["tokens_BT"]).logits
    assert difference.abs().max() < 1e-4


def test_predictions_have_offsets_into_their_input(trained: Path) -> None:
    """Of a raw text, of words of one's own, of nothing; in the order of the input."""
    ours = predictor(trained / "run")
    text = "  Is Ada and\tGrace in\u00a0Rome"
    first, second, third = ours.predict(
        [ours.plain(text), ours.parse({"tokens": ["ada", "is", "in", "rome"]}), ours.plain("")]
    )
    for entity in first["entities"]:
        assert text[entity["start"] : entity["end"]] == entity["text"]
        assert 0 < entity["score"] <= 1
    assert [entity["text"] for entity in first["entities"]] == ["Ada", "Grace", "Rome"]
    assert second["tags"] == ["B-person", "O", "O", "B-place"]
    assert second["text"][second["entities"][1]["start"] :] == "rome"
    assert third == {"text": "", "entities": []}
    assert ours.show(second) == "[ada](person) is in [rome](place)"
    with pytest.raises(UserError, match="neither"):
        ours.parse({"words": 3})


def test_a_prediction_does_not_depend_on_the_others(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of a sentence longer than the model every word has a tag."""
    ours = predictor(trained / "run")
    texts = ["ada is in rome", "alan", "far from paris and york"]
    alone = [ours.predict([ours.plain(text)])[0] for text in texts]
    assert ours.predict([ours.plain(text) for text in texts]) == alone
    long = ours.parse({"tokens": ["ada", "is", "in", "rome"] * 60})
    (answer,) = ours.predict([long])
    assert len(answer["tags"]) == 240
    assert answer["tags"][:4] == ["B-person", "O", "O", "B-place"]
    assert "cut" not in answer
    pieces = Cutter._pieces
    monkeypatch.setattr(Cutter, "_pieces", lambda self, texts: [[[*w] * 500 for w in s] for s in pieces(self, texts)])
    assert ours.predict([ours.plain("ada")])[0]["cut"] is True


def test_evaluation_equals_seqeval_and_says_what_is_odd(trained: Path, tmp_path: Path) -> None:
    metrics = pytest.importorskip("seqeval.metrics")
    ours = predictor(trained / "run")
    path = conll(tmp_path / "test.conll", 25, 3)
    path.write_text(path.read_text() + "\nfar B-planet\nis I-place\n")
    made = ours.evaluate([str(path)], TagConfig(), limit=None)
    true, guess = [], []
    for answer, block in zip(made.predictions, path.read_text().split("\n\n"), strict=True):
        true.append([line.split()[1] for line in block.strip().split("\n")])
        guess.append(answer["tags"])
    assert made.scores["f1"] == pytest.approx(metrics.f1_score(true, guess))
    assert made.scores["precision"] == pytest.approx(metrics.precision_score(true, guess))
    assert made.scores["recall"] == pytest.approx(metrics.recall_score(true, guess))
    low, high = made.scores["interval"]["f1"]
    assert low <= made.scores["f1"] <= high
    assert made.scores["examples"] == 26
    assert any("1 held-out sentences with labels that the model does not have" in line for line in made.notes)
    assert any("do not follow BIO" in line for line in made.notes)
    assert any("planet" in line for line in made.lines)
    few = ours.evaluate([str(path)], TagConfig(), limit=2)
    assert few.scores["examples"] == len(few.predictions) == 2


def test_what_cannot_be_trained_on(tmp_path: Path) -> None:
    """No entities, a decoder, and strict data."""
    small_bert.save(tmp_path / "base")
    plain, broken = tmp_path / "plain.conll", tmp_path / "broken.conll"
    plain.write_text("a O\n\nb O\n\nc O\n")
    broken.write_text("a B-x\n\nb I-x\n\nc O\n")

    def run(model: Path, data: Path, **settings: Any) -> None:
        finetune(model, data, task="tag", out=tmp_path / "run", settings={"train.steps": 1, **settings}, device="cpu")

    with pytest.raises(UserError, match="has no entities"):
        run(tmp_path / "base", plain)
    with pytest.raises(UserError, match=r"broken\.conll:3: sentences whose tags do not follow BIO"):
        run(tmp_path / "base", broken, **{"data.strict": True})
    one = tmp_path / "one.conll"
    one.write_text("a B-x\nb I-y\n")
    with pytest.raises(UserError, match="too few to hold some out; 1 sentences whose tags do not follow BIO"):
        run(tmp_path / "base", one)
    with pytest.raises(UserError, match="does not follow BIO"):
        run(tmp_path / "base", broken, **{"tag.repair": False})
    tiny_models.save(tmp_path / "gpt")
    with pytest.raises(UserError, match="no head of kind 'token'"):
        run(tmp_path / "gpt", broken)


def test_data_of_which_nothing_is_tagged_is_refused(tmp_path: Path) -> None:
    """Would catch an F1 of 0 over no entity; a file without any beside one that has some is data."""
    bare, tagged = tmp_path / "bare.jsonl", tmp_path / "tagged.jsonl"
    bare.write_text('{"text": "Ada"}\n')
    tagged.write_text('{"text": "Ada", "spans": [[0, 3, "per"]]}\n')
    report = Report()
    assert len(tag.read([str(bare), str(tagged)], TagConfig(), report)[0]) == 2
    assert report.notes == {"sentences with neither tags nor spans, taken as without entities": 1}
    with pytest.raises(UserError, match=r"bare\.jsonl: no sentence has words and tags, or a text and spans"):
        tag.read([str(bare)], TagConfig(), Report())
