"""Scores of models on tasks: likelihoods, choices, heads, generated text, programs."""

import dataclasses
import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from gpt_jax.data.tokenizers import byte_tokenizer, train_bpe
from gpt_jax.decode.text import Completion
from gpt_jax.evals import task_evaluation
from gpt_jax.evals.likelihood import choice_scores, continuation_logprobs, encode_pair
from gpt_jax.evals.record_batches import record_batches
from gpt_jax.evals.task_evaluation import evaluate_task
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.transformer import Transformer, forward, init_params
from gpt_jax.tasks.contract import Formatted, Task
from gpt_jax.tasks.data_spec import DataSpec
from gpt_jax.tasks.encode import encode
from gpt_jax.tasks.table import TASKS

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_id


def make(family="decoder", **changes):
    config = TransformerConfig(
        vocab_size=260, seq_len=48, num_layers=1, embed_dim=16, num_heads=2, family=family,
        positions="learned", **changes,
    )  # fmt: skip
    model = Transformer(config)
    shapes = nn.meta.unbox(jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0)))
    rng = np.random.default_rng(0)
    # Far from uniform, so that a token more or less shows.
    return model, jax.tree.map(
        lambda leaf: rng.normal(len(leaf.shape) == 1, 0.3, leaf.shape).astype(np.float32), shapes
    )


@pytest.fixture(scope="module")
def decoder():
    return make()


@pytest.fixture(scope="module")
def encoder_decoder():
    return make("encoder_decoder")


LENGTH = 48
_jitted = jax.jit(forward, static_argnums=0)


def outputs_of(model, params, tokens, source=None):
    """The outputs of one row alone, [len(tokens), ...]."""

    def padded(values):
        row = np.zeros((1, LENGTH), np.int32)
        row[0, : len(values)] = values
        return row

    batch = {
        "tokens": padded(tokens),
        "positions": padded(range(len(tokens))),
        "segment_ids": padded([1] * len(tokens)),
    }
    if source is not None:
        batch |= {
            "encoder_tokens": padded(source),
            "encoder_positions": padded(range(len(source))),
            "encoder_segment_ids": padded([1] * len(source)),
        }
    return np.asarray(_jitted(model, params, batch), np.float64)[0, : len(tokens)]


def logprobs_of(model, params, context, continuation):
    """log p of each of some ids, and whether they are the most likely ones."""
    if model.config.family == "encoder_decoder":
        logits = outputs_of(model, params, [EOS, *continuation[:-1]], [*context, EOS])
    else:
        logits = outputs_of(model, params, [EOS, *context, *continuation][-LENGTH - 1 : -1])
    logits = logits[-len(continuation) :]
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    best = logits.argmax(-1)
    return logits[np.arange(len(continuation)), continuation], bool((best == continuation).all())


@pytest.mark.parametrize("name", ["decoder", "encoder_decoder"])
def test_likelihoods_are_those_of_single_rows(name, request):
    model, params = request.getfixturevalue(name)
    pairs = [("a", " b"), ("", "xyz"), ("some longer context", "!"), ("a", " b"), ("a", "")]
    results = continuation_logprobs(model, params, TOKENIZER, pairs, batch_size=3)
    for (context, text), result in zip(pairs, results, strict=True):
        if not text:
            assert result == (0.0, 0, True)
            continue
        single, greedy = logprobs_of(model, params, list(context.encode()), list(text.encode()))
        assert result.logprob == pytest.approx(single.sum(), abs=1e-4)
        assert result.num_tokens == len(text) and result.is_greedy == greedy
    assert results[0] == results[3]


def test_the_most_likely_text_is_greedy(decoder):
    model, params = decoder
    ascii_only = (np.arange(260) >= 32) & (np.arange(260) < 127)
    params = {**params, "head": np.where(ascii_only, params["head"], 0)}
    text = ""
    for _ in range(3):
        pairs = [("ab", text + chr(code)) for code in range(32, 127)]
        results = continuation_logprobs(model, params, TOKENIZER, pairs, batch_size=95)
        text += chr(32 + int(np.argmax([result.logprob for result in results])))
    greedy = continuation_logprobs(model, params, TOKENIZER, [("ab", text), ("ab", text[:2] + "~")])
    assert logprobs_of(model, params, [97, 98], list(text.encode()))[1]
    assert greedy[0].is_greedy and not greedy[1].is_greedy


def test_long_contexts_lose_their_start(decoder):
    model, params = decoder
    context, text = "c" * 30 + "d" * 45, "end"
    (long,) = continuation_logprobs(model, params, TOKENIZER, [(context, text)])
    single, _ = logprobs_of(model, params, list(context.encode()), list(text.encode()))
    assert long.logprob == pytest.approx(single.sum(), abs=1e-4)
    (longer,) = continuation_logprobs(model, params, TOKENIZER, [("c", "e" * 60)])
    assert longer.num_tokens == 48


def test_white_space_belongs_to_the_continuation():
    merging = train_bpe(["the cat is good and the dog is bad"] * 30, 300)
    context, continuation = encode_pair(merging, "the cat is ", "good")
    assert merging.decode(context) == "the cat is" and merging.decode(continuation) == " good"
    assert encode_pair(merging, "the cat is", " good") == (context, continuation)
    assert context + continuation == merging.encode("the cat is good")
    assert encode_pair(merging, "", "good") == ([], merging.encode("good"))
    # No token is left for a continuation that the context's last token grows over.
    assert len(merging.encode("the cat")) <= len(merging.encode("the ca"))
    assert encode_pair(merging, "the ca", "t") == (merging.encode("the ca"), merging.encode("t"))


def test_choices_by_each_normalisation(decoder):
    model, params = decoder
    asked = [Formatted("Q:", " no", choices=(" no", " naïve"), label=0)]
    scores = choice_scores(model, params, TOKENIZER, asked, "A:")
    totals = [logprobs_of(model, params, b"Q:", list(c.encode()))[0] for c in asked[0].choices]
    alone = [logprobs_of(model, params, b"A:", list(c.encode()))[0] for c in asked[0].choices]
    behind = np.array([total.sum() for total in totals])
    expected = {
        "sum": behind,
        "token": behind / [3, 7],
        "character": behind / [2, 5],
        "byte": behind / [2, 6],
        "cue": behind - [a.sum() for a in alone],
    }
    for name, values in expected.items():
        assert scores[name][0] == pytest.approx(values, abs=1e-4)


def test_batches_hold_each_record_once():
    rng = np.random.default_rng(0)
    records = [
        {"tokens": np.full(n, i), "targets": np.zeros(n), "loss_mask": np.ones(n)}
        for i, n in enumerate(rng.integers(1, 40, 23))
    ]
    seen, shapes = [], set()
    for numbers, batch in record_batches(records, 4, most=40):
        shapes.add(batch["tokens"].shape)
        for row, number in enumerate(numbers):
            real = batch["segment_ids"][row] > 0
            assert (batch["tokens"][row][real] == number).all()
            assert real.sum() == len(records[number]["tokens"])
        assert not batch["loss_mask"][len(numbers) :].any()
        seen += numbers
    assert sorted(seen) == list(range(23)) and len(shapes) <= 4
    assert max(length for _, length in shapes) <= 40


# Tasks.


def write(folder, rows, splits=("train", "test")):
    for split in splits:
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


REVIEWS = [
    {"text": chr(99 + 2 * i) * (1 + 7 * i % 11), "label": ["negative", "positive"][i % 2]}
    for i in range(9)
]


def test_a_head_of_numbers(tmp_path):
    """A regression, whose outputs are what is scored: each goes to its own example."""
    model, params = make("encoder", head="sequence", num_classes=1, pool="mean")
    seen = {}

    def ask(row):
        return Formatted("", "", text=row["text"], label=float(len(row["text"])))

    def score(predictions, formatted):
        seen.setdefault("predictions", predictions)
        return {"error": float(np.mean([p - f.label for p, f in zip(predictions, formatted)]))}  # noqa: B905

    data = DataSpec(write(tmp_path, REVIEWS))
    task = Task("length", data, ask, score, "error", heads=("sequence",))
    scores = evaluate_task(model, params, TOKENIZER, task, "test", None, batch_size=4)
    formatted = task.formatted("test", None)
    records = [encode(f, TOKENIZER, model.config, LENGTH) for f in formatted]
    expected = [outputs_of(model, params, record["tokens"])[0] for record in records]
    assert seen["predictions"] == pytest.approx(expected, abs=1e-4)
    assert len({round(value, 3) for value in expected}) == 9
    assert scores["num_examples"] == 9
    errors = np.array(expected) - [f.label for f in formatted]
    assert scores["error"] == pytest.approx(errors.mean(), abs=1e-4)
    assert scores["error_stderr"] == pytest.approx(errors.std(ddof=1) / 3, abs=1e-3)
    assert scores["error_low"] < scores["error"] < scores["error_high"]
    with pytest.raises(ValueError, match=r"^num_shots: 2 needs model.head 'lm', not 'sequence'"):
        evaluate_task(model, params, TOKENIZER, task, "test", None, num_shots=2)


def test_a_head_of_words(tmp_path):
    model, params = make("encoder", head="tokens", num_classes=9)
    rows = [{"words": ["ab"] * n, "tags": ["B-PER"] * n} for n in (1, 4, 3)]
    task = TASKS["ner_en"].with_data(write(tmp_path, rows))
    scores = evaluate_task(model, params, TOKENIZER, task, "test", None, batch_size=2)
    assert scores["num_examples"] == 3 and 0 <= scores["word_accuracy"] < 1


def test_choices(decoder, tmp_path):
    model, params = decoder
    task = TASKS["sentiment_en"].with_data(write(tmp_path, REVIEWS))
    scores = evaluate_task(model, params, TOKENIZER, task, "test", None, batch_size=8)
    formatted = task.formatted("test", None)
    best = [
        int(np.argmax([r.logprob for r in continuation_logprobs(
            model, params, TOKENIZER, [(f.prompt, c) for c in f.choices])]))
        for f in formatted
    ]  # fmt: skip
    assert scores["accuracy"] == np.mean(
        [b == f.label for b, f in zip(best, formatted, strict=True)]
    )
    assert scores["accuracy_by_sum"] == scores["accuracy"] and "accuracy_by_cue" in scores
    # Two solved examples have no place in 48 tokens, and what had is told.
    few = evaluate_task(model, params, TOKENIZER, task, "test", None, batch_size=8, num_shots=2)
    assert 0 <= few["num_shots"] < 2


class Oracle:
    """Answers as a function of the prompt says; keeps what it was asked."""

    answers: dict = {}  # noqa: RUF012
    asked: list = []  # noqa: RUF012

    def __init__(self, model, params, tokenizer):
        pass

    def complete(self, prompts, params):
        Oracle.asked += [(prompt, params) for prompt in prompts]
        return [
            Completion(text, "stop", (), 1)
            for prompt in prompts
            for text in (Oracle.answers[prompt] * params.n)[: params.n]
        ]


@pytest.fixture
def oracle(monkeypatch):
    monkeypatch.setattr(task_evaluation, "Generator", Oracle)
    monkeypatch.setattr(Oracle, "asked", [])
    return Oracle


def test_written_answers_go_to_their_examples(oracle, decoder, tmp_path):
    model, params = decoder
    rows = [
        {"source": f"{'w' * (5 * i % 7)} {i}", "target": f"wort {i} und noch {i}"} for i in range(7)
    ]
    task = TASKS["translate_en_de"].with_data(write(tmp_path, rows))
    long = dataclasses.replace(model.config, seq_len=256)
    oracle.answers = {f.prompt: [f.target] for f in task.formatted("test", None)}
    scores = evaluate_task(
        Transformer(long), params, TOKENIZER, task, "test", None, batch_size=3, max_tokens=9
    )
    assert scores["bleu"] == pytest.approx(100) and "tok:13a" in scores["bleu_signature"]
    sampling = oracle.asked[0][1]
    assert (sampling.max_tokens, sampling.temperature, sampling.stop) == (9, 0.0, ("\n",))


@pytest.mark.parametrize(
    ("family", "seq_len", "source_len", "kept"),
    [
        ("decoder", 20, 0, "German:"),
        ("encoder_decoder", 20, 12, "English: one"[:11]),
    ],
)
def test_prompts_are_cut_as_in_training(family, seq_len, source_len, kept, oracle, tmp_path):
    rows = [{"source": "one two three four five", "target": "eins"}]
    task = TASKS["translate_en_de"].with_data(write(tmp_path, rows))
    (example,) = task.formatted("test", None)
    model = Transformer(dataclasses.replace(make(family)[0].config, seq_len=64))
    oracle.answers = type("Any", (), {"__getitem__": lambda self, key: [" eins"]})()
    evaluate_task(
        model, {}, TOKENIZER, task, "test", None,
        seq_len=seq_len, source_len=source_len, max_tokens=8,
    )  # fmt: skip
    ((prompt, _),) = oracle.asked
    record = encode(example, TOKENIZER, model.config, seq_len, source_len)
    if family == "decoder":
        assert prompt == example.prompt[-11:] and prompt.endswith(kept)
    else:
        assert prompt == kept == TOKENIZER.decode(record["encoder_tokens"])


def test_programs(oracle, decoder, tmp_path):
    model, params = decoder
    rows = [
        {
            "prompt": f"def {name}():\n    '{name}'\n",
            "canonical_solution": f"    return {number}\n",
            "test": f"def check(f):\n    assert f() == {number}\n",
            "entry_point": name,
        }
        for name, number in (("one", 1), ("two", 2))
    ]
    task = TASKS["human_eval"].with_data(write(tmp_path, rows))
    one, two = task.formatted("test", None)
    oracle.answers = {
        one.prompt: ["\n    return 2 - 1", "\n    return -1 + 2"],
        two.prompt: ["\n    return 0", "\n    return 1"],
    }

    def evaluate(**how):
        long = Transformer(dataclasses.replace(model.config, seq_len=256))
        return evaluate_task(long, params, TOKENIZER, task, "test", None, **how)

    scores = evaluate()
    assert "pass@1" not in scores and scores["parse_rate"] == 1.0 and scores["exact_match"] == 0.0
    scores = evaluate(allow_code_execution=True)
    assert scores["pass@1"] == 0.5 and scores["pass@1_low"] < 0.5
    scores = evaluate(allow_code_execution=True, num_samples=2, temperature=0.8)
    assert scores["pass@1"] == pytest.approx(0.5) and "pass@10" not in scores


def test_the_real_generator_answers(encoder_decoder, tmp_path):
    model, params = encoder_decoder
    rows = [{"source": "one", "target": "eins"}]
    task = TASKS["translate_en_de"].with_data(write(tmp_path, rows))
    scores = evaluate_task(model, params, TOKENIZER, task, "test", None, max_tokens=4)
    assert scores["num_examples"] == 1 and 0 <= scores["chrf"] <= 100


def test_what_cannot_be_evaluated(decoder, tmp_path):
    model, params = decoder
    silent = Task("talk", DataSpec("x"))
    with pytest.raises(ValueError, match="task 'talk' has no score beside its loss"):
        evaluate_task(model, params, TOKENIZER, silent, "test", None)
    task = TASKS["sentiment_en"].with_data(write(tmp_path, []))
    with pytest.raises(ValueError, match=r"^tasks.sentiment_en: split 'test' has no rows"):
        evaluate_task(model, params, TOKENIZER, task, "test", None)
    encoder, weights = make("encoder", head="tokens", num_classes=9)
    with pytest.raises(ValueError, match=r"^model.head: 'tokens' does not do"):
        evaluate_task(encoder, weights, TOKENIZER, task, "test", None)
    with pytest.raises(ValueError, match=r"^model.head: 'tokens' gives no likelihoods"):
        continuation_logprobs(encoder, weights, TOKENIZER, [("a", "b")])
