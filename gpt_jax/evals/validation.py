"""Loss, perplexity, bits per byte and accuracy on held-out rows."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gpt_jax.data.packing import Rows, TokenRows
from gpt_jax.data.pipeline import evaluation_batches
from gpt_jax.models.gpt import GPT, forward
from gpt_jax.parallel import sharding
from gpt_jax.types import Array, Batch, Tree


def eval_step(params: Tree, batch: Batch, *, model: GPT, objective: Callable) -> dict[str, Array]:
    """The objective's sums over a batch, and `num_targets`; no dropout."""
    _, sums = objective(forward(model, params, batch), batch)
    return {**sums, "num_targets": batch["loss_mask"].sum()}


class Validation:
    """Runs a model over held-out rows.

    Args:
      model: The model.
      objective: (outputs, batch) -> sum to minimise, sums of metrics.
      rows: The held-out rows.
      batch_size: Sequences of a global batch.
      mesh: Where it runs.
      max_batches: Batches of one evaluation; 0: all rows.
    """

    def __init__(
        self,
        model: GPT,
        objective: Callable,
        rows: Rows | TokenRows,
        batch_size: int,
        mesh: Mesh,
        max_batches: int = 0,
    ):
        score = functools.partial(eval_step, model=model, objective=objective)
        self._eval_step = sharding.on_mesh(mesh, jax.jit(score))
        self._rows = rows
        self._batch_size = batch_size
        self._mesh = mesh
        self._max_batches = max_batches

    def run(self, params: Tree, *, whole: bool = False) -> dict[str, float]:
        """Means over the targets: loss in nats, perplexity, accuracy, and bits_per_byte.

        Bits per byte are the nats of all targets over ln 2 and over the bytes of the text. On a
        part of the rows (`whole` False and max_batches set) the bytes of that part are taken to be
        the split's mean bytes a token; on the whole split the number is exact.
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
            for name, value in jax.device_get(self._eval_step(params, place(batch))).items():
                sums[name] = sums.get(name, 0.0) + np.float64(value)
        loss = float(sums["loss"] / sums["num_targets"])
        result = {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "accuracy": float(sums["accuracy"] / sums["num_targets"]),
        }
        if self._rows.num_bytes:
            bytes_per_target = self._rows.num_bytes / self._rows.num_tokens
            result["bits_per_byte"] = loss / math.log(2) / bytes_per_target
        return result
