"""Parsers of Python packages: their files, and their documented functions."""

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path

from gpt_jax.data.corpus_parsers_text import clean, decode
from gpt_jax.data.corpus_rows import Row

# Tests repeat what they test; locales and migrations repeat one another; parsers are generated.
_LEFT_OUT = {"tests", "test", "testing", "test-examples", "benchmarks", "locale", "migrations"}
_LEFT_OUT |= {"_antlr"}
_MIN_FILE, _MAX_FILE, _MAX_DIGITS = 200, 400_000, 0.3
_MIN_DOCSTRING, _MAX_PROMPT, _MAX_BODY = 20, 3000, 3000


def python_files(folder: Path) -> Iterator[Row]:
    """One file a row."""
    for path, text in _sources(folder):
        yield Row({"path": path, "text": text}, path)


def python_functions(folder: Path) -> Iterator[Row]:
    """Documented functions and methods: what a caller reads, and the code below it."""
    for path, text in _sources(folder):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in strings of theirs
            tree = ast.parse(text)
        lines = text.splitlines(keepends=True)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                parts = _split_function(node, lines)
                if parts:
                    fields = {"prompt": parts[0], "body": parts[1], "path": path, "name": node.name}
                    yield Row(fields, path)


def _sources(folder: Path) -> Iterator[tuple[str, str]]:
    """(path in the package, text) of the Python files that are no tests."""
    for file in sorted(folder.rglob("*.py")):
        path = file.relative_to(folder)
        is_test = path.name.startswith("test_") or path.name == "conftest.py"
        if is_test or _LEFT_OUT & set(path.parts):
            continue
        text = clean(decode(file)) + "\n"
        is_table = sum(map(str.isdigit, text)) > _MAX_DIGITS * len(text)
        if _MIN_FILE <= len(text) <= _MAX_FILE and not is_table:
            yield path.as_posix(), text


def _split_function(node, lines: list[str]) -> tuple[str, str] | None:
    """Signature with docstring, and body, both moved to the left; None for what teaches little."""
    docstring = ast.get_docstring(node, clean=True)
    if not docstring or len(docstring) < _MIN_DOCSTRING or len(node.body) < 2:
        return None
    first, last = node.body[0], node.body[1]
    if first.end_lineno >= last.lineno or _is_stub(node.body[1:]):
        return None
    prompt = _dedent(lines[node.lineno - 1 : first.end_lineno], node.col_offset)
    body = _dedent(lines[first.end_lineno : node.end_lineno], node.col_offset).strip("\n") + "\n"
    if len(prompt) > _MAX_PROMPT or len(body) > _MAX_BODY:
        return None
    return (prompt, body) if _is_same(node, prompt + body) else None


def _is_stub(body: list) -> bool:
    """Whether all it does is pass, raise or give a constant."""
    node = body[0]
    constant = isinstance(node, ast.Return | ast.Expr) and (
        node.value is None or isinstance(node.value, ast.Constant)
    )
    return len(body) == 1 and (constant or isinstance(node, ast.Pass | ast.Raise))


def _dedent(lines: list[str], columns: int) -> str:
    indent = " " * columns
    return "".join(line.removeprefix(indent) for line in lines)


def _is_same(node, source: str) -> bool:
    """Whether the moved source still says the same: a string over several lines may not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            (moved,) = ast.parse(source).body
        except (SyntaxError, ValueError):
            return False
    if not isinstance(moved, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    return [ast.dump(part) for part in moved.body[1:]] == [ast.dump(part) for part in node.body[1:]]
