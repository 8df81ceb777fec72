"""Options that name a model to use.  Starts no JAX."""

import argparse

from gpt_jax.models.config import WEIGHT_DTYPES


def add_model(parser: argparse.ArgumentParser) -> None:
    """--run, --step and --dtype."""
    told = "a run directory, hf:DIR, gguf:FILE or a folder of Hugging Face's"
    parser.add_argument("--run", required=True, metavar="SPEC", help=told)
    parser.add_argument("--step", type=int, help="checkpoint (default: the best kept, or newest)")
    parser.add_argument(
        "--dtype", choices=WEIGHT_DTYPES, default=WEIGHT_DTYPES[0],
        help="of the weights in memory (default: %(default)s)",
    )  # fmt: skip


def read_model(arguments: argparse.Namespace):
    """The OpenModel that they name.

    Raises:
      ValueError: There is none, or it cannot be represented so.
    """
    from gpt_jax.convert.open_model import held_as, open_model

    opened = open_model(arguments.run, step=arguments.step, field="--run")
    return held_as(opened, arguments.dtype)
