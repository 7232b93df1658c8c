"""Filling in: what stands where a text has [MASK], by an encoder as it was pretrained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tfcli.errors import UserError
from tfcli.infer.fill import Filler
from tfcli.model.transformer import Transformer
from tfcli.tasks.task import Predictor
from tfcli.text.tokenizers.codec import Codec

TOP = 5
"""Guesses for each mask."""


class FillPredictor(Predictor):
    """A masked-language model that answers. Raises UserError for a model that has no head for it."""

    key = "text"

    def __init__(self, model: Transformer, codec: Codec) -> None:
        self.filler = Filler(model, codec)

    def plain(self, line: str) -> str:
        """A line with a mask; UserError for one without, or too long."""
        self.filler.encode(line)
        return line

    def parse(self, row: dict[str, Any]) -> str:
        """The "text" of an object, as ``plain``."""
        text = row.get(self.key)
        if not isinstance(text, str):
            raise UserError(f'has no "{self.key}" with a string')
        return self.plain(text)

    def predict(self, inputs: Sequence[str]) -> list[dict[str, Any]]:
        """{"text", "masks"}: for each mask in its order the likeliest words, {"word", "probability"}."""
        answers = self.filler.fill(inputs, top=TOP)
        return [
            {
                "text": text,
                "masks": [
                    [{"word": guess.word, "probability": round(guess.probability, 7)} for guess in guesses]
                    for guesses in masks
                ],
            }
            for text, masks in zip(inputs, answers, strict=True)
        ]

    def show(self, answer: Mapping[str, Any]) -> str:
        """The words of each mask, the likeliest first."""
        masks = [
            ", ".join(f"{guess['word']} {guess['probability']:.2f}" for guess in guesses) for guesses in answer["masks"]
        ]
        return f"{answer['text']}\t{' | '.join(masks)}"
