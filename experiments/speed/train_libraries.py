"""The two libraries whose training steps are compared, on the GPT-2 architecture; also a worker.

Tied head, biases, gelu, learned positions, no dropout; AdamW, the gradient clipped at norm 1;
random tokens. Parameters are float32; in bfloat16 ours computes as `model.dtype` says, the peer
under torch.autocast. As a worker:

    python train_libraries.py ours|peer [--freed]

answers {"do": "steps", "shape", "dtype", "compiled", "steps", "seconds"} (so many at least, and for
so long at least), "roof", "memory" and "forget". Ours keeps freed memory, as `gpt-jax train` does,
unless it is told --freed.
"""

import dataclasses
import functools
import sys
import time
from types import SimpleNamespace
from typing import Any

from measuring import answer_jobs, peak_memory, roof

WARMUP_STEPS = 3


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
        """Of a step, by counts.FLOPS_RULE: causal attention counts half."""
        from gpt_jax.scaling.counts import flops_per_token

        # What the rule looks at, so that nothing else need be imported.
        config = SimpleNamespace(
            family="decoder", head="lm", tied=True, bias=False, qkv_bias=False, scan=False,
            activation="gelu", lora_rank=0, window=0, vocab_size=self.V, embed_dim=self.D,
            num_layers=self.L, num_heads=self.N, num_kv_heads=self.N, head_dim=self.D // self.N,
            mlp_dim=4 * self.D, num_experts=0,
        )  # fmt: skip
        return self.B * self.T * flops_per_token(config, self.T)


SHAPES = {
    "small": Shape(L=4, D=128, N=4, T=64, B=12, V=65),  # nanoGPT's for a laptop
    "char": Shape(L=6, D=384, N=6, T=256, B=16, V=65),  # nanoGPT's for characters
    "gpt2": Shape(L=12, D=768, N=12, T=1024, B=2, V=50304),  # GPT-2, 124M
}


class Ours:
    """gpt_jax.

    Attributes:
      num_parameters: Of the model.
      state: The TrainState; it is the same for both dtypes.
    """

    def __init__(self, shape: Shape):
        import jax
        import jax.numpy as jnp

        from gpt_jax import trees
        from gpt_jax.optim.durations import Clock
        from gpt_jax.optim.optimizers import OptimizerConfig, make_optimizer
        from gpt_jax.runs.state import make_init, options_of_once

        self._shape = shape
        clock = Clock(tokens_per_step=shape.B * shape.T, tokens_per_epoch=10**6, total_steps=1000)
        self._optimizer = make_optimizer(OptimizerConfig(name="adamw", clip_norm=1.0), clock)
        init = make_init(self._model("float32"), self._optimizer, 0)
        options = options_of_once(jax.default_backend())
        self.state = jax.jit(init, compiler_options=options)()
        self.num_parameters = trees.num_elements(self.state.params)
        size = (shape.B, shape.T)
        tokens = jax.random.randint(jax.random.key(1), size, 0, shape.V)
        self._batch = {
            "tokens": tokens,
            "targets": jnp.roll(tokens, -1, axis=1),
            "loss_mask": jnp.ones(size),
            "positions": jnp.broadcast_to(jnp.arange(shape.T), size),
            "segment_ids": jnp.ones(size, jnp.int32),
        }
        self._updates: dict[str, Any] = {}

    def _model(self, dtype: str):
        from gpt_jax.models.config import TransformerConfig
        from gpt_jax.models.transformer import Transformer

        s = self._shape
        return Transformer(TransformerConfig(
            vocab_size=s.V, seq_len=s.T, num_layers=s.L, embed_dim=s.D, num_heads=s.N,
            positions="learned", norm="layernorm", norm_eps=1e-5, activation="gelu", bias=True,
            tied=True, qk_norm=False, init="gpt2", dtype=dtype,
        ))  # fmt: skip

    def _update(self, dtype: str):
        import jax

        from gpt_jax.objectives.config import ObjectiveConfig
        from gpt_jax.objectives.objectives import make_objective
        from gpt_jax.train.step import train_step

        objective = make_objective(ObjectiveConfig())
        parts = {"model": self._model(dtype), "objective": objective, "optimizer": self._optimizer}
        return jax.jit(functools.partial(train_step, **parts), donate_argnums=0)

    def step(self, dtype: str, compiled: bool = True) -> None:
        """Makes one step and waits for it; `compiled` is the peer's."""
        import jax

        if dtype not in self._updates:
            self._updates[dtype] = self._update(dtype)
        self.state, metrics = self._updates[dtype](self.state, self._batch)
        jax.block_until_ready((self.state, metrics))


class Peer:
    """Hugging Face's GPT2LMHeadModel on torch, eager or through torch.compile."""

    def __init__(self, shape: Shape):
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=shape.V, n_positions=shape.T, n_embd=shape.D, n_layer=shape.L,
            n_head=shape.N, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        self._model = GPT2LMHeadModel(config).train()
        self._forward = {False: self._model, True: torch.compile(self._model)}
        self.num_parameters = sum(p.numel() for p in self._model.parameters())
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self._tokens = torch.randint(0, shape.V, (shape.B, shape.T))

    def step(self, dtype: str, compiled: bool = False) -> None:
        """Makes one step and waits for it."""
        import torch

        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = self._forward[compiled](input_ids=self._tokens, labels=self._tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        loss.item()


class _Answers:
    """A worker's answers; it keeps what it has made until it is told to forget."""

    def __init__(self, library: type):
        self._library, self._made, self._warm = library, {}, set()

    def __call__(self, job: dict) -> Any:
        return {
            "steps": self._steps, "roof": lambda job: roof(job["dtype"]),
            "memory": lambda job: peak_memory(), "forget": self._forget,
        }[job["do"]](job)  # fmt: skip

    def _steps(self, job: dict) -> dict:
        shape, dtype, compiled = Shape(**job["shape"]), job["dtype"], job.get("compiled", False)
        if shape not in self._made:
            self._made[shape] = self._library(shape)
        model = self._made[shape]
        if (shape, dtype, compiled) not in self._warm:
            self._warm.add((shape, dtype, compiled))
            for _ in range(job.get("warmup", WARMUP_STEPS)):
                model.step(dtype, compiled)
        seconds, processor = [], []
        while len(seconds) < job["steps"] or sum(seconds) < job.get("seconds", 0.0):
            start, start_cpu = time.perf_counter(), time.process_time()
            model.step(dtype, compiled)
            seconds.append(time.perf_counter() - start)
            processor.append(time.process_time() - start_cpu)
        return {
            "seconds": seconds, "processor": processor, "parameters": model.num_parameters,
        }  # fmt: skip

    def _forget(self, job: dict) -> None:
        self._made, self._warm = {}, set()


if __name__ == "__main__":
    if sys.argv[1] == "ours" and "--freed" not in sys.argv:
        from gpt_jax.parallel.startup import keep_memory

        keep_memory()
    answer_jobs(_Answers({"ours": Ours, "peer": Peer}[sys.argv[1]]))
