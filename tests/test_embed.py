"""Vectors and classes of texts: what they are, and that a text's do not depend on the others."""

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from gpt_jax.convert.open_model import OpenModel
from gpt_jax.data.tokenizers import byte_tokenizer
from gpt_jax.evals import classify
from gpt_jax.evals.classify import class_scores
from gpt_jax.evals.embed import embed
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.transformer import Transformer, init_params

TEXTS = ("a", "one cat sat on the mat", "Grüße", "and two dogs ran under a tree")
_HEADS = {"encoder": {"head": "none"}, "decoder": {"positions": "learned"}}


@functools.cache
def opened(family, **changes):
    tokenizer = byte_tokenizer(("[CLS]", "[SEP]"))
    values = {"qk_norm": False, "init": "gpt2", **_HEADS[family], **changes}
    config = TransformerConfig(tokenizer.vocab_size, 48, 1, 32, 2, family=family, **values)
    model = Transformer(config)
    boxed = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(1))
    # The outputs of a text are of order 1 and differ from place to place. Drawn by numpy: to
    # compile JAX's initialisation takes longer than all that is tested.
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: rng.normal(x.ndim == 1, 0.15, x.shape).astype(np.float32), nn.unbox(boxed)
    )
    return OpenModel(
        name="tiny", model=model, params=params, tokenizer=tokenizer,
        prefix_ids=(257,) if family == "encoder" else (256,),
        suffix_ids=(258,) if family == "encoder" else (), eos_ids=(256,),
        chat_template=None, generation={}, labels=(),
    )  # fmt: skip


def unpadded(model, ids, features=False, **arrays):
    """The outputs of one text alone; compiled whole, which is quicker than op by op."""

    @jax.jit
    def run(params, ids_1T, arrays):
        return model.model.apply({"params": params}, ids_1T, features=features, **arrays)

    return np.asarray(run(model.params, np.array([ids]), arrays))[0]


@pytest.mark.parametrize("family", ["encoder", "decoder"])
def test_a_vector_is_the_mean_of_all_that_is_read_and_of_length_one(family):
    model = opened(family)
    vectors = embed(model, TEXTS, batch_size=3)
    assert vectors.shape == (4, 32) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    for vector, text in zip(vectors[:2], TEXTS, strict=False):
        around = ([257], [258]) if family == "encoder" else ([256], [])
        mean = unpadded(model, [*around[0], *text.encode(), *around[1]], features=True).mean(0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=2e-6)
    # Different texts lie apart, or the above would say nothing.
    assert (vectors @ vectors.T)[~np.eye(4, dtype=bool)].max() < 0.98


def test_ids_are_read_as_they_are():
    model = opened("decoder")
    np.testing.assert_allclose(embed(model, [[256, 97]]), embed(model, ["a"]), atol=2e-6)


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        ((), "texts: 0 are not"),
        (("fine", "x" * 60), r"texts\[1\]: 61 tokens are not from 1 to the model's context of 48"),
        (([1], []), r"texts\[1\]: 0 tokens"),
        (([1], [5, 400]), r"texts\[1\]: 400 is not an id from 0 to 258"),
    ],
)
def test_what_has_no_vector_is_told_by_its_number(texts, told):
    with pytest.raises(ValueError, match=told):
        embed(opened("decoder"), texts)


def test_only_one_stack_has_vectors():
    config = TransformerConfig(259, 48, 2, 32, 2, family="encoder_decoder")
    other = dataclasses.replace(opened("decoder"), model=Transformer(config))
    with pytest.raises(ValueError, match=r"model\.family: 'encoder_decoder'"):
        embed(other, ["a"])


@functools.cache
def classifier():
    return opened("encoder", head="sequence", num_classes=3, num_token_types=2, bias=True)


def test_classes_do_not_depend_on_the_batch():
    model = classifier()
    pairs = [(text, "") for text in TEXTS] + [("a cat", "a dog")]
    scores = class_scores(model, pairs, batch_size=2)
    assert scores.shape == (5, 3)
    for row, text in zip(scores[:2], TEXTS, strict=False):
        np.testing.assert_allclose(row, unpadded(model, [257, *text.encode(), 258]), atol=2e-6)
    ids = [257, *b"a cat", 258, *b"a dog", 258]
    types = np.array([[0] * 7 + [1] * 6])
    np.testing.assert_allclose(scores[4], unpadded(model, ids, token_types=types), atol=2e-6)
    assert np.abs(scores - scores[0]).max(axis=1)[1:].min() > 1e-3


def test_a_decoder_reads_what_it_was_trained_on(monkeypatch):
    theirs = opened("decoder", head="sequence", num_classes=3, pool="last")
    ours = dataclasses.replace(theirs, trained_here=True)
    read = []
    monkeypatch.setattr(
        classify, "_logits", lambda params, batch, model: (read.append(batch), np.zeros((1, 3)))[1]
    )
    for model, ids in (
        (theirs, [256, *b"a cat", *b"a dog"]),  # what its tokenizer puts around a text
        (ours, [257, *b"a cat", 258, *b"a dog", 258]),
        # generation_config.json has no say in it.
        (dataclasses.replace(ours, generation={"top_k": 3}), [257, *b"a", 258]),
    ):
        pair = ("a cat", "a dog") if len(ids) > 3 else ("a", "")
        class_scores(model, [pair], batch_size=1)
        assert read[-1]["tokens"][read[-1]["segment_ids"] > 0].tolist() == ids


def test_a_text_that_is_too_long_has_no_class():
    model = classifier()
    assert class_scores(model, [("x" * 46, "")]).shape == (1, 3)
    with pytest.raises(ValueError, match=r"texts\[1\]: 49 tokens or more are not at most"):
        class_scores(model, [("x", ""), ("x" * 47, "")])
    with pytest.raises(ValueError, match=r"model\.head: 'lm' gives no classes"):
        class_scores(opened("decoder"), [("x", "")])
