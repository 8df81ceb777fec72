"""Prompts of Python for the measure of next lines: whole lines of one function, and the next one.

Which prompts are taken depends on the texts and on the room alone, not on the model.
"""

import ast
import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Sequence

from gpt_jax.data.hashing import unit_hash
from gpt_jax.tasks.code import parses

# Bytes of prompt and line together: what every model with 256 tokens of context can read, whatever
# its tokenizer, so that models are asked the same.
ROOM = 256
_PROMPT_SHARE, _LINE_SHARE = 5 / 8, 1 / 4
# Lines of at most so many characters (without indentation) are of this difficulty.
DIFFICULTIES = {"short": 15, "medium": 30, "long": ROOM}


@dataclasses.dataclass(frozen=True)
class LinePrompt:
    """A function up to one of its lines.

    Attributes:
      prompt: Its header and what follows, whole lines, without the last line end.
      line: The next line, with its indentation, without a line end.
    """

    prompt: str
    line: str

    @property
    def difficulty(self) -> str:
        """By the length of the line: a key of DIFFICULTIES."""
        size = len(self.line.strip())
        return next(name for name, most in DIFFICULTIES.items() if size <= most)


def line_prompts(texts: Iterable[str | None], number: int, room: int = ROOM) -> list[LinePrompt]:
    """At most `number` prompts, one a function, of functions chosen by a hash of them.

    Args:
      texts: Documents; those that are no Python module are passed over.
      number: How many.
      room: Bytes of a prompt and its line.
    """
    candidates = {c for text in texts if text for c in _candidates(text, min(room, ROOM))}
    chosen = []
    for one in sorted(candidates, key=lambda c: unit_hash(f"{c.prompt}\0{c.line}")):
        if len(chosen) == number:
            break
        # What the parse rate asks of a model must hold of the true line.
        if is_statement(one.prompt, f"\n{one.line}\n"):
            chosen.append(one)
    return chosen


def written_line(text: str) -> str | None:
    """A continuation up to its first line end behind something written; None: it has none."""
    start = len(text) - len(text.lstrip())
    end = text.find("\n", start)
    return None if start == len(text) or end < 0 else text[: end + 1]


def is_statement(prompt: str, continuation: str) -> bool:
    """Whether the next line of a continuation is Python where it stands.

    The first line of a compound statement (`if x:`) counts; a comment or no whole line does not.
    """
    line = written_line(continuation)
    if line is None or line.strip().startswith("#"):
        return False
    source = prompt + line
    if parses(source):
        return True
    header = line.strip("\n")
    if not header.endswith(":"):
        return False
    indent = " " * (len(header) - len(header.lstrip()))
    body = f"{source}{indent}    pass\n"
    return parses(body) or parses(f"{body}{indent}finally:\n{indent}    pass\n")


def _candidates(text: str, room: int) -> Iterator[LinePrompt]:
    """For each function of a module one of its lines, by a hash of the function."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return
    lines = text.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        own = _dedented(lines[node.lineno - 1 : node.end_lineno], node.col_offset)
        if own is None:
            continue
        found = [
            LinePrompt("\n".join(own[:cut]).rstrip(), own[cut].rstrip())
            for cut in _cuts(node, len(own))
        ]
        fitting = [c for c in found if _fits(c, room)]
        if fitting:
            yield fitting[int(unit_hash("\n".join(own)) * len(fitting))]


def _cuts(node: ast.FunctionDef | ast.AsyncFunctionDef, size: int) -> list[int]:
    """Lines of the function, counted from its header, on which a statement of its body begins."""
    first = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    inner = (part for part in first for part in ast.walk(part))
    starts = {part.lineno - node.lineno for part in inner if isinstance(part, ast.stmt)}
    return sorted(cut for cut in starts if 0 < cut < size)


def _dedented(lines: Sequence[str], columns: int) -> list[str] | None:
    """None where a line begins before the function does (in a text of several lines), or by tabs.

    Without a carriage return, which a model may or may not have been taught.
    """
    lines = [line.rstrip("\r") for line in lines]
    if any("\t" in line or line[:columns].strip() for line in lines):
        return None
    return [line[columns:] for line in lines]


def _fits(one: LinePrompt, room: int) -> bool:
    sizes = len(one.prompt.encode()), len(one.line.encode())
    return sizes[0] <= _PROMPT_SHARE * room and 0 < sizes[1] <= _LINE_SHARE * room
