"""Chat templates: transformers says what they give; what is hostile or broken is refused, soon and in little memory."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import chat_templates
import pytest
from foreign import write

from tfcli.errors import UserError
from tfcli.formats.hf.tokenizers import load_tokenizer
from tfcli.text.chat import messages as chat
from tfcli.text.chat.messages import CHATML, ChatTemplate, prompt_ids, read_messages, template_of
from tfcli.text.chat.template import Budget, Sandbox

TEMPLATES = {
    "smollm2": chat_templates.SMOLLM2, "chatml": CHATML, "llama2": chat_templates.LLAMA2,
    "llama3": chat_templates.LLAMA3, "gemma": chat_templates.GEMMA, "mistral": chat_templates.MISTRAL,
    "thinking": chat_templates.THINKING,
}  # fmt: skip
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": ["<é&'>"]}}}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi"}],
    [
        {"role": "system", "content": " Be brief. é中 "},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "<think>\nx\n</think>\n\nb <|im_end|>"},
        {"role": "user", "content": " c \n"},
    ],
    [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    [{"role": "assistant", "content": ""}],
    [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "42"},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": 'does <x> & "y" – 中', "parameters": {}}}]
SETTINGS: dict[str, dict[str, Any]] = {"plain": {}, "tools": {"tools": TOOLS}, "flag": {"enable_thinking": False}}


def render(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return ChatTemplate(template).render(messages, **options)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_texts_are_transformers(name: str, setting: str) -> None:
    """Catches white space, escapes, filters, loops and refusals that are not as in apply_chat_template."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template, extra = ChatTemplate(TEMPLATES[name]), SETTINGS[setting]
    for messages in CHATS:
        for add in (True, False):
            try:
                ((expected,), _) = render_jinja_template(
                    [messages], chat_template=TEMPLATES[name], add_generation_prompt=add, bos_token="<s>",
                    eos_token="</s>", **extra,
                )  # fmt: skip
            except Exception as error:
                with pytest.raises(UserError, match="refuses these messages: ") as caught:
                    template.render(messages, add_generation_prompt=add, bos_token="<s>", eos_token="</s>", extra=extra)
                assert caught.value.message.endswith(str(error))
                continue
            assert expected == template.render(
                messages, add_generation_prompt=add, bos_token="<s>", eos_token="</s>", extra=extra
            )


@pytest.mark.parametrize("name", ["smollm", "qwen"])
def test_ids_are_transformers(name: str, tmp_path: Path) -> None:
    """From messages to ids: special pieces of the template are found, nothing is added."""
    from transformers import PreTrainedTokenizerFast

    directory = write(tmp_path, name, chat_template=chat_templates.SMOLLM2)
    ours, theirs = load_tokenizer(directory), PreTrainedTokenizerFast.from_pretrained(directory)
    template = template_of(ours)
    for messages in CHATS:
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert prompt_ids(ours, template, messages) == expected
    without = prompt_ids(ours, template, CHATS[0], add_generation_prompt=False)
    assert without == theirs.apply_chat_template(CHATS[0], return_dict=False)
    assert without[-2:] == [*ours.encode_special("<|im_end|>"), *ours.encode("\n")]


def test_a_model_without_a_template(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no chat template"):
        template_of(load_tokenizer(write(tmp_path, "gpt2")))


LEAVES = {
    "class": "{{ ''.__class__ }}",
    "mro": "{{ ''.__class__.__mro__ }}",
    "by name": "{{ messages['__class__'] }}",
    "by filter": "{{ ''|attr('__class__') }}",
    "by map": "{{ messages|map(attribute='__class__')|list }}",
    "by format": "{{ '{0.__class__}'.format('') }}",
    "function": "{{ raise_exception.__globals__ }}",
    "cycler": "{{ cycler.__init__.__globals__ }}",
    "self": "{{ self.__init__ }}",
    "context": "{{ self._TemplateReference__context }}",
    "loop": "{% for a in [1] %}{{ loop.__class__ }}{% endfor %}",
    "append": "{{ messages.append(1) }}",
    "through a type": "{{ dict.update(messages[0], {'role': 1}) }}",
    "bytes": "{{ (1).to_bytes(999999999, 'big') }}",
    "namespace": "{% set ns = namespace(__class__=1) %}",
}


@pytest.mark.parametrize("template", LEAVES.values(), ids=LEAVES)
def test_leaving_the_sandbox(template: str) -> None:
    with pytest.raises(UserError, match="tries to leave its sandbox"):
        render(template, CHATS[0])


DOUBLES = "{%% set ns = namespace(x=%s) %%}{%% for i in range(99) %%}{%% set ns.x = %s %%}{%% endfor %%}{{ ns.x }}"
BOMBS = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "text times number": "{{ 'a' * 10**9 }}",
    "number times text": "{{ 10**9 * 'a' }}",
    "list times number": "{{ ([1] * 10**9)|length }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "squares": DOUBLES % ("3", "ns.x * ns.x"),
    "wide %": "{{ '%999999999d' % 1 }}",
    "wide % from elsewhere": "{{ '%*d' % (999999999, 1) }}",
    "wide format": "{{ '{:>999999999}'.format(1) }}",
    "wide format from elsewhere": "{{ '{:{}}'.format(1, 999999999) }}",
    "wide format filter": "{{ '%999999999d'|format(1) }}",
    "wide text": "{{ 'a'.ljust(999999999) }}",
    "indent": "{{ 'a\nb'|indent(999999999) }}",
    "indent by a text": "{{ ('a\n' * 9999)|indent('x' * 99999) }}",
    "JSON indent": "{{ [1]|tojson(indent=999999999) }}",
    "batch": "{{ [1]|batch(999999999, 'x')|list|length }}",
    "doubling by ~": DOUBLES % ("'aaaa'", "ns.x ~ ns.x"),
    "doubling by +": DOUBLES % ("'aaaa'", "ns.x + ns.x"),
    "doubling lists": DOUBLES % ("['a']", "ns.x + ns.x"),
    "a million laughs": DOUBLES % ("['lol']", "[ns.x, ns.x]"),
    "laughs in objects": DOUBLES % ("['lol']", "{'a': ns.x, 'b': ns.x}"),
    "replace": "{% set x = 'a' * 99999 %}{{ x.replace('a', x) }}",
    "replace filter": "{% set x = 'a' * 99999 %}{{ x|replace('a', x) }}",
    "join": "{% set x = 'a' * 99999 %}{{ x.join(x) }}",
    "join filter": "{{ (['a' * 99999] * 99999)|join }}",
    "sum": "{{ ([[1] * 99] * 99)|sum(start=[]) }}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1, 2, 3, 4]) if loop.depth < 99 }}{% endfor %}",
    "much text": "{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}",
    "much text caught": "{% set x %}{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}{% endset %}",
    "slices": "{% set x = 'a' * 999999 %}{% for i in range(99999) %}{% set y = x[1:] %}{% endfor %}",
    "searches": "{% set x = 'a' * 999999 %}{% for i in range(99999) %}{% set y = 'b' in x %}{% endfor %}",
    "date": "{{ strftime_now('%9999999d') }}",
}


@pytest.mark.parametrize("template", BOMBS.values(), ids=BOMBS)
def test_building_too_much(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hundredth of the usual budget, for speed; each would take hours or all memory."""
    import tfcli.text.chat.template

    monkeypatch.setattr(tfcli.text.chat.template, "WORK", tfcli.text.chat.template.WORK // 100)
    with pytest.raises(UserError, match="builds too much, or loops too often"):
        render(template, CHATS[0])


def test_every_thread_has_a_budget_of_its_own() -> None:
    """Catches a chat that spends, or renews, the budget of another one."""
    sandbox = Sandbox()
    sandbox.budget = Budget(5)
    other = threading.Thread(target=setattr, args=(sandbox, "budget", Budget(7)))
    other.start()
    other.join()
    assert sandbox.budget.left == 5


def test_what_a_long_chat_may_take() -> None:
    """The budget grows with the messages: a book of them passes in every template."""
    messages = [{"role": ("user", "assistant")[index % 2], "content": "word " * 400} for index in range(1001)]
    for name, template in TEMPLATES.items():
        assert len(render(template, messages, bos_token="", eos_token="")) > 2_000_000, name


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "is not Jinja: line 1: Expected an expression"),
        ("a\n{{ 1|magic }}", "is not Jinja: line 2: No filter named 'magic'"),
        ("{% if x %}", "is not Jinja: line 1"),
        ("{{ raise_exception('no\nsystem') }}", "refuses these messages: no system"),
        ("{{ a.b }}", "what the messages do not have: 'a' is undefined"),
        ("{{ messages[0].content.x.y }}", "what the messages do not have"),
        ("{{ 1 / 0 }}", "failed: division by zero"),
        ("{{ 1 + 'a' }}", "failed: unsupported operand"),
        ("{% include 'secret' %}", "failed: no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed: maximum recursion depth"),
        ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "cannot be compiled"),
        ("{{ " + "(" * 3000 + ")" * 3000 + " }}", "chat template"),
        ("x" * (1 << 18) + "x", "at most 262144"),
    ],
)
def test_a_template_that_does_not_work(template: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        render(template, CHATS[0])
    assert message in caught.value.message


def test_values_that_a_template_may_not_have() -> None:
    """Objects with methods are refused, and so are endlessly nested values."""
    with pytest.raises(UserError, match="Path cannot be given"):
        render("{{ x }}", CHATS[0], extra={"x": Path("a")})
    nested: list[Any] = []
    nested.append(nested)
    with pytest.raises(UserError, match="nested too deeply"):
        render("{{ x }}", CHATS[0], extra={"x": nested})


def test_a_chat_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "LONGEST_TEXT", 1000)
    with pytest.raises(UserError, match="more than 1000 characters"):
        render(CHATML, [{"role": "user", "content": "x" * 1000}])


def test_messages_are_read() -> None:
    for messages in CHATS:
        assert read_messages(messages) == messages == read_messages({"messages": messages})
    copy = read_messages(CHATS[0])
    copy[0]["role"] = "x"
    assert CHATS[0][0]["role"] == "user"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "a list that is not empty"),
        ("hi", "a list that is not empty"),
        ({"role": "user", "content": "x"}, "a list that is not empty"),
        ([{"role": "user", "content": "x"}, "y"], "message 2 is not an object"),
        ([{"content": "x"}], "message 1 has no role"),
        ([{"role": "user"}], "message 1 has no content"),
        ([{"role": "user", "content": None}], "message 1 has the content 'None'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "content must be a text"),
        ([{"role": 3, "content": "x"}], "message 1 has the role '3'"),
        ([{"role": "asistant", "content": "x"}], "did you mean 'assistant'?"),
    ],
)
def test_messages_that_are_wrong(value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_messages(json.loads(json.dumps(value)))
    assert message in str(caught.value)
