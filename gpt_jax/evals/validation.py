"""Loss, perplexity, bits per byte and accuracy on held-out rows."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gpt_jax.data.pipeline import PreparedData, evaluation_batches
from gpt_jax.models.transformer import Transformer, forward
from gpt_jax.parallel import sharding
from gpt_jax.types import Array, Batch, Tree


def eval_step(
    params: Tree, batch: Batch, token_bytes: Array, *, model: Transformer, objective: Callable
) -> dict[str, Array]:
    """The objective's sums over a batch, `num_targets`, and `num_bytes` of them; no dropout."""
    _, sums = objective(forward(model, params, batch), batch)
    mask = batch["loss_mask"]
    num_bytes = (token_bytes[batch["targets"]] * mask).sum()
    return {**sums, "num_targets": mask.sum(), "num_bytes": num_bytes}


class Validation:
    """Runs a model over held-out rows.

    Args:
      model: The model.
      objective: (outputs, batch) -> sum to minimise, sums of metrics.
      data: Whose validation rows are read.
      batch_size: Sequences of a global batch.
      mesh: Where it runs.
      max_batches: Batches of one evaluation; 0: all rows.
    """

    def __init__(
        self,
        model: Transformer,
        objective: Callable,
        data: PreparedData,
        batch_size: int,
        mesh: Mesh,
        max_batches: int = 0,
    ):
        score = functools.partial(eval_step, model=model, objective=objective)
        self._eval_step = sharding.on_mesh(mesh, jax.jit(score))
        self._rows = data.validation
        self._token_bytes = _bytes_by_token(data)
        self._batch_size = batch_size
        self._mesh = mesh
        self._max_batches = max_batches

    def run(self, params: Tree, *, whole: bool = False) -> dict[str, float]:
        """Means over the targets: loss in nats, perplexity, accuracy, and bits_per_byte.

        Bits per byte are the nats of all targets over ln 2 and over the UTF-8 bytes of their text.
        With a tokenizer that is not byte-level a token counts the split's mean bytes.
        """
        local = sharding.local_rows(self._batch_size, self._mesh)
        batches = evaluation_batches(
            self._rows, self._batch_size, local, 0 if whole else self._max_batches
        )
        place = functools.partial(
            sharding.global_batch, rows=local, batch_size=self._batch_size, mesh=self._mesh
        )
        sums: dict[str, Any] = {}
        for batch in batches:
            step_sums = self._eval_step(params, place(batch), self._token_bytes)
            for name, value in jax.device_get(step_sums).items():
                sums[name] = sums.get(name, 0.0) + np.float64(value)
        loss = float(sums["loss"] / sums["num_targets"])
        result = {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "accuracy": float(sums["accuracy"] / sums["num_targets"]),
        }
        if sums["num_bytes"]:
            result["bits_per_byte"] = float(sums["loss"] / math.log(2) / sums["num_bytes"])
        return result


def _bytes_by_token(data: PreparedData) -> np.ndarray:
    """UTF-8 bytes of each id's text, f32[V]; zeros where the bytes of the text are not known."""
    exact = data.tokenizer.token_bytes()
    if exact is not None:
        return exact.astype(np.float32)
    rows = data.validation
    return np.full(data.tokenizer.vocab_size, rows.num_bytes / rows.num_tokens, np.float32)
