"""A model that tags words: its answers for people and programs, and their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tfcli.errors import UserError
from tfcli.infer.batches import by_length
from tfcli.model.transformer import Transformer
from tfcli.runtime import Runtime
from tfcli.tasks.common import batch
from tfcli.tasks.common.batch import Batch, head_logits
from tfcli.tasks.common.report import Report
from tfcli.tasks.tag import data as rows
from tfcli.tasks.tag.chunks import Chunk, Cutter
from tfcli.tasks.tag.data import Sentence
from tfcli.tasks.tag.options import TagConfig
from tfcli.tasks.tag.schemes import Entity, Scheme, entities, write
from tfcli.tasks.tag.scores import as_numbers, score, table
from tfcli.tasks.tag.words import joined, split
from tfcli.tasks.task import Evaluation, Predictor
from tfcli.text.read import tables
from tfcli.text.tokenizers.codec import Codec


def read(data: Sequence[str], config: TagConfig, report: Report) -> tuple[list[Sentence], Scheme]:
    """Return the sentences of all files, and the scheme of their tags: BIOES where one file is written in it.

    Raises UserError where no file has tags or spans.
    """
    parts = [rows.read(path, report, config.data, repair=config.tag.repair) for path in tables.expand(data)]
    if all(part.bare for part in parts):
        raise UserError(f"{', '.join(data)}: no sentence has words and tags, or a text and spans", hint=rows.EXPECTED)
    scheme: Scheme = "bioes" if any(part.scheme == "bioes" for part in parts) else "bio"
    return [sentence for part in parts for sentence in part.sentences], scheme


def note_unknown(sentences: Sequence[Sentence], names: Sequence[str], report: Report) -> None:
    """Count sentences with labels that the model does not have."""
    known = {name[2:] for name in names}
    for sentence in sentences:
        if not {entity.label for entity in sentence.entities} <= known:
            kind = "held-out sentences with labels that the model does not have, missed"
            report.fault(kind, sentence.where, None)


def note_words(cutter: Cutter, report: Report) -> None:
    """Count what the tokenizer and the length of a row did to words."""
    report.note("words that the tokenizer leaves nothing of, tagged O", cutter.without_pieces)
    report.note("words longer than the model reads, cut", cutter.cut_words, action="cut")
    report.note("sentences longer than the model reads, in parts that overlap", cutter.long)


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Predicted tags of every word, and their probabilities."""

    tags: list[list[str]]
    sure: list[npt.NDArray[np.float32]]
    shares: list[npt.NDArray[np.float32]]
    """Probabilities (words, labels) of the words of each chunk."""

    @cached_property
    def entities(self) -> list[list[Entity]]:
        """The entities of the tags."""
        return [entities(each) for each in self.tags]


@dataclass(frozen=True, kw_only=True)
class TagPredictor(Predictor):
    """A finetuned model that tags: the ``Predictor`` of ``tag``."""

    model: Transformer
    codec: Codec
    names: tuple[str, ...]
    """Labels by their ids."""
    length: int
    """Maximum tokens of a row."""
    runtime: Runtime
    key: str = "text"

    def plain(self, line: str) -> Sentence:
        """Split a line of text into words."""
        return Sentence(text=line, words=tuple(split(line)))

    def parse(self, row: dict[str, Any]) -> Sentence:
        """Split the text of {"text": "..."} into words, or take those of {"tokens": [...]}."""
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
        """A new cutter for the model's rows."""
        return Cutter(self.codec, length=self.length)

    @torch.inference_mode()
    def tag(self, sentences: Sequence[Sentence], chunks: Sequence[Chunk]) -> Predictions:
        """Predict the most probable tag of every word; words that the tokenizer leaves nothing of are O."""
        shares: list[npt.NDArray[np.float32]] = [np.empty((0, 0), np.float32)] * len(chunks)
        for chosen in by_length([len(chunk.ids) for chunk in chunks], device=self.runtime.device):
            ids = [chunks[index].ids for index in chosen]
            part = Batch({"tokens_BT": batch.pad(ids), "mask_BT": batch.mask(ids)}).to(self.runtime.device)
            shares_BTL = head_logits(self.model, part, dtype=self.runtime.dtype).softmax(dim=-1).cpu().numpy()
            for row, index in enumerate(chosen):
                shares[index] = shares_BTL[row, list(chunks[index].at)]
        tags = [["O"] * len(sentence.words) for sentence in sentences]
        sure = [np.ones(len(sentence.words), np.float32) for sentence in sentences]
        for chunk, array in zip(chunks, shares, strict=True):
            for word, row in zip(chunk.words, array, strict=True):
                label = int(row.argmax())
                tags[chunk.index][word] = self.names[label]
                sure[chunk.index][word] = row[label]
        return Predictions(tags=tags, sure=sure, shares=shares)

    def predict(self, inputs: Sequence[Sentence]) -> list[dict[str, Any]]:
        """Return {"text", "entities": [{"start", "end", "label", "text", "score"}]}, offsets in characters of the text.

        ``score`` is the mean probability of an entity's tags. For inputs with words of their own, the text is these
        joined by spaces, and "tokens" and "tags" are added. "cut" is set where a word has more tokens than fit a row;
        texts of any length are read whole.
        """
        cutter = self.cutter
        answers = _answers(inputs, self.tag(inputs, rows_of(cutter, inputs)))
        for index in cutter.cut:
            answers[index]["cut"] = True
        return answers

    def show(self, answer: Mapping[str, Any]) -> str:
        """Return a line such as: [Ada Lovelace](person) lived in [London](location)."""
        text, parts, at = answer["text"], [], 0
        for entity in answer["entities"]:
            parts += [text[at : entity["start"]], f"[{entity['text']}]({entity['label']})"]
            at = entity["end"]
        return "".join([*parts, text[at:]]).replace("\n", " ")

    def evaluate(self, data: Sequence[str], config: TagConfig, *, limit: int | None) -> Evaluation:
        """Return precision, recall and F1 of entities as seqeval's, with 95 % bootstrap intervals over sentences."""
        report = Report.of(config.data)
        sentences = read(data, config, report)[0][:limit]
        note_unknown(sentences, self.names, report)
        cutter = self.cutter
        tagged = self.tag(sentences, rows_of(cutter, sentences))
        note_words(cutter, report)
        numbers, lines = assess(sentences, tagged)
        predictions = _answers(sentences, tagged)
        for answer, sentence in zip(predictions, sentences, strict=True):
            answer["expected"] = [_placed(sentence, entity) for entity in sentence.entities]
        numbers["data"] = report.as_json()
        return Evaluation(scores=numbers, lines=lines, predictions=predictions, notes=tuple(report.lines()))


def rows_of(cutter: Cutter, sentences: Sequence[Sentence]) -> list[Chunk]:
    """Return the rows of sentences."""
    return cutter.chunks([(sentence.text, sentence.words) for sentence in sentences])


def assess(sentences: Sequence[Sentence], tagged: Predictions) -> tuple[dict[str, Any], list[str]]:
    """Return the scores of predicted tags, and a table of them for people."""
    scores = score([sentence.entities for sentence in sentences], tagged.entities)
    numbers = {**as_numbers(scores), "accuracy": _accuracy(sentences, tagged), "examples": len(sentences)}
    return numbers, table(scores)


def _answers(sentences: Sequence[Sentence], tagged: Predictions) -> list[dict[str, Any]]:
    answers = []
    for sentence, spans, tags, sure in zip(sentences, tagged.entities, tagged.tags, tagged.sure, strict=True):
        scored = [(span, float(sure[span.start : span.end].mean())) for span in spans]
        listed = [{**_placed(sentence, span), "score": round(share, 4)} for span, share in scored]
        answer: dict[str, Any] = {"text": sentence.text, "entities": listed}
        if sentence.own_words:
            answer |= {"tokens": sentence.tokens, "tags": tags}
        answers.append(answer)
    return answers


def _placed(sentence: Sentence, entity: Entity) -> dict[str, Any]:
    """Return an entity by characters of its text."""
    start, end = sentence.words[entity.start][0], sentence.words[entity.end - 1][1]
    return {"start": start, "end": end, "label": entity.label, "text": sentence.text[start:end]}


def _accuracy(sentences: Sequence[Sentence], tagged: Predictions) -> float:
    """Return the share of words whose tag is right, with both sides written as BIO."""
    right = total = 0
    for sentence, spans in zip(sentences, tagged.entities, strict=True):
        predicted = write(spans, len(sentence.words), "bio")
        right += sum(a == b for a, b in zip(sentence.tags("bio"), predicted, strict=True))
        total += len(predicted)
    return right / total if total else 0.0
