"""A model that tags words: what it says of sentences, for people and programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tfcli.errors import UserError
from tfcli.infer.batches import by_length
from tfcli.model import heads
from tfcli.model.transformer import Transformer
from tfcli.runtime import Runtime
from tfcli.tasks.common import batch
from tfcli.tasks.common.batch import Batch
from tfcli.tasks.tag import data as rows
from tfcli.tasks.tag.chunks import Chunk, Cutter
from tfcli.tasks.tag.data import Sentence
from tfcli.tasks.tag.schemes import Entity, entities, write
from tfcli.tasks.tag.words import joined, split
from tfcli.text.tokenizers.codec import Codec


def logits(model: Transformer, part: Batch, *, dtype: torch.dtype | None = None, dropout: float = 0.0) -> Tensor:
    """(B, T, labels) in fp32 of a batch's tokens."""
    head = heads.of(model)
    assert head is not None, "a head was attached"
    hidden_BTD = model(part["tokens_BT"], mask_BT=part["mask_BT"], dtype=dtype, dropout=dropout)
    found_BTL: Tensor = head(hidden_BTD, part["mask_BT"], dropout)
    return found_BTL


@torch.inference_mode()
def probabilities(model: Transformer, chunks: Sequence[Chunk], runtime: Runtime) -> list[npt.NDArray[np.float32]]:
    """[own words, labels] of each row."""
    out: list[npt.NDArray[np.float32]] = [np.empty((0, 0), np.float32)] * len(chunks)
    for chosen in by_length([len(chunk.ids) for chunk in chunks], device=runtime.device):
        ids = [chunks[index].ids for index in chosen]
        part = Batch({"tokens_BT": batch.pad(ids), "mask_BT": batch.mask(ids)}).to(runtime.device)
        found_BTL = logits(model, part, dtype=runtime.dtype).softmax(dim=-1).cpu().numpy()
        for row, index in enumerate(chosen):
            out[index] = found_BTL[row, list(chunks[index].at)]
    return out


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a model says of sentences: a tag for every word, and how sure it is of each."""

    tags: list[list[str]]
    sure: list[npt.NDArray[np.float32]]
    shares: list[npt.NDArray[np.float32]]
    """[own words, labels] of each row."""

    @cached_property
    def entities(self) -> list[list[Entity]]:
        """Those of the tags."""
        return [entities(each) for each in self.tags]


@dataclass(kw_only=True)
class Tagger:
    """A model that tags."""

    model: Transformer
    codec: Codec
    names: tuple[str, ...]
    """Its labels by their ids."""
    length: int
    """Tokens of a row at most."""
    runtime: Runtime
    key: str = "text"

    def plain(self, line: str) -> Sentence:
        """A line of text, split into words."""
        return Sentence(text=line, words=tuple(split(line)))

    def parse(self, row: dict[str, Any]) -> Sentence:
        """{"text": "..."} is split into words, {"tokens": [...]} has its own."""
        tokens = next((row[key] for key in rows.TOKENS if isinstance(row.get(key), list)), None)
        if tokens is None:
            if not isinstance(row.get("text"), str):
                raise UserError('has neither "text" with a string nor "tokens" with a list')
            return self.plain(row["text"])
        if not all(isinstance(token, str) and token for token in tokens):
            raise UserError('has "tokens" that are not all words')
        text, words = joined(tokens)
        return Sentence(text=text, words=words, own_words=True)

    @property
    def cutter(self) -> Cutter:
        """A new one for its rows."""
        return Cutter(self.codec, length=self.length)

    def find(self, sentences: Sequence[Sentence], chunks: Sequence[Chunk]) -> Found:
        """Tags of every word, the most probable each; words that the tokenizer leaves nothing of are O."""
        shares = probabilities(self.model, chunks, self.runtime)
        tags = [["O"] * len(sentence.words) for sentence in sentences]
        sure = [np.ones(len(sentence.words), np.float32) for sentence in sentences]
        for chunk, array in zip(chunks, shares, strict=True):
            for word, row in zip(chunk.words, array, strict=True):
                label = int(row.argmax())
                tags[chunk.index][word] = self.names[label]
                sure[chunk.index][word] = row[label]
        return Found(tags=tags, sure=sure, shares=shares)

    def predict(self, inputs: Sequence[Sentence]) -> list[dict[str, Any]]:
        """{"text", "entities": [{"start", "end", "label", "text", "score"}]}, offsets in characters of the text.

        ``score`` is the mean probability of an entity's tags. Of inputs with words of their own, the text is these with
        spaces between, and "tokens" and "tags" stand beside it. "cut" where a word had more pieces than a row has room
        for; texts of any length are read whole.
        """
        cutter = self.cutter
        made = answers(inputs, self.find(inputs, rows_of(cutter, inputs)))
        for index in cutter.cut:
            made[index]["cut"] = True
        return made

    def show(self, answer: Mapping[str, Any]) -> str:
        """[Ada Lovelace](person) lived in [London](location)."""
        text, parts, at = answer["text"], [], 0
        for entity in answer["entities"]:
            parts += [text[at : entity["start"]], f"[{entity['text']}]({entity['label']})"]
            at = entity["end"]
        return "".join([*parts, text[at:]]).replace("\n", " ")


def rows_of(cutter: Cutter, sentences: Sequence[Sentence]) -> list[Chunk]:
    """The rows of sentences."""
    return cutter.chunks([(sentence.text, sentence.words) for sentence in sentences])


def answers(sentences: Sequence[Sentence], found: Found) -> list[dict[str, Any]]:
    """What ``Tagger.predict`` gives."""
    made = []
    for sentence, spans, tags, sure in zip(sentences, found.entities, found.tags, found.sure, strict=True):
        listed = [
            {**placed(sentence, span), "score": round(float(sure[span.start : span.end].mean()), 4)} for span in spans
        ]
        answer: dict[str, Any] = {"text": sentence.text, "entities": listed}
        if sentence.own_words:
            answer |= {"tokens": sentence.tokens, "tags": tags}
        made.append(answer)
    return made


def placed(sentence: Sentence, entity: Entity) -> dict[str, Any]:
    """An entity by characters of its text."""
    start, end = sentence.words[entity.start][0], sentence.words[entity.end - 1][1]
    return {"start": start, "end": end, "label": entity.label, "text": sentence.text[start:end]}


def accuracy(sentences: Sequence[Sentence], found: Found) -> float:
    """The part of all words whose tag is right, both sides written as BIO."""
    right = total = 0
    for sentence, spans in zip(sentences, found.entities, strict=True):
        guess = write(spans, len(sentence.words), "bio")
        right += sum(a == b for a, b in zip(sentence.tags("bio"), guess, strict=True))
        total += len(guess)
    return right / total if total else 0.0
