"""Malformed bodies by the thousand and more clients than there is place for: no 5xx, no hang."""

import concurrent.futures
import json
import random
import resource
import threading
import time

import pytest
from serve_fixtures import EOS, ScriptedEngine, serving, tiny_model

from gpt_jax.serve.settings import Settings

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def opened():
    return tiny_model()


_GOOD = {
    "/v1/completions": {"model": "tiny", "prompt": "ab", "max_tokens": 4, "stop": ["x"],
                        "logit_bias": {"5": 1}, "stream": False, "logprobs": 1, "echo": True},
    "/v1/chat/completions": {"model": "tiny", "messages": USER, "max_tokens": 4, "tools": [],
                             "response_format": {"type": "text"}, "logprobs": True},
    "/v1/embeddings": {"model": "tiny", "input": ["a"], "encoding_format": "float"},
    "/v1/engines/tiny/completions": {"prompt": [1, 2], "best_of": 2, "n": 1},
    "/tokenize": {"prompt": "ab"},
    "/detokenize": {"tokens": [1, 2]},
}  # fmt: skip
_ATOMS = [
    None, True, False, 0, -1, 1, 3, 1.5, -0.0, 1e308, 2**31, 2**63, 10**300, "", "a", "\x00", "é",
    "\U0001f642", "<|im_end|>", "a" * 3000, [], {}, [[]], [None], ["a"], [1], [[1]], [1, "a"],
    {"a": 1}, {"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "a",
    "schema": {"$ref": "#"}}}, [{"role": "user", "content": None}], [{"role": "tool", "content":
    "x"}], {"1": 1}, {"include_usage": True}, [{"type": "function", "function": {"name": "a"}}],
]  # fmt: skip


def fuzz_body(rng):
    """A path and a body that is wrong in some way, and sometimes right."""
    path = rng.choice(sorted(_GOOD))
    body = dict(_GOOD[path])
    names = [*body, "n", "temperature", "seed", "suffix", "best_of", "max_tokens", "top_p", "zzz"]
    for _ in range(rng.randint(0, 3)):
        body[rng.choice(names)] = rng.choice(_ATOMS)
    if rng.random() < 0.1:
        body.pop(rng.choice(sorted(body)))
    text = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode()
    for _ in range(rng.choice((0, 0, 1, 3))):
        at = rng.randrange(len(text) + 1)
        piece = rng.choice(
            (b"", b'"', b"{", b"]", b",", b"\xff", b"NaN", b"\\ud800", b"1e999", b"0")
        )
        text = text[:at] + piece + text[at + rng.randint(0, 3) :]
    return path, text


def fuzz(served, count, seed):
    rng = random.Random(seed)
    statuses = {}
    kind = {"Content-Type": "application/json"}
    for _ in range(count):
        path, text = fuzz_body(rng)
        answer = served.http.post(path, content=text, headers=kind, timeout=60)
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        assert answer.status_code in (200, 400, 404), (path, text, answer.text)
        if answer.status_code != 200:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    return statuses


def scripted():
    return ScriptedEngine(lambda request, sample: [*b"hello", EOS])


def test_malformed_bodies(opened):
    with serving(opened, Settings(), scripted) as served:
        statuses = fuzz(served, 200, seed=0)
        assert statuses[400] > 80 and statuses[200] > 10
        assert served.post("/v1/completions", model="tiny", prompt="a")[0] == 200


@pytest.mark.slow
def test_a_flood(opened):
    settings = Settings(slots=4, max_waiting=32)
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 30, "n": 1}
    with serving(opened, settings) as served:  # a real engine
        served.post("/v1/completions", **body)

        def ask(number):
            began = time.monotonic()
            answer = served.http.post("/v1/completions", json={**body, "seed": number % 7})
            return answer.status_code, answer.text, time.monotonic() - began

        with concurrent.futures.ThreadPoolExecutor(90) as pool:
            answers = list(pool.map(ask, range(200)))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            answers += pool.map(ask, range(200))
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        statuses = [status for status, _, _ in answers]
        assert set(statuses) == {200, 429} and statuses.count(200) > 40
        # Whoever is let in waits for at most those that were there before.
        assert max(seconds for status, _, seconds in answers if status == 200) < 60
        assert grown < 50_000, f"{grown} KiB"
        stats = served.service.runner.stats
        assert stats["running"] == stats["waiting"] == 0


@pytest.mark.slow
def test_many_malformed_bodies(opened):
    with serving(opened) as served:  # a real engine
        fuzz(served, 500, seed=1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        fuzz(served, 2000, seed=2)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 100_000, f"{grown} KiB"
        assert served.post("/v1/completions", model="tiny", prompt="a")[0] == 200
        assert threading.active_count() < 60
