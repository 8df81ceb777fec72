"""Decoding with a cache against whole forward passes, on token ids."""

import dataclasses

import jax
import numpy as np
import pytest
from decode_fixtures import (
    CONFIG,
    LEARNED,
    PADDED_VOCAB_SIZE,
    SEQ_LEN,
    VOCAB_SIZE,
    engine_for,
    forward,
    params_for,
    run,
)  # fmt: skip

from gpt_jax import trees
from gpt_jax.decode import caches, loop, prefill
from gpt_jax.decode.engine import Engine
from gpt_jax.decode.generate import generate
from gpt_jax.decode.sampling_params import SamplingParams
from gpt_jax.models.transformer import Transformer

# One token; and with 12 tokens more the context is full.
PROMPTS = [[3], [5, 1, 4, 1, 5, 9, 2, 6, 5], [30, 29, 28], list(range(20))]


@pytest.mark.parametrize(
    "config", [dataclasses.replace(CONFIG, scan=True), LEARNED], ids=["rotary-gqa-scan", "learned"]
)
def test_every_position_with_a_cache_gives_the_logits_of_the_whole_forward(config):
    params, tokens_BT = params_for(config), np.random.default_rng(1).integers(0, 31, (3, SEQ_LEN))
    lengths_B = np.array([1, 7, 13], np.int32)
    whole = prefill.Prefill(
        Transformer(config),
        params,
        [(*row_T[:length], 0) for row_T, length in zip(tokens_BT, lengths_B, strict=True)],
        chunk=16,
        vocab_size=VOCAB_SIZE,
    )
    whole.advance()
    assert whole.done
    cache = caches.resized(whole.cache, np.arange(3), length=SEQ_LEN).replace(index_B=lengths_B)
    step = jax.jit(
        lambda tokens, cache: Transformer(config).apply({"params": params}, tokens, cache=cache)
    )
    expected_BTV = np.stack([forward(config)(row_T) for row_T in tokens_BT])
    rows_B = np.arange(3)
    for offset in range(SEQ_LEN - lengths_B.max()):
        here_B = lengths_B + offset
        logits_B1V, cache = step(tokens_BT[rows_B, here_B][:, None], cache)
        np.testing.assert_allclose(logits_B1V[:, 0], expected_BTV[rows_B, here_B], atol=2e-5)
    assert expected_BTV.std() > 0.5


def test_greedy_is_the_argmax_of_whole_forwards():
    ids, logprobs = run(engine_for(), PROMPTS, temperature=0.0, max_tokens=12)
    for prompt, row, row_logprobs in zip(PROMPTS, ids, logprobs, strict=True):
        assert len(row) == 12
        logits_TV = forward(CONFIG)(prompt + row)[len(prompt) - 1 : -1]
        assert logits_TV[:, :VOCAB_SIZE].argmax(-1).tolist() == row
        expected_T = np.asarray(jax.nn.log_softmax(logits_TV))[np.arange(12), row]
        np.testing.assert_allclose(row_logprobs, expected_T, atol=2e-5)


def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd():
    values = dict(seed=7, max_tokens=12, top_p=0.9)
    crowd, _ = run(engine_for(), PROMPTS, **values)
    assert run(engine_for(), PROMPTS, num_steps=5, **values)[0] == crowd
    assert run(engine_for(), PROMPTS[3:4], **values)[0] == crowd[3:4]
    assert run(engine_for(), PROMPTS[3:4], n=4, **values)[0][0] == crowd[3]


def test_samples_differ_and_repeat_by_seed():
    engine, values = engine_for(), dict(n=4, max_tokens=12, top_p=0.9)
    first, logprobs = run(engine, PROMPTS[1:2], seed=1, **values)
    assert len({tuple(row) for row in first}) == 4
    assert run(engine, PROMPTS[1:2], seed=1, **values) == (first, logprobs)
    assert run(engine, PROMPTS[1:2], seed=2, **values)[0] != first


def test_no_padding_id_is_ever_drawn():
    params = trees.map_named(
        lambda path, leaf: leaf * 0 if path == "head" else leaf, params_for(CONFIG)
    )
    # With equal logits every fourth draw or so would be one of the padding's.
    engine = Engine(Transformer(CONFIG), params, vocab_size=VOCAB_SIZE)
    ids, logprobs = run(engine, PROMPTS[:1], n=4, max_tokens=31, top_k=99)
    drawn = {token_id for row in ids for token_id in row}
    assert max(drawn) < VOCAB_SIZE and len(drawn) > 25
    np.testing.assert_allclose(logprobs[0], -np.log(PADDED_VOCAB_SIZE), rtol=1e-5)


def test_a_row_ends_at_the_eos_id_at_max_tokens_or_with_the_context():
    free, _ = run(engine_for(), PROMPTS, max_tokens=16, top_p=0.9)
    assert [len(row) for row in free] == [16, 16, 16, SEQ_LEN - 20]
    eos_id = free[1][4]
    ids, _ = run(engine_for(eos_id=eos_id), PROMPTS, max_tokens=16, top_p=0.9)
    cut = [row.index(eos_id) + 1 if eos_id in row else len(row) for row in free]
    assert ids == [row[:end] for row, end in zip(free, cut, strict=True)]
    assert len(ids[1]) <= 5 and len(set(map(len, ids))) > 1


def test_other_values_compile_nothing():
    def num_programs():
        programs = (prefill._read, loop.place, loop.decode, caches._empty, loop.resized)
        return [program._cache_size() for program in programs]

    engine = Engine(Transformer(CONFIG), params_for(CONFIG), vocab_size=VOCAB_SIZE)
    run(engine, PROMPTS, top_k=5, max_tokens=12)
    before = num_programs()
    run(engine, PROMPTS, temperature=0.3, top_k=9, top_p=0.5, min_p=0.1, seed=3, max_tokens=10)
    run(engine, [[1] * 18, [2, 2], [3] * 5, [4]], num_steps=2, top_p=0.9, max_tokens=9)
    assert num_programs() == before


def test_prompts_that_cannot_be_continued_are_refused():
    engine = engine_for()
    with pytest.raises(ValueError, match="prompt: 32 tokens are not fewer than the model"):
        generate(engine, [[1], [1] * 32], SamplingParams())
    with pytest.raises(ValueError, match="prompt: 0 tokens"):
        generate(engine, [[]], SamplingParams())
    with pytest.raises(ValueError, match="prompt: 31 is not an id from 0 to 30"):
        generate(engine, [[1, 31]], SamplingParams())
    with pytest.raises(ValueError, match="vocab_size: 41 is not at most the model's 40"):
        Engine(Transformer(CONFIG), params_for(CONFIG), vocab_size=41)
    assert engine.idle
    ids, _ = run(engine, [[1] * 31] * 4, max_tokens=5, top_p=0.9)
    assert [len(row) for row in ids] == [1] * 4


def test_bfloat16_models_decode_in_float32_on_cpu():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    engine = Engine(Transformer(config, platform="cpu"), params_for(config))
    assert engine.model.config.dtype == "float32"
    assert Engine(Transformer(config, platform="gpu"), {}).model.config.dtype == "bfloat16"
