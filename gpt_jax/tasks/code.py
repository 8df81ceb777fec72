"""Python code: the next line of a fragment, and a function's body by its docstring.

Row:        {"prompt": 'def double(x):\\n    "Twice x."\\n', "body": "    return 2 * x\\n"}
Formatted:  prompt 'def double(x):\\n    "Twice x."', target "\\n    return 2 * x"
Prediction: "\\n    return x + x"
Score:      {"exact_match": 0.0, "parse_rate": 1.0}; where tests may run, pass@1 is added

The line end belongs to the target: tokenizers join it with the indentation behind it, so a prompt
that ended with it would be a text such as the model has never seen.
"""

import ast
import codeop
import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence

from gpt_jax.data.hashing import unit_hash
from gpt_jax.tasks import metrics
from gpt_jax.tasks.contract import Formatted, Scores, Task, text_field
from gpt_jax.tasks.data_spec import DataSpec

# What begins behind the end of a function (arXiv:2107.03374).
_END_OF_FUNCTION = ("\ndef ", "\nclass ", "\n@", "\n#", "\nif ", "\nprint(", '\n"""', "\nimport ")


def format_body(row: dict, *, body: str = "body") -> Formatted:
    """All of a function behind its docstring; `body` is the field's name."""
    prompt, answer = text_field(row, "prompt").rstrip(), text_field(row, body).rstrip()
    tests = ""
    if "test" in row:
        tests = f"\n\n{text_field(row, 'test')}\ncheck({text_field(row, 'entry_point')})\n"
    return Formatted(prompt, "\n" + answer.strip("\n"), tests=tests, keep_end=True)


def format_line(row: dict) -> Formatted:
    """One line of a function's body; which one is a hash of the function."""
    whole = format_body(row)
    lines = whole.target.split("\n")[1:]
    numbers = [i for i, line in enumerate(lines) if line.strip()]
    cut = numbers[int(unit_hash(whole.prompt + whole.target) * len(numbers))]
    prompt = "\n".join([whole.prompt, *lines[:cut]]).rstrip()
    return Formatted(prompt, "\n" + lines[cut].rstrip(), keep_end=True, open_end=True)


def first_line(text: str) -> str:
    """The first line that is not blank."""
    return next((line.rstrip() for line in text.split("\n") if line.strip()), "")


def parses(source: str) -> bool:
    """Whether it is Python."""
    return _is_accepted(ast.parse, source)


def may_continue(source: str) -> bool:
    """Whether it is the beginning of some Python."""
    return _is_accepted(codeop.CommandCompiler(), source, "<fragment>", "exec")


def _is_accepted(parse: Callable, *arguments) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            parse(*arguments)
        except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
            return False
    return True


def score(
    predictions: Sequence[str],
    formatted: Sequence[Formatted],
    *,
    answer: Callable[[str], str],
    check: Callable[[str], bool],
) -> Scores:
    """Shares of answers that are the target, and that are Python behind the prompt.

    `answer` gives the part of a text that counts, `check` says whether that and the prompt parse.
    """
    answers = [answer(text) for text in predictions]
    targets = [(answer(f.target),) for f in formatted]
    # No answer at all is not Python: it becomes something that no parser takes.
    sources = [f"{f.prompt}\n{a or '?'}" for f, a in zip(formatted, answers, strict=True)]
    return {
        "exact_match": metrics.exact_match(answers, targets),
        "parse_rate": metrics.mean(map(check, sources)),
    }


def program(formatted: Formatted, answer: str) -> str:
    """The function and its tests."""
    return formatted.prompt + answer + formatted.tests


_LINE = Task(
    name="complete_line",
    data=DataSpec("python_functions"),
    format=format_line,
    score=functools.partial(score, answer=first_line, check=may_continue),
    metric="exact_match",
    is_share=True,
    max_tokens=48,
    stop=(),
)
_BODY = dataclasses.replace(
    _LINE,
    name="body_from_docstring",
    format=format_body,
    score=functools.partial(score, answer=lambda text: text.strip("\n").rstrip(), check=parses),
    max_tokens=256,
    stop=_END_OF_FUNCTION,
)
_HUMAN_EVAL = dataclasses.replace(
    _BODY,
    name="human_eval",
    data=DataSpec("human_eval"),
    format=functools.partial(format_body, body="canonical_solution"),
    program=program,
)

TASKS = (_LINE, _BODY, _HUMAN_EVAL)


def from_file(name: str, path: str) -> Task:
    """A task of one's own rows."""
    return dataclasses.replace(_BODY, name=name, data=DataSpec(path))
