"""The measure of next lines: which prompts, what counts as a statement, and its figures."""

import functools
import json
import types

import flax.linen as nn
import jax
import numpy as np
import pytest

from gpt_jax.data.tokenizers import byte_tokenizer
from gpt_jax.decode.text import Completion
from gpt_jax.evals import python_lines, run_evaluation
from gpt_jax.evals.python_lines import score_python_lines
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.transformer import Transformer, forward, init_params
from gpt_jax.runs.ledger import _evaluations
from gpt_jax.tasks.python_lines import LinePrompt, is_statement, line_prompts, written_line

TOKENIZER = byte_tokenizer()
MODULE = '''
"""A module."""
import os

class Box:
    @property
    def full(self):
        """Whether nothing more goes in."""
        if self.size:
            return self.limit <= self.size
        return False

def text():
    return """
a line that begins before the function's own
"""

def short(a): return a
'''


@functools.cache
def model_and_params():
    model = Transformer(
        TransformerConfig(vocab_size=257, seq_len=128, num_layers=1, embed_dim=16, num_heads=2)
    )
    shapes = nn.meta.unbox(jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0)))
    rng = np.random.default_rng(0)
    return model, jax.tree.map(
        lambda leaf: rng.normal(len(leaf.shape) == 1, 0.3, leaf.shape).astype(np.float32), shapes
    )


def test_prompts_are_whole_lines_of_a_function():
    full = MODULE.split("    @property\n")[1].split("\n\ndef text")[0]
    lines = [line[4:] for line in full.split("\n")]
    seen = set()
    for number in range(12):  # another name is another hash, and another line
        text = MODULE.replace("full", f"full{number}")
        for one in line_prompts([text, None, "no Python at all (", ""], 10):
            if "text" in one.prompt:
                assert one.line == '    return """'
                continue
            own = [line.replace("full", f"full{number}") for line in lines]
            cut = own.index(one.line)
            assert one.prompt == "\n".join(own[:cut])
            seen.add(cut)
    assert seen == {2, 3, 4}  # neither the header nor the docstring
    assert not line_prompts(["x = 1\n", "def f(:\n"], 10)
    assert not line_prompts([MODULE], 10, room=40)


def test_the_same_prompts_for_every_model():
    texts = [MODULE.replace("full", f"full{i}") for i in range(30)]
    found = line_prompts(texts, 100)
    assert found == line_prompts(reversed(texts), 100) == line_prompts(texts * 2, 100, room=9999)
    assert line_prompts(texts, 7) == found[:7] and len(found) > 25
    assert {one.difficulty for one in found} == {"short", "medium"}
    assert LinePrompt("def f():", "    return " + "x" * 30).difficulty == "long"


@pytest.mark.parametrize(
    ("continuation", "counts"),
    [
        ("\n    return a\n", True),
        ("\n\n    b = a +\n", False),
        ("\n    if a:\n", True),
        ("\n    try:\n", True),
        ("\n    else:\n", False),
        ("\nx = f(\n", False),
        ("\n  return a\n nonsense (", True),  # what is behind the line does not enter
        ("\n    return a", False),  # no line end: it may go on
        ("\n    # a comment\n", False),
        ("\n   \n", False),
        ("", False),
        (" + 1\n    return a\n", True),  # goes on with the prompt's last line
        ("\n    \0\n", False),
    ],
)
def test_what_counts_as_a_statement(continuation, counts):
    prompt = "def f(a):" if continuation != " + 1\n    return a\n" else "def f(a):\n    b = a"
    assert is_statement(prompt, continuation) == counts
    assert not is_statement("def f(a):\n    b = a", "\n    # a comment\n")
    assert is_statement("def f():\n    if a:\n        pass", "\n    else:\n")


def test_a_written_line_ends_where_something_was_written():
    assert written_line("\n  \n  a b\n c\n") == "\n  \n  a b\n"
    assert written_line(" c\nd") == " c\n"
    assert written_line("\n\n") is None and written_line("a") is None


def test_the_logprob_is_that_of_the_line_and_its_line_ends():
    model, params = model_and_params()
    prompts = line_prompts([MODULE.replace("full", f"full{i}") for i in range(3)], 4, room=128)
    figures = score_python_lines(model, params, TOKENIZER, prompts)
    logprobs = []
    for one in prompts:
        given = [TOKENIZER.eos_id, *one.prompt.encode()]
        ids = [*given, *f"\n{one.line}\n".encode()]
        tokens = np.array([ids + [0] * (128 - len(ids))], np.int32)
        batch = {
            "tokens": tokens,
            "positions": np.arange(128, dtype=np.int32)[None],
            "segment_ids": np.ones_like(tokens),
        }
        logits = np.asarray(jax.jit(forward, static_argnums=0)(model, params, batch))[0]
        logits = logits.astype(np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        places = np.arange(len(given), len(ids))
        logprobs.append(logits[places - 1, np.array(ids)[places]].sum())
    assert figures["next_line_logprob"] == pytest.approx(np.mean(logprobs), rel=1e-4)
    assert figures["num_prompts"] == len(prompts) and figures["next_line_exact"] == 0.0
    assert 0.0 <= figures["parse_rate"] < 0.5  # bytes at random
    assert figures == score_python_lines(model, params, TOKENIZER, prompts)


def test_samples_are_judged_behind_their_own_prompt(monkeypatch):
    model, params = model_and_params()
    prompts = [LinePrompt("def f():", "    return 1"), LinePrompt("def longer(a):\n  b = a", "  c")]

    class Writer:
        def __init__(self, *arguments, **more):
            pass

        def complete(self, asked, sampling):
            texts = {"def f():": "\n    return 1\n", prompts[1].prompt: "\n    indented\n"}
            return [Completion(texts[p], "stop", (), 1) for p in asked for _ in range(sampling.n)]

    monkeypatch.setattr(python_lines, "Generator", Writer)
    rates = python_lines._parse_rates(model, params, TOKENIZER, prompts)
    assert rates.tolist() == [1.0, 0.0]
    figures = score_python_lines(model, params, TOKENIZER, prompts)
    assert figures["parse_rate"] == 0.5
    assert figures["parse_rate_stderr"] == pytest.approx(0.5)


def test_evaluate_adds_a_row_that_the_ledger_reads(tmp_path, monkeypatch):
    model, params = model_and_params()
    config = types.SimpleNamespace(
        model=model.config, tasks=types.SimpleNamespace(names=()), data=None
    )
    opened = types.SimpleNamespace(
        config=config, model=model, params=params, tokenizer=TOKENIZER, step=3, workdir=tmp_path
    )
    monkeypatch.setattr(run_evaluation, "open_run", lambda workdir, step: opened)
    texts = [MODULE.replace("full", f"full{i}") for i in range(3)]
    monkeypatch.setattr(run_evaluation, "open_source", lambda *arguments: texts)
    figures = run_evaluation.python_lines(tmp_path, None, tmp_path, limit=2)
    assert figures["num_prompts"] == 2
    row = json.loads((tmp_path / "evaluations.jsonl").read_text())
    assert row == {"step": 3, "task": "python_lines", **figures}
    assert _evaluations(tmp_path / "evaluations.jsonl") == {
        f"python_lines/{name}": value for name, value in figures.items()
    }

    class Prose(list):
        label = "novels"

    monkeypatch.setattr(run_evaluation, "open_source", lambda *arguments: Prose(["Once upon"]))
    with pytest.raises(ValueError, match=r"^--tasks: 'python_lines': the validation split of 'nov"):
        run_evaluation.python_lines(tmp_path, None, tmp_path)
