"""Next-token prediction: a decoder that continues text (Radford et al. 2018)."""

from __future__ import annotations

from pathlib import Path

from tfcli.config.model import ModelConfig
from tfcli.config.options import PretrainConfig
from tfcli.objectives.base import Objective
from tfcli.runtime import Runtime
from tfcli.tasks.lm.task import LanguageModeling
from tfcli.text.corpus.prepare import Corpus


class Gpt(Objective):
    """--arch gpt."""

    name = "gpt"
    called = "a GPT"

    def task(self, config: PretrainConfig, shape: ModelConfig, corpus: Corpus, runtime: Runtime) -> LanguageModeling:
        """Language modeling."""
        return LanguageModeling(
            train=corpus.train, val=corpus.val, tokenizer=corpus.tokenizer, context=shape.context, runtime=runtime
        )

    def next_step(self, directory: Path) -> str:
        """A continuation of a prompt."""
        return f'tfcli generate --model {directory} --prompt "..."'


OBJECTIVE = Gpt()
