"""Classification: columns and labels read, what is wrong with them said, pairs as transformers encodes them, scores."""

import json
from pathlib import Path
from typing import Any

import data_reports
import numpy as np
import pytest
import small_bert
import tiny_models
import torch

from tfcli.config.resolve import resolve
from tfcli.errors import UserError
from tfcli.formats.hf import heads as formats
from tfcli.model import heads
from tfcli.tasks.classify import data, scores
from tfcli.tasks.classify.options import ClassifyConfig
from tfcli.tasks.classify.predictor import encode
from tfcli.tasks.classify.task import APPLICATION, Classification
from tfcli.tasks.common.batch import head_logits
from tfcli.tasks.common.report import duplicates
from tfcli.tasks.task import Start


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("bert")
    return folder, small_bert.save(folder)


def config(**settings: Any) -> ClassifyConfig:
    return resolve(ClassifyConfig, flags={key.replace("__", "."): value for key, value in settings.items()})[0]


def write(folder: Path, rows: list[dict[str, Any]], name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepare(bert: tuple[Path, Any], files: list[str], **settings: Any) -> tuple[Classification, list[str]]:
    notes: list[str] = []
    loaded = formats.load(bert[0], runtime=tiny_models.cpu())
    start = Start(
        model=loaded.model, codec=loaded.codec, data=files, config=config(**settings), runtime=tiny_models.cpu(),
        hf_config=loaded.hf_config, note=notes.append,
    )  # fmt: skip
    return APPLICATION.prepare(start), notes


LETTERS = [{"text": f"{a} {b}", "label": a} for a in "abc" for b in "pqrstuvwxy"]


def test_pairs_are_transformers_pairs(bert: tuple[Path, Any], tmp_path: Path) -> None:
    """Catches types of the second text, a missing [SEP], and truncation from the wrong one (the longer goes first)."""
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(bert[0])
    codec = formats.load(bert[0], runtime=tiny_models.cpu()).codec
    texts, pairs = ["a b c d e f g", "a", "a b c d e f", "a b"], ["x y", "p q r s t u v w", "u v w x y z", None]
    made = encode(codec, texts, pairs, 11)
    for index, (text, pair) in enumerate(zip(texts, pairs, strict=True)):
        expected = theirs(text, pair, truncation="longest_first", max_length=11)
        assert made.ids[index] == expected["input_ids"], index
        assert made.types[index] == expected["token_type_ids"], index
    assert made.cut == [0, 1, 2]
    assert encode(codec, ["", "a"], [None, None], 11).ids[0] == theirs("")["input_ids"]


def test_the_loss_is_transformers_loss(bert: tuple[Path, Any], tmp_path: Path) -> None:
    """Catches a mean where a sum belongs, a pooler left out, labels numbered otherwise; single and several labels."""
    import transformers

    several = [{**row, "label": [row["label"], "z"] if i % 2 else [row["label"]]} for i, row in enumerate(LETTERS)]
    for kind, rows in {"single_label_classification": LETTERS, "multi_label_classification": several}.items():
        loaded = formats.load(bert[0], runtime=tiny_models.cpu())
        notes: list[str] = []
        task = APPLICATION.prepare(
            Start(model=loaded.model, codec=loaded.codec, data=[write(tmp_path, rows)], config=config(),
                  runtime=tiny_models.cpu(), hf_config=loaded.hf_config, note=notes.append)
        )  # fmt: skip
        batch = task.rows(np.arange(8), np.zeros(8, dtype=np.int64))
        loss, count = task.loss(loaded.model, batch, dtype=torch.float32, dropout=0.0)
        from tfcli.formats.hf import directory as hf

        hf.save(tmp_path / kind, loaded.model, loaded.codec, about=task.hf_config)  # type: ignore[arg-type]
        twin = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / kind).eval()
        assert twin.config.problem_type == kind
        out = twin(
            input_ids=batch["tokens_BT"], attention_mask=batch["mask_BT"].long(), token_type_ids=batch["types_BT"],
            labels=batch["targets"],
        )  # fmt: skip
        # fp32 through two blocks, in another order.
        torch.testing.assert_close(loss / count, out.loss, rtol=1e-4, atol=1e-5)
        got = head_logits(loaded.model, batch, dtype=torch.float32)
        torch.testing.assert_close(got, out.logits, rtol=1e-4, atol=1e-4)


def test_columns_and_splits(bert: tuple[Path, Any], tmp_path: Path) -> None:
    """Catches a split that is not of each label alike, a split that changes from call to call, and one in silence."""
    rows = [{"id": i, "sentence": row["text"], "category": row["label"]} for i, row in enumerate(LETTERS)]
    task, notes = prepare(bert, [write(tmp_path, rows)], data__val_fraction=0.2)
    assert task.data_report["val"]["labels"] == {"a": 2, "b": 2, "c": 2}
    assert any("held out: 6 of 30 examples, stratified" in note for note in notes)
    assert prepare(bert, [write(tmp_path, rows)], data__val_fraction=0.2)[0].val.examples == task.val.examples
    named = [{"x": row["label"], "y": row["text"], "label": 1, "text": "no"} for row in LETTERS]
    task, _ = prepare(bert, [write(tmp_path, named)], data__text_key="y", data__label_key="x")
    assert task.names == ["a", "b", "c"]
    about = {**task.hf_config, "architectures": ["BertForSequenceClassification"]}
    loaded = formats.load(bert[0], runtime=tiny_models.cpu())
    heads.fresh(loaded.model, "sequence", 3, seed=0)
    predictor = APPLICATION.predictor(loaded.model, loaded.codec, about, tiny_models.cpu())
    assert predictor.parse({"text": "no", "y": "yes"}) == ("yes", None), "the column that was trained on"
    table = tmp_path / "t.tsv"
    table.write_text("".join(f"{row['label']}\t{row['text']}\n" for row in LETTERS))
    task, notes = prepare(bert, [str(table)])
    assert (task.names, task.train.examples[0].text[0]) == (["a", "b", "c"], task.train.examples[0].labels[0])
    assert any("no header: column 1 is the label, column 2 the text" in note for note in notes)


def test_the_data_report_counts(bert: tuple[Path, Any], tmp_path: Path) -> None:
    """Catches rows that vanish: empty texts, rows without a label, long ones, the same text on both sides."""
    odd = [{"text": "", "label": "a"}, {"text": "x", "label": None}, {"text": "y", "label": ""}]
    long = [{"text": "a " * 100, "label": "a"}]
    train, val = write(tmp_path, [*LETTERS, *odd, *long]), write(tmp_path, [LETTERS[0], LETTERS[11]], "val.jsonl")
    task, notes = prepare(bert, [train], data__val=val)
    data_report = task.data_report
    data_reports.check(data_report, "classify")
    assert data_report["dropped"] == {
        "count": 3,
        "reasons": [
            {"reason": "rows without a label, left out", "count": 2, "places": [f"{train}:32", f"{train}:33"]},
            {
                "reason": "examples with an empty text, left out of training",
                "count": 1,
                "places": [f"{train}:31"],
            },
        ],
    }
    assert data_report["cut"]["reasons"][0]["places"] == [f"{train}:34"]
    assert [(row["name"], row["part"]) for row in data_report["sources"]] == [(train, "train"), (val, "val")]
    assert (data_report["cut"]["count"], data_report["duplicates"]["across_splits"]) == (1, 2)
    assert (data_report["train"]["documents"], data_report["train"]["longest"]) == (31, 64)
    said = "\n".join(notes)
    for line in ("2 rows without a label, left out", "1 examples with an empty text", "1 texts longer than the context",
                 "2 held-out texts are in the training part too"):  # fmt: skip
        assert line in said
    with pytest.raises(UserError, match=r"data.jsonl:31 has an empty text"):
        prepare(bert, [train], data__val=val, data__strict=True)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_class_may_be_called_none(bert: tuple[Path, Any], tmp_path: Path, suffix: str) -> None:
    """Only an empty cell, or null, is no label: stance has FAVOR, AGAINST and NONE."""
    labels = ["FAVOR", "AGAINST", "NONE", "null", "nan"]
    rows = [{"text": "a b", "label": labels[i % 5]} for i in range(50)] + [{"text": "a", "label": ""}]
    path = tmp_path / f"stance.{suffix}"
    lines = [f"{row['text']},{row['label']}" for row in rows] if suffix == "csv" else map(json.dumps, rows)
    path.write_text("\n".join(["text,label"] * (suffix == "csv") + [*lines]) + "\n")
    task, notes = prepare(bert, [str(path)])
    assert task.names == sorted(labels)
    assert any("1 rows without a label, left out" in note for note in notes)
    if suffix == "csv":
        task, _ = prepare(bert, [f"hf:{tmp_path}"])
        assert task.names == sorted(labels)
    numbers = [{"text": "a b", "label": str(i % 3) if i % 4 else "nan"} for i in range(40)]
    assert prepare(bert, [write(tmp_path, numbers)])[0].names == ["0", "1", "2", "nan"]


def test_labels_of_every_kind(bert: tuple[Path, Any], tmp_path: Path) -> None:
    """Catches 10 before 9, 1.0 beside 1, a label with a fraction taken for a class, lists and separated labels."""
    numbers = [{"text": row["text"], "label": float(i % 11)} for i, row in enumerate(LETTERS)]
    task, notes = prepare(bert, [write(tmp_path, numbers)])
    assert task.names == [str(i) for i in range(11)]
    assert any("are read as whole numbers" in note for note in notes)
    with pytest.raises(UserError, match=r"data.jsonl:2: the label is 0.5, a number with a fraction"):
        prepare(bert, [write(tmp_path, [{"text": "a", "label": 1.0}, {"text": "b", "label": 0.5}])])
    lists = [{"text": "a b", "label": ["x", "y"] if i % 2 else []} for i in range(10)]
    task, _ = prepare(bert, [write(tmp_path, lists)])
    assert (task.multi, task.names) == (True, ["x", "y"])
    joined = [{"text": "a b", "label": "x; y" if i % 2 else "y"} for i in range(10)]
    task, _ = prepare(bert, [write(tmp_path, joined)], data__label_separator=";")
    assert (task.multi, task.names) == (True, ["x", "y"])


@pytest.mark.parametrize(
    ("rows", "val", "said"),
    [
        (LETTERS, [{"text": "a", "label": "A"}, {"text": "b", "label": "b"}], "does not have: 'A' (1)"),
        ([{"text": "a", "label": "x"}] * 9, None, "all 9 examples of the data have one label, 'x'"),
        ([{"text": 3, "label": "x"}], None, "data.jsonl:1: 'text' is int, expected a string"),
        ([{"text": "a", "label": {"x": 1}}], None, "data.jsonl:1: 'label' is dict, expected a label"),
        ([{"a": "x", "b": "y", "c": "z"}], None, "which column holds the text?"),
        ([{"text": "x", "b": "y"}], None, "which column holds the label?"),
        ([{"text": "a", "label": None}], None, "has no rows with a label"),
        ([{"text": f"a{i}", "label": f"l{i}"} for i in range(80)], None, "80 different labels in 80 examples"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], None, "2 examples are too few to hold some out"),
    ],
)
def test_bad_data(
    bert: tuple[Path, Any], tmp_path: Path, rows: list[dict[str, Any]], val: list[dict[str, Any]] | None, said: str
) -> None:
    """Catches a traceback, and a run that trains on what makes no sense."""
    more = {} if val is None else {"data__val": write(tmp_path, val, "val.jsonl")}
    with pytest.raises(UserError) as error:
        prepare(bert, [write(tmp_path, rows)], **more)
    assert said in str(error.value)
    assert error.value.hint


def test_class_weights(bert: tuple[Path, Any], tmp_path: Path) -> None:
    """Catches weights that do not average to one, or that favour what is frequent."""
    rows = [{"text": f"{i}", "label": "a" if i % 4 else "b"} for i in range(40)]
    task, _ = prepare(bert, [write(tmp_path, rows)], classify__class_weights="balanced", data__val_fraction=0.2)
    assert task.weights is not None
    assert task.weights.tolist() == pytest.approx([32 / (2 * 24), 32 / (2 * 8)])


def test_a_model_with_the_same_labels_keeps_their_order(bert: tuple[Path, Any], tmp_path: Path) -> None:
    """Catches a head whose rows are renamed when a classifier is trained further."""
    loaded = formats.load(bert[0], runtime=tiny_models.cpu())
    heads.fresh(loaded.model, "sequence", 3, seed=0)
    notes: list[str] = []
    about = {"id2label": {"0": "c", "1": "a", "2": "b"}}
    start = Start(model=loaded.model, codec=loaded.codec, data=[write(tmp_path, LETTERS)], config=config(),
                  runtime=tiny_models.cpu(), hf_config=about, note=notes.append)  # fmt: skip
    before = heads.of(loaded.model)
    assert APPLICATION.prepare(start).names == ["c", "a", "b"]
    assert heads.of(loaded.model) is before


def test_scores_are_scikit_learns() -> None:
    """1,000 random cases: accuracy, macro F1, classes and confusion, also of labels that never occur."""
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    for case in range(1000):
        labels, count = int(generator.integers(2, 6)), int(generator.integers(1, 12))
        true, predicted = generator.integers(0, labels, (2, count))
        got = scores.single(true, predicted, labels)
        assert got["accuracy"] == pytest.approx(sklearn.accuracy_score(true, predicted))
        assert got["macro_f1"] == pytest.approx(sklearn.f1_score(true, predicted, average="macro", zero_division=0))
        if case % 20:
            continue
        matrix = sklearn.confusion_matrix(true, predicted, labels=range(labels))
        assert (scores.confusion(true, predicted, labels) == matrix).all()
        sets = generator.random((2, count, labels)) < 0.4
        several = scores.multi(sets[0], sets[1])
        assert several["accuracy"] == pytest.approx(sklearn.accuracy_score(sets[0], sets[1]))
        for average, name in {"macro": "macro_f1", "micro": "f1"}.items():
            expected = sklearn.f1_score(sets[0], sets[1], average=average, zero_division=0)
            assert several[name] == pytest.approx(expected)
        each = sklearn.precision_recall_fscore_support(sets[0], sets[1], average=None, zero_division=0)
        found = scores.by_class(sets[0], sets[1], [str(i) for i in range(labels)])
        assert np.allclose([[c.precision, c.recall, c.f1, c.support] for c in found], np.array(each).T)


def test_the_interval_holds_the_score() -> None:
    """Catches an interval of something else: of 100 coin flips it is about half +- 0.1."""
    true, heads = np.eye(2, dtype=bool)[np.zeros(100, int)], np.eye(2, dtype=bool)[np.arange(100) % 2]
    low, high = scores.intervals(true, heads, multi=False)["accuracy"]
    assert 0.36 < low < 0.44 and 0.56 < high < 0.64


@pytest.mark.parametrize("multi", [False, True])
def test_intervals_are_those_of_the_scores_of_resamples(multi: bool) -> None:
    """Catches sums over labels that are not the macro F1 of a resample, labels that are not in it included."""
    draw = np.random.default_rng(3)
    true, predicted = (draw.integers(0, 6, 40) for _ in range(2))
    eye = np.eye(7, dtype=bool)
    found = scores.intervals(eye[true], eye[predicted], multi=multi)
    again, drawn = np.random.default_rng(0), []
    for rows in (again.integers(0, 40, 40) for _ in range(1000)):
        each = scores.multi(eye[true[rows]], eye[predicted[rows]])
        drawn.append(each if multi else scores.single(true[rows], predicted[rows], 7))
    for name, bounds in found.items():
        assert bounds == pytest.approx(np.percentile([each[name] for each in drawn], [2.5, 97.5]).tolist())


def test_tables_for_people() -> None:
    """Catches columns that do not line up, and a matrix of a hundred labels."""
    matrix = np.array([[5, 1], [0, 123456]])
    lines = scores.table(matrix, ["yes", "a very long label indeed"])
    assert len({len(line) for line in lines}) == 1
    many = scores.table(np.eye(30, dtype=np.int64) + np.eye(30, k=1, dtype=np.int64), [f"l{i}" for i in range(30)])
    assert many[0].startswith("most often confused") and "predicted as" in many[1]


def test_duplicates() -> None:
    """Catches a count of rows instead of repeats."""
    made = [data.Example(text=text, pair=None, labels=("x",), where="") for text in ("a", "a ", "b", "a")]
    keys = [example.key for example in made]
    assert duplicates(keys, keys[:1]) == {"within_train": 2, "across_splits": 1}
