"""Calls of tools in a model's text: <tool_call>{"name": ..., "arguments": {...}}</tool_call>.

That is the form of Hermes, which the templates of Qwen and others use. Whether a template uses it
is seen in its text; there is no other form yet.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

from gpt_jax.data.chat_template import ChatTemplate
from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.serve.message_schemas import Function

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Call(NamedTuple):
    """A call; the arguments are JSON in a string."""

    name: str
    arguments: str


def takes_tools(template: ChatTemplate, tokenizer: Tokenizer) -> bool:
    """Whether a model is told of tools, and writes calls that can be read in its text."""
    hidden = set(tokenizer.special_tokens)
    return OPEN in template.source and "tools" in template.source and not {OPEN, CLOSE} & hidden


def forced_grammar(functions: Sequence[Function]) -> str:
    """Lark's grammar of one call of one of the functions, with arguments as they are described."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": function.name}, "arguments": _arguments(function)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in functions
    ]
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    opens, closes = json.dumps(f"{OPEN}\n"), json.dumps(f"\n{CLOSE}")
    return f"start: {opens} call {closes}\ncall: %json {json.dumps(schema)}\n"


def _arguments(function: Function) -> dict | bool:
    return {"type": "object"} if function.parameters is None else function.parameters


class CallReader:
    """Takes calls out of a text that comes in pieces.

    What is no call of a known function stays text, as the model wrote it.
    """

    def __init__(self, names: Sequence[str], most: int | None = None):
        """
        Args:
          names: Functions that may be called.
          most: Calls beyond so many are dropped; None: all are kept.
        """
        self._names, self._most = set(names), most
        self._held = ""
        self._inside = False
        self.num_calls = 0

    def put(self, text: str, last: bool = False) -> tuple[str, list[Call]]:
        """Text and calls that are certain now; `last`: no more will come."""
        self._held += text
        shown, calls = "", []
        while True:
            mark = CLOSE if self._inside else OPEN
            before, found, behind = self._held.partition(mark)
            if not found:
                break
            self._held = behind
            if not self._inside:
                shown += before
            elif not self._take(before, calls):
                shown += OPEN + before + CLOSE
            self._inside = not self._inside
        if last and self._inside:
            # Some models end the text in place of the mark.
            if not self._take(self._held, calls):
                shown += OPEN + self._held
            self._held = ""
        elif not self._inside:
            kept = 0 if last else _begun(self._held, OPEN)
            shown += self._held[: len(self._held) - kept]
            self._held = self._held[len(self._held) - kept :]
        # Line ends between calls are of the format.
        return ("" if self.num_calls and not shown.strip() else shown), calls

    def _take(self, text: str, calls: list[Call]) -> bool:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return False
        known = isinstance(value, dict) and isinstance(value.get("name"), str)
        if not known or value["name"] not in self._names:
            return False
        arguments = value.get("arguments", value.get("parameters", {}))
        if not isinstance(arguments, dict):
            return False
        if self._most is None or self.num_calls < self._most:
            calls.append(Call(value["name"], json.dumps(arguments, ensure_ascii=False)))
            self.num_calls += 1
        return True


def _begun(text: str, mark: str) -> int:
    """Characters at the text's end with which the mark may begin."""
    sizes = range(min(len(mark) - 1, len(text)), 0, -1)
    return next((size for size in sizes if mark.startswith(text[-size:])), 0)
