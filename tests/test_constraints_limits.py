"""Bad, hostile and unusable constraints: a clear refusal, never a crash, never other than JSON."""

import builtins
import json
import subprocess
import sys

import numpy as np
import pytest

from gpt_jax.data.tokenizers import byte_tokenizer
from gpt_jax.decode import constraints
from gpt_jax.decode.constraints import (
    grammar_constraint,
    json_schema_constraint,
    regex_constraint,
)

pytest.importorskip("llguidance")

BYTES = byte_tokenizer()


def chain(links):
    """A schema whose "$ref"s lead from one to the next."""
    definitions = {str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(links)}
    return {"$defs": definitions | {str(links): {"type": "integer"}}, "$ref": "#/$defs/0"}


def nested(levels):
    schema = {"type": "integer"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


BAD_SCHEMAS = {
    "list": ([], "a list is not a JSON schema"),
    "type": ({"type": "wat"}, "Invalid type: wat"),
    "unknown keyword": ({"type": "object", "unevaluatedProperties": False}, "Unimplemented keys"),
    "look-ahead": ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    "remote": ({"$ref": "http://localhost/x.json"}, "not present"),
    "file": ({"$ref": "file:///etc/passwd"}, "not present"),
    "itself": ({"$ref": "#"}, ""),
    "not json": ({"const": float("nan")}, "Out of range float"),
    "half a pair": ({"const": "\ud800"}, ""),
    "deep": (nested(100_000), "nested deeper than 64"),
    "a bit too deep": (nested(64), "nested deeper than 64"),
    "large": ({"enum": ["x" * 70_000]}, "characters; at most 65536"),
    "product": (
        {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(8)]}
                   for i in range(12)]}, "too large",
    ),
    "counting": ({"type": "string", "pattern": "^(a{1000}){1000}$"}, None),
    "huge length": ({"type": "string", "minLength": 10**9}, None),
    "huge list": ({"type": "array", "minItems": 10**9}, None),
    "many names": ({"properties": {f"p{i}": {} for i in range(3000)}}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SCHEMAS)
def test_bad_and_hostile_schemas(name):
    schema, message = BAD_SCHEMAS[name]
    if message is None:  # allowed or refused: no crash, and a text that goes on or ends
        try:
            constraint = json_schema_constraint(BYTES, schema)()
        except ValueError as error:
            assert str(error).startswith("json_schema: ")
            return
        for _ in range(5):
            allowed = np.flatnonzero(constraint.allowed())
            constraint.accept(allowed[-1])
        return
    with pytest.raises(ValueError, match=f"^json_schema: .*{message}") as error:
        json_schema_constraint(BYTES, schema)
    assert len(str(error.value)) < 400


def test_the_deepest_schema_is_taken():
    assert json_schema_constraint(BYTES, nested(63))().allowed().any()


def test_the_longest_chain_of_references_does_not_overflow_the_stack():
    # What goes wrong here ends the process, so it is another one.
    code = (
        "import json, sys; from gpt_jax.data.tokenizers import byte_tokenizer\n"
        "from gpt_jax.decode import constraints\n"
        "schema, grammar = json.load(sys.stdin)\n"
        "constraints.json_schema_constraint(byte_tokenizer(), schema)\n"
        "constraints.grammar_constraint(byte_tokenizer(), grammar)\n"
        "print('alive')"
    )
    links = 1500
    assert constraints.MAX_CHARS["json_schema"] * 0.9 < len(json.dumps(chain(links)))
    rules = [f"r{i}:r{i + 1}" for i in range(1300)]
    grammar = "\n".join(["start: r0", *rules, 'r1300: "a"'])
    assert constraints.MAX_CHARS["grammar"] * 0.8 < len(grammar)
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps([chain(links), grammar]), text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.stdout == "alive\n", (done.returncode, done.stderr[-300:])


@pytest.mark.parametrize(
    "make, text, message",
    [
        (regex_constraint, "[a", "^regex: .*unclosed character class"),
        (regex_constraint, r"(a)\1", "^regex: .*backreferences are not supported"),
        (regex_constraint, r"[^\x00-\x{10FFFF}]", "^regex: "),
        (regex_constraint, "(" * 2000 + ")" * 2000, "^regex: "),
        (regex_constraint, "(a{1000}){1000}", "^regex: "),
        (regex_constraint, "a" * 5000, "^regex: 5000 characters; at most 4096"),
        (regex_constraint, 3, "^regex: a int is not a string"),
        (grammar_constraint, "start: foo", "^grammar: .*unknown name"),
        (grammar_constraint, "rule: 'a'", "^grammar: "),
        (grammar_constraint, "start: " + "(" * 7000 + ")" * 7000, "^grammar: .*nested"),
        (grammar_constraint, "x" * 20_000, "^grammar: 20000 characters; at most 16384"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_regexes_and_grammars(make, text, message):
    with pytest.raises(ValueError, match=message) as error:
        make(BYTES, text)
    assert len(str(error.value)) < 400


def test_a_schema_cannot_switch_off_json():
    loose = {
        "item_separator": ";",
        "key_separator": "=",
        "whitespace_pattern": "x",
        "lenient": True,
    }
    schema = {"x-guidance": loose, "type": "array", "items": {"const": 1}, "minItems": 2}
    constraint = json_schema_constraint(BYTES, schema)()
    for char in b"[1":
        constraint.accept(char)
    allowed = set(np.flatnonzero(constraint.allowed()).tolist())
    assert allowed <= {ord(char) for char in ", \n\t"}


def test_a_matcher_that_gives_up_ends_the_text_and_says_so(monkeypatch):
    monkeypatch.setitem(constraints._LIMITS, "max_items_in_row", 50)
    wide = {"type": "object", "properties": {f"p{i}": {} for i in range(100)}}
    with pytest.raises(ValueError, match=r"^json_schema: .*row"):
        json_schema_constraint(BYTES, wide)
    constraint = json_schema_constraint(BYTES, {"type": "array", "items": wide})()
    for char in b"[{":
        assert constraint.allowed()[char] and not constraint.failure
        constraint.accept(char)
    for _ in range(2):
        assert np.flatnonzero(constraint.allowed()).tolist() == [BYTES.eos_id]
        assert constraint.failure


def test_a_text_that_ended_before_it_was_complete_was_cut():
    make = json_schema_constraint(BYTES, {"type": "array", "items": {"const": 1}})
    end = BYTES.eos_id
    assert constraints.end_reason(make, [*b"[1,1]", end]) == "stop"
    assert constraints.end_reason(make, [*b"[1,1", end]) == "length"
    assert constraints.end_reason(None, [*b"[1", end]) == "stop"


def test_without_llguidance_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "llguidance":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"^grammar: .*pip install 'gpt-jax\[serve\]'"):
        grammar_constraint(BYTES, 'start: "a"')
