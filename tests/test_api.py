"""The Python interface for people who know Hugging Face's: names, defaults, refusals, results."""

import subprocess
import sys

import numpy as np
import pytest
from test_embed import opened

from gpt_jax.decode.hf_options import generate_options
from gpt_jax.evals.text_scores import score_texts


def test_importing_the_package_starts_no_jax():
    code = (
        "import gpt_jax, sys; assert 'jax' not in sys.modules; "
        "assert 'from_pretrained' in gpt_jax.__all__; gpt_jax.nothing"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "AttributeError: module 'gpt_jax' has no attribute 'nothing'" in done.stderr


def test_the_call_wins_over_the_file_and_the_file_over_the_defaults():
    plain = generate_options({}, {})
    assert (plain.top_k, plain.do_sample, plain.new_tokens(5, 100)) == (50, False, (0, 20))
    folder = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "use_cache": True}
    chosen = generate_options({"temperature": 0.7, "top_p": None}, folder)
    assert (chosen.do_sample, chosen.temperature, chosen.top_p) == (True, 0.7, 0.9)
    params = chosen.sampling(0, 20, seed=3)
    assert (params.temperature, params.top_k, params.top_p) == (0.7, 50, 0.9)
    # Without a draw their rules do not count.
    greedy = generate_options({"do_sample": False}, folder).sampling(0, 20, seed=3)
    assert (greedy.temperature, greedy.top_k, greedy.top_p) == (0.0, 0, 1.0)


def test_lengths_count_as_hugging_face_s():
    assert generate_options({"max_length": 50}, {}).new_tokens(8, 100) == (0, 42)
    assert generate_options({"max_new_tokens": 7}, {"max_length": 50}).new_tokens(8, 100) == (0, 7)
    assert generate_options({"max_length": 50}, {"max_new_tokens": 7}).new_tokens(8, 100) == (0, 42)
    assert generate_options({"max_length": 9, "min_length": 12}, {}).new_tokens(8, 100) == (1, 1)
    assert generate_options({"min_new_tokens": 3, "min_length": 19}, {}).new_tokens(8, 9) == (3, 9)
    with pytest.raises(ValueError, match="max_length: 8 is not above the 8 tokens of the prompt"):
        generate_options({"max_length": 8}, {}).new_tokens(8, 100)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"num_return_sequences": 3}, "num_return_sequences: 3 is above num_beams 1"),
        ({"num_return_sequences": 5, "num_beams": 4}, "num_return_sequences: 5 is above num_beams"),
        ({"num_beams": 2, "do_sample": True}, "num_beams: a beam search that draws is not"),
        ({"do_sample": True, "temperature": 0.0}, "temperature: 0.0 is not above 0"),
        ({"bad_words_ids": [[5]]}, r"bad_words_ids: \[\[5\]\] is not supported; give complete"),
        ({"attention_mask": np.ones(3)}, "attention_mask: .* is not supported; give a list"),
        ({"typical_p": 0.5}, "typical_p: 0.5 is not supported; see top_p"),
        ({"num_beans": 2}, "num_beans: generate has no such argument"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0 is not an integer of at least 1"),
        ({"max_length": 2.5}, "max_length: 2.5 is not an integer of at least 1"),
    ],
)
def test_what_generate_refuses(given, told):
    with pytest.raises(ValueError, match=told):
        generate_options(given, {})


def test_what_is_ignored_is_told():
    with pytest.warns(UserWarning, match="top_p: ignored, as do_sample is False"):
        generate_options({"top_p": 0.5}, {})
    with pytest.warns(UserWarning, match=r"generation_config.json: typical_p: 0.5 is not"):
        generate_options({}, {"typical_p": 0.5})
    generate_options({"typical_p": 1.0, "output_scores": False}, {"num_beam_groups": 1})


def test_a_text_s_tokens_are_scored_one_by_one():
    model = opened("decoder")
    text, other = "one cat", "two"
    score, second = score_texts(model, [text, other])
    ids = [256, *text.encode()]
    logits = model.model.apply({"params": model.params}, np.array([ids]))[0]
    logprobs = np.asarray(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
    expected = logprobs[np.arange(len(ids) - 1), ids[1:]]
    assert score.ids == tuple(ids) and second.ids == (256, *other.encode())
    # Nothing stands before the first.
    assert score.logprobs[0] is None and score.num_scored == len(text)
    np.testing.assert_allclose(score.logprobs[1:], expected, atol=3e-6)
    np.testing.assert_allclose(score.logprob, expected.sum(), atol=1e-5)
    np.testing.assert_allclose(score.perplexity, np.exp(-expected.mean()), rtol=1e-5)
    # Behind a context the same tokens, without those of the context.
    (behind,) = score_texts(model, [" cat"], ["one"])
    assert behind.ids == tuple(b" cat")
    np.testing.assert_allclose(behind.logprobs, expected[3:], atol=3e-6)


@pytest.mark.parametrize(
    ("texts", "contexts", "told"),
    [
        (["a", "b" * 60], None, r"texts\[1\]: 60 tokens are not at most the model's context of 48"),
        (["a", ""], ["x", "y"], r"texts\[1\]: 0 tokens are not at least 1"),
        (["a", "b"], ["x"], "contexts: 1 are not as many as texts, 2"),
    ],
)
def test_what_has_no_score_is_told(texts, contexts, told):
    with pytest.raises(ValueError, match=told):
        score_texts(opened("decoder"), texts, contexts)
