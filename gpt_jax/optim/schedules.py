"""Learning-rate schedules over the steps of a run."""

from collections.abc import Callable

import jax.numpy as jnp

from gpt_jax.types import Array


def make_schedule(
    name: str, *, peak: float, final: float, warmup: int, decay: int, total: int
) -> Callable[[Array | int], Array]:
    """A function from the step to the learning rate.

    Args:
      name: After the warm-up: "constant" stays at the peak; "linear" and "cosine"
        (arXiv:1608.03983) fall to the final rate at the end of the run; "wsd" (warm-up, stable,
        decay, arXiv:2404.06395) stays at the peak and falls over the last `decay` steps.
      peak: Learning rate at the end of the warm-up.
      final: Learning rate at the last step.
      warmup: Steps of linear rise; the first step already has peak / warmup.
      decay: Steps of the fall of "wsd", which goes like 1 - sqrt (arXiv:2405.18392).
      total: Steps of the run.
    """

    def schedule(step: Array | int) -> Array:
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
        start = total - decay if name == "wsd" else warmup
        # The last step of the run, total - 1, is the one that has the final rate.
        t = jnp.clip((step - start + 1) / max(total - start, 1), 0.0, 1.0)
        fall = {
            "constant": lambda: jnp.ones_like(t),
            "linear": lambda: 1 - t,
            "cosine": lambda: 0.5 * (1 + jnp.cos(jnp.pi * t)),
            "wsd": lambda: 1 - jnp.sqrt(t),
        }[name]()
        end = peak if name == "constant" else final
        return jnp.minimum(peak * rise, end + (peak - end) * fall)

    return schedule
