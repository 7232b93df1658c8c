"""Filling in [MASK], with an encoder as it was pretrained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tfcli.errors import UserError
from tfcli.infer.fill import Filler
from tfcli.model.transformer import Transformer
from tfcli.tasks.task import Predictor
from tfcli.text.tokenizers.codec import Codec

TOP = 5
"""Predictions for each mask."""


class TextPredictor(Predictor):
    """A predictor whose inputs are single texts."""

    key = "text"

    def plain(self, line: str) -> str:
        """A line is a text."""
        return line

    def parse(self, row: dict[str, Any]) -> str:
        """The "text" of an object, checked as by ``plain``."""
        text = row.get(self.key)
        if not isinstance(text, str):
            raise UserError(f'has no "{self.key}" with a string')
        return self.plain(text)


class FillPredictor(TextPredictor):
    """Predict masked words. Raises UserError for a model without a masked-language head."""

    def __init__(self, model: Transformer, codec: Codec) -> None:
        self.filler = Filler(model, codec)

    def plain(self, line: str) -> str:
        """Check a line. Raises UserError for one without a mask, or too long."""
        self.filler.encode(line)
        return line

    def predict(self, inputs: Sequence[str]) -> list[dict[str, Any]]:
        """{"text", "masks"}: the likeliest words of each mask, {"word", "probability"}."""
        answers: list[dict[str, Any]] = []
        for text, masks in zip(inputs, self.filler.fill(inputs, top=TOP), strict=True):
            words = [[{"word": one.word, "probability": round(one.probability, 7)} for one in mask] for mask in masks]
            answers.append({"text": text, "masks": words})
        return answers

    def show(self, answer: Mapping[str, Any]) -> str:
        """The words of each mask, the likeliest first."""
        masks = (", ".join(f"{word['word']} {word['probability']:.2f}" for word in mask) for mask in answer["masks"])
        return f"{answer['text']}\t{' | '.join(masks)}"
