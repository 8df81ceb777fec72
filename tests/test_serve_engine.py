"""The server over the real engine: each field of a request shows in the text."""

import concurrent.futures
import json
import re

import httpx
import openai
import pytest
from serve_fixtures import EOS, TURN_END, serving, tiny_model

from gpt_jax.serve.settings import Settings

USER = [{"role": "user", "content": "hi"}]
GREEDY = {"model": "tiny", "prompt": "ab", "temperature": 0, "max_tokens": 12}
SAMPLED = {**GREEDY, "temperature": 1, "seed": 1}


@pytest.fixture(scope="module")
def served():
    with serving(tiny_model(num_layers=1), Settings(slots=4, prefix_cache_tokens=512)) as server:
        yield server


def choice(served, **body):
    """The first choice."""
    status, answer = served.post("/v1/completions", **body)
    assert status == 200, answer
    return answer["choices"][0]


def ids_of(choice):
    """Bytes of the tokens of an answer with logprobs."""
    return [
        int(name[-2:], 16) if name.startswith("bytes:") else ord(name)
        for name in choice["logprobs"]["tokens"]
        if not name.startswith("<|")
    ]


def test_greedy_and_seeds(served):
    greedy = choice(served, **GREEDY)
    assert greedy == choice(served, **GREEDY, seed=5)
    assert greedy["text"] == choice(served, **SAMPLED | {"top_k": 1})["text"]
    assert greedy["text"] == choice(served, **SAMPLED | {"top_p": 0})["text"]
    assert greedy["text"] == choice(served, **SAMPLED | {"min_p": 1})["text"]
    first = choice(served, **SAMPLED)
    assert first == choice(served, **SAMPLED)
    others = [choice(served, **SAMPLED | {"seed": seed})["text"] for seed in (2, 3, None)]
    assert any(text != first["text"] for text in others)
    assert first["text"] != greedy["text"]


@pytest.mark.slow
def test_a_request_is_not_changed_by_others(served):
    alone = choice(served, **SAMPLED)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        bodies = [SAMPLED | {"seed": i % 4, "n": 1 + i % 3} for i in range(12)]
        found = list(pool.map(lambda body: choice(served, **body), bodies))
    assert [c for c, body in zip(found, bodies, strict=True) if body["seed"] == 1] == [alone] * 3


@pytest.mark.slow
def test_rules_show_in_the_text(served):
    plain = choice(served, **GREEDY, logprobs=5)
    first = ids_of(plain)[0]
    banned = choice(served, **GREEDY, logprobs=0, logit_bias={str(first): -100})
    assert first not in ids_of(banned)
    forced = choice(served, **GREEDY, logit_bias={str(ord("x")): 100})
    assert forced["text"] == "x" * 12
    for field, value in (("presence_penalty", 2), ("frequency_penalty", 2),
                         ("repetition_penalty", 3.0), ("no_repeat_ngram", 1)):  # fmt: skip
        changed = []
        for bias in (2, 3, 4):  # one of which is as much as a penalty can undo
            body = {**GREEDY, "prompt": "xx", "logit_bias": {str(ord("x")): bias}}
            changed.append(choice(served, **body) != choice(served, **body, **{field: value}))
        assert any(changed), field
    # Log-probabilities are the model's own, whatever the rules are.
    again = choice(served, **GREEDY, logprobs=5, repetition_penalty=1.01, presence_penalty=0.01)
    assert again["logprobs"]["token_logprobs"][0] == plain["logprobs"]["token_logprobs"][0]


@pytest.mark.slow
def test_ends_of_texts(served):
    always = {**GREEDY, "logit_bias": {str(EOS): 100}}
    ended = choice(served, **always)
    assert (ended["text"], ended["finish_reason"]) == ("", "stop")
    assert choice(served, **always, min_tokens=3, logprobs=0)["logprobs"]["tokens"].__len__() == 3
    on = choice(served, **always, ignore_eos=True)
    assert on["finish_reason"] == "length"
    x = {**GREEDY, "logit_bias": {str(ord("x")): 100}}
    assert choice(served, **x, stop_token_ids=[ord("x")])["text"] == ""
    assert choice(served, **x, stop="xxx") == choice(served, **x, stop=["y", "xxx"])
    assert choice(served, **x, stop="xxx")["finish_reason"] == "stop"
    turn = served.post(
        "/v1/chat/completions", model="tiny", messages=USER, temperature=0,
        logit_bias={str(TURN_END): 100},
    )[1]["choices"][0]  # fmt: skip
    assert (turn["message"]["content"], turn["finish_reason"]) == ("", "stop")


def test_echo_scores_what_generation_scored(served):
    made = choice(served, **SAMPLED, logprobs=1)
    ids = [EOS, *b"ab", *ids_of(made)]
    assert len(ids) == 3 + 12
    echoed = choice(served, model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=1)
    assert echoed["logprobs"]["token_logprobs"][0] is None
    assert echoed["logprobs"]["token_logprobs"][3:] == pytest.approx(
        made["logprobs"]["token_logprobs"], abs=1e-4
    )
    assert echoed["text"] == "ab" + made["text"]
    for logprob, top in zip(
        echoed["logprobs"]["token_logprobs"][1:], echoed["logprobs"]["top_logprobs"][1:],
        strict=True,
    ):  # fmt: skip
        assert logprob in top.values() and len(top) <= 2


@pytest.mark.slow
def test_many_choices_and_the_best(served):
    body = {**SAMPLED, "prompt": ["ab", "c"], "logprobs": 0}
    answer = served.post("/v1/completions", **body, n=3)[1]
    assert len({c["text"] for c in answer["choices"]}) > 3
    assert answer["usage"]["completion_tokens"] >= 60
    means = [sum(c["logprobs"]["token_logprobs"]) / 12 for c in answer["choices"][:3]]
    best = served.post("/v1/completions", **{**body, "prompt": "ab"}, best_of=3)[1]["choices"]
    assert best[0]["text"] == answer["choices"][means.index(max(means))]["text"]


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_is_the_answer_in_pieces(served, path):
    body = {"model": "tiny", "n": 2, "seed": 3, "max_tokens": 20, "stop": ["e"]}
    body |= {"prompt": "ab"} if path == "/v1/completions" else {"messages": USER}
    whole = [c.get("text", c.get("message", {}).get("content"))
             for c in served.post(path, **body)[1]["choices"]]  # fmt: skip
    texts = ["", ""]
    with served.http.stream("POST", path, json={**body, "stream": True}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                found = json.loads(line.removeprefix("data: "))["choices"][0]
                texts[found["index"]] += found.get("text") or found.get("delta", {}).get(
                    "content", ""
                )
    assert texts == whole


def test_forms_of_an_answer(served):
    body = {"model": "tiny", "prompt": "a", "max_tokens": 100}
    for seed in range(3):
        text = choice(served, **body, seed=seed, guided_regex="[a-c]{3,5}")["text"]
        assert re.fullmatch("[a-c]{3,5}", text)
    grammar = 'start: ("x" "y")+ "z"'
    found = choice(served, **body, seed=1, guided_grammar=grammar)
    assert re.fullmatch("(xy)+z", found["text"]) and found["finish_reason"] == "stop"
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0)
    answer = client.chat.completions.create(
        model="tiny", messages=USER, response_format=form, seed=1, max_tokens=100
    )
    assert json.loads(answer.choices[0].message.content)["a"] in (1, 2)
    tool = {"type": "function", "function": {"name": "add", "parameters": schema}}
    answer = client.chat.completions.create(
        model="tiny", messages=USER, tools=[tool], tool_choice="required",
        logit_bias={str(ord(" ")): -100},
    ).choices[0]  # fmt: skip
    assert answer.finish_reason == "tool_calls"
    assert json.loads(answer.message.tool_calls[0].function.arguments)["a"] in (1, 2)


@pytest.mark.slow
def test_a_prompt_that_was_read_is_known(served):
    body = {"model": "tiny", "prompt": "a long beginning " * 6, "max_tokens": 2}
    served.post("/v1/completions", **body)
    usage = served.post("/v1/completions", **body)[1]["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > 50


@pytest.mark.slow
def test_the_end_of_the_context(served):
    asked = {"model": "tiny", "messages": USER, "seed": 1, "ignore_eos": True}
    body = served.post("/v1/chat/completions", **asked)[1]
    assert body["usage"]["total_tokens"] == 512
    assert body["choices"][0]["finish_reason"] == "length"


@pytest.mark.slow
def test_clients_that_vanish_free_their_slots(served):
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 250, "ignore_eos": True, "stream": True}

    def vanish(number):
        with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as answer:
            next(answer.iter_lines())

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        list(pool.map(vanish, range(100)))
    choice(served, **GREEDY)
    for _ in range(100):
        stats = served.service.runner.stats
        if stats["running"] == stats["waiting"] == 0 and not served.service.in_flight:
            break
        choice(served, **GREEDY | {"max_tokens": 1})
    assert stats["running"] == stats["waiting"] == 0 and stats["free_slots"] == 4


@pytest.mark.slow
def test_an_encoder_decoder_answers():
    opened = tiny_model(family="encoder_decoder", start_id=EOS)
    with serving(opened) as served:
        found = choice(served, model="tiny", prompt="ab", temperature=0, max_tokens=5, logprobs=1)
        assert len(found["logprobs"]["tokens"]) == 5 or found["finish_reason"] == "stop"
        assert (
            choice(served, model="tiny", prompt="ab", echo=True, max_tokens=3)["text"][:2] == "ab"
        )
        refused = served.refused("/v1/completions", model="tiny", prompt="a", echo=True, logprobs=1)
        assert refused[0] == "echo"
        assert served.refused("/v1/embeddings", model="tiny", input="a")[0] == "model"
