"""GPT-style language models in JAX and Flax.  Importing this package starts no JAX."""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["from_pretrained"]


def __getattr__(name: str) -> Any:
    """What starts JAX is imported when it is first asked for."""
    if name in __all__:
        return getattr(importlib.import_module("gpt_jax.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
