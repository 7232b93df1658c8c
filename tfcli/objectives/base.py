"""What pretraining does for each --arch: pieces of the vocabulary, the model with its head, the task, what is saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfcli.config.model import ModelConfig
from tfcli.config.options import PretrainConfig, TokenizerOptions
from tfcli.errors import UserError
from tfcli.formats.hf import directory as hf
from tfcli.model.base import Model
from tfcli.model.transformer import Transformer, initialize
from tfcli.objectives import lstm_files as lstm
from tfcli.objectives import masked, spans
from tfcli.objectives.lstm import Lstm
from tfcli.objectives.masked import MaskedLanguageModeling
from tfcli.objectives.spans import SpanCorruption
from tfcli.runtime import Runtime
from tfcli.tasks.lm.task import LanguageModeling
from tfcli.text.corpus.prepare import Corpus
from tfcli.text.tokenizers import training
from tfcli.text.tokenizers.sentencepiece import Tokenizer

OF_ARCH = {"mlm.": "bert", "spans.": "transformer"}
"""Settings that go with one architecture alone, by what their names begin with."""
OF_MUON = ("optim.muon_lr", "optim.momentum")
NAMES = {"gpt": "a GPT", "bert": "an encoder", "transformer": "an encoder-decoder", "lstm": "an LSTM"}


def tokenizer_options(config: PretrainConfig) -> TokenizerOptions:
    """How the vocabulary is made: an encoder's has pieces of its own, an encoder-decoder's has sentinels."""
    options = config.tokenizer
    if config.model.arch == "bert":
        return replace(options, trainer={**training.ENCODER, **options.trainer})
    if config.model.arch == "transformer":
        count = spans.sentinels(config.model.context, config.spans)
        return replace(options, trainer={**training.sentinels(count), **options.trainer})
    return options


def check(config: PretrainConfig, sources: Mapping[str, str]) -> None:
    """Raise UserError for a setting that does nothing in this architecture; ``sources`` are as ``resolve`` has them."""
    arch, given = config.model.arch, [key for key, source in sources.items() if source != "default"]
    for key in given:
        for begins, owner in OF_ARCH.items():
            if key.startswith(begins) and arch != owner:
                raise UserError(f"{key} does nothing in {NAMES[arch]}", hint=f"it goes with --arch {owner}")
        if key in OF_MUON and arch == "lstm":
            raise UserError(f"{key} does nothing in an LSTM, which AdamW trains", hint="its rate is optim.lr")
    if config.train.compile == "on" and arch == "lstm":
        raise UserError("train.compile does nothing in an LSTM, whose layers are compiled already", hint="leave it out")


def check_tokenizer(config: PretrainConfig, tokenizer: Tokenizer) -> None:
    """Raise UserError for a tokenizer that lacks what the architecture needs."""
    if config.model.arch == "bert":
        masked.check_tokenizer(tokenizer)
    if config.model.arch == "transformer":
        spans.check_tokenizer(tokenizer, config.model.context, config.spans)


def task(config: PretrainConfig, model: ModelConfig, corpus: Corpus, runtime: Runtime) -> Any:
    """What is learnt from the text: the next piece, the covered ones, or the hidden spans."""
    fields: dict[str, Any] = {
        "train": corpus.train,
        "val": corpus.val,
        "tokenizer": corpus.tokenizer,
        "context": model.context,
        "runtime": runtime,
    }
    if config.model.arch == "bert":
        return MaskedLanguageModeling(**fields, options=config.mlm, seed=config.seed)
    if config.model.arch == "transformer":
        return SpanCorruption(**fields, options=config.spans, seed=config.seed)
    return (Scored if config.model.arch == "lstm" else LanguageModeling)(**fields)


class Scored(LanguageModeling):
    """Language modelling by a model that writes nothing."""

    def sample(self, model: Any, seed: int) -> None:
        """Nothing to read."""
        return


def build(config: PretrainConfig, model: ModelConfig) -> Model:
    """The model with its head, not yet filled."""
    if config.model.arch == "lstm":
        return Lstm(model)
    made = Transformer(model)
    if config.model.arch == "bert":
        masked.attach(made)
    return made


def fill(model: Any, seed: int) -> None:
    """Give every parameter the value that it begins with."""
    if isinstance(model, Lstm):
        model.initialize(seed)
    else:
        initialize(model, seed)


def save(
    directory: Path, config: PretrainConfig, model: ModelConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer
) -> None:
    """Write the model directory."""
    made: Any = build(config, model)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(weights[name])
    if isinstance(made, Lstm):
        lstm.save(directory, made, tokenizer)
    elif config.model.arch == "bert":
        hf.save(directory, made, tokenizer, card=_card(model), about=_about(tokenizer))
    elif config.model.arch == "transformer":
        ending = Tokenizer(tokenizer.model_bytes, name=tokenizer.name, suffix_ids=(tokenizer.eos_id,))
        hf.save(directory, made, ending, card=_seq2seq_card(model))
    else:
        hf.save(directory, made, tokenizer)


def next_step(arch: str, directory: Path) -> str:
    """What a person does with a model of an architecture."""
    return {
        "gpt": f'tfcli generate --model {directory} --prompt "..."',
        "bert": f'tfcli predict {directory} --task fill "... [MASK] ..."',
        "transformer": f"tfcli finetune {directory} PAIRS --task translate",
        "lstm": f"tfcli evaluate {directory} TEXT",
    }[arch]


def _about(tokenizer: Tokenizer) -> dict[str, Any]:
    """Of an encoder: its special pieces, and how it is finetuned. Nothing has taught its [CLS] to speak for a text."""
    ids = {"cls_token_id": tokenizer.bos_id, "sep_token_id": tokenizer.eos_id, "mask_token_id": tokenizer.mask_id}
    return {**ids, "classifier_pooling": "mean", "tfcli": {"optimizer": "muon"}}


def _card(config: ModelConfig) -> str:
    """The README of an encoder with its masked-language head."""
    return f"""---
library_name: transformers
pipeline_tag: fill-mask
tags:
- tfcli
---

# A small encoder, made with tfcli

{config.depth} blocks of width {config.width}, {config.heads} heads, a vocabulary of {config.vocab_size} pieces and a
context of {config.context} tokens, wired as ModernBERT. It says what stands where a text has [MASK], and is what
classifiers and taggers are finetuned from.

With tfcli:

```sh
tfcli predict . --task fill "Once upon a [MASK]."
```

With transformers:

```python
from transformers import pipeline

print(pipeline("fill-mask", ".")("Once upon a [MASK]."))
```
"""


def _seq2seq_card(config: ModelConfig) -> str:
    """The README of an encoder-decoder that learnt to say what is hidden."""
    return f"""---
library_name: transformers
tags:
- tfcli
---

# An encoder-decoder, made with tfcli

An encoder of {config.encoder_depth} blocks and a decoder of {config.depth} (width {config.width}, {config.heads}
heads), a vocabulary of {config.vocab_size} pieces and a context of {config.context} tokens, stored as mBART. It was
pretrained by span corruption: of a text in which pieces such as <extra_id_0> stand for hidden words, it says these
words. It is what models that turn one text into another are finetuned from.

With tfcli:

```sh
tfcli finetune . pairs.tsv --task translate
```

With transformers:

```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForSeq2SeqLM.from_pretrained(".")
```
"""
