"""Datasets by name: calls of the datasets library, splits and classes, and errors with the most similar name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from tfcli.config.options import DataOptions
from tfcli.errors import RunError, UserError
from tfcli.text.read import hf_data, sources, tables

FEATURES = Features(
    {
        "tokens": List(Value("string")),
        "ner_tags": List(ClassLabel(names=["O", "B-place", "I-place"])),
        "label": ClassLabel(names=["no", "yes"]),
        "turns": [{"kind": ClassLabel(names=["ask", "say"]), "text": Value("string")}],
    }
)
ROW = {"tokens": ["in", "Rome"], "ner_tags": [0, 1], "label": 1, "turns": [{"kind": 1, "text": "x"}]}
READ = {**ROW, "ner_tags": ["O", "B-place"], "label": "yes", "turns": [{"kind": "say", "text": "x"}]}


def rows(count: int, **changes: Any) -> Dataset:
    return Dataset.from_list([{**ROW, **changes}] * count, features=FEATURES)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    DatasetDict({"train": rows(3), "test": rows(2, label=-1)}).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_classes_become_names_and_splits_are_chosen(saved: Path, tmp_path: Path) -> None:
    assert hf_data.rows(f"hf:{saved}:train") == (tuple(FEATURES), [READ] * 3)
    assert hf_data.rows(f"hf:{saved}") == hf_data.rows(f"hf:{saved}:train")
    assert hf_data.rows(f"hf:{saved}:test")[1] == [{**READ, "label": None}] * 2, "-1 hides a label"
    rows(4).save_to_disk(tmp_path / "one")
    assert len(hf_data.rows(f"hf:{tmp_path / 'one'}")[1]) == 4
    (tmp_path / "plain").mkdir()
    rows(5).to_parquet(tmp_path / "plain" / "test.parquet")
    assert len(hf_data.rows(f"hf:{tmp_path / 'plain'}")[1]) == 5, "the only split"
    assert len(hf_data.rows(f"hf:{tmp_path / 'plain'}:test[:2]")[1]) == 2


def test_parquet_of_the_library_has_names_too(tmp_path: Path) -> None:
    """Its files contain the numbers of classes; their names are in the metadata of the schema."""
    rows(2).to_parquet(tmp_path / "a.parquet")
    assert [row.values for row in tables.read(tmp_path / "a.parquet", known=()).rows] == [READ] * 2


@pytest.mark.parametrize("kind", [{"_type": "ClassLabel", "names": ["a"]}, {"_type": "OfALaterVersion"}])
def test_classes_that_cannot_be_read(tmp_path: Path, kind: dict[str, Any]) -> None:
    """A number without a name, and a feature of a later version of the library: an error that names the file."""
    about = json.dumps({"info": {"features": {"label": kind}}})
    table = pyarrow.table({"label": [1]}).replace_schema_metadata({"huggingface": about})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"a\.parquet is not a readable Parquet file: .*(class label 1|OfALaterVersion)"
    ):
        tables.read(tmp_path / "a.parquet", known=())


def test_a_table_of_a_name_is_like_that_of_a_file(saved: Path) -> None:
    table = tables.read(f"hf:{saved}:train", known=())
    assert table.form.columns == tuple(FEATURES) and table.rows[2].where == f"hf:{saved}:train: row 3"
    assert table.digest.sha256 == tables.read(f"hf:{saved}", known=()).digest.sha256
    assert table.digest.sha256 != tables.read(f"hf:{saved}:test", known=()).digest.sha256
    assert [str(path) for path in tables.expand([f"hf:{saved}:train"])] == [f"hf:{saved}:train"]


def test_text_to_pretrain_on_is_a_document_a_row(tmp_path: Path) -> None:
    Dataset.from_list([{"text": "one\ntwo", "n": 1}, {"text": "three", "n": 2}]).save_to_disk(tmp_path / "texts")
    found = sources.find([f"hf:{tmp_path / 'texts'}"], spool=tmp_path)
    assert [chunk.text for chunk in sources.read(found, DataOptions())] == ["one\ntwo", "three"]
    assert found[0].name == f"hf:{tmp_path / 'texts'}"


def test_unknown_names_are_refused_with_the_most_similar_one(saved: Path, tmp_path: Path) -> None:
    for split, message in {
        "trian": "no split 'trian' .did you mean 'train'. it has: train, test",
        "x": "it has: train",
    }.items():
        with pytest.raises(UserError, match=message):
            hf_data.load(f"hf:{saved}:{split}")
    for spec in ("hf:", "hf:x:", "hf:a/b/c/d:train"):
        with pytest.raises(UserError, match=r"is not the name of a dataset .expected hf:NAME:SPLIT"):
            hf_data.load(spec)
    folder = tmp_path / "plain"
    folder.mkdir()
    with pytest.raises(UserError, match="there is no dataset"):
        hf_data.load(f"hf:{folder}")
    rows(1).save_to_disk(tmp_path / "one")
    with pytest.raises(UserError, match="is a dataset without splits"):
        hf_data.load(f"hf:{tmp_path / 'one'}:test")
    with pytest.raises(UserError, match=r"hf:squad needs a split .for example: --val hf:squad:test"):
        hf_data.check_split("hf:squad", "--val")
    hf_data.check_split("hf:squad:validation", "--val")
    hf_data.check_split("held-out.jsonl", "--val")
    hf_data.check_split(f"hf:{tmp_path / 'one'}", "--val")


class Hub:
    """A stand-in for ``datasets.load_dataset`` that records its calls."""

    def __init__(self, **there: Any) -> None:
        self.there, self.asked = there, []  # type: ignore[var-annotated]

    def __call__(self, name: str, config: str | None = None, split: str | None = None, revision: Any = None) -> Any:
        self.asked.append((name, config, split, revision))
        found = self.there.get(name.replace("/", "_"))
        if isinstance(found, Exception) and revision is None:
            raise found
        if found is None:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        made = DatasetDict({"train": rows(3), "validation": rows(1)})
        return made if split is None else made[split.partition("[")[0]]


def test_names_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Owner, configuration, slices; an old name without an owner; a dataset with a script from the copy in Parquet."""
    script = RuntimeError("Dataset scripts are no longer supported, but found conll2003.py")
    hub = Hub(nyu_glue=1, glue=1, conll2003=script)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    for spec, count, asked in [
        ("hf:nyu/glue:validation", 1, [("nyu/glue", None, None, None)]),
        ("hf:nyu/glue/mrpc", 3, [("nyu/glue", "mrpc", None, None)]),
        ("hf:nyu/glue:train[:9]", 3, [("nyu/glue", None, "train[:9]", None)]),
        ("hf:glue/mrpc:train", 3, [("glue/mrpc", None, None, None), ("glue", "mrpc", None, None)]),
        ("hf:conll2003", 3, [("conll2003", None, None, None), ("conll2003", None, None, hf_data.COPY)]),
    ]:
        hub.asked.clear()
        assert len(hf_data.load(spec)) == count, spec
        assert hub.asked == asked, spec


def test_errors_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "BuilderConfig 'mrcp' not found. Available: ['cola', 'mrpc']"
    missing = "Config name is missing.\nPlease pick one among the available configs: ['cola', 'mrpc']\nExample"
    split = "Unknown split \"tset\". Should be one of ['train', 'test']."
    hub = Hub(a=ValueError(listed), b=ValueError(missing), c=ValueError(split), d=ConnectionError("Couldn't reach 'd'"))
    monkeypatch.setattr(datasets, "load_dataset", hub)
    for spec, message in {
        "hf:a/mrcp": "no configuration 'mrcp' .did you mean 'mrpc'",
        "hf:b": "has several configurations .name one: cola, mrpc",
        "hf:c:tset[:3]": "no split 'tset' .did you mean 'test'. it has: train, test",
        "hf:nope": "there is no dataset nope",
    }.items():
        with pytest.raises(UserError, match=message):
            hf_data.load(spec)
    with pytest.raises(RunError, match=r"hf:d cannot be read: Couldn't reach 'd'.*check the network"):
        hf_data.load("hf:d")


def test_rows_are_json(saved: Path) -> None:
    """They can be part of a data report and of a message."""
    assert json.loads(json.dumps(hf_data.rows(f"hf:{saved}")[1])) == [READ] * 3


def test_directories_are_found_again_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For --resume: names of the hub stay as they are, a relative directory becomes absolute."""
    rows(2).save_to_disk(tmp_path / "d")
    monkeypatch.chdir(tmp_path)
    assert hf_data.absolute("hf:d:train") == f"hf:{tmp_path / 'd'}:train"
    assert hf_data.absolute("hf:d") == f"hf:{tmp_path / 'd'}"
    assert hf_data.absolute("hf:glue/mrpc:test") == "hf:glue/mrpc:test"
