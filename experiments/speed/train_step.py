"""A training step of gpt_jax against Hugging Face's GPT2LMHeadModel on this machine's CPU.

    pip install -e '.[peers]'
    python experiments/speed/train_step.py [--shapes=small,char,gpt2] [--steps=10]

Both train the GPT-2 architecture (tied, biases, gelu, learned positions, no dropout) with AdamW and
the gradient clipped at norm 1, on random tokens. Each library lives in a process of its own, so
that their threads do not meet; rounds of steps alternate between f32 and bf16 of both (the peer's
bf16 is torch.autocast). Times are medians over all timed steps, after three of warm-up.

Share of the roof: FLOPs of a step over its time, over the speed of one 2048 x 2048 product in the
same dtype. A step counts (6 N + 12 L T D) FLOPs a token, N = 12 L D^2 + V D: 2 for the forward
product, 4 for the backward ones; attention as if all scores were computed (PaLM's rule,
arXiv:2204.02311, appendix B), so that skipping the masked half counts as speed.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

WARMUP_STEPS = 3
ROUNDS = 5
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Shape:
    """L layers of width D with N heads, T tokens a sequence, B sequences, V vocabulary."""

    L: int
    D: int
    N: int
    T: int
    B: int
    V: int

    def flops(self) -> float:
        num_params = 12 * self.L * self.D**2 + self.V * self.D
        return self.B * self.T * (6 * num_params + 12 * self.L * self.T * self.D)


SHAPES = {
    "small": Shape(L=4, D=128, N=4, T=64, B=12, V=65),  # nanoGPT's for a laptop
    "char": Shape(L=6, D=384, N=6, T=256, B=16, V=65),  # nanoGPT's for characters
    "gpt2": Shape(L=12, D=768, N=12, T=1024, B=2, V=50304),  # GPT-2, 124M
}


def make_ours(shape: Shape, dtype: str):
    """A function that makes one step and waits for it."""
    import jax
    import jax.numpy as jnp

    from gpt_jax.models.config import TransformerConfig
    from gpt_jax.models.transformer import Transformer
    from gpt_jax.objectives.config import ObjectiveConfig
    from gpt_jax.objectives.objectives import make_objective
    from gpt_jax.optim.durations import Clock
    from gpt_jax.optim.optimizers import OptimizerConfig, make_optimizer
    from gpt_jax.runs.state import make_init
    from gpt_jax.train.step import train_step

    config = TransformerConfig(
        vocab_size=shape.V, seq_len=shape.T, num_layers=shape.L, embed_dim=shape.D,
        num_heads=shape.N, positions="learned", norm="layernorm", norm_eps=1e-5, activation="gelu",
        bias=True, tied=True, qk_norm=False, init="gpt2", dtype=dtype,
    )  # fmt: skip
    model = Transformer(config)
    clock = Clock(tokens_per_step=shape.B * shape.T, tokens_per_epoch=10**6, total_steps=1000)
    optimizer = make_optimizer(OptimizerConfig(name="adamw", clip_norm=1.0), clock)
    state = jax.jit(make_init(model, optimizer, 0))()
    size = (shape.B, shape.T)
    tokens = jax.random.randint(jax.random.key(1), size, 0, shape.V)
    batch = {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, axis=1),
        "loss_mask": jnp.ones(size),
        "positions": jnp.broadcast_to(jnp.arange(shape.T), size),
        "segment_ids": jnp.ones(size, jnp.int32),
    }
    parts = {"model": model, "objective": make_objective(ObjectiveConfig()), "optimizer": optimizer}
    update = jax.jit(functools.partial(train_step, **parts), donate_argnums=0)

    def step():
        nonlocal state
        state, metrics = update(state, batch)
        jax.block_until_ready((state, metrics))

    return step


def make_peer(shape: Shape, dtype: str):
    """The same of the peer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=shape.V, n_positions=shape.T, n_embd=shape.D, n_layer=shape.L, n_head=shape.N,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    tokens = torch.randint(0, shape.V, (shape.B, shape.T))

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def make_roof(dtype: str):
    """One 2048 x 2048 product, emitted in f32."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (2048, 2048)).astype(dtype)
    product = jax.jit(lambda x, y: jnp.dot(x, y, preferred_element_type=jnp.float32))
    return lambda: jax.block_until_ready(product(x, x))


def work(who: str) -> None:
    """A worker: reads lines of JSON {"shape", "dtype", "steps"}, answers the seconds of each."""
    if who == "ours":
        importlib.import_module("gpt_jax.parallel.host_memory").keep_freed_memory()
    make = {"ours": make_ours, "peer": make_peer}[who]
    made = {}
    for line in sys.stdin:
        job = json.loads(line)
        key = job["shape"], job["dtype"]
        if key not in made:
            made = {k: v for k, v in made.items() if k[0] == key[0]}  # one shape in memory
            is_roof = job["shape"] == "roof"
            made[key] = make_roof(key[1]) if is_roof else make(SHAPES[key[0]], key[1])
            for _ in range(WARMUP_STEPS):
                made[key]()
        seconds = []
        for _ in range(job["steps"]):
            start = time.perf_counter()
            made[key]()
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), flush=True)


class Worker:
    """A process that makes steps when told to."""

    def __init__(self, who: str):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, __file__, f"--worker={who}"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=environment, **pipes)

    def run(self, shape: str, dtype: str, steps: int) -> list[float]:
        job = json.dumps({"shape": shape, "dtype": dtype, "steps": steps})
        print(job, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit("error: a worker ended; its message is above")
        return json.loads(answer)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def measure(workers: dict[str, Worker], name: str, steps: int, roof: dict[str, float]) -> dict:
    """Rows of one shape, by library and dtype."""
    cases = [(who, dtype) for dtype in DTYPES for who in workers]
    times = {case: [] for case in cases}
    for _ in range(ROUNDS):
        for who, dtype in cases:
            times[who, dtype] += workers[who].run(name, dtype, -(-steps // ROUNDS))
    medians = {case: statistics.median(seconds) for case, seconds in times.items()}
    peer_f32 = medians["peer", "float32"]
    peer_best = min(medians["peer", dtype] for dtype in DTYPES)
    shape = SHAPES[name]
    return [
        {
            **{"shape": name, "library": who, "dtype": dtype, "ms": 1e3 * seconds},
            "min_ms": 1e3 * min(times[who, dtype]),
            "tokens_per_second": shape.B * shape.T / seconds,
            "to_peer_f32": peer_f32 / seconds,
            "to_peer_best": peer_best / seconds,
            "share_of_roof": shape.flops() / seconds / 1e9 / roof[dtype],
        }
        for (who, dtype), seconds in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(SHAPES), help="of " + ",".join(SHAPES))
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each, at least")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "train_step.json"))
    parser.add_argument("--worker", choices=("ours", "peer"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker)
    names = args.shapes.split(",")
    if not set(names) <= set(SHAPES) or args.steps < 1:
        parser.error(f"--shapes are of {', '.join(SHAPES)}; --steps is at least 1")
    if not all(importlib.util.find_spec(package) for package in ("torch", "transformers")):
        print("error: torch or transformers is missing: pip install -e '.[peers]'", file=sys.stderr)
        raise SystemExit(2)

    workers = {who: Worker(who) for who in ("ours", "peer")}
    fastest = {dtype: min(workers["ours"].run("roof", dtype, 20)) for dtype in DTYPES}
    roof = {dtype: 2 * 2048**3 / seconds / 1e9 for dtype, seconds in fastest.items()}
    print("roof: " + ", ".join(f"{dtype} {speed:.0f} GF/s" for dtype, speed in roof.items()))
    print("shape  library dtype         ms   tokens/s  peer f32  peer best  of roof")
    rows = []
    for name in names:
        for row in measure(workers, name, args.steps, roof):
            print(
                f"{name:6} {row['library']:7} {row['dtype']:8} {row['ms']:8.1f} "
                f"{row['tokens_per_second']:10.0f} {row['to_peer_f32']:8.2f}x "
                f"{row['to_peer_best']:9.2f}x {row['share_of_roof']:8.2f}"
            )
            rows.append(row)
    for worker in workers.values():
        worker.close()
    packages = ("jax", "jaxlib", "torch", "transformers")
    result = {"roof_gflops": roof, "rows": rows, "cores": os.cpu_count()}
    result["shapes"] = {name: dataclasses.asdict(SHAPES[name]) for name in names}
    result["versions"] = {name: importlib.metadata.version(name) for name in packages}
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
