"""Clients of others against the server: openai 0.28.1 and lm-eval 0.4.13."""

import json
import os
import subprocess
import sys

import pytest
from serve_fixtures import ScriptedEngine, serving, tiny_model

from gpt_jax.evals.likelihood import continuation_logprobs
from gpt_jax.serve.settings import Settings

pytestmark = pytest.mark.peers

# As the articles call it; prints what it got.
_OLD_CLIENT = """
import base64, json, sys, openai
openai.api_base, openai.api_key = sys.argv[1] + "/v1", "sk-none"
assert openai.__version__ == "0.28.1", openai.__version__
found = {}
answer = openai.Completion.create(
    engine="davinci", prompt="Once", max_tokens=5, n=2, stop=None, temperature=0.5)
found["texts"] = [choice["text"] for choice in answer["choices"]]
found["first"] = answer.choices[0].text.strip()
found["usage"] = answer["usage"]["total_tokens"]
found["model"] = openai.Completion.create(model="tiny", prompt="a", stop=["l"]).choices[0].text
parts = openai.Completion.create(engine="tiny", prompt="a", stream=True, max_tokens=5)
found["stream"] = "".join(part["choices"][0]["text"] for part in parts)
scores = openai.Completion.create(engine="tiny", prompt="ab", logprobs=2, echo=True, max_tokens=1)
found["scores"] = scores["choices"][0]["logprobs"]
turns = [{"role": "user", "content": "hi"}]
chat = openai.ChatCompletion.create(model="tiny", messages=turns, max_tokens=5)
found["chat"] = chat["choices"][0]["message"]["content"]
deltas = openai.ChatCompletion.create(model="tiny", messages=turns, max_tokens=5, stream=True)
found["deltas"] = "".join(d["choices"][0]["delta"].get("content", "") for d in deltas)
for name in ("model", "engine"):
    vector = openai.Embedding.create(**{name: "tiny"}, input=["ab", "c"])["data"][0]["embedding"]
    found[f"embedding_{name}"] = len(vector)
found["models"] = [model["id"] for model in openai.Model.list()["data"]]
found["engines"] = [(e["id"], e["ready"]) for e in openai.Engine.list()["data"]]
found["one"] = openai.Model.retrieve("tiny")["id"]
errors = {}
for name, call in {
    "InvalidRequestError": lambda: openai.Completion.create(engine="tiny", prompt="a", n=0),
    "unknown": lambda: openai.Completion.create(engine="other", prompt="a"),
    "long": lambda: openai.Completion.create(engine="tiny", prompt="a", max_tokens=5000),
}.items():
    try:
        call()
    except openai.error.InvalidRequestError as error:
        errors[name] = [error.param, error.code, error.http_status]
found["errors"] = errors
print(json.dumps(found))
"""


def test_the_client_of_the_articles():
    folder = os.environ.get("GPT_JAX_OPENAI_028")
    if not folder:
        pytest.skip("GPT_JAX_OPENAI_028 names no folder with openai 0.28.1")

    def make_engine():
        return ScriptedEngine(lambda request, sample: list(b"hello world"))

    with serving(tiny_model(), Settings(aliases=("davinci",)), make_engine) as served:
        environment = {**os.environ, "PYTHONPATH": folder}
        ran = subprocess.run(
            [sys.executable, "-c", _OLD_CLIENT, served.url], env=environment, text=True,
            capture_output=True, timeout=120,
        )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["texts"] == ["hello", "hello"] and found["first"] == "hello"
    assert found["usage"] == 5 + 2 * 5
    assert found["model"] == "he" and found["stream"] == "hello"
    assert found["chat"] == found["deltas"] == "hello"
    assert found["scores"]["tokens"] == ["a", "b", "h"]
    assert found["embedding_model"] == found["embedding_engine"] == 32
    assert found["models"] == ["tiny", "davinci"] and found["one"] == "tiny"
    assert found["engines"] == [["tiny", True], ["davinci", True]]
    assert found["errors"] == {
        "InvalidRequestError": ["n", "invalid_value", 400],
        "unknown": ["model", "model_not_found", 404],
        "long": ["prompt", "context_length_exceeded", 400],
    }


_TASK = """
task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}} is"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
_ROWS = [
    {"question": "the cat", "choices": ["black", "a dog", "42"], "answer": 0},
    {"question": "a café in Zürich", "choices": ["open", "zu", "été"], "answer": 1},
    {"question": "x", "choices": ["y", "yy", "yyyyyyyyyyyyyyyy"], "answer": 2},
]


@pytest.mark.parametrize("as_text", [True, False], ids=["texts", "ids"])
def test_lm_eval_finds_what_our_evaluator_finds(tmp_path, monkeypatch, as_text):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, _ROWS)))
    (tmp_path / "tiny_choices.yaml").write_text(_TASK.format(rows=rows))
    opened = tiny_model()
    with serving(opened) as served:
        results = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={
                "model": "tiny", "base_url": f"{served.url}/v1/completions", "max_length": 128,
                "tokenized_requests": not as_text, "max_retries": 1,
            },
            tasks=["tiny_choices"], log_samples=True, bootstrap_iters=0,
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        )  # fmt: skip
    found = {}
    for sample in results["samples"]["tiny_choices"]:
        for argument, response in zip(sample["arguments"], sample["filtered_resps"], strict=True):
            found[tuple(argument)] = response
    pairs = [(f"{row['question']} is", f" {choice}") for row in _ROWS for choice in row["choices"]]
    assert set(found) == set(pairs)
    ours = continuation_logprobs(opened.model, opened.params, opened.tokenizer, pairs)
    for pair, expected in zip(pairs, ours, strict=True):
        logprob, is_greedy = found[pair]
        if as_text:  # behind the model's prefix, as our evaluator reads them
            assert logprob == pytest.approx(expected.logprob, rel=1e-6)
            assert bool(is_greedy) == expected.is_greedy
        else:
            assert logprob < 0 and logprob != expected.logprob
