"""Does the best learning rate stay where it is as a model gets wider?

    python experiments/mup/learning_rate_transfer.py [--rates=-10:-4] [--init=fan_in|gpt2]

Models of several widths are trained for --steps steps at learning rates a factor of 2 apart on the
Python standard library by bytes, in the standard parametrisation and in muP; AdamW, depth 2.  The
loss is that of held-out rows at the end, averaged over seeds; a run that diverges has none.  Prints
the best rate of each width, of those tried and between them; writes JSON and PNG.  A best rate at
an end of --rates is an error (2): it says nothing of where the best one lies.
"""

import argparse
import math
import sys
import time
from typing import Any

import jax
import numpy as np
from small_runs import (
    PARAMETRISATIONS,
    arguments,
    base_width,
    batches,
    config_for,
    prepare,
    program,
    write,
)

from gpt_jax.data.pipeline import evaluation_batches
from gpt_jax.evals.validation import eval_step
from gpt_jax.objectives.objectives import make_objective

_EVAL_BATCH = 16


def exponents(words: str) -> tuple[int, int]:
    """The ends of --rates."""
    low, colon, high = words.partition(":")
    if not colon or int(high) - int(low) < 2:
        raise argparse.ArgumentTypeError(f"{words!r} is not LOW:HIGH with at least three rates")
    return int(low), int(high)


def losses(args, data, width: int, mup: bool) -> list[list[float]]:
    """Held-out loss by rate and seed; infinity where a run diverged."""
    config = config_for(args, width, mup, "adamw")
    runs = program(config)
    objective = make_objective(config.objective, training=False)
    evaluate = jax.jit(
        lambda params, batch: eval_step(params, batch, None, model=runs.model, objective=objective)
    )
    held_out = next(iter(data.validation.values()))
    rows = list(evaluation_batches(held_out, _EVAL_BATCH, None, args.eval_batches))
    orders = [batches(data, args.steps, args.batch_size, seed) for seed in range(args.seeds)]
    table = []
    for rate in rates(args):
        by_seed = []
        for seed, order in enumerate(orders):
            state = runs.start(seed, rate)
            for batch in order:
                state, _ = runs.step(state, batch)
            sums = [evaluate(state.params, batch) for batch in rows]
            loss = sum(float(s["loss"]) for s in sums) / sum(float(s["count"]) for s in sums)
            failed = int(state.flags["first_nonfinite"]) >= 0 or not math.isfinite(loss)
            by_seed.append(math.inf if failed else loss)
        table.append(by_seed)
    return table


def rates(args) -> list[float]:
    low, high = args.rates
    return [2.0**exponent for exponent in range(low, high + 1)]


def best(means: list[float], field: str) -> int:
    """The place of the least mean.

    Raises:
      ValueError: It is the first or the last rate.
    """
    place = int(np.argmin(means))
    if place in (0, len(means) - 1):
        end = "lowest" if place == 0 else "highest"
        raise ValueError(f"--rates: the {end} rate is the best of {field}; widen the sweep")
    return place


def vertex(means: list[float], place: int) -> float:
    """Where, in places, the parabola through a least mean and its neighbours is lowest."""
    before, least, after = means[place - 1 : place + 2]
    bend = before - 2 * least + after
    return place + (before - after) / (2 * bend) if bend else float(place)


def study(args) -> dict[str, Any]:
    """All runs; what the JSON holds."""
    data = prepare(args)
    found: dict[str, dict[str, list]] = {name: {} for name in PARAMETRISATIONS}
    for name in PARAMETRISATIONS:
        for width in args.widths:
            began = time.monotonic()
            if name == "mup" and width == base_width(args):
                # The base is the standard parametrisation, bit for bit (tests/test_mup.py).
                found[name][str(width)] = found["standard"][str(width)]
            else:
                found[name][str(width)] = losses(args, data, width, name == "mup")
            means = " ".join(f"{np.mean(loss):.4f}" for loss in found[name][str(width)])
            print(f"{name} {width} ({time.monotonic() - began:.0f} s): {means}", flush=True)
    return {"rates": rates(args), "losses": found}


def conclude(result: dict[str, Any]) -> dict[str, Any]:
    """The best rate of each width, and by how many factors of 2 they lie apart.

    Raises:
      ValueError: One lies at an end of the sweep.
    """
    summary: dict[str, Any] = {}
    for name, by_width in result["losses"].items():
        places, least, between = [], [], []
        for width, table in by_width.items():
            means = [float(np.mean(by_seed)) for by_seed in table]
            places.append(best(means, f"width {width}, {name}"))
            least.append(min(means))
            between.append(vertex(means, places[-1]) + math.log2(result["rates"][0]))
        summary[name] = {
            "best_rate": {w: result["rates"][p] for w, p in zip(by_width, places, strict=True)},
            "loss": dict(zip(by_width, least, strict=True)),
            "factors_of_2": max(places) - min(places),
            # The logarithm to the base 2 of the best rate, between those that were tried.
            "log2_between": dict(zip(by_width, between, strict=True)),
        }
    return summary


def print_table(summary: dict[str, Any]) -> None:
    widths = list(next(iter(summary.values()))["best_rate"])
    print(
        "\n| parametrisation |" + "".join(f" width {width} |" for width in widths) + " moves by |"
    )
    print("|---|" + "---|" * (len(widths) + 1))
    for name, row in summary.items():
        cells = (
            f"2^{round(math.log2(rate))}, 2^{row['log2_between'][width]:.1f} "
            f"({row['loss'][width]:.3f})"
            for width, rate in row["best_rate"].items()
        )
        print(f"| {name} | " + " | ".join(cells) + f" | {2 ** row['factors_of_2']} x |")


def draw(result: dict[str, Any], path: str) -> None:
    """Loss against rate, a line for each width, a panel for each parametrisation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(PARAMETRISATIONS), figsize=(10, 4), dpi=120, layout="constrained", sharey=True
    )
    least = math.inf
    for panel, (name, by_width) in zip(axes, result["losses"].items(), strict=True):
        for number, (width, table) in enumerate(by_width.items()):
            means = np.array([np.mean(by_seed) for by_seed in table])
            least = min(least, means.min())
            color = f"C{number}"
            panel.plot(result["rates"], means, "o-", markersize=3, color=color, label=width)
            place = means.argmin()
            panel.plot(result["rates"][place], means[place], "*", markersize=12, color=color)
        panel.set(title=name, xlabel="learning rate", xscale="log", ylim=(least - 0.05, least + 1))
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("held-out loss (nats a byte)")
    axes[0].legend(title="width")
    figure.savefig(path)
    plt.close(figure)


def main(words: list[str] | None = None) -> dict[str, Any]:
    """The script; returns what its JSON holds."""
    parser = arguments(
        __doc__,
        "learning_rate_transfer",
        widths=(32, 64, 128, 256),
        steps=250,
        seeds=3,
        batch_size=8,
        warmup=25,
        dtype="bfloat16",
    )
    parser.add_argument("--rates", type=exponents, default=(-10, -4), help="powers of 2, LOW:HIGH")
    parser.add_argument("--eval_batches", type=int, default=8, help=f"of {_EVAL_BATCH} rows")
    args = parser.parse_args(words)
    result = study(args)
    write(args, result)
    draw(result, args.out.removesuffix(".json") + ".png")
    try:
        result["summary"] = conclude(result)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    write(args, result)
    print_table(result["summary"])
    return result


if __name__ == "__main__":
    main()
