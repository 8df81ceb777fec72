"""Beam search against Hugging Face's generate: the same sequences, the same scores."""

import functools

import numpy as np
import pytest
from test_hf_parity import imported

from gpt_jax.decode.beam import beam_search
from gpt_jax.models.transformer import Transformer

pytestmark = pytest.mark.peers

VOCAB, NUM_BEAMS, MAX_NEW = 48, 4, 12
EOS = [5, 9, 17]
PROMPTS = [[3], [7, 1, 4, 1, 20, 8, 2, 6, 40], [30, 29, 28, 11]]


def tiny(name):
    """A model of Hugging Face's with unequal random weights."""
    import torch
    import transformers as hf

    size = dict(vocab_size=VOCAB, eos_token_id=EOS, bos_token_id=0, pad_token_id=0)
    if name == "gpt2":
        config = hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **size)
        cls = hf.GPT2LMHeadModel
    elif name == "llama":
        config = hf.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, **size,
        )  # fmt: skip
        cls = hf.LlamaForCausalLM
    else:
        config = hf.T5Config(
            d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0,
            n_positions=64, **size,
        )  # fmt: skip
        cls = hf.T5ForConditionalGeneration
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn_like(weight) * weight.shape[-1] ** -0.5)
    return model


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    @functools.cache
    def loaded(name):
        model = tiny(name)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        return model, *imported(f"hf:{folder}")

    return loaded


def ours(load, name, **values):
    _, config, params = load(name)
    return beam_search(
        Transformer(config), params, PROMPTS, num_beams=NUM_BEAMS, max_new_tokens=MAX_NEW,
        eos_ids=EOS, num_return_sequences=3, **values,
    )  # fmt: skip


def theirs(model, prompt, **values):
    import torch

    out = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        num_beams=NUM_BEAMS, max_new_tokens=MAX_NEW, do_sample=False, num_return_sequences=3,
        return_dict_in_generate=True, output_scores=True, eos_token_id=EOS, pad_token_id=0,
        **values,
    )  # fmt: skip
    start = 1 if model.config.is_encoder_decoder else len(prompt)
    rows = []
    for ids in out.sequences[:, start:].tolist():
        ends = [i for i, token in enumerate(ids) if token in EOS]
        rows.append(tuple(ids[: ends[0] + 1] if ends else ids))
    return rows, out.sequences_scores.numpy()


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_beams_are_those_of_hugging_face(load, name, length_penalty, early_stopping):
    model, _, _ = load(name)
    values = dict(length_penalty=length_penalty, early_stopping=early_stopping)
    found = ours(load, name, **values)
    for prompt, beams in zip(PROMPTS, found, strict=True):
        ids, scores = theirs(model, prompt, **values)
        assert [beam.ids for beam in beams] == ids
        np.testing.assert_allclose([beam.score for beam in beams], scores, rtol=1e-5, atol=1e-4)


def test_the_cases_above_differ(load):
    """Some beams end early, some late; penalties and kinds of stopping matter."""
    lengths, found = set(), set()
    for name in ("gpt2", "llama", "t5"):
        for length_penalty in (0.0, 1.0, 2.0):
            for early_stopping in (False, True, "never"):
                values = dict(length_penalty=length_penalty, early_stopping=early_stopping)
                ids = [[beam.ids for beam in beams] for beams in ours(load, name, **values)]
                lengths |= {len(beam) for beams in ids for beam in beams}
                found.add((name, str(ids)))
    assert MAX_NEW in lengths and len(lengths) > 4
    assert len(found) >= 9


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_no_ngram_is_repeated_by_a_rule(load, name):
    from gpt_jax.ops.penalties import forbid_ngrams

    def no_bigram_twice(logprob_RV, text_RS, length_R):
        return forbid_ngrams(logprob_RV, text_RS, length_R, np.full(len(text_RS), 2, np.int32))

    model, _, _ = load(name)
    found = ours(load, name, rule=no_bigram_twice)
    for prompt, beams in zip(PROMPTS, found, strict=True):
        ids, scores = theirs(model, prompt, no_repeat_ngram_size=2)
        assert [beam.ids for beam in beams] == ids
        np.testing.assert_allclose([beam.score for beam in beams], scores, rtol=1e-5, atol=1e-4)
