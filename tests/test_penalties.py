"""What forbids and weighs tokens, against plain Python, one row at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.ops import penalties, sampling

penalize = jax.jit(penalties.penalize)
forbid_ngrams = jax.jit(penalties.forbid_ngrams)
forbid = jax.jit(penalties.forbid)
constrain = jax.jit(penalties.constrain)
top_logprobs = jax.jit(penalties.top_logprobs, static_argnames="k")


def penalties_for(*rows):
    """Penalties of rows (repetition, presence, frequency)."""
    repetition_B, presence_B, frequency_B = np.array(rows, np.float32).T
    zeros_B = np.zeros(len(rows), np.int32)
    return penalties.Penalties(repetition_B, presence_B, frequency_B, zeros_B, zeros_B)


def forbidden(logits_V):
    return np.flatnonzero(np.isneginf(logits_V)).tolist()


def test_openai_s_formula_counts_only_what_was_generated():
    logits_BV = np.array([[2.0, -1.0, 0.5, 3.0, -np.inf]], np.float32)
    counts_BV = np.array([[0, 1, 3, 0, 2]], np.int32)
    in_prompt_BV = np.array([[True, False, False, True, False]])
    after_BV = penalize(
        logits_BV, penalties_for((1, 0.5, 0.25)), counts_BV=counts_BV, in_prompt_BV=in_prompt_BV
    )
    expected = [2.0, -1.0 - 0.25 - 0.5, 0.5 - 3 * 0.25 - 0.5, 3.0, -np.inf]
    np.testing.assert_array_equal(after_BV[0], np.array(expected, np.float32))


def test_repetition_counts_prompt_and_text_once_and_comes_first():
    logits_BV = np.array([[2.0, -1.0, 0.5, 3.0, 0.0, -np.inf]], np.float32)
    counts_BV = np.array([[0, 5, 3, 0, 1, 1]], np.int32)
    in_prompt_BV = np.array([[True, True, False, False, False, False]])
    after_BV = penalize(
        logits_BV, penalties_for((2, 0, 1)), counts_BV=counts_BV, in_prompt_BV=in_prompt_BV
    )
    expected = [1.0, -2.0 - 5, 0.25 - 3, 3.0, -1.0, -np.inf]
    np.testing.assert_array_equal(after_BV[0], np.array(expected, np.float32))


def test_each_row_has_its_own_penalties_and_none_changes_nothing():
    logits_BV = np.random.default_rng(0).normal(0, 3, (3, 20)).astype(np.float32)
    counts_BV = np.arange(60, dtype=np.int32).reshape(3, 20) % 3
    rows = penalties_for((1, 0, 0), (1.5, 0, 0), (1, -1, 0))
    after_BV = penalize(
        logits_BV, rows, counts_BV=counts_BV, in_prompt_BV=np.zeros((3, 20), bool)
    )  # fmt: skip
    np.testing.assert_array_equal(after_BV[0], logits_BV[0])
    assert (np.abs(np.asarray(after_BV - logits_BV)[1]) > 0).tolist() == (counts_BV[1] > 0).tolist()
    np.testing.assert_allclose(after_BV[2], logits_BV[2] + (counts_BV[2] > 0), rtol=1e-6)


def plain_ngram_ends(history, n):
    """The tokens that would complete an n-gram of the history again."""
    if n == 0 or len(history) < n - 1:
        return []
    start = history[len(history) - n + 1 :]
    ends = {
        history[i + n - 1] for i in range(len(history) - n + 1) if history[i:][: n - 1] == start
    }
    return sorted(ends)


def test_no_ngram_of_a_row_comes_twice():
    # Few different tokens, all lengths and all n, so that matches of every length occur.
    S, V = 24, 3
    rows = [(n, length) for n in range(penalties.MAX_NGRAM + 1) for length in range(1, S + 1)]
    rng = np.random.default_rng(0)
    history_BS = rng.integers(0, V, (len(rows), S)).astype(np.int32)
    # Rows of long n get a period, else nothing would ever match, and some a break in it.
    for history_S, (n, _) in zip(history_BS, rows, strict=True):
        if n > 4:
            history_S[:] = np.tile(history_S[: n % 5 + 1], S)[:S]
            history_S[rng.integers(2 * S) % (2 * S - 1) // 2] = 0
    ngram_B, length_B = np.array(rows, np.int32).T
    left_BV = forbid_ngrams(np.zeros((len(rows), V), np.float32), history_BS, length_B, ngram_B)
    found = 0
    for (n, length), history_S, left_V in zip(rows, history_BS.tolist(), left_BV, strict=True):
        expected = plain_ngram_ends(history_S[:length], n)
        assert forbidden(left_V) == expected, (n, history_S[:length])
        found += (n > 4) * len(expected)
    assert found > 50


def test_ids_are_forbidden_in_the_rows_that_say_so():
    logits_BV = np.zeros((2, 5), np.float32)
    left_BV = forbid(logits_BV, np.array([1, 3, -1]), np.array([True, False]))
    assert [forbidden(row) for row in left_BV] == [[1, 3], []]
    left_BV = forbid(logits_BV, np.array([[0, -1], [4, 9]]), np.array([True, True]))
    assert [forbidden(row) for row in left_BV] == [[0], [4]]


def test_a_constraint_wins_where_the_other_rules_leave_nothing_of_it():
    raw_BV = np.array([[1.0, 2.0, 3.0, 4.0]] * 2, np.float32)
    allowed_BV = np.array([[True, True, False, False]] * 2)
    logits_BV = raw_BV - 1
    logits_BV[0, :2] = -np.inf
    left_BV = constrain(logits_BV, allowed_BV, raw_BV)
    expected = np.array([[1, 2, -np.inf, -np.inf], [0, 1, -np.inf, -np.inf]])
    np.testing.assert_array_equal(left_BV, expected)


@pytest.mark.parametrize("scale", [1, 30])
def test_top_logprobs_are_sorted_and_the_same_floats_as_the_drawn_token_s(scale):
    B, V, k = 8, 3000, 20
    logits_BV = np.random.default_rng(1).normal(0, scale, (B, V)).astype(np.float32)

    @jax.jit
    def step(logits_BV, keys_B, rules):
        ids_B = sampling.draw(logits_BV, keys_B, rules)
        top = penalties.top_logprobs(logits_BV, k)
        return ids_B, penalties.logprobs_of(logits_BV, ids_B[:, None])[:, 0], *top

    ones_B = np.ones(B, np.float32)
    rules = sampling.Rules(ones_B, np.full(B, k, np.int32), ones_B, 0 * ones_B)
    ids_B, logprob_B, ids_Bk, logprobs_Bk = step(
        logits_BV, jax.random.split(jax.random.key(0), B), rules
    )
    exact_BV = logits_BV - np.log(np.exp(logits_BV.astype(np.float64)).sum(-1, keepdims=True))
    np.testing.assert_array_equal(ids_Bk, np.argsort(-logits_BV, axis=-1)[:, :k])
    np.testing.assert_allclose(
        logprobs_Bk, np.take_along_axis(exact_BV, np.asarray(ids_Bk), 1), rtol=1e-6, atol=1e-5
    )
    for b in range(B):
        assert logprob_B[b] == logprobs_Bk[b][ids_Bk[b] == ids_B[b]][0]


def test_more_top_logprobs_than_tokens_gives_all():
    ids_Bk, logprobs_Bk = top_logprobs(jnp.zeros((2, 3)), k=5)
    assert ids_Bk.shape == logprobs_Bk.shape == (2, 3)
