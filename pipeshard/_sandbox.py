"""A Jinja environment for templates that come from files of strangers: nothing can be reached or changed from it
(Jinja's immutable sandbox), and no template can use more than a bounded amount of time or memory.

How the bound works: every way of spending time or memory is charged to the render's `Meter` *before* it is spent.
Operators and calls pass through the sandbox's own hooks. What has no hook (loops, `~`, comparisons, literals, output,
slices) is given one: the syntax tree is rewritten, before it becomes code, so that those nodes run through the filters
`ps_*` below. Filters and tests are wrapped where they are registered. Sizes are measured as they would be written out,
shared parts counted each time, so that a value built from two copies of itself forty times over is caught where it is
built or used, not where it fills the memory. Limits grow with the size of the caller's own variables.

Not here: which template, which variables, what an error means (chat.py).
Threads: one environment serves any number of threads; the meter in use is a context variable.
"""

from __future__ import annotations

import json
import re
from collections.abc import (
    Callable,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    ValuesView,
)
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from itertools import islice
from types import BuiltinMethodType, MethodType
from typing import Any, NoReturn

import jinja2.ext
from jinja2 import Environment, TemplateError, nodes, pass_context, pass_environment
from jinja2.exceptions import FilterArgumentError, SecurityError
from jinja2.filters import do_indent, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

__all__ = ["RaisedByTemplate", "RunawayTemplate", "make_environment", "render"]

MAX_SOURCE_CHARS = 1 << 18
# Steps are about as long as it takes to look at one item of a list; what costs a call of ours costs more of them.
_BASE_STEPS = 16_000_000  # two seconds or so; real templates take thousands
_CALL_STEPS = 8
_BASE_CHARS = 1 << 21
_MAX_NODES = 1_000_000
_MAX_DEPTH = 500
_MAX_BITS = 4096  # of an integer
_MAX_PAD = 4096  # width or precision in a format


class RunawayTemplate(Exception):
    """The template wants more time or memory than any conversation needs."""


class RaisedByTemplate(TemplateError):
    """The template called raise_exception: it says that the messages are not what it takes."""


class Meter:
    """What one render may still spend, and how large values are."""

    def __init__(self, variables: Mapping[str, Any]) -> None:
        self.steps = _BASE_STEPS
        self.max_chars = _BASE_CHARS
        self.created = 1 << 62
        # Sizes of values already measured, by identity; the values are kept, or another could get the identity.
        self._sizes: dict[int, tuple[object, int, int]] = {}
        self._n_kept, self._max_kept = 0, 1 << 40
        self.max_nodes = 1 << 40
        n_nodes, n_chars = self.measure(dict(variables))
        self.max_nodes = _MAX_NODES + 8 * n_nodes
        self._max_kept = self._n_kept + _MAX_NODES // 8
        self.max_chars = _BASE_CHARS + 8 * n_chars
        self.created = 32 * self.max_chars
        self.steps = _BASE_STEPS + 256 * n_nodes + 2 * n_chars

    def step(self, count: int = _CALL_STEPS) -> None:
        self.steps -= count
        if self.steps < 0:
            raise RunawayTemplate("it runs for too many steps")

    def chars(self, count: int) -> None:
        """A text of `count` characters is about to exist."""
        if count > self.max_chars:
            raise RunawayTemplate(f"it builds a text of {count} characters")
        self.created -= count
        if self.created < 0:
            raise RunawayTemplate("it builds too much text")

    def nodes(self, count: int) -> None:
        """A list of `count` items is about to exist."""
        if count > self.max_nodes:
            raise RunawayTemplate(f"it builds a list of {count} items")
        self.step(count >> 3)

    def bits(self, count: int) -> None:
        if count > _MAX_BITS:
            raise RunawayTemplate(f"it computes an integer of {count} bits")

    def measure(self, value: object) -> tuple[int, int]:
        """Nodes and characters of a value as if it were written out; what is new to the meter costs steps."""
        if isinstance(value, str):
            return 1, len(value)
        if isinstance(value, range):
            return 1 + len(value), 0
        if not isinstance(value, _CONTAINERS):
            return 1, 0
        known = self._sizes.get(id(value))
        if known is not None and known[0] is value:
            return known[1], known[2]
        return self._measure_deep(value)

    def _measure_deep(self, root: object) -> tuple[int, int]:
        """Depth first without recursion; containers get their size once all their parts have one. A namespace can
        change, so its size, and that of all around it, is not kept."""
        total: list[list[int]] = [[0, 0, 0]]  # nodes, characters, whether a namespace is inside
        stack: list[tuple[object, Iterator[object]]] = [(None, iter([root]))]
        while stack:
            holder, parts = stack[-1]
            sums = total[-1]
            for part in parts:
                self.step(1)
                if isinstance(part, str):
                    sums[0] += 1
                    sums[1] += len(part)
                elif isinstance(part, range):
                    sums[0] += 1 + len(part)
                elif isinstance(part, _CONTAINERS):
                    known = self._sizes.get(id(part))
                    if known is None or known[0] is not part:
                        self.step(2 * _CALL_STEPS)
                        if len(stack) > _MAX_DEPTH:
                            raise RunawayTemplate("it nests values too deeply")
                        stack.append((part, iter(_parts(part))))
                        total.append([1, 0, int(isinstance(part, Namespace))])
                        break
                    sums[0] += known[1]
                    sums[1] += known[2]
                else:
                    sums[0] += 1
                if sums[0] > self.max_nodes or sums[1] > self.max_chars << 8:
                    raise RunawayTemplate("it builds a value that is too large")
            else:
                stack.pop()
                done = total.pop()
                if not stack:
                    return done[0], done[1]
                n_items = len(holder) if isinstance(holder, (list, tuple, dict)) else 1
                if not done[2] and self._n_kept + n_items <= self._max_kept:
                    self._n_kept += n_items
                    self._sizes[id(holder)] = (holder, done[0], done[1])
                above = total[-1]
                above[0] += done[0]
                above[1] += done[1]
                above[2] |= done[2]
        raise AssertionError("unreachable")

    def use(self, value: object) -> tuple[int, int]:
        """Something walks through all of `value`: compares it, writes it, looks into it."""
        n_nodes, n_chars = self.measure(value)
        self.step(_CALL_STEPS + n_nodes + (n_chars >> 6))
        return n_nodes, n_chars

    def touch(self, value: object) -> None:
        """Something walks over the items of `value`, not into them."""
        if isinstance(value, str):
            self.step(_CALL_STEPS + (len(value) >> 6))
        elif isinstance(value, (list, tuple, dict, range)):
            self.step(_CALL_STEPS + 2 * len(value))
        else:
            self.step()

    def made(self, value: Any) -> Any:
        """`value` has just come to be; passes it on."""
        if isinstance(value, str):
            self.chars(len(value))
        elif isinstance(value, bool):
            pass
        elif isinstance(value, int):
            self.bits(value.bit_length())
        elif isinstance(value, _CONTAINERS):
            if isinstance(value, (list, tuple, dict)):
                self.step(3 * len(value))  # its items may all be new
            _, n_chars = self.measure(value)
            if n_chars > self.max_chars:
                raise RunawayTemplate(f"it builds a value with {n_chars} characters")
        return value


_VIEWS = (KeysView, ValuesView, ItemsView)
_CONTAINERS = (list, tuple, dict, Namespace, *_VIEWS)


def _parts(value: Any) -> Iterable[object]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, Namespace):
        # The one place where a namespace keeps its values; its own attribute access hides it.
        return list(object.__getattribute__(value, "_Namespace__attrs").values())
    return value  # type: ignore[no-any-return]


_meter: ContextVar[Meter] = ContextVar("pipeshard_template_meter")


# ---- hooks that the rewritten syntax tree calls ----


@pass_context
def _tick(context: Context, value: Any) -> Any:
    _meter.get().step()
    return value


@pass_context
def _emit(context: Context, n_chars: int) -> str:
    """The template's own text between expressions; in a loop it adds up like any other output."""
    meter = _meter.get()
    meter.step()
    meter.chars(n_chars)
    return ""


@pass_context
def _out(context: Context, value: Any) -> Any:
    meter = _meter.get()
    meter.chars(meter.use(value)[1])
    return value


@pass_context
def _concat(context: Context, parts: list[Any]) -> str:
    meter = _meter.get()
    meter.chars(sum(meter.use(part)[1] for part in parts))
    return "".join(map(str, parts))


@pass_context
def _see(context: Context, value: Any) -> Any:
    meter = _meter.get()
    _, n_chars = meter.use(value)
    meter.step(n_chars >> 4)  # it may be searched for another text, character by character
    return value


@pass_context
def _touch(context: Context, value: Any) -> Any:
    _meter.get().touch(value)
    return value


@pass_context
def _literal(context: Context, value: Any) -> Any:
    meter = _meter.get()
    meter.step()
    return meter.made(value)


_HOOKS: dict[str, Callable[..., Any]] = {
    "ps_tick": _tick,
    "ps_emit": _emit,
    "ps_out": _out,
    "ps_concat": _concat,
    "ps_see": _see,
    "ps_touch": _touch,
    "ps_literal": _literal,
}


def _hook(name: str, value: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)


class _Rewriter(NodeTransformer):
    """Puts a hook on every node that costs and that the sandbox does not intercept."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        line = node.lineno
        node.body.insert(0, nodes.ExprStmt(_hook("ps_tick", nodes.Const(0)), lineno=line))
        if node.test is not None:
            tick = _hook("ps_tick", nodes.Const(True))
            node.test = nodes.And(tick, node.test, lineno=line)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        texts = [part for part in node.nodes if isinstance(part, nodes.TemplateData)]
        parts = [
            part if isinstance(part, nodes.TemplateData) else _hook("ps_out", part)
            for part in node.nodes
        ]
        n_chars = sum(len(text.data) for text in texts)
        node.nodes = [_hook("ps_emit", nodes.Const(n_chars)), *parts]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _hook("ps_concat", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _unless_const("ps_see", node.expr)
        for operand in node.ops:
            operand.expr = _unless_const("ps_see", operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _hook("ps_touch", node.node)
        return node

    def _visit_items(self, node: nodes.List | nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node, nodes.Tuple) and node.ctx != "load":
            return node
        if all(isinstance(item, nodes.Const) for item in node.items):
            return node  # no larger than the template's own text
        return _hook("ps_literal", node)

    visit_List = visit_Tuple = _visit_items

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        for pair in node.items:
            pair.key = _unless_const("ps_see", pair.key)
        return _hook("ps_literal", node)


def _unless_const(name: str, expr: nodes.Expr) -> nodes.Expr:
    return expr if isinstance(expr, nodes.Const) else _hook(name, expr)


# ---- operators ----

_CONVERSION = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|[0-9]+)?(?:\.(\*|[0-9]+)?)?")
_NESTED_KEY = re.compile(
    r"%\([^)]*\("
)  # a key that _CONVERSION would read otherwise than Python does


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _check_operator(meter: Meter, operator: str, left: Any, right: Any) -> None:
    """Refuses, before it is done, what would not fit; what fits is checked as a result."""
    meter.step()
    sized = (str, list, tuple)
    if operator == "*":
        for one, other in ((left, right), (right, left)):
            if isinstance(one, sized) and isinstance(other, int):
                (meter.chars if isinstance(one, str) else meter.nodes)(len(one) * max(other, 0))
        meter.bits(_bits(left) + _bits(right))
    elif operator == "**":
        if isinstance(left, int) and isinstance(right, int):
            meter.bits(_bits(left) * abs(right))
    elif operator == "+":
        if isinstance(left, str) and isinstance(right, str):
            meter.chars(len(left) + len(right))
        elif isinstance(left, sized) and isinstance(right, sized):
            meter.nodes(len(left) + len(right))
    elif operator == "%" and isinstance(left, str):
        _check_percent(meter, left, right)


def _check_percent(meter: Meter, text: str, values: Any) -> None:
    conversions = list(_CONVERSION.finditer(text))
    widths = [width for match in conversions for width in match.groups() if width]
    if _NESTED_KEY.search(text) or any(_too_wide(width) for width in widths):
        raise RunawayTemplate("it formats to an enormous width")
    n_nodes, n_chars = meter.use(values)
    once = 8 * n_chars + 64 * n_nodes  # repr() may write up to eight characters for one
    if isinstance(values, dict):
        once *= len(conversions)  # a key may be used any number of times
    meter.step(_CALL_STEPS * len(conversions))
    if len(text) + once + _MAX_PAD * len(widths) > meter.max_chars << 4:
        raise RunawayTemplate("it formats an enormous text")


def _too_wide(width: str) -> bool:
    return width == "*" or len(width) > 4 or int(width) > _MAX_PAD


class _Formatter(SandboxedFormatter):
    """str.format with bounded widths and a bounded result."""

    def format_field(self, value: Any, format_spec: str) -> str:
        meter = _meter.get()
        meter.use(value)
        if any(_too_wide(width) for width in re.findall("[0-9]+", format_spec)):
            raise RunawayTemplate("it formats to an enormous width")
        text: str = super().format_field(value, format_spec)
        meter.chars(len(text))
        return text

    def convert_field(self, value: Any, conversion: Any) -> Any:
        meter = _meter.get()
        meter.chars(meter.use(value)[1])
        return super().convert_field(value, conversion)


# ---- methods of strings and containers ----


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SAFE_METHODS: tuple[tuple[type | tuple[type, ...], frozenset[str]], ...] = (
    (
        str,
        _words(
            "capitalize casefold center count endswith expandtabs find format format_map index"
            " isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable"
            " isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix"
            " replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith"
            " strip swapcase title upper zfill"
        ),
    ),
    (dict, _words("copy get items keys values")),
    ((list, tuple, range), _words("copy count index")),
    ((int, float), _words("bit_length is_integer")),
)


def _check_method(meter: Meter, owner: Any, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Charges a method call on a value; returns the arguments, materialised where they were a stream."""
    if not any(isinstance(owner, types) and name in names for types, names in _SAFE_METHODS):
        raise SecurityError(f"{type(owner).__name__}.{name} is not for templates")
    if isinstance(owner, str) or name in ("copy", "count", "index"):
        meter.touch(owner)
    if not isinstance(owner, str):
        return args
    first = args[0] if args else None
    if name in ("center", "ljust", "rjust", "zfill"):
        meter.chars(max(len(owner), _int(first)))
    elif name == "expandtabs":
        meter.chars(len(owner) * max(8, _int(first)))
    elif name == "replace" and len(args) >= 2 and all(isinstance(a, str) for a in args[:2]):
        old, new = args[:2]
        limit = _int(args[2]) if len(args) > 2 else -1
        count = owner.count(old) if limit < 0 else min(owner.count(old), limit)
        meter.chars(len(owner) + count * max(0, len(new) - len(old)))
    elif name == "join" and args:
        items = list(islice(args[0], meter.max_nodes + 1))
        meter.chars(meter.use(items)[1] + len(owner) * len(items))
        return (items, *args[1:])
    return args


def _int(value: Any) -> int:
    return value if isinstance(value, int) else 0


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        rewritten = _Rewriter().visit(source)
        rewritten.set_environment(self)
        return super()._generate(rewritten, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = _meter.get()
        _check_operator(meter, operator, left, right)
        return meter.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = _meter.get()
        meter.step()
        # A macro only receives its arguments; a method may compare, hash or write them.
        charge = meter.touch if isinstance(__obj, (Macro, LoopContext)) else meter.use
        for value in (*args, *kwargs.values()):
            charge(value)
        if isinstance(__obj, (BuiltinMethodType, MethodType)):
            owner = __obj.__self__
            if isinstance(owner, (str, bytes, int, float, list, tuple, dict, range)):
                args = _check_method(meter, owner, __obj.__name__, args)
        return meter.made(super().call(__context, __obj, *args, **kwargs))

    def getitem(self, obj: Any, argument: Any) -> Any:
        if not isinstance(argument, (str, int)):
            _meter.get().use(argument)  # a tuple as key is hashed as a whole
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if not isinstance(value, (BuiltinMethodType, MethodType)):
            return None
        text, is_map = value.__self__, value.__name__ == "format_map"
        if not isinstance(text, str) or value.__name__ not in ("format", "format_map"):
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            if is_map:
                (kwargs,), args = args, ()
            return _Formatter(self).vformat(text, args, kwargs)

        return bounded


# ---- filters, tests, globals ----


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant wrote, for training; rendering just goes through it."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it without ClassVar

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(indent, (int, str)) and (indent if isinstance(indent, int) else len(indent)) > 64:
        raise RunawayTemplate("it indents to an enormous width")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None and separators is None:
        return encoder.encode(value)
    meter, pieces = _meter.get(), []
    for piece in encoder.iterencode(value):  # indentation multiplies: count as it comes
        meter.chars(len(piece))
        pieces.append(piece)
    return "".join(pieces)


def _raise_exception(message: Any = "") -> NoReturn:
    raise RaisedByTemplate(str(message))


def _range(*args: Any) -> range:
    numbers = range(*args)
    try:
        _meter.get().nodes(len(numbers))
    except OverflowError:  # more than len() can say
        raise RunawayTemplate("it counts without end") from None
    return numbers


def _strftime_now(format: str) -> str:
    if len(format) > 256:
        raise RunawayTemplate("it asks for an enormous date")
    return datetime.now().strftime(format)


class _Dict:
    """`dict(...)` and `dict.fromkeys(...)` without the class and its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Jinja's namespace without room for Python's own attributes."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # Written like Jinja's, so that a template may use `self` as a name.
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


@pass_environment
def _join(
    environment: Environment, value: Any, d: str = "", attribute: str | int | None = None
) -> str:
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    meter, items, between = _meter.get(), list(value), str(d)
    meter.chars(meter.use(items)[1] + len(between) * len(items))
    return between.join(map(str, items))


def _replace(s: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, before, after = str(s), str(old), str(new)
    _check_method(_meter.get(), text, "replace", (before, after, -1 if count is None else count))
    return text.replace(before, after, -1 if count is None else count)


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise FilterArgumentError("can't handle positional and keyword arguments at the same time")
    text = str(value)
    _check_percent(_meter.get(), text, kwargs or args)
    return text % (kwargs or args)


def _indent(s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = str(s)
    n_lines = len(text.splitlines()) + 1
    _meter.get().chars(len(text) + n_lines * (width if isinstance(width, int) else len(width)))
    return do_indent(text, width, first, blank)


# Not for chat templates, and not bounded by the size of what they get.
_NO_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
# Filters that only walk over what they get; all others may write or compare every part of it.
_SHALLOW_FILTERS = _words(
    "abs attr batch count d default first float int items last length list map random reject"
    " rejectattr reverse round select selectattr slice sum"
)
# Where a number among the arguments becomes a size.
_SIZED_FILTERS = _words("batch center indent round slice truncate")
_COMPARING_TESTS = _words(
    "!= < <= == > >= eq equalto ge greaterthan gt in le lessthan lower lt ne upper"
)


def _guard_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    shallow, sized = name in _SHALLOW_FILTERS, name in _SIZED_FILTERS

    @wraps(function)  # keeps what the filter wants as its first argument
    def guarded(*args: Any, **kwargs: Any) -> Any:
        meter = _meter.get()
        meter.step()
        if not shallow:
            args = tuple(_settle(meter, value) for value in args)
        for value in (*args, *kwargs.values()):
            if shallow:
                meter.touch(value)
            else:
                meter.step(_CALL_STEPS * meter.use(value)[0])  # ours or Jinja's code for each item
            if sized and isinstance(value, int) and abs(value) > _MAX_PAD:
                raise RunawayTemplate(f"it calls the filter {name!r} with {value}")
        if name == "sum" and not isinstance(kwargs.get("start", 0), (int, float)):
            raise SecurityError("the filter 'sum' adds numbers only")
        return meter.made(function(*args, **kwargs))

    return guarded


def _settle(meter: Meter, value: Any) -> Any:
    """A stream becomes a list, so that it can be measured before it is used."""
    if not isinstance(value, Iterator):
        return value
    items = list(islice(value, meter.max_nodes + 1))
    meter.nodes(len(items))
    return items


def _guard_test(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        meter = _meter.get()
        for value in args:
            meter.use(value)
        return function(*args, **kwargs)

    return guarded


def make_environment() -> ImmutableSandboxedEnvironment:
    """The environment that `transformers` renders chat templates in, with a meter on everything."""
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # constants would be folded at compile time, where no meter runs
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    for name in _NO_FILTERS:
        environment.filters.pop(name)
    environment.filters |= {
        "tojson": _tojson,
        "join": _join,
        "replace": _replace,
        "format": _format,
        "indent": _indent,
    }
    for name, function in list(environment.filters.items()):
        environment.filters[name] = _guard_filter(name, function)
    environment.filters.update(_HOOKS)
    for name in _COMPARING_TESTS:
        test: Any = environment.tests[name]  # typed as a bare function object
        environment.tests[name] = _guard_test(test)
    environment.globals.pop("lipsum")
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "range": _range,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The template's text. Raises what the template raises, or RunawayTemplate."""
    meter = Meter(variables)
    token = _meter.set(meter)
    try:
        pieces: list[str] = []
        n_chars = 0
        for piece in template.root_render_func(template.new_context(dict(variables))):
            n_chars += len(piece)
            if n_chars > meter.max_chars:
                raise RunawayTemplate("its text is too long")
            pieces.append(piece)
        return "".join(pieces)
    finally:
        _meter.reset(token)
