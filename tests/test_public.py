"""The public names: functions that stay functions, documented by examples that run, in a notebook as well."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models

import tfcli
from tfcli.apply import predict

FUNCTIONS = ("bench", "compress", "convert", "evaluate", "finetune", "inspect", "load", "predict", "pretrain")
REVIEWS = "text,label\n" + "".join(
    f"a {word} film number {n},{word}\n" for n in range(12) for word in ("lovely", "dull")
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the examples: a text, a table, a language model and a classifier."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "corpus.txt").write_text(tiny_models.TEXT, encoding="utf-8")
    (folder / "reviews.csv").write_text(REVIEWS, encoding="utf-8")
    tiny_models.save(folder / "runs" / "first")
    reviews = folder / "runs" / "reviews"
    settings: dict[str, Any] = {"train.steps": 2}
    tfcli.finetune(folder / "runs" / "first", folder / "reviews.csv", task="classify", out=reviews, settings=settings)
    return folder


def test_every_command_is_a_function() -> None:
    """With every submodule imported: none has the name of a function, which it would take the place of."""
    for module in pkgutil.walk_packages(tfcli.__path__, "tfcli."):
        if not module.name.endswith(("__main__", "peer_process")):
            importlib.import_module(module.name)
    assert set(dir(tfcli)) >= {*FUNCTIONS, "Tokenizer"}
    for name in FUNCTIONS:
        assert inspect.isfunction(getattr(tfcli, name)), name
        assert getattr(tfcli, name).__name__ == name
    assert all(hasattr(tfcli, name) for name in dir(tfcli))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_are_typed_and_short_by_position(name: str) -> None:
    signature = inspect.signature(getattr(tfcli, name))
    parameters = list(signature.parameters.values())
    assert all(each.annotation is not each.empty for each in parameters)
    assert signature.return_annotation is not signature.empty
    assert sum(each.kind is not each.KEYWORD_ONLY for each in parameters) <= 3
    assert not any(each.kind is each.VAR_KEYWORD for each in parameters)


@pytest.mark.parametrize("name", [*FUNCTIONS, "Tokenizer", "TaskModel"])
def test_the_example_of_each_runs(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(tfcli, name), name, globs={})
    assert example.examples and "Example:" in (example.docstring or "")
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "runs").unlink()
    (tmp_path / "runs").mkdir()
    for path in (folder / "runs").iterdir():
        (tmp_path / "runs" / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    output: list[str] = []
    doctest.DocTestRunner().run(example, out=output.append)
    assert not output, "".join(output)


def test_a_stream_of_texts_is_answered_as_it_comes(folder: Path) -> None:
    """A window at a time, in order: what the command does with stdin."""
    model = tfcli.TaskModel.load(folder / "runs" / "reviews")
    taken: list[int] = []

    def texts() -> Iterator[str]:
        for number in range(2 * predict.WINDOW + 1):
            taken.append(number)
            yield f"film {number}"

    answers = model.predict(model.parsed(texts()))
    assert next(answers)["text"] == "film 0" and len(taken) == predict.WINDOW
    assert [answer["text"] for answer in answers] == [f"film {n}" for n in range(1, 2 * predict.WINDOW + 1)]


def test_predict_names_the_text_that_is_none(folder: Path) -> None:
    with pytest.raises(tfcli.UserError, match='text 2 has no "text" with a string'):
        tfcli.predict(folder / "runs" / "first", ["a", {"text": 3}])
    with pytest.raises(tfcli.UserError, match="--beam goes with models that translate"):
        tfcli.predict(folder / "runs" / "first", "a", beam=2)
    with pytest.raises(tfcli.UserError, match="was not finetuned for tag"):
        tfcli.predict(folder / "runs" / "first", "a", task="tag")


def test_options_of_other_models_are_refused(folder: Path) -> None:
    text, table = folder / "corpus.txt", folder / "reviews.csv"
    first, reviews = folder / "runs" / "first", folder / "runs" / "reviews"
    with pytest.raises(tfcli.UserError, match="--stride goes with a model of text"):
        tfcli.evaluate(reviews, table, tfcli.EvaluateOptions(stride=4))
    with pytest.raises(tfcli.UserError, match="--strict goes with a model that was finetuned for a task"):
        tfcli.evaluate(first, text, tfcli.EvaluateOptions(strict=True))


def test_nothing_is_printed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A library call speaks through its result, and to who listens."""
    notes: list[str] = []
    tfcli.evaluate(folder / "runs" / "first", folder / "corpus.txt", on_note=notes.append)
    tfcli.predict(folder / "runs" / "reviews", ["a film"])
    tfcli.inspect(folder / "runs" / "first")
    assert notes[0].startswith("device: ") and capfd.readouterr() == ("", "")
