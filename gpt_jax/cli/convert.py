"""Makes a run of a pretrained language model, to generate from, evaluate or finetune.

  gpt-jax convert --from=hf:DIR --to=runs/gpt2       a folder of Hugging Face's
  gpt-jax convert --from=gguf:FILE --to=runs/smollm2

"hf:NAME" and "gguf:NAME" are models that `gpt-jax data fetch NAME` brought.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", required=True, dest="source", metavar="SOURCE")
    parser.add_argument("--to", required=True, metavar="DIR", help="the new run directory")
    parser.add_argument(
        "--skip", action="append", default=[], metavar="REGEX",
        help="parameters of the source to leave out; repeatable",
    )  # fmt: skip


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from gpt_jax.convert.source import model_values

    model_values(arguments.source)  # most mistakes, before JAX starts

    from gpt_jax.convert.import_run import import_run
    from gpt_jax.parallel.startup import start

    start()
    config = import_run(arguments.source, arguments.to, arguments.skip)
    model = config.model
    print(
        f"{arguments.to}: {model.family} of {model.num_layers} layers of {model.embed_dim}, "
        f"vocabulary {model.vocab_size}"
    )
    return 0
