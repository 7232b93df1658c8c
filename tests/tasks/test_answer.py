"""Question answering: logits and loss as transformers', spans as by trying all, a run that learns, offsets."""

import json
import math
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
from tfcli.tasks.answer import task as answer
from tfcli.tasks.answer.options import AnswerConfig, AnswerOptions
from tfcli.tasks.answer.predictor import AnswerPredictor, asked
from tfcli.tasks.answer.predictor import logits as logits_of
from tfcli.train.finetune import finetune

NAMES = ["ada", "grace", "alan", "kurt"]
OTHERS = ["is", "in", "the", "and", "far", "from", "was"]


def squad(path: Path, count: int, seed: int, *, impossible: bool, plausible: bool = False) -> Path:
    """Who is it? The one name of the context, which every third lacks where ``impossible``.

    Where ``plausible`` all have a name, and that of all but the last three is not an answer but a plausible one.
    """
    rng = random.Random(seed)
    articles = []
    for number in range(count):
        words = rng.choices(OTHERS, k=rng.randrange(2, 9))
        abstains = number < count - 3 if plausible else impossible and number % 3 == 0
        at = rng.randrange(len(words))
        name = rng.choice(NAMES)
        if plausible or not abstains:
            words[at] = name
        start = sum(len(word) + 1 for word in words[:at])
        there = [{"text": name, "answer_start": start}]
        qa: dict[str, Any] = {"id": f"{seed}-{number}", "question": "who?", "answers": [] if abstains else there}
        if plausible and abstains:
            qa["plausible_answers"] = there
        if impossible:
            qa["is_impossible"] = abstains
        articles.append({"title": f"t{number}", "paragraphs": [{"context": " ".join(words), "qas": [qa]}]})
    path.write_text(json.dumps({"version": "x", "data": articles}))
    return path


def predictor(directory: Path) -> AnswerPredictor:
    loaded = head_files.load(directory, runtime=tiny_models.cpu())
    return answer.APPLICATION.predictor(loaded.model, loaded.codec, loaded.hf_config, tiny_models.cpu())


def test_logits_and_loss_equal_transformers(tmp_path: Path) -> None:
    """Segments, positions of the ends; fp32, 1e-4. Rows of one length: theirs gives padding a share of the softmax."""
    theirs = small_bert.save(tmp_path, architecture="BertForQuestionAnswering")
    ours = predictor(tmp_path)
    encoded = ours.encode([asked("who is it?", "ada was in rome"), asked("where is i", "ada was in york")])
    part = answer.examples(encoded.windows, [(12, 14), (0, 0)])
    assert part["mask_BT"].all()
    with torch.no_grad():
        expected = theirs(
            input_ids=part["tokens_BT"],
            attention_mask=part["mask_BT"].long(),
            token_type_ids=part["types_BT"],
            start_positions=part["targets_B2"][:, 0],
            end_positions=part["targets_B2"][:, 1],
        )
        logits = logits_of(ours.model, part)
        loss, count = answer.loss(ours.model, part)
    assert (logits[..., 0] - expected.start_logits).abs().max() < 1e-4
    assert (logits[..., 1] - expected.end_logits).abs().max() < 1e-4
    assert float(loss) / count == pytest.approx(float(expected.loss), abs=1e-4)


def test_padding_changes_nothing(tmp_path: Path) -> None:
    """The loss of a short row beside a long one is that of the row alone."""
    small_bert.save(tmp_path, architecture="BertForQuestionAnswering")
    ours = predictor(tmp_path)
    windows = ours.encode([asked("who?", "ada"), asked("who is it then?", "ada was in rome and york")]).windows
    targets = [(7, 9), (0, 0)]
    with torch.no_grad():
        both = answer.loss(ours.model, answer.examples(windows, targets))[0]
        pairs = zip(windows, targets, strict=True)
        alone = [float(answer.loss(ours.model, answer.examples([w], [t]))[0]) for w, t in pairs]
    assert float(both) == pytest.approx(sum(alone), abs=1e-4)


def test_loss_of_a_plausible_answer(tmp_path: Path) -> None:
    """-log p(none) - w log p(its end | not none), by hand; nothing where there is none."""
    small_bert.save(tmp_path, architecture="BertForQuestionAnswering")
    ours = predictor(tmp_path)
    windows = ours.encode(
        [asked("who?", "ada"), asked("who is it then?", "ada was in rome and york"), asked("who", "a")]
    ).windows
    targets, plausible = [(7, 9), (0, 0), (0, 0)], [(0, 0), (14, 16), (0, 0)]
    part = answer.examples(windows, targets, plausible)
    with torch.no_grad():
        p = logits_of(ours.model, part).double().softmax(dim=1)
        plain, _ = answer.loss(ours.model, part)
        weighted, count = answer.loss(ours.model, part, plausible=0.5)
    known = sum(-float(p[row, at[end], end].log()) for row, at in enumerate(targets) for end in (0, 1)) / 2
    more = sum(-float((p[1, at, end] / (1 - p[1, 0, end])).log()) for end, at in enumerate((14, 16))) / 2
    assert count == 3
    assert float(plain) == pytest.approx(known, abs=1e-4)
    assert float(weighted) == pytest.approx(known + 0.5 * more, abs=1e-4)


def test_plausible_answers_teach_where_answers_are(tmp_path: Path) -> None:
    """Three of 120 questions have an answer: made to answer, the model finds it by what the others could have had."""
    small_bert.save(tmp_path / "base", words=(*NAMES, *OTHERS, "who"), initializer_range=0.1)
    data = squad(tmp_path / "train.json", 120, 1, impossible=True, plausible=True)
    test = squad(tmp_path / "test.json", 40, 2, impossible=False)
    settings = {"train.epochs": 5, "optim.lr": 3e-3, "train.batch_size": 8, "train.dropout": 0.0, "data.val": str(test)}
    scores = {}
    for weight in (0.0, 1.0):
        out = tmp_path / str(weight)
        finetune(
            tmp_path / "base",
            data,
            task="answer",
            out=out,
            settings={**settings, "answer.plausible": weight},
            device="cpu",
            precision="fp32",
        )
        made = predictor(out).evaluate([str(test)], AnswerConfig(answer=AnswerOptions(threshold=1e9)), limit=None)
        scores[weight] = made.scores["exact_match"]
        notes = json.loads((out / "data.json").read_text())["notes"]
        assert list(notes.values()) == ([117] if weight else [])
    assert scores[1.0] > 0.9 > scores[0.0] + 0.3


def test_answers_that_no_window_holds_are_counted(tmp_path: Path) -> None:
    """They are trained on as none; plausible ones are counted where they are trained on."""
    small_bert.save(tmp_path / "base", words=(*NAMES, *OTHERS, "who"))
    context = " ".join(["ada", *["is in the"] * 30])
    qas: list[dict[str, Any]] = []
    for number, text in enumerate([context, "ada", context, "ada", "is in"]):
        given = [{"text": text, "answer_start": 0 if text != "is in" else 4}]
        qas.append({"id": str(number), "question": "who?", "answers": given if number < 2 else []})
        qas[-1] |= {"plausible_answers": given} if number >= 2 else {}
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"paragraphs": [{"context": context, "qas": qas}]}]}))
    finetune(
        tmp_path / "base",
        tmp_path / "a.json",
        task="answer",
        out=tmp_path / "run",
        settings={"train.steps": 1, "data.context": 24, "data.val": str(tmp_path / "a.json")},
        device="cpu",
    )
    assert json.loads((tmp_path / "run" / "data.json").read_text())["notes"] == {
        "questions whose answer is whole in no window, trained on as without one": 1,
        "questions without an answer, trained on with the plausible one that the data gives": 2,
        "questions with a context that is read in several windows": 10,
    }


def test_the_best_span_is_that_of_trying_all(tmp_path: Path) -> None:
    """Over windows, never longer than allowed, never within the question; probabilities of all spans and none are 1."""
    small_bert.save(tmp_path, architecture="BertForQuestionAnswering")
    ours = predictor(tmp_path)
    context = "ada was in rome and york, far from the old city. " * 4
    encoded = ours.encode([asked("who is it?", context), asked("where?", "rome")])
    assert len(encoded.windows) > 3
    found = ours.read(encoded)
    for index in range(2):
        spans, nulls = [], []
        for window, owner in zip(encoded.windows, encoded.owner, strict=True):
            if owner != index:
                continue
            logits = logits_of(ours.model, answer.examples([window], [(0, 0)]))[0].detach().double()
            nulls.append(float(logits[0].sum()))
            for first in range(window.at, window.at + window.count):
                for last in range(first, min(first + ours.longest, window.at + window.count)):
                    shift = window.first - window.at
                    spans.append((float(logits[first, 0] + logits[last, 1]), first + shift, last + shift))
        score, first, last = max(spans)
        pieces = encoded.contexts[index].spans
        assert (found[index].start, found[index].end) == (pieces[first][0], pieces[last][1])
        assert found[index].no_answer_score == pytest.approx(min(nulls) - score, abs=1e-4)
        total = math.fsum(math.exp(each) for each, _, _ in spans) + math.exp(min(nulls))
        assert found[index].probability == pytest.approx(math.exp(score) / total, abs=1e-5)
        assert found[index].no_answer_probability == pytest.approx(math.exp(min(nulls)) / total, abs=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over a tiny BERT, long enough to overfit the names."""
    folder = tmp_path_factory.mktemp("answer")
    small_bert.save(folder / "base", words=(*NAMES, *OTHERS, "who"), initializer_range=0.1)
    val = squad(folder / "val.json", 40, 2, impossible=True)
    settings = {"train.epochs": 8, "optim.lr": 3e-3, "train.batch_size": 8, "train.dropout": 0.0, "data.val": str(val)}
    finetune(
        folder / "base",
        squad(folder / "train.json", 240, 1, impossible=True),
        task="answer",
        out=folder / "run",
        settings=settings,
        device="cpu",
        precision="fp32",
    )
    return folder


def test_a_run_learns_and_is_scored(trained: Path) -> None:
    """Would catch answers beside their pieces, questions without one, and metrics that are not written."""
    scores = json.loads((trained / "run" / "run.json").read_text())["scores"]
    assert scores["val_f1"] > 0.9
    assert scores["val_no_answer_accuracy"] > 0.8
    assert scores["val_has_answer_exact_match"] > 0.8
    lines = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    first, steps = next(line for line in lines if "lr" in line), lines[-1]["step"]
    assert first["lr"] == pytest.approx(3e-3 * (1 - first["step"] / steps)), "a warm-up"
    data_report = json.loads((trained / "run" / "data.json").read_text())
    data_reports.check(data_report, "answer")
    assert data_report["details"]["version"] == 2
    assert (data_report["train"]["documents"], data_report["train"]["without_answer"]) == (240, 80)
    threshold = json.loads((trained / "run" / "config.json").read_text())["tfcli"]["threshold"]
    assert threshold == pytest.approx(scores["val_threshold"], abs=1e-6), "of the best model, not of the last"


def test_of_scores_that_an_error_does_not_tell_apart_the_later_is_kept(tmp_path: Path) -> None:
    """Catches a model that says "none" to all, which half of the questions like, kept for one that learnt to answer;
    and the threshold of another evaluation."""
    small_bert.save(tmp_path / "base", words=(*NAMES, *OTHERS, "who"), initializer_range=0.1)
    val = squad(tmp_path / "val.json", 12, 2, impossible=True)
    settings = {"train.steps": 12, "optim.lr": 1e-5, "train.eval_every": 3, "data.val": str(val)}
    data = squad(tmp_path / "train.json", 24, 1, impossible=True)
    finetune(tmp_path / "base", data, task="answer", out=tmp_path / "run", settings=settings, device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scored = [line for line in lines if "val_f1" in line]
    assert max(line["val_f1"] for line in scored) - scored[-1]["val_f1"] < 0.1
    threshold = json.loads((tmp_path / "run" / "config.json").read_text())["tfcli"]["threshold"]
    assert threshold == scored[-1]["val_threshold"] != scored[0]["val_threshold"]


def test_the_directory_is_a_model_of_transformers(trained: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForQuestionAnswering.from_pretrained(trained / "run").eval()
    assert type(theirs).__name__ == "BertForQuestionAnswering"
    ours = predictor(trained / "run")
    part = answer.examples(ours.encode([asked("who?", "far from ada")]).windows, [(0, 0)])
    with torch.no_grad():
        logits = logits_of(ours.model, part)
        expected = theirs(input_ids=part["tokens_BT"], token_type_ids=part["types_BT"])
    assert (logits[..., 0] - expected.start_logits).abs().max() < 1e-4
    assert (logits[..., 1] - expected.end_logits).abs().max() < 1e-4


def test_predictions_have_offsets_into_the_context(trained: Path) -> None:
    """Whitespace and case of the context are kept, no answer has no offsets, and the batch does not matter."""
    ours = predictor(trained / "run")
    context = "was  far\tfrom ADA and\u00a0the"
    inputs = [
        ours.parse({"id": 7, "question": "who?", "context": context}),
        ours.plain("who?\tis in the far"),
        ours.plain("who?\t"),
    ]
    first, second, third = ours.predict(inputs)
    assert first["id"] == "7"
    assert (first["answer"], context[first["start"] : first["end"]]) == ("ADA", "ADA")
    assert 0 < first["score"] <= 1
    assert (second["answer"], second["start"], second["end"]) == ("", None, None)
    assert third["answer"] == ""
    assert [ours.predict([each])[0] for each in inputs] == [first, second, third]
    assert ours.show(first).startswith("ADA\t")
    assert ours.show(second).startswith("-\t")
    with pytest.raises(UserError, match="no context"):
        ours.plain("who?")
    with pytest.raises(UserError, match='no "question"'):
        ours.parse({"question": "who?"})


def test_a_question_that_is_too_long_is_said_with_its_answer(trained: Path) -> None:
    """And counted by the call alone: evaluations after predictions counted these again."""
    ours = predictor(trained / "run")
    room = ours.layout.question
    long, short = ours.plain("who? " * room + "\tfar from ada"), ours.plain("who?\tfar from ada")
    for _ in range(2):
        first, second = ours.predict([long, short])
        assert first["cut"] is True and "cut" not in second
    test = squad(trained / "again.json", 4, 3, impossible=True)
    made = ours.evaluate([str(test)], AnswerConfig(), limit=None)
    assert not any("too long" in note for note in made.notes)


def test_evaluation_of_both_versions(trained: Path, tmp_path: Path) -> None:
    """Scores equal those of the answers that are written beside them; version 1 always answers."""
    from test_answer_scores import compute_exact, compute_f1

    ours = predictor(trained / "run")
    for impossible in (True, False):
        path = squad(tmp_path / "test.json", 30, 3, impossible=impossible)
        made = ours.evaluate([str(path)], AnswerConfig(), limit=None)
        exact = [max(compute_exact(g, p["answer"]) for g in p["expected"] or [""]) for p in made.predictions]
        f1 = [max(compute_f1(g, p["answer"]) for g in p["expected"] or [""]) for p in made.predictions]
        assert made.scores["exact_match"] == pytest.approx(sum(exact) / 30)
        assert made.scores["f1"] == pytest.approx(sum(f1) / 30)
        assert made.scores["f1"] > 0.8
        assert ("no_answer_accuracy" in made.scores) == impossible
        assert all(p["answer"] for p in made.predictions) or impossible
    never = AnswerConfig(answer=AnswerOptions(threshold=-1e9))
    path = squad(tmp_path / "test.json", 30, 3, impossible=True)
    made = ours.evaluate([str(path)], never, limit=9)
    assert made.scores["no_answer_accuracy"] == 1
    assert made.scores["has_answer_f1"] == 0
    assert made.scores["examples"] == 9


def test_what_cannot_be_trained_on(tmp_path: Path) -> None:
    """No answers at all, strict data, a window without room, a decoder."""
    small_bert.save(tmp_path / "base")
    path = tmp_path / "data.json"

    def run(model: Path, qas: list[dict[str, Any]], **settings: Any) -> None:
        data = [{"title": str(n), "paragraphs": [{"context": "ada is", "qas": [qa]}]} for n, qa in enumerate(qas)]
        path.write_text(json.dumps({"data": data}))
        finetune(
            model, path, task="answer", out=tmp_path / "run", settings={"train.steps": 1, **settings}, device="cpu"
        )

    good = [{"id": str(n), "question": "who?", "answers": [{"text": "ada", "answer_start": 0}]} for n in range(3)]
    misses = {"id": "x", "question": "who?", "answers": [{"text": "ada", "answer_start": 1}]}
    none = [{"id": str(n), "question": "who?", "answers": [], "is_impossible": True} for n in range(3)]
    with pytest.raises(UserError, match="no question of the data has an answer"):
        run(tmp_path / "base", none)
    with pytest.raises(UserError, match=r"data\[0\].*offset misses"):
        run(tmp_path / "base", [misses, *good], **{"data.strict": True})
    with pytest.raises(UserError, match="for the context"):
        run(tmp_path / "base", good, **{"data.context": 9})
    with pytest.raises(UserError, match=r"answer\.longest is 0"):
        run(tmp_path / "base", good, **{"answer.longest": 0})
    for weight in (-1.0, math.nan):
        with pytest.raises(UserError, match=rf"answer\.plausible is {weight}"):
            run(tmp_path / "base", good, **{"answer.plausible": weight})
    with pytest.raises(UserError, match="too few to hold some out; 2 questions with the id of another, left out"):
        run(tmp_path / "base", [good[0]] * 3)
    tiny_models.save(tmp_path / "gpt")
    with pytest.raises(UserError, match="no head of kind 'span'"):
        run(tmp_path / "gpt", good)


def test_windows_of_short_rows_move_on() -> None:
    """Catches an overlap of 128 in rows of 128, which left a window for every few pieces: 24 of them for a question."""
    assert [answer._overlap(None, length) for length in (384, 512, 128, 30)] == [128, 128, 42, 10]
    assert answer._overlap(0, 128) == 0
