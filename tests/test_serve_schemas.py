"""Bodies of requests: the fields that clients know, strict JSON, errors that name the field."""

import json
import random
import typing

import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params

from gpt_jax.serve.errors import ApiError
from gpt_jax.serve.json_body import MAX_DEPTH, parse_json
from gpt_jax.serve.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingsRequest,
    TokenizeRequest,
    validated,
)

NEEDED = {
    CompletionRequest: {"prompt": "a"},
    ChatRequest: {"messages": [{"role": "user", "content": "a"}]},
    EmbeddingsRequest: {"input": "a"},
    TokenizeRequest: {"prompt": "a"},
    DetokenizeRequest: {"tokens": [1]},
}


def refusal(schema, **fields):
    """(param, code) of the 400."""
    with pytest.raises(ApiError) as caught:
        validated(schema, {**NEEDED[schema], **fields})
    assert caught.value.status == 400
    assert caught.value.message.startswith(caught.value.param)
    return caught.value.param, caught.value.code


@pytest.mark.parametrize(
    ("schema", "known"),
    [
        (CompletionRequest, completion_create_params.CompletionCreateParamsNonStreaming),
        (ChatRequest, chat_create_params.CompletionCreateParamsNonStreaming),
        (EmbeddingsRequest, embedding_create_params.EmbeddingCreateParams),
    ],
)
def test_every_field_of_the_client_is_known(schema, known):
    fields = set(typing.get_type_hints(known))
    assert len(fields) > 4
    assert not fields - set(schema.model_fields)
    for name in fields:  # null is the same as nothing, but for what must be there
        if name not in NEEDED[schema]:
            validated(schema, {**NEEDED[schema], name: None})


@pytest.mark.parametrize("schema", NEEDED)
def test_every_field_refuses_what_it_cannot_be(schema):
    validated(schema, NEEDED[schema])
    for name in schema.model_fields:
        # No other field takes an object of an object whose name is no id.
        wrong = "x" if name in ("metadata", "prompt_cache_options") else {"x": {"y": [1.5]}}
        param, _ = refusal(schema, **{name: wrong})
        assert param.split(".")[0].split("[")[0] == name
    assert refusal(schema, temperatur=1) == ("temperatur", "unknown_parameter")
    for name in NEEDED[schema]:
        if schema is not CompletionRequest:
            with pytest.raises(ApiError) as caught:
                validated(schema, {})
            assert (caught.value.param, caught.value.code) == (name, "missing_required_parameter")


BOUNDS = [
    ("n", [1, 16], [0, -1, 1.0, True, "1", 10**30]),
    ("best_of", [1], [0, "2"]),
    ("max_tokens", [0, 5], [-1, 2**31, 10**400, 1.5]),
    ("temperature", [0, 1, 0.5, 2], [-0.1, 2.1, "1", 10**400, True]),
    ("top_p", [0, 1, 0.3], [-1, 1.01]),
    ("presence_penalty", [-2, 2], [-2.1, 2.1]),
    ("frequency_penalty", [-2, 2], [-2.1, 2.1]),
    ("logprobs", [0, 5, 20], [-1, 21, True]),
    ("logit_bias", [{"50": -100, "1": 100, "3": 0.5}, {}],
     [{"50": 101}, {"a": 1}, {"-1": 1}, {"1": "1"}, {"1": True}, {"²": 1}, [1], {"1": 10**400},
      {str(i): 1 for i in range(1025)}, {"9" * 5000: 1}]),
    ("stop", ["a", ["a"] * 4, []], ["", [""], ["a"] * 5, [1], 1, "a" * 257]),
    ("seed", [0, -5, 2**63 - 1], [2**63, 1.5]),
    ("stream", [True, False], [1, "true"]),
    ("stream_options", [{"include_usage": True}, {}], [{"x": 1}, {"include_usage": 1}]),
    ("top_k", [0, 40], [-1, 1.5]),
    ("min_p", [0, 1], [-0.1, 1.1]),
    ("repetition_penalty", [0.5, 2], [0, -1, 11]),
    ("no_repeat_ngram", [0, 3], [-1]),
    ("min_tokens", [0, 3], [-1]),
    ("stop_token_ids", [[], [1, 2]], [[-1], ["a"], [1] * 65, 3, [True]]),
    ("prompt", ["", "a", ["a", "b"], [1, 2], [[1], [2]], None],
     [1, [], [[]], [1, "a"], [["a"]], [-1], [1.5], [True], {}, [2**31]]),
    ("response_format",
     [{"type": "text"}, {"type": "json_object"},
      {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}],
     [{"type": "json_schema"}, {"type": "xml"}, "text", {"type": "text", "json_schema": {"name":
      "a"}}, {"type": "json_schema", "json_schema": {"name": "a b"}},
      {"type": "json_schema", "json_schema": {"name": "a", "schema": {"a": "b" * 70000}}}]),
    ("guided_regex", ["a+"], [1, "a" * 9000]),
]  # fmt: skip


@pytest.mark.parametrize(("field", "right", "wrong"), BOUNDS, ids=[b[0] for b in BOUNDS])
def test_values_of_fields(field, right, wrong):
    for value in right:
        validated(CompletionRequest, {field: value})
    for value in wrong:
        param, _ = refusal(CompletionRequest, **{field: value})
        assert param.split(".")[0] == field, value


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"role": "robot", "content": "a"},
        {"role": "user", "content": 1},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": ["a"]},
        {"role": "user", "content": [{"type": ["text"], "text": "a"}]},
        {"role": "user", "content": "a", "colour": "b"},
        {"role": "assistant", "tool_calls": [{"id": "a"}]},
        {"role": "assistant", "content": None},
        "a",
        None,
    ],
)
def test_messages_that_are_none(message):
    param, _ = refusal(ChatRequest, messages=[{"role": "user", "content": "a"}, message])
    assert param.startswith("messages[1]")


def test_parts_of_a_message_become_one_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = validated(ChatRequest, {"messages": [{"role": "user", "content": parts}]})
    assert body.messages[0].content == "ab"


MALFORMED = [
    b"", b" ", b"{", b"null", b"[]", b'"a"', b"{'a': 1}", b'{"a": 1,}', b'{"a": 1} x',
    b'{"a": NaN}', b'{"a": Infinity}', b'{"a": -Infinity}', b'{"a": 1e999}', b'{"a": -1e999}',
    b'{"a": ' + b"1" * 5000 + b"}", b'{"a": "\xff"}', b"\xff\xfe{\x00}\x00", b'{"a": 1, "a": 2}',
    b'{"b": {"a": 1, "a": 1}}', b'{"a": "\\ud800"}', b'{"\\uDFFF": 1}', b'{"a": ["\\udc00x"]}',
    b'{"a": "\xed\xa0\x80"}', b'{"a": "\n"}', b"[" * 100_000, b'{"a":' * 100_000,
    b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
]  # fmt: skip


@pytest.mark.parametrize("body", MALFORMED, ids=range(len(MALFORMED)))
def test_json_that_is_none(body):
    with pytest.raises(ApiError) as caught:
        parse_json(body)
    assert caught.value.status == 400
    json.dumps(caught.value.body).encode()


def test_json_is_read_as_it_is():
    value = {"a": [1, 2.5, None, True, '\U0001f642 " [ { \\'], "b": {"c": -1e10}}
    for ascii_only in (True, False):
        assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value
    deep = b'{"a": ' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}"
    assert parse_json(deep)


def test_many_names_are_checked_in_no_time():
    names = ",".join(f'"{i}":1' for i in range(200_000))
    with pytest.raises(ApiError, match="twice"):
        parse_json(f'{{{names},"199999":2}}'.encode())


def test_random_bodies_never_crash_the_schemas():
    rng = random.Random(0)
    atoms = [None, True, 0, -1, 1.5, 2**70, "", "a", "\x00", [], {}, [[]], {"a": 1}, ["a", 1]]
    for schema in NEEDED:
        for _ in range(300):
            names = rng.sample(sorted(schema.model_fields), k=2)
            body = NEEDED[schema] | {name: rng.choice(atoms) for name in names}
            try:
                validated(schema, body)
            except ApiError as error:
                assert error.status == 400 and error.param.split(".")[0].split("[")[0] in body
