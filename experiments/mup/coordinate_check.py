"""Do activations keep their size as a model gets wider?  The coordinate check of muP.

    python experiments/mup/coordinate_check.py [--optimizers=adamw,muon] [--init=fan_in|gpt2]

Models of several widths take a few steps at one learning rate on the Python standard library by
bytes.  At each step the mean |x| is taken of what every layer's attention and MLP add to the
residual stream, of the stream after every layer, and of the logits; averaged over seeds.  The slope
of its logarithm against the logarithm of the width should be 0: what is positive grows without
bounds, what is negative stops learning.  Prints a table of slopes; writes JSON and PNG.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from small_runs import PARAMETRISATIONS, arguments, batches, config_for, prepare, program, write

# The largest slope of muP that counts as none.
TOLERANCE = 0.1
_SUBLAYERS = ("attention", "mlp")


def sizes_of(model, params, batch) -> dict[str, jax.Array]:
    """Mean |x| by name of the place."""
    kept = model.apply(
        {"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"],
        capture_intermediates=lambda module, method: (
            method == "__call__"
            and (module.name in (None, *_SUBLAYERS) or module.name.startswith("layers_"))
        ),
        mutable=["intermediates"],
    )[1]["intermediates"]  # fmt: skip
    found = {}
    for name in sorted(kept["stack"], key=lambda name: int(name.removeprefix("layers_"))):
        layer, number = kept["stack"][name], name.removeprefix("layers_")
        found[f"attention {number}"] = layer["attention"]["__call__"][0][0]
        found[f"mlp {number}"] = layer["mlp"]["__call__"][0]
        found[f"stream after {number}"] = layer["__call__"][0][0]
    found["logits"] = kept["__call__"][0]
    return {name: jnp.abs(x.astype(jnp.float32)).mean() for name, x in found.items()}


def measure(args, data, mup: bool, optimizer: str) -> dict[str, np.ndarray]:
    """Mean |x| by place: [widths, steps + 1], averaged over seeds."""
    found: dict[str, list] = {}
    for i, width in enumerate(args.widths):
        runs = program(config_for(args, width, mup, optimizer))
        sizes = jax.jit(lambda params, batch, model=runs.model: sizes_of(model, params, batch))
        for seed in range(args.seeds):
            state = runs.start(seed, args.rate)
            for step, batch in enumerate(batches(data, args.steps + 1, args.batch_size, seed)):
                for name, size in sizes(state.params, batch).items():
                    table = found.setdefault(name, np.zeros((len(args.widths), args.steps + 1)))
                    table[i, step] += float(size) / args.seeds
                if step < args.steps:
                    state, _ = runs.step(state, batch)
    return found


def slope(widths: tuple[int, ...], sizes: np.ndarray) -> float | None:
    """d log size / d log width by least squares; None where a size is 0, as zeros at the start."""
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        return None
    return float(np.polyfit(np.log(widths), np.log(sizes), 1)[0])


def case(args, data, parametrisation: str, optimizer: str) -> dict[str, Any]:
    """One parametrisation's row of the JSON."""
    sizes = measure(args, data, parametrisation == "mup", optimizer)
    return {
        "parametrisation": parametrisation,
        "optimizer": optimizer,
        "slopes": {
            name: [slope(args.widths, column) for column in table.T]
            for name, table in sizes.items()
        },
        "sizes": {name: np.round(table, 6).tolist() for name, table in sizes.items()},
    }


def print_table(cases: list[dict], steps: int) -> None:
    columns = sorted({0, 1, 2, steps // 2, steps})
    print("| optimizer | parametrisation | place |" + "".join(f" step {t} |" for t in columns))
    print("|---|---|---|" + "---|" * len(columns))
    for row in cases:
        for name, slopes in row["slopes"].items():
            cells = ("" if slopes[t] is None else f"{slopes[t]:+.2f}" for t in columns)
            print(f"| {row['optimizer']} | {row['parametrisation']} | {name} | "
                  + " | ".join(cells) + " |")  # fmt: skip


def draw(cases: list[dict], widths: tuple[int, ...], path: str) -> None:
    """Sizes at the last step against the width, a panel for each case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    optimizers = list(dict.fromkeys(row["optimizer"] for row in cases))
    shape = (len(optimizers), len(PARAMETRISATIONS))
    figure, axes = plt.subplots(
        *shape, figsize=(9, 3.4 * len(optimizers)), dpi=120, layout="constrained", sharey="row",
        squeeze=False,
    )  # fmt: skip
    for row in cases:
        place = optimizers.index(row["optimizer"]), PARAMETRISATIONS.index(row["parametrisation"])
        panel = axes[place]
        for name, table in row["sizes"].items():
            panel.plot(widths, [sizes[-1] for sizes in table], "o-", markersize=3, label=name)
        panel.set(
            title=f"{row['optimizer']}, {row['parametrisation']}", xlabel="width",
            ylabel="mean |x| at the last step", xscale="log", yscale="log",
        )  # fmt: skip
        panel.set_xticks(widths, [str(width) for width in widths], minor=False)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.savefig(path)
    plt.close(figure)


def main(words: list[str] | None = None) -> dict[str, Any]:
    """The script; returns what its JSON holds."""
    parser = arguments(__doc__, "coordinate_check", steps=10, rate=2.0**-7, optimizers="adamw,muon")
    args = parser.parse_args(words)
    data = prepare(args)
    cases = [
        case(args, data, parametrisation, optimizer)
        for optimizer in args.optimizers.split(",")
        for parametrisation in PARAMETRISATIONS
    ]
    largest = {
        f"{row['optimizer']} {row['parametrisation']}": max(
            abs(slopes[-1]) for slopes in row["slopes"].values() if slopes[-1] is not None
        )
        for row in cases
    }
    print_table(cases, args.steps)
    print(f"\nlargest |slope| at step {args.steps}: "
          + ", ".join(f"{name} {value:.2f}" for name, value in largest.items()))  # fmt: skip
    result = {"largest_slope": largest, "cases": cases}
    write(args, result)
    draw(cases, args.widths, args.out.removesuffix(".json") + ".png")
    grown = [name for name in largest if name.endswith("mup") and largest[name] > TOLERANCE]
    if grown:
        print(f"error: slopes over {TOLERANCE}: {', '.join(grown)}", file=sys.stderr)
    return result


if __name__ == "__main__":
    main()
