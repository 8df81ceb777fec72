"""What the scripts of this folder share: small runs that differ in width, rate and seed alone.

Model, first parameters, optimizer and step are the project's.  One program serves all rates and
seeds of a width: every update of the optimizer's chain is proportional to the peak rate, so that
the chain is built for a rate of 1 and its updates are multiplied by the one wanted, a traced value.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax

from gpt_jax.data.pipeline import PreparedData
from gpt_jax.models.transformer import Transformer
from gpt_jax.objectives.objectives import make_objective
from gpt_jax.optim.durations import Clock
from gpt_jax.optim.optimizers import make_optimizer
from gpt_jax.optim.width_scaling import WidthScaling
from gpt_jax.parallel.cache_folder import cache_dir
from gpt_jax.runs.config import RunConfig, run_config
from gpt_jax.runs.data import prepare_run
from gpt_jax.runs.state import TrainState, make_init
from gpt_jax.train.step import train_step

FOLDER = Path(__file__).parent
PARAMETRISATIONS = ("standard", "mup")


@dataclasses.dataclass(frozen=True)
class Program:
    """One width's programs.

    Attributes:
      model: The model.
      start: (seed, rate) -> the first state.
      step: (state, batch) -> (the state after, metrics).
    """

    model: Transformer
    start: Callable[[int, float], TrainState]
    step: Callable[[TrainState, dict], tuple[TrainState, dict]]


def config_for(args: argparse.Namespace, width: int, mup: bool, optimizer: str) -> RunConfig:
    """The config of a width: heads of 16, so that wider models have more of them."""
    return run_config(
        {
            "seed": 0,
            "data": {
                "path": args.text, "name": "" if args.text else "python_stdlib",
                "tokenizer": "bytes", "vocab_size": 257, "seq_len": args.seq_len,
            },
            "model": {
                "vocab_size": 257, "seq_len": args.seq_len, "num_layers": args.layers,
                "embed_dim": width, "num_heads": max(width // 16, 1), "init": args.init,
                "dtype": args.dtype, "mup_base_width": base_width(args) if mup else 0,
            },
            "optimizer": {
                "name": optimizer, "learning_rate": 1.0, "muon_learning_rate": args.muon_ratio,
                "schedule": args.schedule, "warmup": args.warmup,
            },
            "train": {"batch_size": args.batch_size, "duration": args.steps},
        }
    )  # fmt: skip


def base_width(args: argparse.Namespace) -> int:
    """model.mup_base_width of muP: --base, or the least of --widths."""
    return args.base or args.widths[0]


def program(config: RunConfig) -> Program:
    """Compiles when first called."""
    model = Transformer(config.model)
    total = config.train.duration
    clock = Clock(config.train.batch_size * config.data.seq_len, 1, total)
    scaling = WidthScaling(config.model.width_multiplier, config.model.depth_multiplier)
    rated = optax.inject_hyperparams(optax.scale)
    optimizer = optax.chain(make_optimizer(config.optimizer, clock, scaling), rated(step_size=1.0))

    @jax.jit
    def start(seed, rate) -> TrainState:
        state = make_init(model, optimizer, seed)()
        *slots, last = state.opt_state
        last = last._replace(hyperparams={"step_size": rate})
        return state.replace(opt_state=(*slots, last))

    step = functools.partial(
        train_step, model=model, objective=make_objective(config.objective), optimizer=optimizer
    )
    return Program(model, start, jax.jit(step, donate_argnums=0))


def prepare(args: argparse.Namespace) -> PreparedData:
    """The rows that all runs read."""
    return prepare_run(config_for(args, args.widths[0], False, "adamw"), cache_dir())


def batches(data: PreparedData, number: int, batch_size: int, seed: int) -> list[dict]:
    """The first batches of a run of this seed."""
    return [data.train.batch(seed, batch_size, index, None) for index in range(number)]


def arguments(doc: str, name: str, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with what both scripts take."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    of_both = {
        "widths": (32, 64, 128, 256), "base": 0, "seeds": 3, "layers": 2, "seq_len": 128,
        "batch_size": 4, "text": "", "init": "fan_in", "dtype": "float32",
        "schedule": "constant", "warmup": 0, "muon_ratio": 1.0,
        "out": str(FOLDER / "results" / f"{name}.json"),
    }  # fmt: skip
    for option, value in (of_both | defaults).items():
        kind = _numbers if isinstance(value, tuple) else type(value)
        parser.add_argument(f"--{option}", type=kind, default=value)
    return parser


def _numbers(words: str) -> tuple[int, ...]:
    numbers = tuple(int(word) for word in words.split(","))
    if len(numbers) < 2 or list(numbers) != sorted(set(numbers)):
        raise argparse.ArgumentTypeError(f"{words!r} is not two or more rising numbers")
    return numbers


def write(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Writes a script's JSON: its arguments, but for the place of that JSON, and what it found."""
    told = {name: value for name, value in vars(args).items() if name != "out"}
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps({"arguments": told, **result}, indent=1) + "\n")
