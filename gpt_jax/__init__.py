"""GPT-style language models in JAX and Flax.  Importing this package starts no JAX."""

__version__ = "0.1.0"
