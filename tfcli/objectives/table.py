"""The objectives by the word after --arch; their modules are imported on first use."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from tfcli.errors import UserError, unknown

if TYPE_CHECKING:
    from tfcli.config.options import PretrainConfig
    from tfcli.objectives.base import Objective


class Line(NamedTuple):
    """A module with an ``OBJECTIVE``, and a phrase on what its models do."""

    module: str
    does: str


OBJECTIVES = {
    "gpt": Line("tfcli.objectives.gpt", "continues text"),
    "bert": Line("tfcli.objectives.masked", "fills in"),
    "transformer": Line("tfcli.objectives.spans", "text to text"),
    "lstm": Line("tfcli.objectives.lstm", "a baseline"),
}
OF_MUON = ("optim.muon_lr", "optim.momentum")


def objective(name: str) -> Objective:
    """The objective of an --arch. Raises UserError for an unknown name, with the nearest known one."""
    if name not in OBJECTIVES:
        raise unknown("model.arch", name, OBJECTIVES)
    return cast("Objective", importlib.import_module(OBJECTIVES[name].module).OBJECTIVE)


def of_format(hf_config: Mapping[str, Any]) -> Objective | None:
    """The objective whose own format a directory with this config.json has; None for other models."""
    from tfcli.formats.hf.stored import OWN

    kind = str(hf_config.get("model_type"))
    name = kind.removeprefix(OWN)
    return objective(name) if kind.startswith(OWN) and name in OBJECTIVES else None


def check_given(config: PretrainConfig, sources: Mapping[str, str]) -> None:
    """Raise UserError for a given setting that does nothing under the objective; ``sources`` as of ``resolve``."""
    mine = objective(config.model.arch)
    owner = {section: name for name in OBJECTIVES for section in objective(name).settings}
    for key in (key for key, source in sources.items() if source != "default"):
        section = key.partition(".")[0]
        if section in owner and section not in mine.settings:
            raise UserError(f"{key} does nothing in {mine.called}", hint=f"it goes with --arch {owner[section]}")
        if key in OF_MUON and not mine.muon:
            raise UserError(f"{key} does nothing in {mine.called}, which AdamW updates", hint="its rate is optim.lr")
    if config.train.compile == "on" and not mine.compiles:
        raise UserError(
            f"train.compile does nothing in {mine.called}, whose layers are compiled already", hint="leave it out"
        )
