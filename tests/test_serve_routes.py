"""Routes as OpenAI's client uses them, over a script in the engine's place."""

import base64
import dataclasses
import itertools
import json

import numpy as np
import openai
import pydantic
import pytest
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from serve_fixtures import EOS, TOKENIZER, TURN_END, ScriptedEngine, serving, tiny_model

from gpt_jax.data.infill_tokens import InfillTokens
from gpt_jax.data.tokenizers import byte_tokenizer
from gpt_jax.evals.embed import embed
from gpt_jax.serve import embeddings as embeddings_module
from gpt_jax.serve.settings import Settings

TEXT = "Hi wörld \U0001f642 STOP more"
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
USER = [{"role": "user", "content": "hi"}]


def script(request, sample):
    """The same text with the sample's number; a call where the prompt asks for it."""
    prompt = TOKENIZER.decode(request.prompt)
    text = f"so: {CALL}" if "CALL" in prompt else f"{TEXT}{sample}"
    ends = [] if request.params.ignore_eos else [EOS]
    return [*text.encode(), *(ends or [66] * 20)]


@pytest.fixture(scope="module")
def served():
    engines = []

    def make_engine():
        engines.append(ScriptedEngine(script))
        return engines[-1]

    settings = Settings(
        aliases=("davinci",), max_input_tokens=100, max_n=4, max_prompts=4, max_choices=8
    )
    with serving(tiny_model(), settings, make_engine) as server:
        server.app.state.engines = engines
        yield server


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def asked(served):
    """The newest request that the engine got."""
    return served.app.state.engines[-1].requests[-1]


def complete(served, **body):
    """The answer's JSON, which OpenAI's own model accepts."""
    status, answer = served.post("/v1/completions", **{"model": "tiny", "prompt": "ab", **body})
    assert status == 200, answer
    if not body.get("echo"):  # of an echo the first log-probability is null, which it refuses
        Completion.model_validate(answer, strict=True)
    return answer


def events(served, path, **body):
    """The events of a stream."""
    body = {"model": "tiny", "stream": True, **body}
    with served.http.stream("POST", path, json=body) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_an_answer_has_every_part(served):
    answer = complete(served, max_tokens=100)
    assert answer["id"].startswith("cmpl-") and answer["object"] == "text_completion"
    assert answer["model"] == "tiny" and answer["system_fingerprint"].startswith("fp_")
    assert answer["choices"] == [
        {"index": 0, "text": f"{TEXT}0", "logprobs": None, "finish_reason": "stop"}
    ]
    size = len(f"{TEXT}0".encode()) + 1
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, size)
    assert usage["total_tokens"] == 3 + size
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


def test_sixteen_tokens_are_the_default_and_a_cut_character_shows(served):
    choice = complete(served)["choices"][0]
    assert choice["text"] == TEXT.encode()[:16].decode() and choice["finish_reason"] == "length"
    assert complete(served, max_tokens=4)["choices"][0]["text"] == "Hi w"
    assert complete(served, max_tokens=5)["choices"][0]["text"] == "Hi w\ufffd"


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("ab", [[EOS, 97, 98]]),
        (["a", "b"], [[EOS, 97], [EOS, 98]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
        ("", [[EOS]]),
        (None, [[EOS]]),
        ("<|im_end|>", [[EOS, *b"<|im_end|>"]]),  # a text cannot spell a special token
    ],
)
def test_prompts(served, prompt, read):
    answer = complete(served, prompt=prompt)
    requests = served.app.state.engines[-1].requests[-len(read) :]
    assert [list(request.prompt) for request in requests] == read
    assert len(answer["choices"]) == len(read)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, read))


def test_choices_are_prompt_by_prompt(served):
    answer = complete(served, prompt=["a", "b"], n=2, max_tokens=100)
    assert [c["text"][-1] for c in answer["choices"]] == ["0", "1", "0", "1"]
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]


def test_the_best_have_the_highest_logprob_a_token(served):
    # Later samples of the script are likelier; all count in usage.
    answer = complete(served, n=2, best_of=3, max_tokens=100)
    assert [c["text"][-1] for c in answer["choices"]] == ["2", "1"]
    assert [c["index"] for c in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == 3 * (len(TEXT.encode()) + 2)
    assert served.refused("/v1/completions", model="tiny", n=3, best_of=2)[0] == "best_of"
    refused = served.refused("/v1/completions", model="tiny", best_of=2, stream=True)
    assert refused[0] == "best_of"


def test_the_context_is_full_to_the_last_token(served):
    for size, limit in ((500, 12), (511, 1), (512, 0)):
        complete(served, prompt=[97] * size, max_tokens=limit)
        body = {"model": "tiny", "prompt": [97] * size, "max_tokens": limit + 1}
        assert served.refused("/v1/completions", **body)[1] == "context_length_exceeded"
    complete(served, prompt=[97] * 510)  # the default is what is left
    assert asked(served).params.max_tokens == 2


def test_a_text_that_gave_up_its_form_is_said_to_be_cut(served):
    # The script takes no notice of forms, as a matcher that reaches a limit does not.
    ask = {"max_tokens": 100, "logprobs": 0}
    (cut,) = complete(served, guided_regex="[a-z]{9}", **ask)["choices"]
    (whole,) = complete(served, guided_regex="(?s).*", **ask)["choices"]
    assert (cut["finish_reason"], whole["finish_reason"]) == ("length", "stop")
    # The id that ended it is no part of the text either way.
    assert cut["logprobs"] == whole["logprobs"] and cut["text"] == whole["text"]


def test_stop_strings_are_no_part_of_the_text(served):
    for stop in ("STOP", ["x", "STOP"]):
        answer = complete(served, stop=stop, max_tokens=100, logprobs=1)
        choice = answer["choices"][0]
        assert choice["text"] == TEXT.partition("STOP")[0] and choice["finish_reason"] == "stop"
        assert len(choice["logprobs"]["tokens"]) == len(choice["text"].encode())
        assert answer["usage"]["completion_tokens"] == len(TEXT.partition(" more")[0].encode())
    assert served.app.state.engines[-1].ended


def test_logprobs_stand_where_their_tokens_do(served):
    answer = complete(served, prompt="é€", echo=True, logprobs=2, max_tokens=100)
    choice, text = answer["choices"][0], f"é€{TEXT}0"
    found = choice["logprobs"]
    assert choice["text"] == text
    expected = [i for i, char in enumerate(text) for _ in char.encode()]
    assert found["text_offset"] == expected
    names = [
        char if len(char.encode()) == 1 else f"bytes:\\x{byte:02x}"
        for char in text
        for byte in char.encode()
    ]
    assert found["tokens"] == names
    for name, logprob, top in zip(
        names, found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert top[name] == logprob == max(top.values())


def test_the_first_of_echoed_ids_has_no_logprob(served):
    found = complete(served, prompt=[97, 98], echo=True, logprobs=1, max_tokens=0)
    choice = found["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    assert choice["logprobs"] == {
        "tokens": ["a", "b"], "token_logprobs": [None, -1.5],
        "top_logprobs": [None, {"b": -1.5}], "text_offset": [0, 1],
    }  # fmt: skip
    found = complete(served, prompt="ab", echo=True, logprobs=0, max_tokens=1)["choices"][0]
    # Behind a text's prefix all of its tokens have one.
    assert found["logprobs"]["token_logprobs"] == [-1.5, -1.5, -0.5]
    assert found["logprobs"]["top_logprobs"] is None


@pytest.mark.parametrize(
    "body",
    [
        {"n": 2, "prompt": ["a", "é"], "echo": True, "logprobs": 1, "stop": ["STOP"]},
        {"max_tokens": 5, "logprobs": 0},
        {"max_tokens": 0, "echo": True, "logprobs": 1},
        {},
    ],
)
def test_a_stream_is_the_answer_in_pieces(served, body):
    body = {"max_tokens": 100, "prompt": "ab", **body}
    whole = complete(served, **body)
    chunks = events(served, "/v1/completions", **body)
    assert len({chunk["id"] for chunk in chunks}) == 1
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert [c["finish_reason"] for c in mine][:-1] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        for key in (choice["logprobs"] or {}) if body.get("logprobs") else ():
            parts = [c["logprobs"][key] for c in mine]
            assert list(itertools.chain(*parts)) == choice["logprobs"][key]


def test_streams_tell_usage_if_asked(served):
    for path, body in (("/v1/completions", {"prompt": "ab"}), ("/v1/chat/completions",
                       {"messages": USER})):  # fmt: skip
        assert all("usage" not in chunk for chunk in events(served, path, **body))
        chunks = events(served, path, stream_options={"include_usage": True}, **body)
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 1
        assert served.refused(path, model="tiny", stream_options={}, **body)[0] == "stream_options"


def test_every_field_reaches_the_engine(served):
    fields = {
        "max_tokens": 50, "min_tokens": 2, "temperature": 0.5, "top_k": 5, "top_p": 0.5,
        "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.3,
        "frequency_penalty": -0.3, "no_repeat_ngram": 3, "n": 2, "ignore_eos": True, "seed": 7,
    }  # fmt: skip
    complete(served, **fields, stop="x", logit_bias={"65": -100}, stop_token_ids=[70], logprobs=3)
    params = asked(served).params
    for name, value in fields.items():
        assert getattr(params, name) == value, name
    assert params.logit_bias == ((65, -100.0),) and params.stop_ids == (70,)
    assert params.stop == ("x",) and params.top_logprobs == 3


def test_seeds(served):
    complete(served)
    first = asked(served).params.seed
    complete(served)
    assert asked(served).params.seed != first
    for seed in (-1, 2**40 + 5):
        complete(served, seed=seed)
        assert asked(served).params.seed == seed % 2**32


@pytest.mark.parametrize(
    ("body", "refused"),
    [
        ({"max_tokens": 600}, ("prompt", "context_length_exceeded")),
        ({"prompt": "a" * 600}, ("prompt", "context_length_exceeded")),
        ({"prompt": [1] * 512}, ("prompt", "context_length_exceeded")),
        ({"prompt": [259]}, ("prompt", None)),
        ({"n": 5}, ("n", None)),
        ({"best_of": 5}, ("best_of", None)),
        ({"prompt": ["a"] * 5}, ("prompt", None)),
        ({"prompt": ["a"] * 4, "n": 4}, ("n", None)),
        ({"min_tokens": 20}, ("min_tokens", None)),
        ({"logit_bias": {"259": 1}}, ("logit_bias", None)),
        ({"stop_token_ids": [300]}, ("stop_token_ids", None)),
        ({"suffix": "b"}, ("suffix", None)),
        ({"guided_regex": "("}, ("guided_regex", None)),
        ({"guided_regex": "a", "ignore_eos": True}, ("ignore_eos", None)),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, ("guided_regex", None)),
        ({"guided_grammar": "x"}, ("guided_grammar", None)),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema":
         {"type": "colour"}}}}, ("response_format", None)),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(served, body, refused):
    assert served.refused("/v1/completions", **{"model": "tiny", "prompt": "ab", **body}) == refused


def test_a_gap_is_filled_where_the_model_was_trained_to():
    engines = []

    def make_engine():
        engines.append(ScriptedEngine(lambda request, sample: list(b"middle") + [260]))
        return engines[-1]

    tokenizer = byte_tokenizer(("<p>", "<s>", "<m>", "<e>"))
    opened = dataclasses.replace(
        tiny_model(vocab_size=tokenizer.vocab_size), tokenizer=tokenizer,
        infill=InfillTokens(257, 258, 259, ("psm",), (260,)),
    )  # fmt: skip
    with serving(opened, make_engine=make_engine) as served:
        answer = complete(served, prompt=["ab", ""], suffix="yz")
        assert [c["text"] for c in answer["choices"]] == ["middle", "middle"]
        assert answer["choices"][0]["finish_reason"] == "stop"
        first, second = engines[0].requests[-2:]
        assert list(first.prompt) == [EOS, 257, *b"ab", 258, *b"yz", 259]
        assert list(second.prompt) == [EOS, 257, 258, *b"yz", 259]
        complete(served, prompt="ab", suffix="")
        assert list(engines[0].requests[-1].prompt) == [EOS, *b"ab"]
        for body, param in (({"prompt": [1]}, "suffix"), ({"echo": True}, "echo")):
            body = {"model": "tiny", "prompt": "a", "suffix": "b", **body}
            assert served.refused("/v1/completions", **body)[0] == param


def test_models_have_names(served, client):
    assert [model.id for model in client.models.list()] == ["tiny", "davinci"]
    assert client.models.retrieve("davinci").id == "davinci"
    assert client.completions.create(model="davinci", prompt="a").model == "davinci"
    for call in (
        lambda: client.models.retrieve("gpt-5"),
        lambda: client.models.retrieve("../../etc/passwd"),
        lambda: client.completions.create(model="gpt-5", prompt="a"),
        lambda: client.chat.completions.create(model="gpt-5", messages=USER),
        lambda: client.embeddings.create(model="gpt-5", input="a"),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    assert served.refused("/v1/completions", prompt="a")[0] == "model"
    status, body = served.post("/v1/engines/tiny/completions", prompt="a")
    assert status == 200 and body["model"] == "tiny"
    assert served.refused("/v1/engines/tiny/completions", model="davinci")[0] == "model"
    assert served.post("/v1/engines/other/completions", prompt="a")[0] == 404
    engines = served.http.get("/v1/engines").json()["data"]
    assert engines[0] == {"id": "tiny", "object": "engine", "owner": "gpt-jax", "ready": True}
    assert served.http.get("/v1/engines/tiny").json() == engines[0]


def test_unknown_routes_and_methods(served, client):
    for path in ("/v1/responses", "/v2", "/v1/completions/", "/page/..%2f..%2fsetup.py"):
        answer = served.http.post(path, json={})
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "unknown_url"
    answer = served.http.get("/v1/completions")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST"
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="tiny", input="a")


def test_answers_have_ids(client):
    ids = {client.completions.create(model="tiny", prompt="a")._request_id for _ in range(2)}
    assert len(ids) == 2 and all(found.startswith("req_") for found in ids)


def test_chat(served, client):
    answer = served.http.post(
        "/v1/chat/completions",
        json={"model": "tiny", "n": 2, "logprobs": True, "top_logprobs": 2, "messages": [
            {"role": "developer", "content": "Be brief."}, *USER]},
    ).json()  # fmt: skip
    found = ChatCompletion.model_validate(answer, strict=True)
    request = asked(served)
    text = TOKENIZER.decode(request.prompt, skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert TURN_END in request.params.stop_ids
    # Without a limit: to the end of the context.
    assert request.params.max_tokens == 512 - len(request.prompt)
    assert [choice.message.content for choice in found.choices] == [f"{TEXT}0", f"{TEXT}1"]
    entries = found.choices[0].logprobs.content
    assert bytes(itertools.chain(*(entry.bytes for entry in entries))) == f"{TEXT}0".encode()
    assert entries[0].token == "H" and len(entries[0].top_logprobs) == 2
    assert found.usage.prompt_tokens == len(request.prompt)
    for field in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(model="tiny", messages=USER, **{field: 2})
        assert answer.choices[0].message.content == "Hi"
        assert answer.choices[0].finish_reason == "length"


def test_chats_have_a_tokenizer_of_their_own(served, client, monkeypatch):
    # It must see special tokens in a text, which other threads' must not see at that moment.
    monkeypatch.setattr(served.service.opened.tokenizer, "encode_with_offsets", None)
    client.chat.completions.create(model="tiny", messages=USER)


def test_a_streamed_chat(served):
    chunks = events(served, "/v1/chat/completions", messages=USER, n=2, logprobs=True)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    first = [chunk["choices"][0]["delta"].get("role") for chunk in chunks[:2]]
    assert first == ["assistant", "assistant"]
    for i in range(2):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == i]
        assert "".join(c["delta"].get("content") or "" for c in mine) == f"{TEXT}{i}"
        assert mine[-1]["delta"] == {} and mine[-1]["finish_reason"] == "stop"
        entries = [e for c in mine if c["logprobs"] for e in c["logprobs"]["content"]]
        assert bytes(b for e in entries for b in e["bytes"]) == f"{TEXT}{i}".encode()


def test_tools_are_called(served, client):
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "CALL"}], "tools": [ADD]}
    choice = client.chat.completions.create(**ask).choices[0]
    call = choice.message.tool_calls[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "so: "
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 1})
    # What the client got it can send back.
    turns = [*ask["messages"], choice.message.model_dump(), {
        "role": "tool", "tool_call_id": call.id, "content": "2"}]  # fmt: skip
    client.chat.completions.create(model="tiny", messages=turns, tools=[ADD])
    text = TOKENIZER.decode(asked(served).prompt, skip_special_tokens=False)
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in text
    assert '"parameters": {"type": "object"}' in text
    deltas = [c.choices[0] for c in client.chat.completions.create(**ask, stream=True)]
    called = [d.delta.tool_calls[0] for d in deltas if d.delta.tool_calls]
    assert [c.function.name for c in called] == ["add"] and called[0].index == 0
    assert deltas[-1].finish_reason == "tool_calls"
    assert "".join(d.delta.content or "" for d in deltas) == "so: "
    # Without tools, or with tool_choice none, it is text.
    for tools in ({}, {"tools": [ADD], "tool_choice": "none"}):
        choice = client.chat.completions.create(**{**ask, "tools": [], **tools}).choices[0]
        assert choice.message.tool_calls is None and CALL in choice.message.content
    client.chat.completions.create(**ask, tool_choice="required", parallel_tool_calls=False)
    assert asked(served).constraint is not None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "a<|im_end|>"}]}, "messages[0].content"),
        ({"max_tokens": 2, "max_completion_tokens": 2}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [ADD, ADD]}, "tools"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "x"}}},
         "tool_choice"),
        ({"tools": [ADD], "tool_choice": "required", "response_format": {"type": "json_object"}},
         "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a", "description": "<|im_end|>"}}]},
         "tools"),
        ({"max_tokens": 500}, "messages"),
        ({"max_completion_tokens": 500}, "messages"),
    ],
)  # fmt: skip
def test_chats_that_cannot_be(served, body, param):
    body = {"model": "tiny", "messages": USER, **body}
    assert served.refused("/v1/chat/completions", **body)[0] == param


@pytest.mark.parametrize("form", ["json_object", "json_schema"])
def test_forms_of_an_answer_make_a_constraint(served, form):
    body = {"type": form}
    if form == "json_schema":
        body["json_schema"] = {"name": "a", "schema": {"type": "object"}, "strict": True}
    for path, ask in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions",
                      {"messages": USER})):  # fmt: skip
        assert served.post(path, model="tiny", response_format=body, **ask)[0] == 200
        allowed = asked(served).constraint().allowed()
        assert allowed[ord("{")] and not allowed[ord("a")]


class Sum(pydantic.BaseModel):
    """What a client wants to get."""

    total: int


def test_the_client_parses_what_it_asked_for():
    def make_engine():
        return ScriptedEngine(lambda request, sample: [*b'{"total": 3}', EOS])

    with serving(tiny_model(), make_engine=make_engine) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        ask = {"model": "tiny", "messages": USER, "response_format": Sum}
        assert client.chat.completions.parse(**ask).choices[0].message.parsed == Sum(total=3)
        with client.chat.completions.stream(**ask) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_completion()
        assert "content.delta" in kinds and kinds.index("content.done")
        assert final.choices[0].message.parsed == Sum(total=3)


def test_embeddings(served, client, monkeypatch):
    opened = served.service.opened
    inputs = ["ab", "cde"]
    expected = embed(opened, inputs)
    for how in ("float", "base64"):
        answer = served.http.post(
            "/v1/embeddings", json={"model": "tiny", "input": inputs, "encoding_format": how}
        ).json()
        if how == "float":
            CreateEmbeddingResponse.model_validate(answer, strict=True)
        for row, item in zip(expected, answer["data"], strict=True):
            vector = item["embedding"]
            if how == "base64":
                vector = np.frombuffer(base64.b64decode(vector), "<f4")
            np.testing.assert_allclose(vector, row, atol=1e-6)
    assert answer["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    data = client.embeddings.create(model="tiny", input="ab", dimensions=32).data
    np.testing.assert_allclose(data[0].embedding, expected[0], atol=1e-6)
    ids = client.embeddings.create(model="tiny", input=[[EOS, 97, 98], [1]]).data
    np.testing.assert_allclose(ids[0].embedding, expected[0], atol=1e-6)
    assert served.post("/v1/engines/tiny/embeddings", input="a")[0] == 200
    monkeypatch.setattr(embeddings_module, "_TOKENS_AT_ONCE", 8)  # two parts of two
    parts = client.embeddings.create(model="tiny", input=["a", "b", "ab", "cde"]).data
    np.testing.assert_allclose(parts[2].embedding, expected[0], atol=1e-6)
    np.testing.assert_allclose(parts[3].embedding, expected[1], atol=1e-6)
    for body, param in (
        ({"input": "a", "dimensions": 16}, "dimensions"),
        ({"input": ["a"] * 5}, "input"),
        ({"input": ["a", "b" * 600]}, "input[1]"),
        ({"input": ["a", "b" * 100]}, "input[1]"),
        ({"input": [[1], [300]]}, "input[1]"),
        ({"input": None}, "input"),
    ):
        assert served.refused("/v1/embeddings", model="tiny", **body)[0] == param


def test_tokens(served):
    status, answer = served.post("/tokenize", prompt="aé")
    assert (status, answer["tokens"], answer["count"]) == (200, [EOS, 97, 0xC3, 0xA9], 4)
    answer = served.post("/tokenize", prompt="<|im_end|>a", add_special_tokens=False)[1]
    assert answer["tokens"] == list(b"<|im_end|>a")
    # Clients ask for the ids of what /tokenizer_info names.
    answer = served.post("/tokenize", prompt="<|endoftext|>", add_special_tokens=False)[1]
    assert answer["tokens"] == [EOS]
    assert served.post("/detokenize", tokens=[97, 0xC3, 0xA9]) == (200, {"prompt": "aé"})
    assert served.refused("/detokenize", tokens=[259])[0] == "tokens"
    assert served.post("/tokenize", prompt="a", model="other")[0] == 404
    info = served.http.get("/tokenizer_info").json()
    assert info["eos_token"] == info["bos_token"] == "<|endoftext|>"
    assert "add_generation_prompt" in info["chat_template"]


def test_numbers_for_prometheus(served):
    complete(served)
    text = served.http.get("/metrics").text
    for name in (
        "gpt_jax_time_to_first_token_seconds_bucket", "gpt_jax_inter_token_seconds_sum",
        "gpt_jax_e2e_seconds_count", "gpt_jax_queue_seconds_count", "gpt_jax_requests_running",
        "gpt_jax_requests_waiting", "gpt_jax_generation_tokens_total",
        "gpt_jax_prompt_tokens_total", 'gpt_jax_finished_total{reason="length"}',
        'gpt_jax_http_responses_total{status="200"}',
    ):  # fmt: skip
        value = next(line for line in text.splitlines() if line.startswith(name)).split()[-1]
        assert float(value) > 0 or "requests" in name, name


def test_a_page_that_needs_nothing_from_elsewhere(served):
    answer = served.http.get("/")
    assert answer.status_code == 200 and "<html" in answer.text
    assert "connect-src 'self'" in answer.headers["content-security-policy"]
    assert "://" not in answer.text.replace("http://www.w3.org", "")
