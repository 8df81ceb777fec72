"""What makes two runs the same run: the part of a config that its numbers come from.  No JAX."""

import hashlib
import json
from typing import Any

from gpt_jax.runs.config import RunConfig, flatten

# How a run is computed, watched and stored: another value gives the same numbers, but for rounding.
NOT_OF_THE_NUMBERS = (
    "model.scan", "model.remat", "model.attention", "mesh.data", "mesh.fsdp", "mesh.tensor",
    "mesh.sequence", "mesh.expert", "mesh.stage",
    "train.log_every", "train.eval_every", "train.eval_batches", "train.checkpoint_every",
    "train.keep", "train.keep_every", "train.sample_prompts", "train.sample_tokens",
    "train.tensorboard", "train.wandb", "train.profile", "train.stall_timeout",
    "tasks.eval_examples",
    "tasks.max_new_tokens",
)  # fmt: skip
# They choose the best checkpoint and the end of a run that looks for it.
_OF_THE_BEST = ("train.eval_every", "train.eval_batches", "tasks.eval_examples")
# Fields that came later: with these values a config is the run that it was without them.
_AS_EVER = {
    "train.on_nonfinite": "halt", "train.spike_sigma": 0.0, "model.num_experts": 0,
    "model.experts_per_token": 2, "model.expert_capacity": 0.0, "model.expert_balance": 0.01,
    "model.router_z_loss": 0.001,
}  # fmt: skip


def of_the_numbers(config: RunConfig) -> dict[str, Any]:
    """{dotted field: value} of the fields that a run's numbers depend on."""
    ignored = set(NOT_OF_THE_NUMBERS)
    if config.train.keep_best or config.train.patience:
        ignored -= set(_OF_THE_BEST)
    flat = flatten(config.to_dict())
    return {name: value for name, value in flat.items() if name not in ignored}


def config_sha(config: RunConfig) -> str:
    """The sha256 of a resolved config: of `of_the_numbers` as JSON, sorted, without spaces."""
    values = of_the_numbers(config)
    values = {name: x for name, x in values.items() if name not in _AS_EVER or x != _AS_EVER[name]}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def first_difference(one: RunConfig, other: RunConfig) -> tuple[str, Any, Any] | None:
    """(field, value in one, value in the other) where two runs first differ; None: nowhere."""
    values, others = of_the_numbers(one), of_the_numbers(other)
    for name, value in values.items():
        if name in others and value != others[name]:
            return name, value, others[name]
    return None
