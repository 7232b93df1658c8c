"""What several applications do alike: check the model, choose the best, write settings and find them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tfcli.config.model import ModelConfig
from tfcli.formats.hf.families import registry as families
from tfcli.model.transformer import Transformer
from tfcli.tasks.common.batch import Batch
from tfcli.tasks.task import Headline


class JudgedByF1:
    """Of a ``Finetuning`` whose rows are read whole, whose best model has the best F1, and that writes nothing."""

    def tokens(self, rows: Batch) -> int:
        """All that are read."""
        return rows.real_tokens

    def headline(self, scores: Mapping[str, float]) -> Headline:
        """F1."""
        return Headline(name="F1", value=scores["val_f1"], higher_is_better=True)

    def sample(self, model: Transformer, seed: int) -> str | None:
        """Nothing to read."""
        return None


def check_head(shape: ModelConfig, kind: str) -> None:
    """Raise UserError for a model whose family has no head of a kind."""
    families.head_names(families.written(shape)[0], kind)


def settings_of(about: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config.json holds of tfcli's; nothing in one of another's."""
    ours = about.get("tfcli")
    return ours if isinstance(ours, Mapping) else {}


def label_ids(names: Sequence[str]) -> dict[str, Any]:
    """Labels by their ids and back, as transformers' config.json has them."""
    return {
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }
