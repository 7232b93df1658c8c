"""The defaults that help shows are those of the settings."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import typer.main

from tfcli.cli.help import by_task, rate
from tfcli.cli.main import build, main
from tfcli.cli.tokenize import TokenizeConfig
from tfcli.config.options import DEFAULT_BUDGET, DEFAULT_VOCAB_SIZE, MAX_TOKENS, PretrainConfig, Sampling
from tfcli.config.resolve import default_of, known_keys
from tfcli.tasks.applications import APPLICATIONS, application, configs
from tfcli.tasks.common.options import BESIDE_MUON_LR, EPOCHS, LR, LR_WIDTH, MOST_LR, NEW_LR
from tfcli.tasks.translate.options import NEW_EPOCHS

WORDS = {
    "train.epochs": f"{EPOCHS:g}; {NEW_EPOCHS:g} for translate from scratch",
    "optim.lr": f"{rate(LR)} x {LR_WIDTH} / width, at most {rate(MOST_LR)}; {rate(NEW_LR)} with --lora; "
    f"{rate(BESIDE_MUON_LR)} from scratch",
}
"""The defaults that finetune shows for settings that the run decides."""
DECIDED = {DEFAULT_BUDGET, f"{MAX_TOKENS}, or what fits", f"{DEFAULT_VOCAB_SIZE}, fewer for little text"}
BY_VALUE = re.compile(r"^[\d.]+(e-?\d+)?\b")


class Stopped(Exception):
    """With the settings that a command gathered from its flags."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings


def command(*names: str) -> Any:
    found = typer.main.get_command(build())
    for name in names:
        found = found.get_command(None, name)  # type: ignore[attr-defined]
    return found


def stop(name: str) -> Callable[..., Any]:
    def stopped(*args: Any, **options: Any) -> Any:
        raise Stopped(dict(options[name]))

    return stopped


def keys(found: Any) -> dict[str, str]:
    """{setting: the default that help shows, "" for none} of every flag that is one, by calling the command with it."""
    made: dict[str, str] = {}
    nothing = {
        each.name: ["x"] if each.param_type_name == "argument" else each.default
        for each in found.params
        if each.name != "debug"
    }
    for parameter in found.params:
        skipped = parameter.name in ("sets", "config", "debug", "help", "file", "system")
        if parameter.param_type_name != "option" or parameter.default not in (None, False) or skipped:
            continue
        value = ["x"] if parameter.multiple else True if parameter.is_flag else 7
        try:
            found.callback(**{**nothing, parameter.name: value})
        except Stopped as stopped:
            given = [key for key, each in stopped.settings.items() if each not in (None, False)]
            shown = parameter.show_default
            made |= dict.fromkeys(given, shown if isinstance(shown, str) else "")
    return made


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, str]]:
    """The settings of a command, with their shown defaults."""
    monkeypatch.setattr("tfcli.train.finetune.finetune", stop("settings"))
    monkeypatch.setattr("tfcli.train.pretrain.pretrain", stop("settings"))
    for module in ("generate", "tokenize"):
        monkeypatch.setattr(f"tfcli.cli.{module}.resolve", stop("flags"))
    return lambda names: keys(command(*names.split()))


@pytest.mark.parametrize(
    ("name", "config", "least"),
    [("pretrain", PretrainConfig, 16), ("generate", Sampling, 11), ("tokenize train", TokenizeConfig, 6)],
)
def test_a_command_shows_what_its_settings_are(
    settings: Callable[[str], dict[str, str]], name: str, config: type[Any], least: int
) -> None:
    found = settings(name)
    assert len(found) >= least and set(found) <= set(known_keys(config))
    for key, shown in found.items():
        default = default_of(config, key)
        if default is None or default is False or default == ():
            assert shown in DECIDED or not BY_VALUE.match(shown), key
        else:
            assert re.split("[,;] ", shown)[0] == str(default), key


def test_finetune_shows_what_the_settings_of_its_tasks_are(settings: Callable[[str], dict[str, str]]) -> None:
    """Catches 32 examples a step where it is 8, and 3 passes where it is 15."""
    found = settings("finetune")
    assert len(found) == 13
    for key, shown in found.items():
        assert all(key in known_keys(config) for config in configs().values())
        default = default_of(configs()["classify"], key)
        expected = WORDS.get(key) or (by_task(key, configs()) if default not in (None, False) else None)
        assert shown == expected if expected is not None else not BY_VALUE.match(shown), key
    assert found["train.batch_size"] == "32; 8 for chat, lm; 128 for translate"


def test_help_knows_the_settings_of_every_task() -> None:
    assert configs().keys() == APPLICATIONS.keys()
    for name, config in configs().items():
        assert application(name).config is config


def test_a_default_beside_a_variable_is_shown_without_parentheses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenize", "encode", "--help"]) == 0
    assert "TFCLI_MODEL; default: ./tokenizer.model]" in " ".join(capsys.readouterr().out.split())


def test_shared_flags_show_the_same_everywhere() -> None:
    """--errors and --encoding are read by commands without settings of their own."""
    for names in (("evaluate",), ("predict",), ("compress",), ("tokenize", "encode")):
        shown = {each.name: each.show_default for each in command(*names).params}
        assert shown.get("errors", "strict") == default_of(PretrainConfig, "data.errors")
        assert shown.get("encoding", "utf-8") == default_of(configs()["classify"], "data.encoding")
    beam = next(each for each in command("predict").params if each.name == "beam")
    assert beam.show_default == f"the model's, else {default_of(configs()['translate'], 'translate.beam')}"
