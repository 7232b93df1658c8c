"""Chats: messages as a model's template writes them into one text."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tfcli.errors import UserError, unknown
from tfcli.text.tokenizers.codec import Codec

if TYPE_CHECKING:
    import jinja2

Message = dict[str, Any]
"""{"role", "content"}, both texts; further keys are for templates that know them."""
ROLES = ("system", "user", "assistant", "tool")
LONGEST_TEMPLATE = 1 << 18
LONGEST_TEXT = 1 << 26
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The template of models that have none of their own (OpenAI's ChatML)."""


class ChatTemplate:
    """A compiled chat template, for any number of chats. UserError for one that is not Jinja."""

    def __init__(self, source: str) -> None:
        from tfcli.text.chat.template import Sandbox

        if len(source) > LONGEST_TEMPLATE:
            raise UserError(f"the chat template has {len(source)} characters, at most {LONGEST_TEMPLATE} are read")
        self.source = source
        self._sandbox = Sandbox()
        self._template = self._compile()

    def _compile(self) -> jinja2.Template:
        import jinja2

        try:
            return self._sandbox.template(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"the chat template is not Jinja: line {error.lineno}: {error.message}", hint="give another template"
            ) from None
        except (jinja2.TemplateError, RecursionError, MemoryError, SyntaxError, ValueError) as error:
            raise UserError(f"the chat template cannot be compiled: {_said(error)}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        bos_token: str | None = None,
        eos_token: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a chat, for ``Codec.encode_special``.

        ``add_generation_prompt`` ends it where the assistant speaks next; ``extra`` are further variables, such as
        "tools". Raises UserError where the template fails, refuses the messages, leaves its sandbox or builds too much.
        """
        from tfcli.text.chat.template import PER_CHARACTER, WORK, Budget, TooMuchError

        variables: dict[str, Any] = {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **{key: token for key, token in (("bos_token", bos_token), ("eos_token", eos_token)) if token is not None},
            **(extra or {}),
        }
        weight = Budget(LONGEST_TEXT)
        try:
            variables = {name: _plain(value) for name, value in variables.items()}
            weight.weigh(variables)
        except RecursionError:
            raise UserError("the messages are nested too deeply") from None
        except TooMuchError:
            raise UserError(f"the chat has more than {LONGEST_TEXT} characters") from None
        self._sandbox.budget = Budget(WORK + PER_CHARACTER * (LONGEST_TEXT - weight.left))
        return self._render(variables)

    def _render(self, variables: dict[str, Any]) -> str:
        import jinja2
        from jinja2.exceptions import SecurityError

        from tfcli.text.chat.template import RefusedError, TooMuchError

        try:
            return self._template.render(variables)
        except RefusedError as error:
            raise UserError(f"the chat template refuses these messages: {_said(error)}") from None
        except SecurityError as error:
            raise UserError(f"the chat template tries to leave its sandbox: {_said(error)}") from None
        except (TooMuchError, OverflowError, MemoryError):
            raise UserError(
                "the chat template builds too much, or loops too often", hint="it may be hostile: look at it"
            ) from None
        except jinja2.UndefinedError as error:
            raise UserError(f"the chat template asks for what the messages do not have: {_said(error)}") from None
        except Exception as error:  # whatever a template makes Python raise
            raise UserError(f"the chat template failed: {_said(error)}") from None


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    bos_token: str | None = None,
    eos_token: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> str:
    """The text of one chat by ``template``; as ``ChatTemplate.render``."""
    return ChatTemplate(template).render(
        messages, add_generation_prompt=add_generation_prompt, bos_token=bos_token, eos_token=eos_token, extra=extra
    )


def template_of(codec: Codec) -> ChatTemplate:
    """The compiled template that came with a tokenizer; UserError where there is none."""
    if codec.chat_template is None:
        raise UserError(
            f"{codec.name} has no chat template", hint="the model continues text: give it a prompt instead of messages"
        )
    return ChatTemplate(codec.chat_template)


def with_template(codec: Codec, template: str) -> Codec:
    """The same tokenizer with another chat template."""
    from tfcli.text.tokenizers.json import JsonTokenizer

    if isinstance(codec, JsonTokenizer):
        roles = dataclasses.replace(codec.roles, chat_template=template)
        return JsonTokenizer(codec.text, name=codec.name, roles=roles)
    made = copy.copy(codec)
    made.chat_template = template  # type: ignore[misc]
    return made


def prompt_ids(
    codec: Codec,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    extra: Mapping[str, Any] | None = None,
) -> list[int]:
    """The ids of a chat as transformers' ``apply_chat_template`` gives them: the template writes all special pieces."""
    text = template.render(
        messages,
        add_generation_prompt=add_generation_prompt,
        bos_token=None if codec.bos_id is None else codec.piece(codec.bos_id),
        eos_token=codec.piece(codec.eos_id),
        extra=extra,
    )
    return codec.encode_special(text)


def read_messages(value: Any) -> list[Message]:
    """The messages of parsed JSON: a list of {"role", "content"}, or an object that has one as "messages".

    Raises UserError that says which message is wrong, and how.
    """
    if isinstance(value, dict) and "messages" in value:
        value = value["messages"]
    if not isinstance(value, list) or not value:
        raise UserError(
            "messages must be a list that is not empty", hint='such as [{"role": "user", "content": "Hello"}]'
        )
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise UserError(f"message {number} is not an object", hint='expected {"role": ..., "content": ...}')
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                said = f"has the {key} {str(message[key])[:40]!r}" if key in message else f"has no {key}"
                raise UserError(f"message {number} {said}", hint=f"{key} must be a text")
        if message["role"] not in ROLES:
            error = unknown("role", message["role"][:40], ROLES)
            raise UserError(f"message {number}: {error.message}", hint=error.hint)
    return [dict(message) for message in value]


def _plain(value: Any) -> Any:
    """JSON's types and no others: what a template may touch."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, str):
        return str.__str__(value)
    raise UserError(f"a {type(value).__name__} cannot be given to a chat template", hint="give JSON's types")


def _said(error: BaseException) -> str:
    text = str(getattr(error, "message", None) or error) or type(error).__name__
    return " ".join(text.split())[:300]
