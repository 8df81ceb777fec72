"""Compiles a config's step for a TPU slice, without one: whether it fits, and what it costs there.

  gpt-jax preflight --config=configs/gpt.py:size=7b --topology=v5e-256,v6e-256

The first use fetches the TPU compiler (200 MiB) into the cache folder. What does not fit is
compiled again with changes, and then for larger slices, until it fits; the command ends with 2.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE[:args]", help="a config file")
    parser.add_argument(
        "--topology", required=True, metavar="SLICE[,SLICE]", help="v5e-256, v4-512, 2xv6e-256 ..."
    )
    parser.add_argument(
        "--price_per_chip_hour", type=float, metavar="X", help="what a chip costs in an hour"
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    import functools
    import os

    from gpt_jax.parallel.topologies import parse_topology
    from gpt_jax.runs.config import run_config
    from gpt_jax.runs.config_file import load_config

    config = run_config(load_config(arguments.config, overrides)[0])
    slices = [parse_topology(name) for name in arguments.topology.split(",")]
    price = arguments.price_per_chip_hour
    if price is not None and not price >= 0:
        raise ValueError(f"--price_per_chip_hour: {price} is below 0")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the compiler must not look for a TPU here

    from gpt_jax.parallel import topologies
    from gpt_jax.parallel.cache_folder import cache_dir
    from gpt_jax.train import preflight

    say, fits = functools.partial(print, flush=True), True
    for topology in slices:
        devices = topologies.devices(topology, cache_dir())
        flight = preflight.fly(config, topology, devices)
        if flight.step:
            say("\n".join(preflight.report(flight, price)))
            continue
        fits = False
        say(f"{topology.name}: {flight.refusal}\n  tried in its place:")
        found = preflight.nearest_fit(config, topology, devices, say) or preflight.larger_fit(
            config, topology, functools.partial(topologies.devices, cache_dir=cache_dir()), say
        )
        if found is None:
            say(f"  no slice of {topology.chip} holds it; take a smaller model")
        else:
            say("\n".join(preflight.report(found[1], price)))
    return 0 if fits else 2
