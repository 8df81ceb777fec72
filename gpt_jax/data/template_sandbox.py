"""The sandbox in which chat templates run: they come with tokenizers, so they are others' code.

What Hugging Face's templates may use is here too: loop controls, `raise_exception`, `tojson`
without HTML escapes, and the tag `{% generation %}`.
"""

import functools
import json

import jinja2
import jinja2.ext
import jinja2.sandbox

GENERATION_MARKS = ("generation_opens", "generation_closes")


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
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@functools.cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
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
