"""Sampling rules against plain numpy, one token at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.decode.sampling_params import SamplingParams
from gpt_jax.ops import sampling

restrict = jax.jit(sampling.restrict, static_argnames="kind")
draw = jax.jit(sampling.draw, static_argnames="kind")


def rules_for(*rows):
    """Rules of rows (temperature, top_k, top_p, min_p)."""
    temperature_B, top_k_B, top_p_B, min_p_B = np.array(rows, np.float64).T
    return sampling.Rules(
        temperature_B.astype(np.float32), top_k_B.astype(np.int32),
        top_p_B.astype(np.float32), min_p_B.astype(np.float32),
    )  # fmt: skip


def plain_probabilities(logits_V, temperature, top_k, top_p, min_p):
    """The rules, one after the other on sorted tokens, in float64."""
    logits_V = np.asarray(logits_V, np.float64) / temperature
    kept = sorted(range(len(logits_V)), key=lambda i: -logits_V[i])
    if top_k:
        kept = [i for i in kept if logits_V[i] >= logits_V[kept[min(top_k, len(kept)) - 1]]]
    if top_p < 1:
        weights = np.exp(logits_V[kept] - logits_V.max())
        total, number = 0.0, 0
        while total < top_p:
            total += weights[number] / weights.sum()
            number += 1
        kept = kept[:number]
    kept = [i for i in kept if np.exp(logits_V[i] - logits_V.max()) >= min_p]
    probabilities_V = np.zeros(len(logits_V))
    probabilities_V[kept] = np.exp(logits_V[kept] - logits_V.max())
    return probabilities_V / probabilities_V.sum()


def test_the_most_likely_token_is_that_of_argmax():
    rng = np.random.default_rng(0)
    for size in (1, 63, 64, 65, 1000):
        # Few values, so that many tie with the largest.
        logits_BCV = rng.integers(0, 6, (2, 3, size)).astype(np.float32)
        logits_BCV[0, 0], logits_BCV[1, 1, size // 2 :] = -np.inf, -np.inf
        got_BC = sampling.most_likely(logits_BCV)
        assert got_BC.dtype == jnp.int32
        np.testing.assert_array_equal(got_BC, logits_BCV.argmax(-1))


ROWS = [
    (1.0, 0, 1.0, 0.0), (0.7, 0, 1.0, 0.0), (1.0, 5, 1.0, 0.0), (1.3, 1, 1.0, 0.0),
    (1.0, 999, 1.0, 0.0), (1.0, 0, 0.8, 0.0), (0.5, 0, 0.3, 0.0), (2.0, 0, 0.999, 0.0),
    (1.0, 0, 1e-6, 0.0), (1.0, 0, 1.0, 0.1), (1.0, 0, 1.0, 1.0), (0.8, 10, 0.6, 0.05),
    (1.5, 4, 0.95, 0.0), (1.5, 20, 0.9, 0.3),
]  # fmt: skip


def test_the_rules_leave_what_plain_numpy_leaves():
    logits_BV = np.random.default_rng(0).normal(0, 2, (len(ROWS), 50)).astype(np.float32)
    restricted_BV = restrict(logits_BV, rules_for(*ROWS))
    probabilities_BV = np.asarray(jax.nn.softmax(restricted_BV, axis=-1))
    for row, logits_V, probabilities_V in zip(ROWS, logits_BV, probabilities_BV, strict=True):
        expected_V = plain_probabilities(logits_V, *row)
        np.testing.assert_array_equal(probabilities_V > 0, expected_V > 0, err_msg=str(row))
        np.testing.assert_allclose(probabilities_V, expected_V, atol=1e-6, err_msg=str(row))


def test_top_k_keeps_all_that_tie_with_the_kth():
    logits_BV = np.array([[1.0, 3.0, 2.0, 2.0, 0.0]], np.float32)
    left_BV = restrict(logits_BV, rules_for((1.0, 2, 1.0, 0.0)))
    assert np.isfinite(left_BV).tolist() == [[False, True, True, True, False]]


def test_top_p_counts_only_what_top_k_left():
    # Of 5 equal tokens and one likelier, top-k 1 leaves one; 0.9 of what is left is that one.
    logits_BV = np.array([[0.1, 0, 0, 0, 0, 0]], np.float32)
    left_BV = restrict(logits_BV, rules_for((1.0, 1, 0.9, 0.0)))
    assert np.isfinite(left_BV).sum() == 1


@pytest.mark.parametrize("neighbours", [False, True])
def test_numbers_of_all_magnitudes_and_neighbours_are_told_apart(neighbours):
    logits_BV = -np.logspace(-37, 37, 60, dtype=np.float32)[None]
    if neighbours:
        logits_BV = -(1 + np.arange(60, dtype=np.float32) * np.finfo(np.float32).eps)[None]
        logits_BV[:, 0] = 0
    for k in (1, 2, 30, 59, 60):
        left_BV = restrict(logits_BV, rules_for((1.0, k, 1.0, 0.0)))
        assert np.isfinite(left_BV)[0].tolist() == [True] * k + [False] * (60 - k)


def test_ranks_are_computed_only_for_top_k_and_top_p():
    rows = [(0.0, 5, 0.5, 0.0), (0.7, 0, 1.0, 0.2)]
    logits_BV = np.random.default_rng(0).normal(0, 2, (2, 50)).astype(np.float32)
    keys_B = jax.random.split(jax.random.key(0), 2)
    rules = rules_for(*rows)
    assert sampling.kind_for(rules) == "unranked"
    assert sampling.kind_for(rules_for(rows[0])) == "greedy"
    assert sampling.kind_for(rules_for(rows[0], (1.0, 0, 0.5, 0.0))) == "ranked"
    fast_B = draw(logits_BV, keys_B, rules, kind="unranked")
    np.testing.assert_array_equal(fast_B, draw(logits_BV, keys_B, rules, kind="ranked"))


def test_draws_follow_the_probabilities():
    logits_V = np.array([2.0, 1.0, 0.0, -1.0, -np.inf], np.float32)
    number, row = 4000, (0.8, 3, 1.0, 0.0)
    drawn_B = draw(
        jnp.broadcast_to(logits_V, (number, 5)), jax.random.split(jax.random.key(1), number),
        rules_for(*[row] * number),
    )  # fmt: skip
    frequency_V = np.bincount(drawn_B, minlength=5) / number
    np.testing.assert_allclose(frequency_V, plain_probabilities(logits_V, *row), atol=0.03)


def test_at_temperature_zero_and_near_it_the_argmax_is_drawn():
    logits_BV = np.random.default_rng(0).normal(0, 30, (9, 50)).astype(np.float32)
    logits_BV[::3] /= 30  # the rows at zero: a draw from them would hardly ever be the argmax
    keys_B = jax.random.split(jax.random.key(0), 9)
    rules = rules_for(*[(temperature, 0, 0.99, 0.0) for temperature in (0.0, 1e-38, 1e-6)] * 3)
    np.testing.assert_array_equal(draw(logits_BV, keys_B, rules), logits_BV.argmax(-1))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"max_tokens": -1}, "max_tokens: -1 is not an integer from 0 to 2147483647"),
        ({"max_tokens": 2**31}, "max_tokens: 2147483648 is not an integer from 0 to 2147483647"),
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens: 5 is not .* 0 to max_tokens 4"),
        ({"temperature": -1}, "temperature: -1 is not a number of at least 0"),
        ({"temperature": float("nan")}, "temperature: nan is not a number"),
        ({"temperature": 10**400}, "temperature: 10* is not a number"),
        ({"top_k": -1}, "top_k: -1 is not an integer from 0"),
        ({"top_k": 2.5}, "top_k: 2.5 is not an integer"),
        ({"top_k": 2**31}, "top_k: 2147483648 is not an integer from 0 to 2147483647"),
        ({"top_p": 0.0}, "top_p: 0.0 is not a number above 0 and at most 1"),
        ({"min_p": 1.5}, "min_p: 1.5 is not a number from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty: 0 is not a number from 0.0001 to 10000"),
        ({"presence_penalty": -1e9}, "presence_penalty: -.* is not a number from -10000 to 10000"),
        ({"frequency_penalty": "2"}, "frequency_penalty: '2' is not a number"),
        ({"logit_bias": ((1, 1e39),)}, "logit_bias: .* is not a tuple of pairs of an id and"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias: .* is not a tuple of pairs of an id and"),
        ({"logit_bias": {1: 1.0}}, "logit_bias: .* is not a tuple of pairs of an id and"),
        ({"no_repeat_ngram": 17}, "no_repeat_ngram: 17 is not an integer from 0 to 16"),
        ({"n": True}, "n: True is not an integer from 1"),
        ({"stop": "END"}, "stop: 'END' is not a tuple of non-empty strings"),
        ({"stop": ("",)}, "stop: .* is not a tuple of non-empty strings"),
        ({"stop_ids": (2**31,)}, "stop_ids: .* is not a tuple of ids"),
        ({"ignore_eos": 1}, "ignore_eos: 1 is not true or false"),
        ({"top_logprobs": 21}, "top_logprobs: 21 is not an integer from 0 to 20"),
        ({"seed": 2**32}, "seed: 4294967296 is not an integer from 0 to 4294967295"),
    ],
)
def test_values_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**values)
