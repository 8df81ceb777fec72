"""Calls of tools are found in a text however it is cut; what is none stays text."""

import json

import pytest
from serve_fixtures import TOKENIZER, TOOL_TEMPLATE

from gpt_jax.data.chat_template import CHATML, ChatTemplate
from gpt_jax.data.tokenizers import byte_tokenizer
from gpt_jax.decode.constraints import grammar_constraint
from gpt_jax.serve.message_schemas import Function
from gpt_jax.serve.tool_calls import Call, CallReader, forced_grammar, takes_tools

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def read(pieces, names=("add", "sub"), most=None):
    """(all text, all calls)."""
    reader = CallReader(names, most)
    found = [reader.put(piece, last=i == len(pieces) - 1) for i, piece in enumerate(pieces)]
    calls = [call for _, called in found for call in called]
    assert reader.num_calls == len(calls)
    return "".join(text for text, _ in found), calls


@pytest.mark.parametrize(
    ("text", "shown", "calls"),
    [
        ("no call", "no call", 0),
        (f"so: {CALL}", "so: ", 1),
        (f"{CALL}\n{CALL}\n", "", 2),
        (CALL.removesuffix("</tool_call>"), "", 1),
        (CALL.replace("add", "mul"), CALL.replace("add", "mul"), 0),
        ("<tool_call>{]</tool_call>!", "<tool_call>{]</tool_call>!", 0),
        ('<tool_call>{"name": "add", "arguments": 3}</tool_call>',
         '<tool_call>{"name": "add", "arguments": 3}</tool_call>', 0),
        ("<tool_call>" + "[" * 5000, "<tool_call>" + "[" * 5000, 0),
        ("a <tool_cal", "a <tool_cal", 0),
        ("a </tool_call> b", "a </tool_call> b", 0),
        ('<tool_call>{"name": "sub"}</tool_call>', "", 1),
    ],
)  # fmt: skip
def test_calls_in_a_text(text, shown, calls):
    found = read([text])
    assert found[0] == shown and len(found[1]) == calls
    assert read(list(text)) == found
    for size in (2, 3, 7):
        assert read([text[i : i + size] for i in range(0, len(text), size)]) == found


def test_what_a_call_says():
    assert read([CALL])[1] == [Call("add", '{"a": 1}')]
    assert len(read([CALL + CALL], most=1)[1]) == 1


def test_which_templates_take_tools():
    assert takes_tools(TOOL_TEMPLATE, TOKENIZER)
    assert not takes_tools(CHATML, TOKENIZER)
    assert not takes_tools(ChatTemplate("{{ tools }}", "a"), TOKENIZER)
    assert not takes_tools(TOOL_TEMPLATE, byte_tokenizer(("<tool_call>",)))


def test_a_forced_call_fits_its_schema():
    numbers = {
        "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
        "additionalProperties": False,
    }  # fmt: skip
    functions = [Function(name="add", parameters=numbers), Function(name="now")]
    make = grammar_constraint(TOKENIZER, forced_grammar(functions))

    def accepts(text):
        constraint = make()
        for byte in text.encode():
            if not constraint.allowed()[byte]:
                return False
            constraint.accept(byte)
        return bool(constraint.allowed()[TOKENIZER.eos_id])

    def call(**value):
        return f"<tool_call>\n{json.dumps(value, separators=(',', ':'))}\n</tool_call>"

    assert accepts(call(name="add", arguments={"a": 12}))
    assert accepts(call(name="now", arguments={}))
    assert not accepts(call(name="add", arguments={}))
    assert not accepts(call(name="add", arguments={"a": "x"}))
    assert not accepts(call(name="mul", arguments={"a": 12}))
    assert not accepts("hello")
    assert read([call(name="add", arguments={"a": 12})])[1] == [Call("add", '{"a": 12}')]
