"""A run's first parameters: drawn, read from a source, or both; and teachers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from gpt_jax.convert.merge import merge_strict
from gpt_jax.convert.source import Source, check_same, load_params, model_values
from gpt_jax.data.pipeline import PreparedData
from gpt_jax.data.skipgram import train_skipgram
from gpt_jax.data.word_vectors import embedding_from_vectors, scaled_embedding
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.lora import merge_lora
from gpt_jax.models.transformer import Transformer
from gpt_jax.runs import canonical
from gpt_jax.runs.config import RunConfig
from gpt_jax.runs.run import open_run
from gpt_jax.runs.state import abstract_on_mesh
from gpt_jax.types import Tree

_SKIPGRAM_TOKENS = 2_000_000


def first_params(
    drawn: Tree, config: RunConfig, model: Transformer, mesh: Mesh, data: PreparedData
) -> Tree:
    """Parameters as the config's init section wants them.

    Args:
      drawn: Parameters drawn at random, on the mesh.
      config: Of the run.
      model: Its model.
      mesh: Where the parameters lie.
      data: For word vectors: tokenizer and corpus.

    Raises:
      ValueError: The source does not fit: see convert.merge.merge_strict and convert.source.
    """
    like = abstract_on_mesh(model, mesh)
    if config.init.source:
        loaded = _canonical_params(config.init.source, config.init.step, config.model)
        wanted = canonical.stacked_target(like)
        skip = config.init.skip + (("(^|/)lora_[ab]$",) if config.model.lora_rank else ())
        used, _ = merge_strict(loaded, wanted, skip, config.init.source)
        drawn = _placed({**canonical.stack(drawn), **used}, like)
    if config.init.word_vectors:
        std = float(jnp.std(drawn["tokens"]))
        table = _word_vectors(config, data, std)
        tokens = np.array(drawn["tokens"])
        tokens[: len(table)] = table
        drawn = {**drawn, "tokens": jax.device_put(tokens, like["tokens"].sharding)}
    return drawn


def load_teacher(spec: str, mesh: Mesh, step: int = -1) -> tuple[Transformer, Tree]:
    """Another model and its parameters, on the mesh.

    Args:
      spec: A run directory, "hf:DIR" or "gguf:FILE".
      mesh: Where they are to lie.
      step: See InitConfig.
    """
    config = TransformerConfig(**_tuples(model_values(spec)))
    if config.lora_rank:  # its adapters are merged
        config = dataclasses.replace(config, lora_rank=0)
    model = Transformer(config, mesh.devices.flat[0].platform)
    like = abstract_on_mesh(model, mesh)
    loaded = _canonical_params(spec, step, config)
    used, _ = merge_strict(loaded, canonical.stacked_target(like), (), spec)
    return model, _placed(used, like)


def _canonical_params(spec: str, step: int, config: TransformerConfig) -> Mapping[str, Any]:
    source = Source.parse(spec)
    if source.kind != "run":
        return load_params(spec, config)
    run = open_run(source.path, None if step < 0 else step)
    check_same(run.config.to_dict()["model"], config, spec)
    params = run.params
    if run.config.model.lora_rank:
        params = merge_lora(run.config.model, params)[1]
    return {name: np.asarray(array) for name, array in canonical.stack(params).items()}


def _placed(arrays: Mapping[str, Any], like: Tree) -> Tree:
    """Parameters from arrays by canonical name, on the mesh."""
    return jax.tree.map(
        lambda array, leaf: jax.device_put(np.asarray(array, leaf.dtype), leaf.sharding),
        canonical.unstack(arrays, like),
        like,
    )


def _word_vectors(config: RunConfig, data: PreparedData, std: float) -> np.ndarray:
    """f32[V, D], V of the tokenizer."""
    spec, tokenizer, width = config.init.word_vectors, data.tokenizer, config.model.embed_dim
    if spec != "skipgram":
        if not epath.Path(spec).exists():
            raise ValueError(f"init.word_vectors: {spec!r} does not exist; give a file or skipgram")
        return embedding_from_vectors(spec, tokenizer, width, config.seed, std=std)[0]
    stream = _stream(data)
    table = train_skipgram(stream, tokenizer.vocab_size, width, seed=config.seed)
    found = np.bincount(stream, minlength=tokenizer.vocab_size) > 0
    return scaled_embedding(table, found, config.seed, std)


def _stream(data: PreparedData) -> np.ndarray:
    """The tokens of the first rows of every part, int[n], without any corruption."""
    tokens, share = [], _SKIPGRAM_TOKENS // len(data.train.parts)
    for rows in data.train.parts.values():
        count = 0
        for row in range(len(rows)):
            tokens.append(rows.row_tokens(row).astype(np.int32))
            count += len(tokens[-1])
            if count >= share:
                break
    return np.concatenate(tokens)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
