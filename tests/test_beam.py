"""Beam search against whole forward passes: a slow one by its definition, and every sequence."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax import trees
from gpt_jax.decode.beam import beam_search
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.transformer import Transformer, init_params

VOCAB, SEQ_LEN, NUM_BEAMS, EOS = 13, 24, 3, (4, 7)
# The last 3 rows of the embedding only pad it.
CONFIG = TransformerConfig(
    vocab_size=VOCAB + 3, seq_len=SEQ_LEN, num_layers=2, embed_dim=16, num_heads=2,
    attention="einsum", positions="learned",
)  # fmt: skip
ENCODER_DECODER = dataclasses.replace(
    CONFIG, family="encoder_decoder", start_id=2, positions="relative"
)
PROMPTS = [[3], [5, 1, 8, 1, 5, 9, 2, 6, 5], [10, 11, 12]]


@functools.cache
def params_for(config):
    """Parameters that make unequal logits."""
    boxed = jax.eval_shape(lambda: init_params(Transformer(config), jax.random.key(0)))
    rng = np.random.default_rng(2)

    def draw(path, leaf):
        one_dim = path.endswith(("bias", "scale"))
        std = 0.3 if one_dim else config.embed_dim**-0.5
        return rng.normal(1.0 if path.endswith("scale") else 0.0, std, leaf.shape)

    drawn = trees.map_named(draw, nn.unbox(boxed))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), drawn)


@functools.cache
def logprobs_for(config):
    """f(prompt, ids) -> log-probabilities of each next token, without a cache or a batch."""

    @jax.jit
    def apply(tokens_1T, source_1S, segments_1S):
        inputs = {}
        if config.family == "encoder_decoder":
            inputs = {"encoder_tokens": source_1S, "encoder_segment_ids": segments_1S}
        return Transformer(config).apply({"params": params_for(config)}, tokens_1T, **inputs)

    def padded(ids):
        return jnp.asarray([list(ids) + [0] * (SEQ_LEN - len(ids))])

    @functools.cache
    def f(prompt, ids):
        text = (2, *ids) if config.family == "encoder_decoder" else prompt + ids
        segments = jnp.asarray([[1] * len(prompt) + [0] * (SEQ_LEN - len(prompt))])
        logits_TV = apply(padded(text), padded(prompt), segments)[0]
        logprobs_V = np.asarray(jax.nn.log_softmax(logits_TV[len(text) - 1]), np.float64)
        return logprobs_V[:VOCAB]

    return f


def slow_search(logprobs, prompt, limit, penalty, early_stopping):
    """Beams as lists, step by step: (ids, score) of those that ended, best first."""
    beams, ended = [((), 0.0)], []
    for n in range(1, limit + 1):
        candidates = [
            (ids + (token,), score + logprobs(tuple(prompt), ids)[token])
            for ids, score in beams
            for token in range(VOCAB)
        ]
        candidates.sort(key=lambda item: -item[1])
        ends = [c for c in candidates[:NUM_BEAMS] if c[0][-1] in EOS or n == limit]
        ended += [(ids, score / n**penalty) for ids, score in ends]
        ended = sorted(ended, key=lambda item: -item[1])[:NUM_BEAMS]
        beams = [c for c in candidates if c[0][-1] not in EOS][:NUM_BEAMS]
        if len(ended) == NUM_BEAMS:
            longest = limit if early_stopping == "never" and penalty > 0 else n
            if early_stopping is True or beams[0][1] / longest**penalty <= ended[-1][1]:
                break
    return ended


def search(config, prompts=PROMPTS, **values):
    values = dict(
        num_beams=NUM_BEAMS, max_new_tokens=9, eos_ids=EOS, num_return_sequences=NUM_BEAMS,
        vocab_size=VOCAB,
    ) | values  # fmt: skip
    return beam_search(Transformer(config), params_for(config), prompts, **values)


@pytest.mark.parametrize(
    ("config", "early_stopping"),
    [(CONFIG, False), (CONFIG, True), (CONFIG, "never"), (ENCODER_DECODER, "never")],
    ids=["decoder-False", "decoder-True", "decoder-never", "encoder_decoder-never"],
)
def test_beams_are_those_of_a_slow_search(config, early_stopping):
    for penalty in (0.0, 1.0, 2.0):
        found = search(config, length_penalty=penalty, early_stopping=early_stopping)
        for prompt, beams in zip(PROMPTS, found, strict=True):
            expected = slow_search(logprobs_for(config), prompt, 9, penalty, early_stopping)
            assert [beam.ids for beam in beams] == [ids for ids, _ in expected]
            np.testing.assert_allclose(
                [beam.score for beam in beams], [score for _, score in expected], atol=1e-5
            )
            for beam in beams:
                stopped = beam.ids[-1] in EOS
                assert beam.finish_reason == ("stop" if stopped else "length")


def test_the_cases_above_differ():
    """Some end early; each kind of stopping and each penalty matters somewhere."""
    found = {
        (penalty, early_stopping): [
            tuple(
                ids for ids, _ in slow_search(logprobs_for(config), p, 9, penalty, early_stopping)
            )
            for config in (CONFIG, ENCODER_DECODER)
            for p in PROMPTS
        ]
        for penalty in (0.0, 1.0, 2.0)
        for early_stopping in (False, True, "never")
    }
    lengths = {len(ids) for rows in found.values() for row in rows for ids in row}
    assert 9 in lengths and len(lengths) > 4
    assert found[1.0, False] != found[1.0, True] != found[1.0, "never"] != found[1.0, False]
    assert found[0.0, False] != found[1.0, False] != found[2.0, False]


def test_with_enough_beams_the_best_of_all_sequences_is_found():
    logprobs, prompt = logprobs_for(CONFIG), (10, 11, 12)
    scores = {}
    for length in (1, 2, 3):
        for ids in itertools.product(range(VOCAB), repeat=length):
            if all(token not in EOS for token in ids[:-1]) and (length == 3 or ids[-1] in EOS):
                total = sum(logprobs(prompt, ids[:i])[ids[i]] for i in range(length))
                scores[ids] = total
    best = sorted(scores, key=lambda ids: -scores[ids])[:5]
    (beams,) = search(
        CONFIG, [prompt], num_beams=VOCAB**2, max_new_tokens=3, length_penalty=0.0,
        early_stopping="never", num_return_sequences=5,
    )  # fmt: skip
    assert [beam.ids for beam in beams] == best


def test_prompts_do_not_depend_on_one_another_or_on_the_context_of_another():
    long = list(range(VOCAB - 2)) * 2
    together = search(CONFIG, [*PROMPTS, long[:20]], max_new_tokens=9)
    (alone,) = search(CONFIG, PROMPTS[1:2], max_new_tokens=9)
    assert [beam.ids for beam in alone] == [beam.ids for beam in together[1]]
    # Four places are left in the context.
    assert {len(beam.ids) for beam in together[3]} <= {1, 2, 3, 4}
    expected = slow_search(logprobs_for(CONFIG), long[:20], 4, 1.0, False)
    assert [beam.ids for beam in together[3]] == [ids for ids, _ in expected]


def no_threes(logprob_RV, text_RS, length_R):
    """Forbids the token that is the row's third last plus one."""
    place_R1 = jnp.maximum(length_R - 3, 0)[:, None]
    third_R1 = jnp.take_along_axis(text_RS, place_R1, axis=1) + 1
    return jnp.where(jnp.arange(logprob_RV.shape[1]) == third_R1, -jnp.inf, logprob_RV)


def test_a_rule_sees_prompt_and_text():
    def ruled(prompt, ids):
        text = [*prompt, *ids]
        row = logprobs_for(CONFIG)(prompt, ids).copy()
        token = text[max(len(text) - 3, 0)] + 1
        if token < VOCAB:
            row[token] = -np.inf
        return row

    found = search(CONFIG, rule=no_threes)
    changed = False
    for prompt, beams, free in zip(PROMPTS, found, search(CONFIG), strict=True):
        expected = slow_search(ruled, prompt, 9, 1.0, False)
        assert [beam.ids for beam in beams] == [ids for ids, _ in expected]
        changed |= [beam.ids for beam in beams] != [beam.ids for beam in free]
    assert changed


@pytest.mark.parametrize(
    ("prompts", "values", "message"),
    [
        ([[]], {}, "prompt: 0 tokens"),
        ([[VOCAB]], {}, "prompt: 13 is not an id"),
        ([[1] * SEQ_LEN], {}, "prompt: 24 tokens"),
        ([[1]], {"num_beams": 0}, "num_beams: 0"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens: 0"),
        ([[1]], {"num_return_sequences": 4}, "num_return_sequences: 4"),
        ([[1]], {"early_stopping": "later"}, "early_stopping: 'later'"),
        ([[1]], {"eos_ids": tuple(range(VOCAB))}, "num_beams: 3 are too many"),
    ],
)
def test_what_is_refused(prompts, values, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        search(CONFIG, prompts, **values)
