"""Jinja for chat templates, which come with a model's files and are not trusted.

The dialect is that of transformers (``apply_chat_template``): trimmed blocks, ``raise_exception``, ``strftime_now``,
``tojson`` without HTML escapes, ``break`` and ``continue``, ``{% generation %}``. The sandbox is Jinja's own immutable
one. The values that a template builds, its loops and its calls are also counted against a budget, since Jinja does not
bound ``'a' * 10**9`` or lists of lists of lists.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from types import GeneratorType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

WORK = 1 << 24
"""The budget of a template: a character that it builds costs 1, an entry ENTRY, a loop iteration or a call STEP."""
PER_CHARACTER = 64
"""The additional budget for each character of the messages."""
ENTRY, STEP = 4, 64
WIDEST = 1000
"""The most columns that a text may be padded to, and similar widths."""
LONGEST_INTEGER = 4096
"""Bits."""
STRING_METHODS = (
    "capitalize", "casefold", "center", "count", "endswith", "find", "format", "index", "isalnum", "isalpha",
    "isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "ljust",
    "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rjust",
    "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper",
    "zfill",
)  # fmt: skip
FILTERS_LEFT_OUT = (
    "center", "filesizeformat", "forceescape", "pprint", "random", "striptags", "urlencode", "urlize", "wordwrap",
    "xmlattr",
)  # fmt: skip
WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\*|\d{4})|\{[^{}]*(\{|\d{4})")
"""A format that pads to thousands of columns, or takes its width from an argument."""


class TooMuchError(Exception):
    """Raised when the budget is spent."""


class RefusedError(jinja2.TemplateError):
    """Raised when a template refuses its messages, by ``raise_exception``."""


class Budget:
    """The remaining work of a template. Raises TooMuchError when it is spent."""

    def __init__(self, work: int) -> None:
        self.left = work

    def spend(self, amount: int) -> None:
        self.left -= max(0, amount)
        if self.left < 0:
            raise TooMuchError

    def weigh(self, value: Any) -> Any:
        """Spend the size of a value with its contents; shared parts count each time, as they are printed each time."""
        waiting = [value]
        while waiting:
            part = waiting.pop()
            self.spend(ENTRY + size(part))
            if isinstance(part, Mapping):
                waiting.extend(part.keys())
                waiting.extend(part.values())
            elif isinstance(part, list | tuple | set | frozenset):
                waiting.extend(part)
        return value


def size(value: Any) -> int:
    """Return the characters, entries or machine words of a value, without its contents."""
    if isinstance(value, str | list | tuple | set | frozenset | range | Mapping):
        return len(value)
    return value.bit_length() // 64 if isinstance(value, int) else 0


class _Counted(NodeTransformer):
    """Routes everything that builds values or repeats statements through the environment's counters."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        super().generic_visit(node, *args, **kwargs)
        match node:
            case nodes.Concat():
                return _through("joined", *node.nodes)
            case nodes.List() | nodes.Dict() | nodes.Tuple(ctx="load") | nodes.Getitem(ctx="load", arg=nodes.Slice()):
                return _through("same", node)
            case nodes.Compare():
                node.expr = _through("same", node.expr)
            case nodes.Operand():
                node.expr = _through("same", node.expr)
            case nodes.For():
                node.iter = _through("turns", node.iter)
            case nodes.TemplateData():
                return nodes.Const(node.data, lineno=node.lineno)  # finalized like other values
        return node


def _through(name: str, *args: Any) -> nodes.Call:
    line = args[0].lineno
    return nodes.Call(nodes.EnvironmentAttribute(name, lineno=line), list(args), [], None, None, lineno=line)


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's text for training; here only its content is rendered."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(lineno)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


class _Names(Namespace):
    """A namespace that refuses names with a leading underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        names = dict(*args, **kwargs)
        for name in names:
            _check_name(name)
        Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja with a budget, which is set before each rendering; every thread has its own."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # compute nothing before it is counted
            extensions=[_Generation, loopcontrols],
            finalize=_shown,
        )
        self._of_thread = threading.local()
        for name in FILTERS_LEFT_OUT:
            del self.filters[name]
        self.filters["tojson"] = tojson
        self.filters = {name: self._counted(name, filter) for name, filter in self.filters.items()}
        del self.globals["lipsum"]
        self.globals |= {"namespace": _Names, "raise_exception": _raise, "strftime_now": _now}

    @property
    def budget(self) -> Budget:
        """The budget of this thread's rendering."""
        budget: Budget = self._of_thread.budget
        return budget

    @budget.setter
    def budget(self, budget: Budget) -> None:
        self._of_thread.budget = budget

    def template(self, source: str) -> jinja2.Template:
        """Compile a template; raises Jinja's errors for an invalid one."""
        tree = _Counted().visit(self.parse(source))
        return jinja2.Template.from_code(self, self.compile(tree, filename="<chat template>"), self.make_globals(None))

    # Called by the compiled template.

    def joined(self, *parts: Any) -> str:
        """Join the texts of ``a ~ b``."""
        return "".join(map(str, map(self.budget.weigh, parts)))

    def same(self, value: Any) -> Any:
        """Return a literal, a slice or a compared value, which ``call`` weighs."""
        return value

    def turns(self, values: Iterable[Any]) -> Iterator[Any]:
        """Yield the values of a loop."""
        for value in values:
            self.budget.spend(STEP)
            yield value

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Make and count a call."""
        self = __self
        self.budget.spend(STEP + sum(map(size, args)) + sum(map(size, kwargs.values())))
        method = getattr(__obj, "__wrapped__", __obj)  # str.format comes wrapped by Jinja
        if isinstance(text := getattr(method, "__self__", None), str):
            args = self._string_call(text, method.__name__, args)
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, GeneratorType):
            return result
        return self.budget.weigh(result)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute and count a binary operation."""
        self.budget.spend(STEP)
        if operator == "*":
            for text, count in ((left, right), (right, left)):
                if isinstance(count, int) and isinstance(text, str | list | tuple):
                    self.budget.spend(len(text) * count)
        if operator == "+" and not isinstance(left, int):
            self.budget.spend(size(left) + size(right))
        if operator == "%" and isinstance(left, str):
            _check_format(left)
            self.budget.spend(len(left))
            self.budget.weigh(right)
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > LONGEST_INTEGER:
                raise TooMuchError
        return self.budget.weigh(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return whether a template may see an attribute; of texts and numbers, only harmless methods."""
        if isinstance(obj, str):
            return attr in STRING_METHODS
        if isinstance(obj, int | float | bytes | type):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        """Raise at once what Jinja would raise when the value is used."""
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__}")

    def _string_call(self, text: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Check a string method before it runs; return its arguments, with a generator as a list."""
        if name in ("center", "ljust", "rjust", "zfill"):
            _check_width(*args)
        if name == "format":
            _check_format(text)
        if name == "replace":
            self._check_replace(text, *args)
        if name == "join" and args:
            args = (self._check_join(args[0], text),)
        self.budget.spend(len(text))
        return args

    def _check_replace(self, text: str, *args: Any) -> None:
        if len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
            self.budget.spend((len(text) // max(1, len(args[0])) + 1) * len(args[1]))

    def _check_join(self, values: Iterable[Any], between: str) -> list[Any]:
        listed = list(self.turns(values))
        self.budget.weigh(listed)
        self.budget.spend(len(listed) * len(between))
        return listed

    def _counted(self, name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a filter to count its work, keeping Jinja's marks on it (what it is passed first)."""
        skipped = 1 if hasattr(filter, "jinja_pass_arg") else 0

        @functools.wraps(filter)
        def counted(*args: Any, **kwargs: Any) -> Any:
            value, rest = args[skipped], (*args[skipped + 1 :], *kwargs.values())
            self.budget.spend(STEP + size(value) + sum(map(size, rest)))
            _check_width(*rest)
            if name == "format":
                _check_format(str(value))
            if name == "replace":
                self._check_replace(str(value), *rest)
            if name in ("indent", "tojson"):
                text = value.count("\n") if isinstance(value, str) else size(value)
                self.budget.spend((text + 1) * sum(arg if isinstance(arg, int) else size(arg) for arg in rest))
            if name == "join":
                between = next((arg for arg in rest if isinstance(arg, str)), "")
                args = (*args[:skipped], self._check_join(value, between), *args[skipped + 1 :])
            if name == "sum" and not all(isinstance(arg, int | float | str | None) for arg in rest):
                raise TooMuchError
            result = filter(*args, **kwargs)
            return self.turns(result) if isinstance(result, GeneratorType) else self.budget.weigh(result)

        return counted


@jinja2.pass_context
def _shown(context: Context, value: Any) -> Any:
    """Weigh a value before it is printed."""
    environment = context.environment
    assert isinstance(environment, Sandbox)
    return environment.budget.weigh(value)


def _check_width(*args: Any) -> None:
    if any(isinstance(arg, int) and abs(arg) > WIDEST for arg in args):
        raise TooMuchError


def _check_format(text: str) -> None:
    if WIDE_FORMAT.search(text):
        raise TooMuchError


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as transformers' templates write it, without HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: Any) -> None:
    raise RefusedError(str(message))


def _now(format: str) -> str:
    if len(format) > WIDEST or re.search(r"%[^a-zA-Z%]*\d{3}", format):
        raise TooMuchError
    return datetime.now().strftime(format)
