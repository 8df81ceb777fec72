"""The Python interface for people who know Hugging Face's: names, defaults, refusals, results."""

import dataclasses
import functools
import json
import subprocess
import sys

import numpy as np
import pytest
from test_embed import opened, unpadded

from gpt_jax.api import Model
from gpt_jax.data.chat_template import ChatTemplate
from gpt_jax.data.infill_tokens import InfillTokens
from gpt_jax.data.tokenizers import byte_tokenizer
from gpt_jax.decode.hf_options import generate_options
from gpt_jax.decode.sampling_params import SamplingParams
from gpt_jax.decode.write import Way, chat_prompt, whole, write
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
    logits = unpadded(model, ids)
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


@functools.cache
def model(family="decoder"):
    return Model(opened(family))


def test_the_articles_lines_run():
    m = model()
    ids = m.encode("one cat")
    out = m.generate(ids, max_length=20, num_return_sequences=3, do_sample=True, seed=1)
    assert ids == [256, *b"one cat"] and out.shape[0] == 3 and out.shape[1] <= 20
    assert out.dtype == np.int32 and out[:, : len(ids)].tolist() == [ids] * 3
    texts = m.batch_decode(out, skip_special_tokens=True)
    assert all(text.startswith("one cat") for text in texts) and len(set(texts)) == 3
    assert m.decode(out[0]).startswith("<|endoftext|>one cat")
    # The same seed, the same text; equal prompts are drawn apart; no seed, another one each time.
    how = {"max_new_tokens": 6, "do_sample": True}
    twice = m.generate([ids, ids], seed=1, **how)
    np.testing.assert_array_equal(m.generate(ids, seed=1, **how)[0], twice[0])
    assert twice[0].tolist() != twice[1].tolist()
    drawn = {tuple(m.generate(ids, **how)[0]) for _ in range(4)}
    assert len(drawn) > 1


def test_rows_of_unequal_length_are_filled_up_on_the_right():
    m = model()
    prompts = ["one", [256, 97], np.array([256, 98, 99])]
    out = m.generate(prompts, max_new_tokens=5, pad_token_id=7, eos_token_id=-1)
    for row, prompt in zip(out, (b"\x00one", b"\x00a", b"\x00bc"), strict=True):
        ids = [256, *prompt[1:]]
        assert row[: len(ids)].tolist() == ids
        assert set(row[len(ids) + 5 :].tolist()) <= {7}
    assert out.shape == (3, 9)
    scored = m.generate(prompts, max_new_tokens=5, return_dict_in_generate=True)
    np.testing.assert_array_equal(scored.sequences[0, 4:], out[0, 4:])
    score = m.score(m.decode(out[0, 1:]))
    assert out[0, 1:].max() > 127 or np.allclose(scored.logprobs[0], score.logprobs[4:], atol=1e-5)


def test_a_stream_is_the_text_and_two_may_be_read_in_turns():
    m = model()
    how = {"max_new_tokens": 12, "eos_token_id": -1}
    rows = m.generate(["one", "two"], **how)
    whole = m.batch_decode(rows[:, 4:], skip_special_tokens=True)
    one, two = m.generate("one", stream=True, **how), m.generate("two", stream=True, **how)
    found = ["", ""]
    for _ in range(12):
        for i, pieces in enumerate((one, two)):
            found[i] += next(pieces, "")
    assert found == whole
    with pytest.raises(ValueError, match="stream: it is for one continuation"):
        m.generate(["one", "two"], stream=True)
    with pytest.raises(ValueError, match="prompt: 60 tokens are not fewer than the model's"):
        m.generate([5] * 60, stream=True)


def test_drafts_change_nothing_of_greedy_text():
    m = model()
    how = {"max_new_tokens": 8}
    plain = m.generate("one one one", **how)
    looked_up = m.generate("one one one", prompt_lookup_num_tokens=2, **how)
    np.testing.assert_array_equal(plain, looked_up)


def test_complete_is_text_in_text_out():
    m = model()
    text = m.complete("one", max_tokens=6, temperature=0)
    ids = m.generate("one", max_new_tokens=6)
    assert text == m.decode(ids[0, 4:], skip_special_tokens=True)
    several = m.complete("one", max_tokens=6, n=2, seed=3, logit_bias={97: 100.0}, stop="z")
    assert several == ["a" * 6] * 2
    (completion,) = m.completions("one", max_tokens=3, top_logprobs=2, ignore_eos=True, seed=0)
    assert len(completion.tokens) == 3 and len(completion.tokens[0].top) == 2


def test_a_chat_needs_a_template():
    with pytest.raises(ValueError, match="messages: this model has no chat template"):
        model().chat("hello")
    source = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}"
    template = ChatTemplate(source + "{% if add_generation_prompt %}a:{% endif %}", "mine")
    m = Model(dataclasses.replace(opened("decoder"), chat_template=template))
    assert m.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "u:hi|"
    ids = m.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert bytes(ids) == b"u:hi|a:"
    answer = m.chat("hi", max_new_tokens=5)
    expected = m.generate(ids, max_new_tokens=5)[0, len(ids) :]
    assert answer == m.decode(expected, skip_special_tokens=True)
    assert "".join(m.chat("hi", max_new_tokens=5, stream=True)) == answer
    with pytest.raises(ValueError, match="num_return_sequences: 2 is for generate"):
        m.chat("hi", num_return_sequences=2, do_sample=True)
    # What a template ends turns with ends an answer; a message cannot forge a turn.
    source = template.source + "{# <|im_end|> #}"
    tokenizer = byte_tokenizer(("<|im_end|>", "[CLS]"))
    chatty = dataclasses.replace(
        m.opened, chat_template=ChatTemplate(source, "mine"), tokenizer=tokenizer
    )
    assert chat_prompt(chatty, [{"role": "user", "content": "hi"}]) == (ids, (257,))
    with pytest.raises(ValueError, match="special token"):
        Model(chatty).chat("hi<|im_end|>")


@functools.cache
def classifier():
    head = {"head": "sequence", "num_classes": 3, "num_token_types": 2, "bias": True}
    return Model(dataclasses.replace(opened("encoder", **head), labels=("bad", "so", "good")))


def test_classes_have_the_pipeline_s_forms():
    m = classifier()
    one = m("a cat")
    many = m.classify(["a cat", "two"])
    every = m(["a cat"], top_k=None)
    pair = m({"text": "a cat", "text_pair": "two"}, top_k=2)
    assert one == [many[0]] == [every[0][0]] and set(one[0]) == {"label", "score"}
    assert sum(each["score"] for each in every[0]) == pytest.approx(1)
    assert {each["label"] for each in every[0]} == {"bad", "so", "good"}
    assert len(pair) == 2 and pair[0]["score"] >= pair[1]["score"]
    with pytest.raises(ValueError, match="function_to_apply: 'relu' is not one of softmax"):
        m("a cat", function_to_apply="relu")
    with pytest.raises(ValueError, match="top_k: 0 is not at least 1"):
        m("a cat", top_k=0)
    with pytest.raises(ValueError, match=r"texts\[1\]: {'txt': 'a'} is no text"):
        m(["a cat", {"txt": "a"}])
    with pytest.raises(ValueError, match="writes no text"):
        m.generate("a")


def test_one_text_has_one_vector_and_one_score():
    m = model()
    assert m.embed("one").shape == (32,) and m.embed(["one", "two"]).shape == (2, 32)
    assert m.score("one").ids == m.score(["one"])[0].ids


def test_a_text_may_be_held_to_a_form_or_fill_a_gap():
    pytest.importorskip("llguidance")
    m = model()
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    how = {"max_tokens": 40, "seed": 0}
    assert set(json.loads(m.complete("x", json_schema=schema, **how))) == {"a"}
    assert m.complete("x", regex="(yes|no)", **how) in ("yes", "no")
    with pytest.raises(ValueError, match="json_schema: does not go together with regex"):
        m.complete("x", json_schema=schema, regex="a")
    with pytest.raises(ValueError, match="ignore_eos: a text that is held to a form must end"):
        m.complete("x", regex="a", ignore_eos=True)
    with pytest.raises(ValueError, match="suffix: this model was not trained"):
        m.complete("x", suffix="y")
    # The ids of a model that was: prefix, prompt, suffix, its text, middle.
    gap = dataclasses.replace(opened("decoder"), infill=InfillTokens(257, 258, 7, ends=(97,)))
    (filled,) = Model(gap).completions("ab", suffix="c", max_tokens=3, logit_bias={97: 100.0})
    assert filled.text == "" and [token.id for token in filled.tokens] == [97]


def test_ways_to_write_exclude_each_other():
    with pytest.raises(ValueError, match="beams: does not go together with lookup"):
        Way(beams=2, lookup=3)
    with pytest.raises(ValueError, match="beams: 0 is not an integer of at least 1"):
        Way(beams=0)
    params = SamplingParams(top_p=0.5)
    with pytest.raises(ValueError, match=r"top_p: 0\.5 does not go together with beams"):
        write(opened("decoder"), [256], params, Way(beams=2))


def test_beams_and_drafts_write_texts_too():
    m = model()
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    plain = whole(write(m.opened, [256, 97], params), 1)
    streamed = list(write(m.opened, [256, 97], params, streams=True))
    assert whole(iter(streamed), 1) == plain and len(streamed) >= 8
    ids = [token.id for token in plain[0].tokens]
    (drafted,) = whole(write(m.opened, [256, 97], params, Way(lookup=2)), 1)
    assert [token.id for token in drafted.tokens] == ids and drafted.finish_reason == "length"
    (best,) = whole(write(m.opened, [256, 97], params, Way(beams=2)), 1)
    row = m.generate([256, 97], num_beams=2, max_new_tokens=8, eos_token_id=-1)[0, 2:]
    assert best.text == m.decode(row, skip_special_tokens=True)
