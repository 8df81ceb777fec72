"""Prints what a config would run, and where each value is from; runs nothing.

gpt-jax config --config=configs/gpt2.py:size=1.5b
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE[:args]", help="a config file")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from gpt_jax.convert.source import inherit_model
    from gpt_jax.runs.config import flatten, run_config
    from gpt_jax.runs.config_file import load_config
    from gpt_jax.scaling import counts

    values, origins = load_config(arguments.config, overrides)
    values = inherit_model(values)
    config = run_config(values)
    flat = flatten(config.to_dict())
    width = max(map(len, flat))
    given = flatten(values)
    for name, value in flat.items():
        origin = origins.get(name, "init.source" if name in given else "default")
        print(f"{name:{width}}  {value!s:24}  {origin}")
    groups = counts.parameter_counts(config.model)
    total = sum(groups.values())
    print("\nparameters")
    for group, number in [*groups.items(), ("total", total)]:
        print(f"  {group:20} {number:>16,}")
    if config.model.num_experts:
        active = counts.num_active_parameters(config.model)
        print(f"  {'of a token':20} {active:>16,}")
    length, batch = config.data.seq_len, config.train.batch_size
    flops = counts.flops_per_token(config.model, length)
    print(f"\nFLOPs a token (6 a weight of a product; causal attention at {length}): {flops:,.0f}")
    frozen = bool(config.model.lora_rank or config.optimizer.freeze)
    if frozen:  # which parameters those are is known only where there is a model
        print("  as if all parameters were trained; the receipt of a run counts those that are")
    print(f"tokens a step: {batch * length:,}")
    print("\nbytes (float32)")
    print(f"  {'parameters':20} {4 * total:>16,}")
    if frozen:
        print("  gradients and optimizer: of the trained parameters alone; `train` prints how many")
        return 0
    slots = counts.optimizer_slots(config.optimizer.name, config.model)
    for what, number in (("gradients", total), ("optimizer", slots)):
        print(f"  {what:20} {4 * number:>16,}")
    return 0
