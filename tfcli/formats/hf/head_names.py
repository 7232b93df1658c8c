"""Task heads of Hugging Face families: tables of the classes that have them and of their parts' names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tfcli.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadNames:
    """A head of a family: the class that has it, before what the names of the trunk begin, and its parts' names."""

    architecture: str
    prefix: str
    parts: Mapping[str, str]


def _decoder(architecture: str, prefix: str = "model.") -> Mapping[str, HeadNames]:
    return {"sequence": HeadNames(architecture=architecture, prefix=prefix, parts={"classifier": "score"})}


HEADS: Mapping[str, Mapping[str, HeadNames]] = {
    "bert": {
        "sequence": HeadNames(
            architecture="BertForSequenceClassification",
            prefix="bert.",
            parts={"pooler": "bert.pooler.dense", "classifier": "classifier"},
        ),
        "token": HeadNames(
            architecture="BertForTokenClassification", prefix="bert.", parts={"classifier": "classifier"}
        ),
        "span": HeadNames(architecture="BertForQuestionAnswering", prefix="bert.", parts={"ends": "qa_outputs"}),
        "masked": HeadNames(
            architecture="BertForMaskedLM",
            prefix="bert.",
            parts={
                "transform.dense": "cls.predictions.transform.dense",
                "transform.norm": "cls.predictions.transform.LayerNorm",
                "output": "cls.predictions",
            },
        ),
    },
    "modernbert": {
        kind: HeadNames(
            architecture=architecture,
            prefix="model.",
            parts={"transform.dense": "head.dense", "transform.norm": "head.norm", ours: theirs},
        )
        for kind, architecture, ours, theirs in (
            ("masked", "ModernBertForMaskedLM", "output", "decoder"),
            ("sequence", "ModernBertForSequenceClassification", "classifier", "classifier"),
            ("token", "ModernBertForTokenClassification", "classifier", "classifier"),
            ("span", "ModernBertForQuestionAnswering", "ends", "classifier"),
        )
    },
    "qwen3": _decoder("Qwen3ForSequenceClassification"),
    "qwen2": _decoder("Qwen2ForSequenceClassification"),
    "llama": _decoder("LlamaForSequenceClassification"),
    "mistral": _decoder("MistralForSequenceClassification"),
    "gemma3_text": _decoder("Gemma3TextForSequenceClassification"),
    "gpt2": _decoder("GPT2ForSequenceClassification", "transformer."),
}
"""{family's model_type: {kind of head: its names}}."""
POOLERS = ("pooler.dense", "bert.pooler.dense")
"""Where a bare BERT has the layer that its sequence head begins with."""


def names(model_type: str, kind: str) -> HeadNames:
    """The names of a head. Raises UserError for a family without it."""
    found = HEADS.get(model_type, {}).get(kind)
    if found is None:
        have = [family for family, heads in HEADS.items() if kind in heads]
        raise UserError(
            f"a model of type {model_type} has no head of kind {kind!r} in transformers",
            hint=f"models that have: {', '.join(have)}; make one: tfcli pretrain TEXT --arch bert",
        )
    return found


TASK = ("id2label", "label2id", "problem_type", "tfcli")
"""What config.json says of a task, beside the shape of its model."""


def of_task(about: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says of the task of its model, for another that answers the same."""
    found = {key: about[key] for key in TASK if key in about}
    if isinstance(found.get("tfcli"), dict):  # without the mark of the tokenizer that lies beside it
        found["tfcli"] = {key: value for key, value in found["tfcli"].items() if key != "tokenizer_sha256"}
    return found


def pooling_of(about: Mapping[str, Any]) -> str:
    """How a model pools its hidden states for a new sequence head, by its config.json."""
    return "mean" if about.get("classifier_pooling") == "mean" else "cls"


def kind_of(about: Mapping[str, Any]) -> str | None:
    """The kind of head of the model that a config.json describes, None for none that is known."""
    listed = about.get("architectures")
    family = HEADS.get(str(about.get("model_type")), {})
    for kind, head in family.items():
        if isinstance(listed, list) and head.architecture in listed:
            return kind
    return None
