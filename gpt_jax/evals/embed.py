"""Vectors of texts.

B batch, T length, D width; n texts.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.convert.open_model import OpenModel
from gpt_jax.data.examples import Record
from gpt_jax.evals.record_batches import record_batches
from gpt_jax.models.transformer import Transformer, forward
from gpt_jax.types import Array, Tree


def embed(
    opened: OpenModel, texts: Sequence[str | Sequence[int]], batch_size: int = 32
) -> np.ndarray:
    """One vector a text: the mean of the last layer's outputs over its tokens, of length 1.

    What the model is used to around a text ([CLS] and [SEP], "<s>") is read too, and counts in the
    mean, as in Sentence-BERT (arXiv:1908.10084). Of a decoder these are the outputs that its head
    would read.

    Args:
      opened: An encoder or a decoder.
      texts: Texts; or ids, which are read as they are.
      batch_size: Texts at a time.

    Returns:
      f32[n, D]; a text's vector does not depend on the others, but for rounding.

    Raises:
      ValueError: No texts, one that is empty or too long (its number is told), ids that the model
        does not have, or an encoder_decoder.
    """
    if opened.model.config.family == "encoder_decoder":
        raise ValueError(
            "model.family: 'encoder_decoder' has no vector of a text; that needs 'encoder' or "
            "'decoder'"
        )
    records = [_record(ids) for ids in input_ids(opened, texts)]
    vectors = np.zeros((len(records), opened.model.config.embed_dim), np.float32)
    most = opened.model.config.seq_len
    for numbers, batch in record_batches(records, batch_size, most=most):
        mean_BD = jax.device_get(_means(opened.params, batch, model=opened.model))
        vectors[numbers] = mean_BD[: len(numbers)]
    return vectors


def input_ids(opened: OpenModel, texts: Sequence[str | Sequence[int]]) -> list[list[int]]:
    """What the model reads of each text, by its number where something is wrong with it.

    Raises:
      ValueError: As embed's.
    """
    config = opened.model.config
    if not len(texts):
        raise ValueError("texts: 0 are not at least 1")
    found = []
    for number, text in enumerate(texts):
        ids = [int(i) for i in text] if not isinstance(text, str) else []
        if isinstance(text, str):
            ids = [*opened.prefix_ids, *opened.tokenizer.encode(text), *opened.suffix_ids]
        unknown = [i for i in ids if not 0 <= i < config.vocab_size]
        if unknown:
            right = f"an id from 0 to {config.vocab_size - 1}"
            raise ValueError(f"texts[{number}]: {unknown[0]} is not {right}")
        if not 0 < len(ids) <= config.seq_len:
            right = f"from 1 to the model's context of {config.seq_len}"
            raise ValueError(f"texts[{number}]: {len(ids)} tokens are not {right}")
        found.append(ids)
    return found


@functools.partial(jax.jit, static_argnames="model")
def _means(params: Tree, batch: dict, *, model: Transformer) -> Array:
    """f32[B, D], of length 1."""
    x_BTD = forward(model, params, batch, features=True).astype(jnp.float32)
    real_BT = batch["segment_ids"] > 0
    # The length takes the number of tokens out again; a row of padding stays zero.
    total_BD = jnp.where(real_BT[..., None], x_BTD, 0).sum(1)
    return total_BD / jnp.maximum(jnp.linalg.norm(total_BD, axis=1, keepdims=True), 1e-12)


def _record(ids: Sequence[int]) -> Record:
    tokens = np.array(ids, np.int32)
    return {"tokens": tokens, "targets": tokens, "loss_mask": np.zeros(len(ids), np.float32)}
