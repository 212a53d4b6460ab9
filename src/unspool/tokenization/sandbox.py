"""Chat templates come with a checkpoint and are not trusted: a Jinja that can only make text, and only so much.

On top of Jinja's immutable sandbox (no attribute that begins with an underscore, no method that changes its object),
each rendering has a budget: steps (turns of loops, calls, filters), seconds, characters written, and the size of every
string, list and number made. Far above what a chat needs, and low enough that a hostile template ends in an error.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
import jinja2.visitor
from jinja2 import nodes
from jinja2.exceptions import SecurityError

__all__ = ["ChatEnvironment", "budget", "compile_template"]

MAX_STEPS = 1_000_000
MAX_SECONDS = 10.0
MAX_CHARACTERS = 1 << 27  # written in all, what goes into macros and blocks included
MAX_SIZE = 1 << 24  # characters of a string, items of a list
MAX_BITS = 4096  # of a number
MAX_WIDTH = 10_000  # a width handed to one of `_WIDENING` or to a format

# Filters and methods that make something as long as a number they are given.
_WIDENING = frozenset(
    {"center", "ljust", "rjust", "zfill", "expandtabs", "do_center", "do_indent", "do_batch", "do_slice"}
)
_WIDENING |= {"format", "format_map", "do_format", "_to_json"}

_WIDE = re.compile(r"%[^a-zA-Z%]*(\*|\d{5})|\{[^{}]*:[^{}]*(\{|\d{5})")


class RunawayTemplate(jinja2.TemplateRuntimeError):
    """A template took more steps, time or space than rendering a chat can need."""


@dataclass(slots=True)
class _Budget:
    """What is left of one rendering."""

    steps: int = MAX_STEPS
    characters: int = MAX_CHARACTERS
    deadline: float = field(default_factory=lambda: time.monotonic() + MAX_SECONDS)

    def spend(self, steps: int = 1) -> None:
        """Take steps; raise when they, or the time, are used up."""
        self.steps -= steps
        if self.steps < 0:
            raise RunawayTemplate(f"it takes more than {MAX_STEPS:,} steps")
        if time.monotonic() > self.deadline:
            raise RunawayTemplate(f"it takes longer than {MAX_SECONDS:g} seconds")

    def write(self, characters: int) -> None:
        """Take characters of output; raise when they are used up."""
        self.characters -= characters
        if self.characters < 0:
            raise RunawayTemplate(f"it writes more than {MAX_CHARACTERS:,} characters")


_budget: ContextVar[_Budget] = ContextVar("unspool_template_budget")


@contextmanager
def budget() -> Iterator[None]:
    """Render templates inside this: it gives them a fresh budget."""
    token = _budget.set(_Budget())
    try:
        yield
    finally:
        _budget.reset(token)


def _sized(value: Any) -> Any:
    """`value`, refused if it is absurdly large."""
    if isinstance(value, str | list | tuple | dict) and len(value) > MAX_SIZE:
        raise RunawayTemplate(f"it makes a {type(value).__name__} of more than {MAX_SIZE:,} elements")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise RunawayTemplate(f"it makes a number of more than {MAX_BITS:,} bits")
    return value


def _check_call(function: Any, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse what would make something huge out of small arguments.

    Args:
        function: the filter or method.
        value: what it is applied to.
        args: its other arguments, positional.
        kwargs: and by name.
    """
    name = getattr(function, "__name__", "")
    if name in _WIDENING:
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, int) and abs(argument) > MAX_WIDTH and name not in ("format", "do_format"):
                raise RunawayTemplate(f"it passes {argument} to {name!r}; {MAX_WIDTH:,} is the most")
    if name in ("format", "format_map", "do_format"):
        _check_format(value)
    if name in ("replace", "do_replace") and len(args) >= 2:
        old, new = str(args[0]), str(args[1])
        if str(value).count(old) * len(new) > MAX_SIZE:
            raise RunawayTemplate(f"it makes a string of more than {MAX_SIZE:,} characters")


def _check_format(text: Any) -> None:
    """Refuse a format with a width that is large, or taken from an argument."""
    if not isinstance(text, str):
        return
    if _WIDE.search(text):
        raise RunawayTemplate(f"it formats with a width that is not plainly below {MAX_WIDTH:,}")


def _guarded(filter_: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that spends the budget: a step, and one more for each item it is given."""

    @functools.wraps(filter_)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        # The environment or context comes first where the filter asks for it; the value follows.
        first = 1 if hasattr(filter_, "jinja_pass_arg") else 0
        value = args[first]
        _budget.get().spend(1 + (len(value) if isinstance(value, list | tuple | dict) else 0))
        _check_call(filter_, value, args[first + 1 :], kwargs)
        return _sized(filter_(*args, **kwargs))

    return guarded


def _tick(characters: int) -> bool:
    """A turn of a loop whose body has so many characters of text."""
    left = _budget.get()
    left.spend()
    left.write(characters)
    return True


def _written(value: Any) -> str:
    """What `{{ value }}` prints."""
    text = value if isinstance(value, str) else str(value)
    _budget.get().write(len(text))
    return text


def _concat(parts: list[Any]) -> str:
    _budget.get().spend()
    texts = [str(part) for part in parts]
    if sum(map(len, texts)) > MAX_SIZE:
        raise RunawayTemplate(f"it makes a string of more than {MAX_SIZE:,} characters")
    return "".join(texts)


class _Meter(jinja2.visitor.NodeTransformer):
    """Rewrites a template so that every turn of a loop and every joining of strings spends the budget."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        """Tick in the body (a recursive loop shares it) and before the `if` of the loop."""
        self.generic_visit(node)
        size = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        node.body.insert(0, nodes.ExprStmt(_filter("_tick", nodes.Const(size), node.lineno), lineno=node.lineno))
        if node.test is not None:
            tick = _filter("_tick", nodes.Const(0), node.lineno)
            node.test = nodes.And(tick, node.test, lineno=node.lineno)
        return node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.AssignBlock:
        """`{% set name %} … {% endset %}`."""
        self.generic_visit(node)
        node.filter = nodes.Filter(node.filter, "_sized", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        """`a ~ b`."""
        self.generic_visit(node)
        return _filter("_concat", nodes.List(node.nodes, lineno=node.lineno), node.lineno)


def _filter(name: str, value: nodes.Expr, line: int) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=line)


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`: marks an assistant's words for training; here it prints its body."""

    tags = {"generation"}  # noqa: RUF012 - the interface of Jinja's extensions

    def parse(self, parser: Any) -> list[nodes.Node]:
        """Return the nodes of the body."""
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


class ChatEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment chat templates are written for, sandboxed and metered.

    Besides Jinja's own: `raise_exception(message)`, `strftime_now(format)`, a `tojson` that does not escape HTML,
    `break` and `continue`, and the `generation` block.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing runs before there is a budget
            finalize=_written,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        self.filters["tojson"] = _to_json
        self.filters = {name: _guarded(filter_) for name, filter_ in self.filters.items()}
        self.filters |= {"_tick": _tick, "_concat": _concat, "_sized": _sized}
        del self.globals["lipsum"]  # text without end, and no chat needs it
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _make_dict,
            "namespace": _Namespace,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        metered: nodes.Template = _Meter().visit(template)
        return metered

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method from a template."""
        _budget.get().spend()
        _check_call(function, getattr(function, "__self__", None), args, kwargs)
        return _sized(super().call(context, function, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format`, which the sandbox replaces by its own."""
        safe = super().wrap_str_format(value)
        if safe is not None:
            _check_format(value.__self__)
        return safe

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right` unless the result would be absurdly large."""
        _budget.get().spend()
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and numbers and left.bit_length() * max(right, 0) > MAX_BITS:
            raise RunawayTemplate(f"it makes a number of more than {MAX_BITS:,} bits")
        if operator == "*" and not numbers:
            sizes = [value if isinstance(value, int) else len(value) for value in (left, right) if not _is_float(value)]
            if len(sizes) == 2 and sizes[0] * sizes[1] > MAX_SIZE:
                raise RunawayTemplate(f"it repeats something to more than {MAX_SIZE:,} elements")
        if operator == "%":
            _check_format(left)
        return _sized(super().call_binop(context, operator, left, right))


def _is_float(value: Any) -> bool:
    return not (isinstance(value, int) or hasattr(value, "__len__"))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    _check_format(format)
    return datetime.now().strftime(format)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)`, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=...)` works, as in Jinja
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace cannot have the attribute {name!r}")


@functools.lru_cache(maxsize=64)
def compile_template(text: str) -> jinja2.Template:
    """Compile a chat template; the last few are remembered.

    Raises:
        jinja2.TemplateError: the text is not a template.
    """
    return ChatEnvironment().from_string(text)
