"""A tiny model for tests of decoding, and the same computed without a cache."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import trees
from gpt_jax.decode.engine import Engine
from gpt_jax.decode.generate import generate
from gpt_jax.decode.sampling_params import SamplingParams
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.transformer import Transformer

# The last 9 rows of the embedding only pad it.
VOCAB_SIZE, PADDED_VOCAB_SIZE, SEQ_LEN = 31, 40, 32
CONFIG = TransformerConfig(
    vocab_size=PADDED_VOCAB_SIZE, seq_len=SEQ_LEN, num_layers=2, embed_dim=16, num_heads=4,
    num_kv_heads=2, attention="einsum",
)  # fmt: skip
LEARNED = dataclasses.replace(
    CONFIG, positions="learned", norm="layernorm", activation="gelu", bias=True, tied=True,
    qk_norm=False, init="gpt2", num_kv_heads=4,
)  # fmt: skip


@functools.cache
def params_for(config: TransformerConfig):
    """Parameters that make unequal logits: activations of order 1, no parameter at 0 or 1."""
    boxed = jax.eval_shape(
        Transformer(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    )
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        one_dim = path.endswith(("bias", "scale"))
        std = 0.3 if one_dim else 2 * config.embed_dim**-0.5
        return rng.normal(1.0 if path.endswith("scale") else 0.0, std, leaf.shape)

    drawn = trees.map_named(draw, nn.unbox(boxed)["params"])
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), drawn)


@functools.cache
def forward(config: TransformerConfig):
    """f(ids) -> logits of the whole sequence without a cache, one compiled size for all."""
    apply = jax.jit(
        lambda tokens_BT: Transformer(config).apply({"params": params_for(config)}, tokens_BT)
    )

    def logits_TV(ids):
        padded_T = np.zeros(SEQ_LEN, np.int32)
        padded_T[: len(ids)] = ids
        return np.asarray(apply(padded_T[None]))[0, : len(ids)]

    return logits_TV


@functools.cache
def engine_for(config=CONFIG, eos_id=None):
    """One engine for many tests: what it did before must not matter."""
    eos_ids = () if eos_id is None else (eos_id,)
    return Engine(Transformer(config), params_for(config), vocab_size=VOCAB_SIZE, eos_ids=eos_ids)


def run(engine, prompts, num_steps=None, **values):
    """Ids and log-probabilities of each row."""
    rows = generate(engine, prompts, SamplingParams(**values), num_steps)
    return [[t.id for t in row] for row in rows], [[t.logprob for t in row] for row in rows]
