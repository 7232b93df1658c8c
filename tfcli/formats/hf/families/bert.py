"""BERT (Devlin et al. 2019): the encoder. Standard library only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tfcli.config.model import ModelConfig
from tfcli.formats.hf.families.base import ACTIVATIONS, CLASSIC, WRITTEN, Family, HeadNames, Names, heads
from tfcli.formats.hf.settings import Settings

NAMES = Names(
    outer={
        "embed": "embeddings.word_embeddings",
        "positions": "embeddings.position_embeddings",
        "types": "embeddings.token_type_embeddings",
        "embed_norm": "embeddings.LayerNorm",
    },
    layer={
        "attention.q": "encoder.layer.{}.attention.self.query",
        "attention.k": "encoder.layer.{}.attention.self.key",
        "attention.v": "encoder.layer.{}.attention.self.value",
        "attention.o": "encoder.layer.{}.attention.output.dense",
        "attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
        "ffn.up": "encoder.layer.{}.intermediate.dense",
        "ffn.down": "encoder.layer.{}.output.dense",
        "ffn_norm": "encoder.layer.{}.output.LayerNorm",
    },
    prefixes=("", "bert."),
    aliases={"gamma": "weight", "beta": "bias"},
    buffers=("embeddings.position_ids",),
    others=("cls.", "classifier.", "qa_outputs.", "pooler.", "bert.pooler."),
)
PREDICTIONS = {
    "transform.dense": "cls.predictions.transform.dense",
    "transform.norm": "cls.predictions.transform.LayerNorm",
    "output": "cls.predictions",
}
HEADS = {
    kind: HeadNames(architecture=architecture, prefix="bert.", parts=parts)
    for kind, architecture, parts in (
        ("sequence", "BertForSequenceClassification", {"pooler": "bert.pooler.dense", "classifier": "classifier"}),
        ("token", "BertForTokenClassification", {"classifier": "classifier"}),
        ("span", "BertForQuestionAnswering", {"ends": "qa_outputs"}),
        ("masked", "BertForMaskedLM", PREDICTIONS),
    )
}


def _read_bert(settings: Settings) -> dict[str, Any]:
    return {
        **heads(settings),
        "norm_eps": settings.number("layer_norm_eps"),
        "tied": True,
        "architecture": replace(
            CLASSIC,
            causal=False,
            norms=replace(CLASSIC.norms, place="post"),
            feed_forward=replace(CLASSIC.feed_forward, activation=settings.one_of("hidden_act", ACTIVATIONS)),
            embedding=replace(CLASSIC.embedding, norm=True, token_types=settings.whole("type_vocab_size")),
        ),
    }


def _write_bert(config: ModelConfig) -> dict[str, Any]:
    return {
        "layer_norm_eps": config.norm_eps,
        "hidden_act": WRITTEN[config.architecture.feed_forward.activation],
        "type_vocab_size": config.architecture.embedding.token_types,
        **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
    }


BERT = Family(
    model_type="bert",
    architecture="BertModel",
    names=NAMES,
    heads=HEADS,
    poolers=("pooler.dense", "bert.pooler.dense"),
    defaults={"hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2},
    fixed={"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"},
    read=_read_bert,
    write=_write_bert,
)
