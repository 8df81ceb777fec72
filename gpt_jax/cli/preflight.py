"""Compiles a config's step for a TPU slice, without one: whether it fits, and what it costs there.

  gpt-jax preflight --config=configs/gpt.py:size=7b --topology=v5e-256,v6e-256

The first use fetches the TPU compiler (200 MiB) into the cache folder. What does not fit is
compiled again with changes, and then for larger slices, until it fits; the command ends with 2.

  gpt-jax preflight --config=configs/gpt.py:size=1m,debug --equivalence

trains it on meshes of 8 simulated devices instead, and ends with 1 unless losses and gradients are
those of one device.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE[:args]", help="a config file")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--topology", metavar="SLICE[,SLICE]", help="v5e-256, v4-512, 2xv6e-256 ...")
    what.add_argument(
        "--equivalence", action="store_true", help="whether training is the same on every mesh"
    )
    parser.add_argument(
        "--price_per_chip_hour", type=float, metavar="X", help="what a chip costs in an hour"
    )
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="of --equivalence (20)")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from gpt_jax.runs.config import run_config
    from gpt_jax.runs.config_file import load_config

    config = run_config(load_config(arguments.config, overrides)[0])
    return _equivalence(arguments, config) if arguments.equivalence else _fly(arguments, config)


def _equivalence(arguments: argparse.Namespace, config) -> int:
    import functools
    import os

    if arguments.steps < 1:
        raise ValueError(f"--steps: {arguments.steps} is below 1")
    # Before JAX starts.
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

    import jax

    # Each program runs a few times: to optimize it takes longer.
    jax.config.update("jax_disable_most_optimizations", True)

    from gpt_jax.train import equivalence

    agreements = equivalence.compare(config, arguments.steps)
    return 0 if equivalence.table(agreements, functools.partial(print, flush=True)) else 1


def _fly(arguments: argparse.Namespace, config) -> int:
    import functools
    import os

    from gpt_jax.parallel.topologies import parse_topology

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
            say(
                "  nothing that was tried holds it; take a smaller model, or a train.batch_size "
                "that divides by more chips"
            )
        else:
            say("\n".join(preflight.report(found[1], price)))
    return 0 if fits else 2
