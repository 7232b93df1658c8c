"""Chat messages, and their rendering by a model's chat template."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tfcli.errors import UserError, unknown
from tfcli.text.tokenizers.codec import Codec

Message = dict[str, Any]
"""{"role", "content"}, both strings; further keys are for templates that use them."""
ROLES = ("system", "user", "assistant", "tool")
LONGEST_TEMPLATE = 1 << 18
LONGEST_TEXT = 1 << 26
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""OpenAI's ChatML, the template of models that have none of their own."""


class ChatTemplate:
    """A compiled chat template, for any number of chats. Raises UserError for one that is not Jinja."""

    def __init__(self, source: str) -> None:
        import jinja2

        from tfcli.text.chat.template import Sandbox

        if len(source) > LONGEST_TEMPLATE:
            raise UserError(f"the chat template has {len(source)} characters, at most {LONGEST_TEMPLATE} are read")
        self.source = source
        self._sandbox = Sandbox()
        try:
            self._template = self._sandbox.template(source)
        except jinja2.TemplateSyntaxError as error:
            message = f"the chat template is not Jinja: line {error.lineno}: {error.message}"
            raise UserError(message, hint="give another template") from None
        except (jinja2.TemplateError, RecursionError, MemoryError, SyntaxError, ValueError) as error:
            raise UserError(f"the chat template cannot be compiled: {_message(error)}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        bos_token: str | None = None,
        eos_token: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """Render a chat as text for ``Codec.encode_special``.

        ``add_generation_prompt`` ends it where the assistant's answer begins; ``extra`` are further variables, such as
        "tools". Raises UserError if the template fails, refuses the messages, leaves its sandbox or builds too much.
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
            raise UserError(f"the chat template refuses these messages: {_message(error)}") from None
        except SecurityError as error:
            raise UserError(f"the chat template tries to leave its sandbox: {_message(error)}") from None
        except (TooMuchError, OverflowError, MemoryError):
            hint = "it may be hostile: look at it"
            raise UserError("the chat template builds too much, or loops too often", hint=hint) from None
        except jinja2.UndefinedError as error:
            raise UserError(f"the chat template asks for what the messages do not have: {_message(error)}") from None
        except Exception as error:  # whatever a template makes Python raise
            raise UserError(f"the chat template failed: {_message(error)}") from None


def template_of(codec: Codec) -> ChatTemplate:
    """Compile the template of a tokenizer. Raises UserError if it has none."""
    if codec.chat_template is None:
        hint = "the model continues text: give it a prompt instead of messages"
        raise UserError(f"{codec.name} has no chat template", hint=hint)
    return ChatTemplate(codec.chat_template)


def with_template(codec: Codec, template: str) -> Codec:
    """Return the same tokenizer with another chat template."""
    from tfcli.text.tokenizers.json import JsonTokenizer

    if isinstance(codec, JsonTokenizer):
        roles = dataclasses.replace(codec.roles, chat_template=template)
        return JsonTokenizer(codec.text, name=codec.name, roles=roles)
    changed = copy.copy(codec)
    changed.chat_template = template  # type: ignore[misc]
    return changed


def prompt_ids(
    codec: Codec,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    extra: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the ids of a chat as transformers' ``apply_chat_template``: the template adds all special pieces."""
    text = template.render(
        messages,
        add_generation_prompt=add_generation_prompt,
        bos_token=None if codec.bos_id is None else codec.piece(codec.bos_id),
        eos_token=codec.piece(codec.eos_id),
        extra=extra,
    )
    return codec.encode_special(text)


def read_messages(value: Any) -> list[Message]:
    """Read the messages of parsed JSON: a list of {"role", "content"}, or an object with one as "messages".

    Raises UserError that names the invalid message.
    """
    if isinstance(value, dict) and "messages" in value:
        value = value["messages"]
    if not isinstance(value, list) or not value:
        hint = 'such as [{"role": "user", "content": "Hello"}]'
        raise UserError("messages must be a list that is not empty", hint=hint)
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise UserError(f"message {number} is not an object", hint='expected {"role": ..., "content": ...}')
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                problem = f"has the {key} {str(message[key])[:40]!r}" if key in message else f"has no {key}"
                raise UserError(f"message {number} {problem}", hint=f"{key} must be a text")
        if message["role"] not in ROLES:
            error = unknown("role", message["role"][:40], ROLES)
            raise UserError(f"message {number}: {error.message}", hint=error.hint)
    return [dict(message) for message in value]


def _plain(value: Any) -> Any:
    """Convert a value to plain JSON types, the only ones that a template may see."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, str):
        return str.__str__(value)
    raise UserError(f"a {type(value).__name__} cannot be given to a chat template", hint="give JSON's types")


def _message(error: BaseException) -> str:
    text = str(getattr(error, "message", None) or error) or type(error).__name__
    return " ".join(text.split())[:300]
