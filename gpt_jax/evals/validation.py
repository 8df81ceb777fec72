"""An objective's means on held-out rows: loss, perplexity, bits per byte, accuracy."""

import functools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gpt_jax.data.pipeline import evaluation_batches
from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.models.transformer import Transformer, forward
from gpt_jax.objectives.objectives import Objective
from gpt_jax.parallel import sharding
from gpt_jax.types import Array, Batch, Tree


def eval_step(
    params: Tree,
    batch: Batch,
    token_bytes: Array | None,
    teacher_params: Tree = None,
    *,
    model: Transformer,
    objective: Objective,
    teacher: Transformer | None = None,
) -> dict[str, Array]:
    """The objective's sums over a batch, `count` to divide them by, `num_bytes`; no dropout."""
    if teacher is not None:
        batch = {**batch, "teacher_logits": forward(teacher, teacher_params, batch)}
    _, sums = objective.loss(forward(model, params, batch), batch)
    sums = {**sums, "count": objective.count(batch)}
    if token_bytes is not None:
        sums["num_bytes"] = (token_bytes[batch["targets"]] * batch["loss_mask"]).sum()
    return sums


class Validation:
    """Runs a model over held-out rows.

    Args:
      model: The model.
      objective: What is measured.
      rows: The held-out rows.
      token_bytes: UTF-8 bytes of each id's text, f32[V] (bytes_by_token); None: targets are no
        text.
      batch_size: Sequences of a global batch.
      mesh: Where it runs.
      max_batches: Batches of one evaluation; 0: all rows.
      teacher: A model and its parameters for objectives that compare with one.
    """

    def __init__(
        self,
        model: Transformer,
        objective: Objective,
        rows: Any,
        token_bytes: np.ndarray | None,
        batch_size: int,
        mesh: Mesh,
        max_batches: int = 0,
        teacher: tuple[Transformer, Tree] | None = None,
    ):
        teacher_model, self._teacher_params = teacher or (None, None)
        score = functools.partial(
            eval_step, model=model, objective=objective, teacher=teacher_model
        )
        self._eval_step = sharding.on_mesh(mesh, jax.jit(score))
        self._rows = rows
        self._token_bytes = token_bytes
        self._batch_size = batch_size
        self._mesh = mesh
        self._max_batches = max_batches

    def run(self, params: Tree, *, whole: bool = False) -> dict[str, float]:
        """The objective's means, `loss` in nats first; of text also perplexity and bits_per_byte.

        Bits per byte are the nats of all targets over ln 2 and over the UTF-8 bytes of their text.
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
            arguments = params, place(batch), self._token_bytes, self._teacher_params
            for name, value in sharding.fetch(self._eval_step(*arguments)).items():
                sums[name] = sums.get(name, 0.0) + np.float64(value)
        count, num_bytes = sums.pop("count"), sums.pop("num_bytes", None)
        means = {name: float(value / count) for name, value in sums.items() if name != "z_loss"}
        loss = means.pop("loss")
        if num_bytes is None:
            return {"loss": loss, **means}
        perplexity = math.exp(loss) if loss < 700 else math.inf
        result = {"loss": loss, "perplexity": perplexity, **means}
        if num_bytes:
            result["bits_per_byte"] = float(sums["loss"] / math.log(2) / num_bytes)
        return result


def bytes_by_token(tokenizer: Tokenizer, rows: Any) -> np.ndarray:
    """UTF-8 bytes of each id's text, f32[V]; zeros where the bytes of the text are not known.

    With a tokenizer that is not byte-level a token counts the rows' mean bytes.
    """
    exact = tokenizer.token_bytes()
    if exact is not None:
        return exact.astype(np.float32)
    return np.full(tokenizer.vocab_size, rows.num_bytes / rows.num_tokens, np.float32)
