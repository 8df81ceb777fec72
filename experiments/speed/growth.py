"""How a training step's time grows with width, depth, length, batch and vocabulary.

    pip install -e '.[peers]'
    python experiments/speed/growth.py [--sweeps=width,depth,length,batch,vocabulary] [--ours]

GPT-2's architecture in bfloat16 (train_libraries.py). A sweep changes one number of 4 layers of
256, length 256, batch 8, vocabulary 2,048; heads are 64 wide; where the length changes, the batch
does too, so that a step always has as many tokens. The peer is measured at both ends of each sweep
(not with --ours). All points of a sweep run by turns.

Time is the wall's, or with --clock=processor that of all threads, which other work on the machine
changes less (waiting threads that spin count too).

Fits, to medians: against length and vocabulary a line, by least squares of relative errors, where
attention's formula is time a token = a + b T; against width and depth the exponent of time over
FLOPs (counts.FLOPS_RULE) beyond the smallest size: 1 is time that grows as FLOPs do (and a line in
the number of layers); against batch a step = c + d B. A PNG lies beside the JSON.
"""

import dataclasses
import statistics
from pathlib import Path

from measuring import PEERS, Worker, alternating, arguments, machine, require, write
from train_libraries import Shape

BASE = Shape(L=4, D=256, N=4, T=256, B=8, V=2048)


def sweep(letter: str, values: list[int]) -> list[Shape]:
    """BASE with one number changed, and what must change with it."""
    shapes = []
    for value in values:
        also = {"D": {"N": value // 64}, "T": {"B": BASE.T * BASE.B // value}}.get(letter, {})
        shapes.append(dataclasses.replace(BASE, **{letter: value}, **also))
    return shapes


SWEEPS = {
    "width": ("D", [64, 128, 256, 512]),
    "depth": ("L", [1, 2, 4, 8, 16]),
    "length": ("T", [64, 128, 256, 512, 1024, 2048]),
    "batch": ("B", [1, 2, 4, 8, 16]),
    "vocabulary": ("V", [256, 1024, 4096, 16384, 50304]),
}


def line(xs: list[float], ys: list[float]) -> dict[str, float]:
    """a + b x with the least squares of relative errors, and the largest of these."""
    import numpy as np

    x, y = np.asarray(xs, float), np.asarray(ys, float)
    (a, b), *_ = np.linalg.lstsq(np.stack([1 / y, x / y], 1), np.ones(len(y)), rcond=None)
    return {"a": float(a), "b": float(b), "worst": float(np.max(np.abs((a + b * x) / y - 1)))}


def exponent(xs: list[float], ys: list[float]) -> float:
    """p of y = c x^p, by least squares of logarithms."""
    import numpy as np

    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def fit(name: str, rows: list[dict]) -> dict[str, float]:
    """The fit of a sweep, of our rows."""
    values, flops = [row["value"] for row in rows], [row["flops"] for row in rows]
    nanoseconds = [row["ns_token"] for row in rows]
    if name in ("length", "vocabulary"):
        return line(values, nanoseconds)
    if name == "batch":
        return line(values, [row["ms"] for row in rows])
    tokens = [row["tokens"] for row in rows]
    a_token = [f / t for f, t in zip(flops, tokens, strict=True)]
    # Beyond the smallest size: a tiny step is mostly what is not a product.
    found = {"exponent": exponent(a_token[1:], nanoseconds[1:])}
    # The head's FLOPs are cheap beside a layer's, so that a line may have an exponent above 1.
    return found | (line(values, nanoseconds) if name == "depth" else {})


def in_words(name: str, found: dict[str, float]) -> str:
    words = []
    if "exponent" in found:
        words.append(f"time ~ FLOPs^{found['exponent']:.2f} beyond the smallest")
    if "a" in found:
        unit, of = ("ms", "a step") if name == "batch" else ("ns", "a token")
        formula = f"{of} {found['a']:.3g} + {found['b']:.3g} {SWEEPS[name][0]} {unit}"
        words.append(f"{formula}, off by {found['worst']:.0%} at most")
    return "; ".join(words)


def measure(workers: dict[str, Worker], shapes: list[Shape], letter: str, args) -> list[dict]:
    """Rows of a sweep: ours at each point, the peer's at the ends."""
    cases: list = [("ours", shape) for shape in shapes]
    if "peer" in workers:
        cases += [("peer", shape) for shape in (shapes[0], shapes[-1])]

    def run(case) -> list[tuple[float, float]]:
        who, shape = case
        job = {"shape": dataclasses.asdict(shape), "dtype": args.dtype, "steps": args.steps}
        done = workers[who].run(do="steps", **job, warmup=2)
        return list(zip(done["seconds"], done["processor"], strict=True))

    times = alternating(cases, run, args.rounds)
    for worker in workers.values():
        worker.run(do="forget")
    rows = []
    for (who, shape), figures in times.items():
        wall, processor = (statistics.median(values) for values in zip(*figures, strict=True))
        chosen, tokens = {"wall": wall, "processor": processor}[args.clock], shape.B * shape.T
        rows.append({
            "library": who, "value": getattr(shape, letter), "tokens": tokens,
            "flops": shape.flops(), "wall_ms": 1e3 * wall, "processor_ms": 1e3 * processor,
            "ms": 1e3 * chosen, "ns_token": 1e9 * chosen / tokens,
            "gflops_per_second": shape.flops() / wall / 1e9,
        })  # fmt: skip
    return rows


def draw(result: dict, path: Path) -> None:
    """One panel a sweep: time a token of both, and FLOPs a token scaled to our last point."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sweeps = result["sweeps"]
    figure, panels = plt.subplots(
        1, len(sweeps), figsize=(3.4 * len(sweeps), 3.6), dpi=120, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for axes, (name, found) in zip(panels[0], sweeps.items(), strict=True):
        for who, style in (("ours", "o-"), ("peer", "s")):
            rows = [row for row in found["rows"] if row["library"] == who]
            if rows:
                xs, ys = zip(*((row["value"], row["ns_token"] / 1e3) for row in rows), strict=True)
                axes.plot(xs, ys, style, label=f"{who}, {result['dtype']}", markersize=5)
        rows = [row for row in found["rows"] if row["library"] == "ours"]
        flops = [row["flops"] / row["tokens"] for row in rows]
        scale = rows[-1]["ns_token"] / 1e3 / flops[-1]
        axes.plot(
            [row["value"] for row in rows], [scale * f for f in flops], "k:", label="FLOPs, scaled"
        )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        labelled = "25" if high > 3 * low else "123456789"
        axes.yaxis.set_minor_formatter(
            lambda y, _, labelled=labelled: f"{y:g}" if str(y)[0] in labelled else ""
        )
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.set(xlabel=name, title=found["in_words"].replace("; ", "\n"))
        axes.title.set_size(7)
        axes.grid(alpha=0.3, which="both")
    panels[0][0].set_ylabel(f"{result['clock']} us a token of a step")
    panels[0][0].legend(fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = arguments(__doc__, "growth", rounds=5)
    parser.add_argument("--sweeps", default=",".join(SWEEPS), help="of " + ",".join(SWEEPS))
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a turn")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--clock", default="wall", choices=("wall", "processor"))
    parser.add_argument("--ours", action="store_true", help="leave the peer out")
    args = parser.parse_args()
    names = args.sweeps.split(",")
    if not set(names) <= set(SWEEPS) or args.steps < 1:
        parser.error(f"--sweeps are of {', '.join(SWEEPS)}; --steps is at least 1")
    packages = ("jax", "jaxlib") if args.ours else ("jax", "jaxlib", *PEERS)
    require(*packages)

    result = {"machine": machine(*packages), "dtype": args.dtype}
    result |= {"clock": args.clock, "sweeps": {}}
    result["base"] = dataclasses.asdict(BASE)
    libraries = ("ours",) if args.ours else ("ours", "peer")
    workers = {who: Worker("train_libraries.py", who) for who in libraries}
    roof = workers["ours"].run(do="roof", dtype=args.dtype)
    print(f"roof: {args.dtype} {roof / 1e9:.0f} GF/s")
    print(f"us/token and fits: {args.clock}")
    print(
        "sweep       value library  wall ms  processor ms   us/token  MFLOP/token     GF/s  of roof"
    )
    for name in names:
        letter, values = SWEEPS[name]
        shapes = sweep(letter, values[:3] if args.debug else values)
        rows = measure(workers, shapes, letter, args)
        for row in rows:
            row["share_of_roof"] = row["gflops_per_second"] * 1e9 / roof
            print(
                f"{name:10} {row['value']:6} {row['library']:7} {row['wall_ms']:8.1f} "
                f"{row['processor_ms']:13.1f} {row['ns_token'] / 1e3:10.1f} "
                f"{row['flops'] / row['tokens'] / 1e6:12.2f} {row['gflops_per_second']:8.0f} "
                f"{row['share_of_roof']:8.2f}"
            )
        found = fit(name, [row for row in rows if row["library"] == "ours"])
        words = in_words(name, found)
        print(f"{name:10} {words}", flush=True)
        result["sweeps"][name] = {"rows": rows, "fit": found, "in_words": words}
    for worker in workers.values():
        worker.close()
    write(args.out, result | {"roof_gflops": roof / 1e9})
    draw(result, Path(args.out).with_suffix(".png"))


if __name__ == "__main__":
    main()
