"""What pretraining does for each --arch: pieces of the vocabulary, the model with its head, the task, what is saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfcli.config import ModelConfig, PretrainConfig, TokenizerOptions
from tfcli.errors import UserError
from tfcli.formats import hf
from tfcli.model.transformer import Transformer
from tfcli.runtime import Runtime
from tfcli.tasks import mlm
from tfcli.tasks.lm import LanguageModeling
from tfcli.tasks.mlm import MaskedLanguageModeling
from tfcli.text import training
from tfcli.text.corpus import Corpus
from tfcli.text.tokenizer import Tokenizer


def tokenizer_options(config: PretrainConfig) -> TokenizerOptions:
    """How the vocabulary is made: an encoder's has pieces of its own."""
    options = config.tokenizer
    if config.model.arch == "gpt":
        return options
    return replace(options, trainer={**training.ENCODER, **options.trainer})


def check(config: PretrainConfig, sources: Mapping[str, str]) -> None:
    """Raise UserError for a setting that does nothing in this architecture; ``sources`` are as ``resolve`` has them."""
    idle = [key for key, source in sources.items() if key.startswith("mlm.") and source != "default"]
    if idle and config.model.arch == "gpt":
        raise UserError(f"{idle[0]} does nothing in a GPT, which masks nothing", hint="it goes with --arch bert")


def check_tokenizer(config: PretrainConfig, tokenizer: Tokenizer) -> None:
    """Raise UserError for a tokenizer that lacks what the architecture needs."""
    if config.model.arch == "bert":
        mlm.check_tokenizer(tokenizer)


def task(config: PretrainConfig, model: ModelConfig, corpus: Corpus, runtime: Runtime) -> Any:
    """What is learnt from the text: the next piece, or the covered ones."""
    if config.model.arch == "gpt":
        return LanguageModeling(
            train=corpus.train, val=corpus.val, tokenizer=corpus.tokenizer, context=model.context, runtime=runtime
        )
    return MaskedLanguageModeling(
        train=corpus.train,
        val=corpus.val,
        tokenizer=corpus.tokenizer,
        context=model.context,
        runtime=runtime,
        options=config.mlm,
        seed=config.seed,
    )


def build(config: PretrainConfig, model: ModelConfig) -> Transformer:
    """The model with its head, not yet filled."""
    made = Transformer(model)
    if config.model.arch == "bert":
        mlm.attach(made)
    return made


def save(
    directory: Path, config: PretrainConfig, model: ModelConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer
) -> None:
    """Write the model directory."""
    made = build(config, model)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(weights[name])
    if config.model.arch == "gpt":
        hf.save(directory, made, tokenizer)
        return
    ids = {"cls_token_id": tokenizer.bos_id, "sep_token_id": tokenizer.eos_id, "mask_token_id": tokenizer.mask_id}
    hf.save(directory, made, tokenizer, card=_card(model), about=ids)


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
