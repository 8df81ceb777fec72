"""The sandbox in which chat templates run: they come with tokenizers, so they are others' code.

What Hugging Face's templates may use is here too: loop controls, `raise_exception`, `tojson`
without HTML escapes, and the tag `{% generation %}`.
"""

import functools
import json
import re
from collections.abc import Callable, ItemsView, Iterable, KeysView, ValuesView
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.filters
import jinja2.sandbox

GENERATION_MARKS = ("generation_opens", "generation_closes")
# What one step may make: its caller can stop a template between two lines, but not within one.
MAX_SIZE, _MAX_BITS = 1 << 24, 4096
# Parts of a value that is written, compared or given to a function, at all its levels.
MAX_PARTS = 1 << 17
# What of texts and numbers can be called: of these none makes much of little, but for those that
# are checked below.
_METHODS = frozenset({
    "capitalize", "casefold", "count", "endswith", "find", "format", "index", "isalnum", "isalpha",
    "isdigit", "islower", "isspace", "isupper", "join", "lower", "lstrip", "partition",
    "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip",
    "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper",
})  # fmt: skip
_CONTAINERS = (list, tuple, dict, KeysView, ValuesView, ItemsView)
_NOT_FILTERS = (
    "batch", "center", "pprint", "round", "slice", "urlize", "wordwrap", "xmlattr",
)  # fmt: skip


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: its inside, between two variables that only we ever define."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [
            jinja2.nodes.Output([jinja2.nodes.Name(name, "load")], lineno=line)
            for name in GENERATION_MARKS
        ]
        return [marks[0], jinja2.nodes.Scope(body, lineno=line), marks[1]]


class _Namespace(jinja2.utils.Namespace):
    """Python calls names like `__html__` itself, outside of the sandbox: none may be stored."""

    def __init__(*args, **kwargs):  # without a named self, so that `namespace(self=1)` works
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name, value):
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message):
    raise jinja2.TemplateError(str(message))


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own escapes HTML, which templates that print tools do not expect.
    _check_size(_size(indent) if isinstance(indent, str) else (indent or 0) << 12)
    text = json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
    _check_size(len(text))
    return text


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise jinja2.exceptions.SecurityError(f"it would make something of {size} parts")


def _checked(value: Any) -> Any:
    """The value, if little enough is in it: of two lists that hold one list twice each, and so on,
    it takes but 40 lines to make one that nobody can write or compare."""
    waiting, parts, chars = [value], 0, 0
    while waiting:
        one = waiting.pop()
        if isinstance(one, jinja2.utils.Namespace):
            one = one._Namespace__attrs
        if isinstance(one, str):
            chars += len(one)
            _check_size(chars)
        elif isinstance(one, _CONTAINERS):
            parts += len(one)
            if parts > MAX_PARTS:
                raise jinja2.exceptions.SecurityError(f"it would make something of {parts} parts")
            waiting += one
            waiting += one.values() if isinstance(one, dict) else ()
    return value


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _check_formatted(text: str, values: Iterable[Any]) -> None:
    """Refuses widths, those of five digits and those that come as values, and long results."""
    largest = max((len(str(value)) for value in values), default=0)
    _check_size(len(text) + (text.count("%") + text.count("{")) * largest)
    widths = re.search(r"\d{5}|\*|\{[^{}]*\{", text)
    if widths:
        raise jinja2.exceptions.SecurityError(f"a format cannot hold {widths[0]!r}")


def _check_replaced(text: Any, old: Any, new: Any) -> None:
    _check_size(len(str(text)) + str(text).count(str(old)) * len(str(new)))


def _joined(parts: Iterable[Any]) -> str:
    texts = [str(_checked(part)) for part in parts]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


class _Code(jinja2.compiler.CodeGenerator):
    """`a ~ b` is an operation of the environment's like all others."""

    def visit_Concat(self, node, frame):
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def _visit_checked(self, node, frame):
        self.write("environment.checked(")
        self.visit(node, frame)
        self.write(")")

    def visit_Compare(self, node, frame):
        self.write("(")
        self._visit_checked(node.expr, frame)
        for operand in node.ops:
            self.visit(operand, frame)
        self.write(")")

    def visit_Operand(self, node, frame):
        self.write(f" {jinja2.compiler.operators[node.op]} ")
        self._visit_checked(node.expr, frame)

    def visit_Dict(self, node, frame):
        self.write("{")
        for pair in node.items:
            self._visit_checked(pair.key, frame)  # it is hashed
            self.write(": ")
            self.visit(pair.value, frame)
            self.write(", ")
        self.write("}")


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    code_generator_class = _Code
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    # Jinja's own joins what a block made.
    concat = staticmethod(_joined)
    checked = staticmethod(_checked)

    def getitem(self, obj, argument):
        return super().getitem(obj, _checked(argument))

    def is_safe_attribute(self, obj, attr, value) -> bool:
        plain = isinstance(obj, str | bytes | bytearray | int | float)
        return (not plain or attr in _METHODS) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value):
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None

        def checked(*args, **kwargs):
            _check_formatted(value.__self__, [*args, *kwargs.values()])
            return formatted(*args, **kwargs)

        return checked

    def call_binop(self, context, operator, left, right):
        sizes = _size(left), _size(right)
        numbers = [x for x in (left, right) if isinstance(x, int)]
        bits = sum(abs(x).bit_length() for x in numbers)
        if operator == "+":
            _check_size(sum(sizes))
        elif operator == "*" and any(sizes):
            _check_size(max(sizes) * max(numbers, default=0))
        elif operator == "%" and isinstance(left, str):
            _check_formatted(left, _checked(right if isinstance(right, tuple) else [right]))
        elif operator == "**" and len(numbers) == 2:
            bits = abs(left).bit_length() * abs(right)
        if operator in ("*", "**") and bits > _MAX_BITS:
            raise jinja2.exceptions.SecurityError("it would make too large a number")
        return super().call_binop(context, operator, left, right)

    def call(self, context, obj, *args, **kwargs):
        _checked((args, kwargs))
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str) and name == "replace":
            _check_replaced(owner, *args[:2])
        elif isinstance(owner, str) and name == "join" and args:
            args = ([*args[0]], *args[1:])
            _check_size(sum(map(_size, args[0])) + len(owner) * len(args[0]))
        return super().call(context, obj, *args, **kwargs)


def _string(value) -> str:
    return _joined([value])


def _format(text, *values, **named):
    _check_formatted(str(text), [*values, *named.values()])
    return jinja2.filters.do_format(text, *values, **named)


@jinja2.pass_eval_context
def _replace(eval_context, text, old, new, count=None):
    _check_replaced(text, old, new)
    return jinja2.filters.do_replace(eval_context, text, old, new, count)


@jinja2.pass_eval_context
def _join(eval_context, value, d="", attribute=None):
    parts = _checked(list(value))
    _check_size(sum(map(_size, parts)) + len(str(d)) * len(parts))
    return jinja2.filters.sync_do_join(eval_context, parts, d, attribute)


def _indent(text, width=4, first=False, blank=False):
    step = len(width) if isinstance(width, str) else int(width)
    _check_size(len(str(text)) + (str(text).count("\n") + 1) * step)
    return jinja2.filters.do_indent(text, width, first, blank)


@jinja2.pass_environment
def _sum(environment, value, attribute=None, start=0):
    if not isinstance(start, int | float):
        raise jinja2.exceptions.SecurityError("sum adds numbers alone")
    return jinja2.filters.sync_do_sum(environment, value, attribute, start)


def _with_checked(function: Callable) -> Callable:
    """A filter or a test that looks at its arguments first."""

    @functools.wraps(function)
    def checked(*args, **kwargs):
        _checked((args, kwargs))
        return function(*args, **kwargs)

    return checked


@functools.cache
def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_checked,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters |= {
        "tojson": _to_json, "format": _format, "replace": _replace, "join": _join,
        "indent": _indent, "string": _string, "sum": _sum,
    }  # fmt: skip
    for name in _NOT_FILTERS:
        del environment.filters[name]
    for table in (environment.filters, environment.tests):
        table |= {name: _with_checked(function) for name, function in table.items()}
    del environment.globals["lipsum"]
    environment.globals |= {"raise_exception": _raise_exception, "namespace": _Namespace}
    return environment


@functools.lru_cache(maxsize=64)
def compile_template(source: str) -> jinja2.Template:
    """A template that can read what it is given and nothing else, nor change it.

    Raises:
      jinja2.TemplateSyntaxError: it is no Jinja.
    """
    return _environment().from_string(source)


@functools.lru_cache(maxsize=64)
def block_tags(source: str) -> frozenset[str]:
    """Names of all block tags in a template."""
    tokens = list(_environment().lex(source))
    tags, inside = set(), False
    for _, kind, value in tokens:
        if inside and kind == "name":
            tags.add(value)
        inside = kind == "block_begin" or (inside and kind == "whitespace")
    return frozenset(tags)
