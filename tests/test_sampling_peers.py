"""Sampling rules against transformers' own processors, and draws against its generate."""

import jax
import numpy as np
import pytest

from gpt_jax.ops import penalties, sampling

pytestmark = pytest.mark.peers

V, EOS = 40, 3


def processors():
    """transformers' module; imported late, so that collecting needs no torch."""
    return pytest.importorskip("transformers.generation.logits_process")


def theirs(logits_BV, history, rules, prompt_length):
    """transformers' processors in the order of SamplingParams' docstring, f32[B, V]."""
    import torch

    make = processors()
    chain = []
    if rules.get("bias"):
        bias = [[[token_id], value] for token_id, value in rules["bias"]]
        chain.append(make.SequenceBiasLogitsProcessor(bias))
    if "repetition" in rules:
        chain.append(make.RepetitionPenaltyLogitsProcessor(rules["repetition"]))
    if "ngram" in rules:
        chain.append(make.NoRepeatNGramLogitsProcessor(rules["ngram"]))
    if "min_tokens" in rules:
        minimum = rules["min_tokens"]
        chain.append(make.MinNewTokensLengthLogitsProcessor(prompt_length, minimum, EOS))
    if "temperature" in rules:
        chain.append(make.TemperatureLogitsWarper(rules["temperature"]))
    if "top_k" in rules:
        chain.append(make.TopKLogitsWarper(rules["top_k"]))
    if "top_p" in rules:
        chain.append(make.TopPLogitsWarper(rules["top_p"]))
    if "min_p" in rules:
        chain.append(make.MinPLogitsWarper(rules["min_p"]))
    ids, scores = torch.tensor(history), torch.tensor(logits_BV)
    for process in chain:
        scores = process(ids, scores)
    return scores.numpy()


@jax.jit
def _ours(raw_BV, bias_V, rows, history_BS, length_B, counts_BV, in_prompt_BV, short_B, rules):
    logits_BV = raw_BV + bias_V
    logits_BV = penalties.penalize(
        logits_BV, rows, counts_BV=counts_BV, in_prompt_BV=in_prompt_BV
    )  # fmt: skip
    logits_BV = penalties.forbid_ngrams(logits_BV, history_BS, length_B, rows.ngram_B)
    logits_BV = penalties.forbid(logits_BV, np.array([EOS]), short_B)
    return logits_BV, sampling.restrict(logits_BV, rules)


def ours(logits_BV, history, rules, prompt_length):
    """Our rules in the same order: logits before temperature, and what may be drawn."""
    B, width = logits_BV.shape
    history_BS = np.asarray(history, np.int32)
    length = history_BS.shape[1]
    bias_V = np.zeros(width, np.float32)
    for token_id, value in rules.get("bias", ()):
        bias_V[token_id] += value
    generated = history_BS[:, prompt_length:]
    counts_BV = np.stack([np.bincount(row, minlength=width) for row in generated])
    prompt = history_BS[:, :prompt_length]
    in_prompt_BV = np.stack([np.bincount(row, minlength=width) > 0 for row in prompt])

    def full(name, default, dtype=np.float32):
        return np.full(B, rules.get(name, default), dtype)

    rows = penalties.Penalties(
        full("repetition", 1), full("presence", 0), full("frequency", 0),
        full("ngram", 0, np.int32), full("min_tokens", 0, np.int32),
    )  # fmt: skip
    draws = sampling.Rules(
        full("temperature", 1), full("top_k", 0, np.int32), full("top_p", 1), full("min_p", 0)
    )
    padded_BS = np.pad(history_BS, ((0, 0), (0, 5)), constant_values=7)
    left = _ours(
        logits_BV, bias_V, rows, padded_BS, np.full(B, length, np.int32),
        counts_BV.astype(np.int32), in_prompt_BV,
        length - prompt_length < rows.min_length_B, draws,
    )  # fmt: skip
    return [np.asarray(part) for part in left]


ALONE = [
    {"bias": ((1, 2.5), (30, -100.0))}, {"repetition": 1.7}, {"repetition": 0.6}, {"ngram": 1},
    {"ngram": 2}, {"ngram": 3}, {"min_tokens": 9}, {"min_tokens": 8},  # 8 are generated
    {"temperature": 0.4},
    {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2},
]  # fmt: skip
ALL = {
    "bias": ((1, 2.5), (30, -100.0)), "repetition": 1.3, "ngram": 2, "min_tokens": 9,
    "temperature": 0.7, "top_k": 12, "top_p": 0.9, "min_p": 0.02,
}  # fmt: skip


@pytest.mark.parametrize("rules", [*ALONE, ALL], ids=str)
def test_each_rule_and_all_in_order_are_as_in_transformers(rules):
    rng = np.random.default_rng(0)
    logits_BV = rng.normal(0, 3, (64, V)).astype(np.float32)
    history = rng.integers(0, 6, (64, 14))  # few different tokens: n-grams come again
    expected_BV = theirs(logits_BV, history, rules, prompt_length=6)
    left_BV = ours(logits_BV, history, rules, prompt_length=6)[1]
    np.testing.assert_array_equal(np.isneginf(left_BV), np.isneginf(expected_BV))
    # Ours are from the most likely token on: a constant a row that a softmax does not see.
    expected_BV = expected_BV - expected_BV.max(-1, keepdims=True)
    np.testing.assert_allclose(left_BV, expected_BV, rtol=1e-5, atol=1e-5)


def test_openai_s_penalties_come_between_repetition_and_ngrams():
    # transformers has none: its chain up to there, the formula by hand, then the rest of it.
    rng = np.random.default_rng(1)
    logits_BV = rng.normal(0, 3, (64, V)).astype(np.float32)
    history = rng.integers(0, 6, (64, 14))
    before = {"bias": ((1, 2.5),), "repetition": 1.3}
    after = {"ngram": 2, "min_tokens": 9, "temperature": 0.7, "top_p": 0.9}
    counts_BV = np.stack([np.bincount(row[6:], minlength=V) for row in history])
    expected_BV = theirs(logits_BV, history, before, prompt_length=6)
    expected_BV = expected_BV - np.float32(0.75) * counts_BV - np.float32(0.5) * (counts_BV > 0)
    expected_BV = theirs(expected_BV.astype(np.float32), history, after, prompt_length=6)
    expected_BV = expected_BV - expected_BV.max(-1, keepdims=True)
    rules = before | after | {"frequency": 0.75, "presence": 0.5}
    left_BV = ours(logits_BV, history, rules, prompt_length=6)[1]
    np.testing.assert_array_equal(np.isneginf(left_BV), np.isneginf(expected_BV))
    np.testing.assert_allclose(left_BV, expected_BV, rtol=1e-5, atol=1e-5)


def chi_square_limit(freedom):
    """What a chi-square of so many degrees exceeds once in 1,000 (Wilson and Hilferty's cube)."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 3.09 * np.sqrt(spread)) ** 3


SAMPLED = [
    {"temperature": 0.8}, {"top_k": 4}, {"top_p": 0.75}, {"min_p": 0.3},
    {"temperature": 1.4, "top_k": 9, "top_p": 0.9, "min_p": 0.1, "repetition": 1.5, "ngram": 2},
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny_gpt2():
    """A random GPT-2 over 12 tokens whose distributions are far from uniform."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=12, n_positions=16, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(4.0)
        model.transformer.wte.weight.mul_(4.0)
    return model


def gpt2_logits(model, histories):
    import torch

    with torch.no_grad():
        return model(torch.tensor(np.asarray(histories))).logits[:, -1].numpy()


def draw_two(model, prompt, rules, number):
    """Two tokens drawn by our rules from the peer's logits, and their exact probabilities."""
    width = 12
    histories = [prompt, *([*prompt, token] for token in range(width))]
    keys = jax.random.split(jax.random.key(5), (2, number))
    firsts, left_first = ours(gpt2_logits(model, histories[:1]), histories[:1], rules, len(prompt))
    seconds, left_second = ours(
        gpt2_logits(model, histories[1:]), histories[1:], rules, len(prompt)
    )
    exact = np.asarray(jax.nn.softmax(left_first)[0, :, None] * jax.nn.softmax(left_second))
    draws = sampling.Rules(*(
        np.full(number, rules.get(name, default), dtype)
        for name, default, dtype in (
            ("temperature", 1, np.float32), ("top_k", 0, np.int32),
            ("top_p", 1, np.float32), ("min_p", 0, np.float32),
        )
    ))  # fmt: skip
    draw = jax.jit(sampling.draw, static_argnames="kind")
    kind = sampling.kind_for(draws)
    first = np.asarray(draw(np.repeat(firsts, number, 0), keys[0], draws, kind=kind))
    second = np.asarray(draw(seconds[first], keys[1], draws, kind=kind))
    return np.bincount(first * width + second, minlength=width**2), exact.ravel()


@pytest.mark.parametrize("rules", SAMPLED, ids=str)
def test_two_drawn_tokens_are_distributed_as_in_transformers_generate(tiny_gpt2, rules):
    import torch

    number, prompt = 6000, [5, 2, 5, 2]
    counts, exact = draw_two(tiny_gpt2, prompt, rules, number)
    names = {
        "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
        "repetition": "repetition_penalty", "ngram": "no_repeat_ngram_size",
    }  # fmt: skip
    torch.manual_seed(0)
    written = tiny_gpt2.generate(
        torch.tensor([prompt]), attention_mask=torch.ones((1, 4), dtype=torch.long),
        do_sample=True, max_new_tokens=2, num_return_sequences=number,
        **({"top_k": 0} | {names[name]: value for name, value in rules.items()}),
    ).numpy()[:, len(prompt) :]  # fmt: skip
    their_counts = np.bincount(written[:, 0] * 12 + written[:, 1], minlength=144)
    assert counts[exact == 0].sum() == their_counts[exact == 0].sum() == 0
    # Cells that are too rare for the test count as one.
    rare = exact * number < 8

    def cells(values):
        return np.append(values[~rare], values[rare].sum())

    expected = cells(exact) * number
    for drawn in (cells(counts), cells(their_counts)):
        statistic = ((drawn - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
        assert statistic < chi_square_limit(len(expected) - 1)
    both = cells(counts) + cells(their_counts)
    apart = ((cells(counts) - cells(their_counts)) ** 2 / np.maximum(both, 1)).sum()
    assert apart < chi_square_limit(len(both) - 1)
