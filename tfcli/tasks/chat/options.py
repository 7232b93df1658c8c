"""Settings of ``finetune --task chat``."""

from __future__ import annotations

from dataclasses import dataclass, field

from tfcli.tasks.common.options import DecoderTrain, FinetuneConfig, FinetuneData


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatData(FinetuneData):
    """Columns of tables, or fields of JSON rows."""

    messages_key: str | None = None
    """The turns of a conversation; left out: messages or conversations."""
    prompt_key: str | None = None
    """Or the prompt of a pair; left out: prompt, question, instruction or input."""
    response_key: str | None = None
    """And its response; left out: response, completion, answer or output."""

    @property
    def keys(self) -> dict[str, str | None]:
        """Columns by what they hold."""
        return {"prompt": self.prompt_key, "response": self.response_key, "messages": self.messages_key}


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatOptions:
    """The packing of conversations into rows."""

    pack: bool = True
    """Pack several conversations into a row, each with attention to itself alone; false: one per row, padded."""
    row: int | None = None
    """Tokens of a packed row; left out: 512, or the context where that is less."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatConfig(FinetuneConfig):
    """Everything that decides a run on conversations."""

    data: ChatData = field(default_factory=ChatData)
    train: DecoderTrain = field(default_factory=DecoderTrain)
    chat: ChatOptions = field(default_factory=ChatOptions)
