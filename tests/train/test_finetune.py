"""A finetuning run: stopped and resumed to the same end, the best kept, early stopping, the whole way from Python."""

import json
from pathlib import Path
from typing import Any

import data_reports
import pytest
import small_bert
import tiny_models
import torch
from safetensors.torch import load_file
from small_runs import digest, facts

from tfcli.errors import Interrupted, UserError
from tfcli.formats.hf import heads
from tfcli.tasks.classify.predictor import run
from tfcli.train.events import Evaluated, Event, Note, Saved
from tfcli.train.finetune import Result, finetune

WORDS = {"sun": ("sun", "lovely", "shone"), "well": ("well", "forest", "dark"), "king": ("king", "castle", "daughters")}
SETTINGS: dict[str, Any] = {
    "train.epochs": 4, "train.batch_size": 8, "train.checkpoint_every": 5, "train.eval_every": 4, "optim.lr": 3e-3,
}  # fmt: skip


def rows(count: int = 72) -> list[dict[str, str]]:
    """Texts whose label is decided by one word in them, of three to eight words."""
    made = []
    for index in range(count):
        label = list(WORDS)[index % 3]
        text = ["the", "old", "tree", "was", "there", "a"][: 2 + index % 5]
        text.insert(index % len(text), WORDS[label][index // 3 % 3])
        made.append({"text": " ".join(text), "label": label})
    return made


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model directory (a decoder) and a dataset."""
    folder = tmp_path_factory.mktemp("finetune")
    tiny_models.save(folder / "base", scale=0.15)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return folder / "base", folder / "data.jsonl"


def train(start: tuple[Path, Path], out: Path, settings: dict[str, Any] | None = None, **more: Any) -> Result:
    machine = {"device": "cpu", "precision": "fp32", "threads": 1}
    return finetune(
        start[0], start[1], task="classify", out=out, settings=SETTINGS | (settings or {}), **machine, **more
    )


def test_learns_and_keeps_the_best(start: tuple[Path, Path], tmp_path: Path) -> None:
    """Catches a head that is not trained, labels in another order, and a last model that is kept for the best."""
    events: list[Event] = []
    length = {"train.epochs": 16, "optim.lr": 5e-3, "train.eval_every": 12}
    result = train(start, tmp_path / "a", length, from_scratch=True, listen=events.append)
    scored = [event for event in events if isinstance(event, Evaluated)]
    best = max(event.value for event in scored)
    assert best > 0.8
    assert result.scores["val_accuracy"] == pytest.approx(best)
    assert [event.name for event in scored] == ["accuracy"] * len(scored)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["id2label"] == {"0": "king", "1": "sun", "2": "well"}
    assert config["architectures"] == ["Qwen3ForSequenceClassification"]
    assert config["tfcli"]["task"] == "classify"
    about = json.loads((tmp_path / "a" / "run.json").read_text())
    assert (about["kind"], about["task"], about["finished"] is not None) == ("finetune", "classify", True)
    data_report = json.loads((tmp_path / "a" / "data.json").read_text())
    data_reports.check(data_report, "classify")
    assert data_report["split"] == {"rule": "stratified", "fraction": 0.1, "seed": 1337} == about["split"]
    assert [row["documents"] for row in data_report["sources"]] == [72]
    assert data_report["val"]["labels"] == {"king": 2, "sun": 2, "well": 2}


def test_resumed_is_never_stopped(start: tuple[Path, Path], tmp_path: Path) -> None:
    """Catches anything that a checkpoint forgets: optimizer, order, dropout, early stopping, the best so far."""
    train(start, tmp_path / "a")

    def stop(event: Event) -> None:
        if isinstance(event, Saved) and event.step == 10:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        train(start, tmp_path / "b", listen=stop)
    again = finetune(None, out=tmp_path / "b", resume=True)
    assert facts(tmp_path / "a") == facts(tmp_path / "b")
    assert (
        again.scores["val_accuracy"] == json.loads((tmp_path / "a" / "run.json").read_text())["scores"]["val_accuracy"]
    )
    with pytest.raises(UserError, match="is finished"):
        finetune(None, out=tmp_path / "b", resume=True)


def test_a_run_is_resumed_from_another_directory(
    start: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches files of a run that are known by names of the directory that it began in."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data.jsonl").write_bytes(start[1].read_bytes())
    monkeypatch.chdir(tmp_path)

    def stop(event: Event) -> None:
        if isinstance(event, Saved):
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        train((start[0], Path("data.jsonl")), tmp_path / "a", {"data.val": "data.jsonl"}, listen=stop)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert finetune(None, out=tmp_path / "a", resume=True).steps > 0


def test_a_run_whose_part_was_drawn_otherwise_is_refused(start: tuple[Path, Path], tmp_path: Path) -> None:
    """Older versions held out other examples; where a file was given they did not, and such a run goes on."""

    def stop(event: Event) -> None:
        if isinstance(event, Saved):
            raise Interrupted("stopped")

    for name, settings in {"drawn": {}, "given": {"data.val": str(start[1])}}.items():
        with pytest.raises(Interrupted):
            train(start, tmp_path / name, settings, listen=stop)
        about = json.loads((tmp_path / name / "run.json").read_text())
        del about["split"]
        (tmp_path / name / "run.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="an older version, which split off other validation data"):
        finetune(None, out=tmp_path / "drawn", resume=True)
    assert finetune(None, out=tmp_path / "given", resume=True).steps > 0


def test_other_data_cannot_be_resumed(start: tuple[Path, Path], tmp_path: Path) -> None:
    """Catches a run that goes on with other examples under the same name."""
    data = tmp_path / "data.jsonl"
    data.write_bytes(start[1].read_bytes())

    def stop(event: Event) -> None:
        if isinstance(event, Saved):
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        train((start[0], data), tmp_path / "b", listen=stop)
    with data.open("a") as file:
        file.write('{"text": "one more", "label": "sun"}\n')
    with pytest.raises(UserError, match="the data is not what"):
        finetune(None, out=tmp_path / "b", resume=True)


def test_early_stopping(start: tuple[Path, Path], tmp_path: Path) -> None:
    """Catches patience that is not counted, and an end without a model: at a rate of 0 nothing becomes better."""
    events: list[Event] = []
    result = train(start, tmp_path / "a", {"train.patience": 2, "optim.lr": 0.0}, listen=events.append)
    assert result.steps == 12, "the first evaluation is the best, two more are not"
    assert any(isinstance(event, Note) and event.text.startswith("stopped early") for event in events)
    assert (tmp_path / "a" / "model.safetensors").is_file()


def test_from_scratch_takes_the_shape_only(start: tuple[Path, Path], tmp_path: Path) -> None:
    """Catches weights of the base in a model that should have none."""
    train(start, tmp_path / "a", {"train.epochs": None, "train.steps": 1, "optim.lr": 0.0}, from_scratch=True)
    base = heads.load(start[0], runtime=tiny_models.cpu()).model
    made = heads.load(tmp_path / "a", runtime=tiny_models.cpu()).model
    assert made.config == base.config
    assert not torch.equal(made.embed.weight, base.embed.weight)


@pytest.mark.parametrize(
    ("kind", "new", "muon"), [(None, True, True), (None, False, False), ("adamw", True, False), ("muon", False, True)]
)
def test_what_is_new_learns_by_muon(
    start: tuple[Path, Path], tmp_path: Path, kind: str | None, new: bool, muon: bool
) -> None:
    """Catches AdamW for new weights, and Muon for pretrained ones."""
    settings = {"train.epochs": None, "train.steps": 1, "optim.kind": kind, "optim.lr": None}
    train(start, tmp_path / "a", settings, from_scratch=new)
    kept = next((tmp_path / "a" / "checkpoints").glob("*/*.safetensors")).parent
    names = {name for file in kept.glob("*.safetensors") for name in load_file(file)}
    assert any(name.endswith("momentum_buffer") for name in names) == muon
    planned = json.loads((tmp_path / "a" / "run.json").read_text())["plan"]
    assert planned["lr"] == {(True, True): 3e-3, (True, False): 1e-3}.get((new, muon), 3e-4)  # a narrow model
    assert planned["muon_lr"] == pytest.approx(planned["lr"] * 20 / 3)


def test_a_rate_that_nothing_has_is_refused(start: tuple[Path, Path], tmp_path: Path) -> None:
    """Catches a setting that does nothing in silence."""
    with pytest.raises(UserError, match=r"optim\.muon_lr does nothing under AdamW"):
        train(start, tmp_path / "a", {"optim.muon_lr": 0.1})
    assert not (tmp_path / "a").exists()


def test_the_model_directory_is_left_alone(start: tuple[Path, Path], tmp_path: Path) -> None:
    """Catches a run that writes into the model that it began with, and one that is given that place."""
    before = digest(start[0] / "model.safetensors")
    train(start, tmp_path / "a", {"train.epochs": None, "train.steps": 2})
    assert digest(start[0] / "model.safetensors") == before
    with pytest.raises(UserError, match="is not empty"):
        train(start, start[0])


def test_padding_changes_nothing(start: tuple[Path, Path], tmp_path: Path) -> None:
    """Catches padding that is attended to or classified: alone and in a batch a text has the same logits."""
    from tfcli.tasks.classify.predictor import encode

    loaded = heads.load(start[0], runtime=tiny_models.cpu())
    from tfcli.model import heads as of_model

    of_model.fresh(loaded.model, "sequence", 3, seed=0)
    texts = [row["text"] for row in rows(9)]
    together = run(loaded.model, encode(loaded.codec, texts, [None] * 9, 32), tiny_models.cpu())
    for text, expected in zip(texts, together, strict=True):
        alone = run(loaded.model, encode(loaded.codec, [text], [None], 32), tiny_models.cpu())[0]
        assert alone == pytest.approx(expected, abs=1e-5)


def test_adapters_and_their_head_resumed_are_never_stopped(start: tuple[Path, Path], tmp_path: Path) -> None:
    """Catches a head that a checkpoint forgets, and a best model that is looked for as a whole one."""
    low = {"lora.on": True, "lora.rank": 2, "optim.lr": 3e-2, "train.epochs": 6, "train.patience": 20}
    train(start, tmp_path / "a", low)

    def stop(event: Event) -> None:
        if isinstance(event, Saved) and event.step == 45:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        train(start, tmp_path / "b", low, listen=stop)
    finetune(None, out=tmp_path / "b", resume=True)
    about = [json.loads((tmp_path / name / "run.json").read_text()) for name in "ab"]
    assert about[0]["scores"] == about[1]["scores"]
    best = [load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab"]
    assert best[0].keys() == best[1].keys()
    assert all(torch.equal(tensor, best[1][name]) for name, tensor in best[0].items())
    last = [sorted((tmp_path / name / "checkpoints").iterdir())[-1] / "model.safetensors" for name in "ab"]
    assert digest(last[0]) == digest(last[1])


def test_a_best_that_was_saved_before_is_found_again(start: tuple[Path, Path], tmp_path: Path) -> None:
    """At a rate of 0 the first evaluation is the best: the process that ends the run never had its weights."""
    still = {"lora.on": True, "optim.lr": 0.0, "train.epochs": None, "train.steps": 12, "train.margin": 0.0}

    def stop(event: Event) -> None:
        if isinstance(event, Saved) and event.step == 5:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        train(start, tmp_path / "a", still, listen=stop)
    result = finetune(None, out=tmp_path / "a", resume=True)
    assert result.steps == 12
    state = json.loads((sorted((tmp_path / "a" / "checkpoints").iterdir())[-1] / "state.json").read_text())
    assert state["best_step"] == 4


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({}, 0.9574),
        ({"lora.on": True}, 0.9574),
        ({"optim.kind": "muon"}, 0.9574),
        ({"optim.warmup": 0.5}, 0.2157),
        ({"optim.warmup": 0.0}, 0.90),
    ],
    ids=["whole", "lora", "muon", "given", "none"],
)
def test_the_rates_rise_over_the_part_that_is_set(
    start: tuple[Path, Path], tmp_path: Path, settings: dict[str, Any], first: float
) -> None:
    """Would catch a setting of the warm-up that one of the optimizers or the adapters do not follow."""
    small_bert.save(tmp_path / "bert")
    length = {"train.epochs": None, "train.steps": 100, "train.batch_size": 2, "train.eval_every": 100}
    train((tmp_path / "bert", start[1]), tmp_path / "a", length | {"optim.lr": 1e-3} | settings)
    rates = [
        json.loads(line)["lr"] for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines() if '"lr"' in line
    ]
    peak = 1e-3 * (20 / 3 if "optim.kind" in settings else 1)
    assert rates[0] / peak == pytest.approx(first, abs=1e-3)  # (100 - 10) / 94, (10 + 1) / 51, and (100 - 10) / 100
