"""Makes a run of a pretrained language model, or a folder for transformers of a run.

  gpt-jax convert --from=hf:DIR --to=runs/gpt2       a folder of Hugging Face's
  gpt-jax convert --from=gguf:FILE --to=runs/smollm2
  gpt-jax convert --from=runs/gpt2 --to=hf:DIR       the way back; adapters are merged

"hf:NAME" and "gguf:NAME" are models that `gpt-jax data fetch NAME` brought.
"""

import argparse
import re

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_DISAGREES = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", required=True, dest="source", metavar="SOURCE")
    parser.add_argument(
        "--to", required=True, metavar="DIR", help="the new run directory, or hf:DIR"
    )
    parser.add_argument(
        "--skip", action="append", default=[], metavar="REGEX",
        help="parameters of the source to leave out of the run; repeatable",
    )  # fmt: skip
    parser.add_argument("--step", type=int, help="checkpoint (default: the best kept, or newest)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of a folder's weights (default: float32)"
    )
    parser.add_argument("--shard_size", metavar="SIZE", help="of a folder's files (default: 5GB)")
    parser.add_argument(
        "--verify", action="store_true",
        help="compare outputs with those of transformers, which must be installed",
    )  # fmt: skip


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from gpt_jax.convert.naming import renamed, source_names

    names = source_names("--from") | {"spec": "--from", "step": "--step", "init.skip": "--skip"}
    with renamed(names):
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from gpt_jax.convert.source import Source, model_values

    exports = arguments.to.startswith("hf:")
    source = Source.parse(arguments.source)  # most mistakes, before JAX starts
    if not exports:
        model_values(arguments.source)
    _check(arguments, exports, source.kind)

    from gpt_jax.parallel.startup import start

    if arguments.verify:
        from gpt_jax.convert.verify import need_transformers

        need_transformers()
    start(one_arena=True)
    return _export(arguments) if exports else _import(arguments, source)


def _check(arguments: argparse.Namespace, exports: bool, kind: str) -> None:
    for name in ("dtype", "shard_size", "step") if not exports else ("skip",):
        if getattr(arguments, name) not in (None, []):
            to = "--to=hf:DIR" if not exports else "a run directory"
            raise ValueError(f"--{name}: {getattr(arguments, name)} is only for {to}")
    if exports and arguments.to == "hf:":
        raise ValueError("--to: 'hf:' names no folder")
    if arguments.verify and not exports and kind != "hf":
        raise ValueError(
            "--verify: transformers is asked to read folders alone: one side is hf:DIR"
        )


def _import(arguments: argparse.Namespace, source) -> int:
    from gpt_jax.convert.import_run import import_run

    config = import_run(arguments.source, arguments.to, arguments.skip)
    model = config.model
    print(
        f"{arguments.to}: {model.family} of {model.num_layers} layers of {model.embed_dim}, "
        f"vocabulary {model.vocab_size}"
    )
    return _verified(arguments.to, source.path) if arguments.verify else 0


def _export(arguments: argparse.Namespace) -> int:
    from gpt_jax.convert.export_run import SHARD_SIZE, export_run

    dtype = arguments.dtype or "float32"
    size = SHARD_SIZE if arguments.shard_size is None else _bytes(arguments.shard_size)
    folder, values = export_run(
        arguments.source, arguments.to.removeprefix("hf:"), step=arguments.step, dtype=dtype,
        shard_size=size,
    )  # fmt: skip
    print(f"{folder}: {values['architectures'][0]}, {dtype}")
    if not arguments.verify:
        return 0
    # What is rounded is read back, so that both have the same numbers.
    return _verified(arguments.source if dtype == "float32" else arguments.to, folder, arguments)


def _verified(ours: str, folder, arguments: argparse.Namespace | None = None) -> int:
    from gpt_jax.convert.open_model import open_model
    from gpt_jax.convert.verify import compare

    step = arguments.step if arguments and ours == arguments.source else None
    agreement = compare(open_model(ours, step=step), folder)
    print(agreement)
    return 0 if agreement.holds else _DISAGREES


def _bytes(text: str) -> int:
    """ "5GB", "300MB" or a number of bytes."""
    found = re.fullmatch(r"(\d+)\s*([KMG]?B)?", text.strip(), re.IGNORECASE)
    unit = (found[2] or "").upper().removeprefix("B") if found else None
    if found is None or int(found[1]) == 0:
        raise ValueError(f"--shard_size: {text!r} is no size such as 5GB or 300MB")
    return int(found[1]) * _UNITS[unit or ""]
