"""Finetuning opens each file of data once; the hash that a run is resumed by is still the one of its bytes."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import small_bert
from opens import opens
from tiny_models import cpu, encoder_decoder, model, tokenizer

from tfcli.formats.open import open_path
from tfcli.tasks import applications
from tfcli.tasks.task import Start
from tfcli.text.read import hf_data

WORDS = ("king", "sun", "well", "forest", "castle", "tree", "daughter", "face")
ROWS: dict[str, list[dict[str, Any]]] = {
    "tag": [{"tokens": ["the", word], "tags": ["O", "B-thing"]} for word in WORDS],
    "answer": [
        {"id": word, "question": "what?", "context": f"the {word}", "answers": {"text": [word], "answer_start": [4]}}
        for word in WORDS
    ],
    "chat": [{"prompt": f"what is a {word}?", "response": f"the {word}"} for word in WORDS],
    "classify": [{"text": word, "label": "long" if len(word) > 4 else "short"} for word in WORDS],
    "translate": [{"source": word, "target": word.upper()} for word in WORDS],
    "lm": [{"text": f"Once upon a time there was a {word}. " * 4} for word in WORDS],
}
FORMS = ("a.jsonl", "a.jsonl.gz", "a.parquet")


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    small_bert.save(folder)
    return folder


def prepared(task: str, bert: Path, data: list[str], **of_data: Any) -> Any:
    app: Any = applications.application(task)
    core = encoder_decoder(context=128) if task == "translate" else model(context=128)
    codec: Any = tokenizer()
    if task in ("tag", "answer"):  # their heads go with encoders
        core, codec = open_path(bert).load(runtime=cpu())
    kind = app.config.__dataclass_fields__["data"].default_factory
    config = app.config(data=kind(**of_data))
    return app.prepare(
        Start(model=core, codec=codec, data=data, config=config, runtime=cpu(), hf_config={}, note=lambda _: None)
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("task", ROWS)
def test_each_file_is_opened_once(tmp_path: Path, bert: Path, task: str, form: str) -> None:
    paths = [written(tmp_path / f"{name}{form}", ROWS[task]) for name in ("train-", "more-", "val-")]
    names = list(map(str, paths))
    with opens() as counts:
        task_data = prepared(task, bert, names[:2], val=names[2])
    if (task, form) != ("lm", "a.parquet"):  # pyarrow reads that by itself
        assert [counts[name] for name in names] == [1, 1, 1]
    if task in ("tag", "answer", "chat"):
        plain = [gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes() for path in paths]
        whole = b"".join(hashlib.sha256(data).digest() for data in plain)
        assert task_data.data_report["content_hash"] == hashlib.sha256(whole).hexdigest()


@pytest.mark.parametrize("task", ROWS)
def test_a_data_set_by_name_is_loaded_once(
    tmp_path: Path, bert: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS[task]).save_to_disk(tmp_path / "saved")
    spec = f"hf:{tmp_path / 'saved'}"
    load, loaded = hf_data.load, []

    def counted(name: str) -> Any:
        loaded.append(name)
        return load(name)

    monkeypatch.setattr(hf_data, "load", counted)
    task_data = prepared(task, bert, [spec], val_fraction=0.25)
    assert loaded == [spec]
    if task in ("tag", "answer", "chat"):
        rows = hf_data.digest(hf_data.rows(spec)[1]).sha256.encode()
        assert task_data.data_report["content_hash"] == hashlib.sha256(rows).hexdigest()


def test_a_new_model_is_sized_by_what_is_trained_on(tmp_path: Path) -> None:
    """Would catch pairs that are read once for the tokenizer and again for training, which a pipe does not give."""
    import tfcli

    path = written(tmp_path / "pairs.jsonl", ROWS["translate"] * 20)
    with opens() as counts:
        settings = {"train.steps": 1, "model.depth": 1, "model.width": 32, "model.context": 32}
        tfcli.finetune(None, path, task="translate", from_scratch=True, out=tmp_path / "run", settings=settings)
    assert counts[str(path)] == 1


def test_a_file_may_be_both_parts(tmp_path: Path, bert: Path) -> None:
    """Would catch examples of the held-out part that count for the training part, where both are one file."""
    path = str(written(tmp_path / "a.jsonl", ROWS["tag"]))
    sources = prepared("tag", bert, [path], val=path).data_report["sources"]
    documents = len(ROWS["tag"])
    assert [(each["part"], each["documents"]) for each in sources] == [("train", documents), ("val", documents)]
