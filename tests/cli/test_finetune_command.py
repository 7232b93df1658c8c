"""tfcli finetune, predict and evaluate of a classifier, as a shell sees them."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data, and a classifier that was finetuned from them."""
    from tfcli.cli.main import main

    folder = tmp_path_factory.mktemp("finetune")
    save(folder / "base", scale=0.15)
    rows = [("the king", "king"), ("a dark forest", "forest"), ("one castle", "king"), ("the tree", "forest")] * 12
    (folder / "data.csv").write_text(
        "text,label\n" + "".join(f'"{text}, {i}",{label}\n' for i, (text, label) in enumerate(rows))
    )
    arguments = ["--task", "classify", "--out", str(folder / "run"), "--epochs", "2", "--lr", "1e-3", "--seed", "3"]
    assert main(["finetune", str(folder / "base"), str(folder / "data.csv"), *arguments, "--device", "cpu"]) == 0
    return folder


@pytest.fixture
def call(folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """(exit code, stdout, stderr) of ``tfcli ARGUMENTS`` with {} for the folder."""
    from tfcli.cli.main import main

    def run(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = main([*(argument.format(folder) for argument in arguments), "--device", "cpu"])
        return code, *capfd.readouterr()

    return run


def test_predict_answers_in_order(call: Any) -> None:
    """Catches answers in the order of length, probabilities that are none, an empty line that is skipped."""
    texts = ["a dark forest and a castle and a tree", "", "the king"]
    code, out, err = call("predict", "{}/run", stdin="\n".join(texts).encode())
    answers = [json.loads(line) for line in out.splitlines()]
    assert (code, [answer["text"] for answer in answers]) == (0, texts)
    for answer in answers:
        assert set(answer["probabilities"]) == {"king", "forest"}
        assert sum(answer["probabilities"].values()) == pytest.approx(1.0, abs=1e-5)
        assert answer["score"] == max(answer["probabilities"].values()) == answer["probabilities"][answer["label"]]
    assert "device: cpu" in err
    code, out, _ = call("predict", "{}/run", "--format", "text", stdin=b"the king\n")
    assert (code, out.split("\t")[2]) == (0, "the king\n")


def test_predict_takes_rows_of_every_form(call: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a JSON object or a row of a table whose text is the whole line, label and all."""
    from tfcli.errors import UserError

    def broken(predictor: Any, row: dict[str, Any]) -> tuple[str, None]:
        if "forest" in row["text"]:
            raise UserError("is none")
        return row["text"], None

    rows = [{"text": "a dark forest", "label": "forest"}, {"text": '{"text": "the king"}', "label": "king"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines)
    (folder / "rows.tsv").write_text("label\ttext\n" + "".join(f"{row['label']}\t{row['text']}\n" for row in rows))
    (folder / "plain.tsv").write_text("the king\tand\n")
    expected = [row["text"] for row in rows]
    for arguments, stdin in (("{}/rows.jsonl",), b""), (("{}/rows.tsv",), b""), ((), lines.encode()):
        code, out, _ = call("predict", "{}/run", *arguments, stdin=stdin)
        assert (code, [json.loads(line)["text"] for line in out.splitlines()]) == (0, expected), arguments
    for stdin in (b'{"other": "a"}\n', b'a\n{"text": "b"}\n'):  # lines of text that look like it
        _, out, _ = call("predict", "{}/run", stdin=stdin)
        assert [json.loads(line)["text"] for line in out.splitlines()] == stdin.decode().splitlines()
    _, out, _ = call("predict", "{}/run", "{}/plain.tsv")
    assert json.loads(out)["text"] == "the king\tand"
    monkeypatch.setattr("tfcli.tasks.classify.task.ClassifyPredictor.parse", broken)
    code, out, err = call("predict", "{}/run", "{}/rows.tsv")  # a row that is none: the others are done
    assert (code, len(out.splitlines()), "rows.tsv:2 is none" in err) == (1, 1, True), err
    monkeypatch.undo()
    code, out, err = call("predict", "{}/run", stdin=lines.encode() + b"broken\n")
    assert (code, len(out.splitlines()), "stdin:3 is not JSON" in err) == (1, 2, True)


def test_what_is_too_much_is_said(call: Any, folder: Path) -> None:
    """Catches a context that is cut to the model's in silence, and a model that is not there blamed on a flag."""
    code, _, err = call(
        "finetune", "{}/base", "{}/data.csv", "--task", "classify", "--out", "{}/long", "--set", "data.context=100000"
    )
    assert (code, "data.context is 100000, the model reads" in err) == (2, True)
    assert not (folder / "long" / "run.json").exists()
    for arguments in (("predict", "{}/none", "--format", "text"), ("evaluate", "{}/none", "{}/data.csv", "--strict")):
        code, _, err = call(*arguments)
        assert (code, "no such model" in err) == (2, True), err


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_predict_in_fewer_bits(call: Any, kind: str) -> None:
    """Catches a head that is lost with its encoder's matrices: probabilities stay within what 8 or 4 bits change."""
    texts = b"a dark forest and a castle\nthe king\na tree\n"
    (code, out, _), (_, plain, _) = (
        call("predict", "{}/run", "--quantize", kind, stdin=texts),
        call("predict", "{}/run", stdin=texts),
    )
    made, expected = ([json.loads(line)["probabilities"] for line in lines.splitlines()] for lines in (out, plain))
    assert code == 0
    for given, wanted in zip(made, expected, strict=True):
        assert given == pytest.approx(wanted, abs={"int8": 0.02, "int4": 0.2}[kind])
    code, out, _ = call("evaluate", "{}/run", "{}/data.csv", "--json", "--quantize", kind)
    assert (code, json.loads(out)["examples"]) == (0, 48)


def test_evaluate_gives_scores_and_answers(call: Any, folder: Path) -> None:
    """Catches scores under other names than DESIGN.md has, and answers that do not belong to their rows."""
    code, out, _ = call("evaluate", "{}/run", "{}/data.csv", "--json", "--predictions", "{}/answers.jsonl")
    scores = json.loads(out)
    assert (code, scores["examples"]) == (0, 48)
    low, high = scores["interval"]["accuracy"]
    assert low <= scores["accuracy"] <= high
    assert 0 <= scores["macro_f1"] <= 1
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert sum(answer["correct"] for answer in answers) / 48 == pytest.approx(scores["accuracy"])
    assert [answer["text"] for answer in answers][1] == "a dark forest, 1"
    code, out, _ = call("evaluate", "{}/run", "{}/data.csv", "--limit", "4")
    assert code == 0
    assert out.startswith("accuracy") and "true \\ predicted" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune", "{}/base", "{}/data.csv", "--task", "clasify"], "did you mean 'classify'?"),
        (["finetune", "{}/base", "{}/data.cvs", "--task", "classify"], "did you mean"),
        (["finetune", "{}/base"], "a --task is needed"),
        (["finetune", "{}/base", "{}/data.csv", "--task", "classify", "--epochs", "0"], "train.epochs is 0.0"),
        (["finetune", "{}/base", "{}/data.csv", "--task", "classify", "--set", "data.labelkey=x"], "did you mean"),
        (["finetune", "{}/base", "{}/data.csv", "--task", "classify", "--set", "data.label_key=lable"], "did you mean"),
        (["finetune", "{}/base", "{}/data.csv", "--task", "classify", "--out", "{}/run"], "holds another run"),
        (["finetune", "--resume", "--out", "{}/run"], "is finished"),
        (["predict", "{}/base", "--task", "classify"], "was not finetuned for classify"),
        (["predict", "{}/run", "--format", "xml"], "unknown format 'xml'"),
        (["evaluate", "{}/run", "{}/data.csv", "--stride", "0"], "--stride is 0"),
        (["evaluate", "{}/run", "{}/data.csv", "--stride", "8"], "--stride goes with a model of text"),
        (["evaluate", "{}/base", "{}/data.csv", "--predictions", "x"], "finetuned for a task"),
        (["evaluate", "{}/run", "{}/data.csv", "--predictions", "{}/none/x"], "no such directory: "),
    ],
)
def test_bad_input(
    call: Any, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, nothing on stdout, and what to do; no directory is left behind."""
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert not list(tmp_path.iterdir())


def test_labels_that_the_model_does_not_know(call: Any, tmp_path: Path) -> None:
    """Catches a score over rows that were left out in silence."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a", "label": "kings"}\n{"text": "b", "label": "forest"}\n')
    code, out, err = call("evaluate", "{}/run", str(path))
    assert (code, out) == (2, "")
    assert "labels that the model does not have: 'kings' (1)" in err and "did you mean 'king'?" in err


def test_the_confusion_matrix_is_a_picture(call: Any, folder: Path) -> None:
    png = b"\x89PNG\r\n\x1a\n"
    assert (folder / "run" / "confusion.png").read_bytes().startswith(png), "finetune leaves one in the run"
    code, _, err = call("evaluate", "{}/run", "{}/data.csv", "--confusion", "{}/mine.png")
    assert code == 0, err
    assert (folder / "mine.png").read_bytes().startswith(png)
    code, _, err = call("evaluate", "{}/run", "{}/data.csv", "--confusion", "{}/mine.jpg")
    assert code == 2 and "is no .png" in err
    code, _, err = call("evaluate", "{}/base", "{}/data.csv", "--confusion", "{}/mine.png")
    assert code == 2 and "--confusion goes with a model that was finetuned for a task" in err


def test_finetune_goes_on_without_matplotlib(
    call: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tfcli.tasks.classify import plot

    monkeypatch.setattr(plot, "available", lambda: False)
    run = ["--task", "classify", "--out", str(tmp_path / "run"), "--steps", "1"]
    code, _, err = call("finetune", "{}/base", "{}/data.csv", *run)
    assert code == 0 and err.count("matplotlib is not installed") == 1, err
    assert not (tmp_path / "run" / "confusion.png").exists()


def test_data_by_name_from_the_shell(call: Any, folder: Path, tmp_path: Path) -> None:
    """Names of classes, the given split held out, and a split that must be named where it matters."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["king", "forest"])})
    rows = [{"text": f"the king {n}" if n % 2 else f"a forest {n}", "label": 1 - n % 2} for n in range(24)]
    made = Dataset.from_list(rows, features=features)
    DatasetDict({"train": made, "test": made.select(range(6))}).save_to_disk(tmp_path / "names")
    spec, out = f"hf:{tmp_path / 'names'}", str(tmp_path / "run")
    run = ["finetune", "{}/base", spec, "--task", "classify", "--steps", "2"]
    code, _, err = call(*run, "--val", spec, "--out", out)
    assert code == 2 and f"--val {spec}:test" in err
    code, _, err = call(*run, "--val", f"{spec}:tset", "--out", out)
    assert code == 2 and "did you mean 'test'?" in err
    code, _, err = call(*run, "--val", f"{spec}:test", "--out", out)
    assert code == 0, err
    assert list(json.loads((tmp_path / "run" / "config.json").read_text())["label2id"]) == ["forest", "king"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["corpus"] == [spec]
    code, _, err = call("evaluate", out, spec)
    assert code == 2 and "needs a split" in err
    code, printed, _ = call("evaluate", out, f"{spec}:test", "--json")
    assert code == 0 and json.loads(printed)["examples"] == 6
