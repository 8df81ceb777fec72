"""The two libraries that decode.py compares, on the same random weights."""

import dataclasses
import time
from pathlib import Path

PROMPT, NEW, CONTEXT, THREADS = 32, 128, 256, 2
# In the words of transformers' LlamaConfig.
SHAPES = {
    "stories": {  # stories15M
        "num_hidden_layers": 6, "hidden_size": 288, "num_attention_heads": 6,
        "num_key_value_heads": 6, "intermediate_size": 768, "vocab_size": 32000,
    },
    "smollm": {  # SmolLM2-135M
        "num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
    },
}  # fmt: skip


def prompts(shape: str, batch: int) -> list[list[int]]:
    import numpy as np

    size = (batch, PROMPT)
    return np.random.default_rng(0).integers(3, SHAPES[shape]["vocab_size"], size).tolist()


class Ours:
    """gpt_jax with weights that the peer has left in a folder."""

    def __init__(self, shape: str, dtype: str, folder: str):
        import jax
        import jax.numpy as jnp
        import numpy as np

        from gpt_jax.models.config import TransformerConfig
        from gpt_jax.models.quantize import num_bytes, quantize, to_bfloat16
        from gpt_jax.models.transformer import Transformer

        s = SHAPES[shape]
        D, N, K = s["hidden_size"], s["num_attention_heads"], s["num_key_value_heads"]
        config = TransformerConfig(
            vocab_size=s["vocab_size"], seq_len=CONTEXT, num_layers=s["num_hidden_layers"],
            embed_dim=D, num_heads=N, num_kv_heads=K, mlp_dim=s["intermediate_size"],
            positions="rotary", norm="rmsnorm", norm_eps=1e-6, activation="swiglu", bias=False,
            tied=True, qk_norm=False, scan=False,
        )  # fmt: skip
        with np.load(Path(folder) / f"{shape}.npz") as file:
            w = {name: jnp.asarray(file[name]) for name in file.files}

        def heads(name: str, count: int):
            return {"kernel": w[f"{name}.weight"].T.reshape(D, count, D // N)}

        def layer(i: int) -> dict:
            at = f"model.layers.{i}"
            a, mlp = f"{at}.self_attn", f"{at}.mlp"
            return {
                "attention_norm": {"scale": w[f"{at}.input_layernorm.weight"]},
                "mlp_norm": {"scale": w[f"{at}.post_attention_layernorm.weight"]},
                "attention": {
                    "q": heads(f"{a}.q_proj", N),
                    "k": heads(f"{a}.k_proj", K),
                    "v": heads(f"{a}.v_proj", K),
                    "out": {"kernel": w[f"{a}.o_proj.weight"].T.reshape(N, D // N, D)},
                },
                "mlp": {
                    name: {"kernel": w[f"{mlp}.{name}_proj.weight"].T}
                    for name in ("up", "gate", "down")
                },
            }

        params = {
            "tokens": w["model.embed_tokens.weight"],
            "final_norm": {"scale": w["model.norm.weight"]},
            "stack": {f"layers_{i}": layer(i) for i in range(config.num_layers)},
        }
        if dtype == "int8":
            params = jax.jit(quantize)(params)
        if dtype == "bfloat16":
            params = jax.jit(to_bfloat16)(params)
            config = dataclasses.replace(config, dtype="bfloat16")
        self.weight_bytes = num_bytes(params)
        self._model, self._params, self._engines = Transformer(config), params, {}

    def engine(self, batch: int):
        from gpt_jax.decode.engine import Engine

        if batch not in self._engines:
            self._engines = {batch: Engine(self._model, self._params, max_slots=batch)}
        return self._engines[batch]

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        engine = self.engine(len(prompts))
        jobs = [engine.submit(_request(prompt, new)) for prompt in prompts]
        tokens = {job.id: [] for job in jobs}
        while not engine.idle:
            for job, output in engine.step():
                tokens[job.id] += [token.id for token in output.tokens]
        return [tokens[job.id] for job in jobs]

    def streams(self, prompts: list[list[int]]) -> dict:
        """All requests at once: seconds, and seconds until each one's first token."""
        engine = self.engine(len(prompts))
        start = time.perf_counter()
        jobs = {engine.submit(_request(prompt, NEW)).id for prompt in prompts}
        first = {}
        while not engine.idle:
            outputs = engine.step()
            now = time.perf_counter() - start
            for job, output in outputs:
                if output.tokens:
                    first.setdefault(job.id, now)
        assert set(first) == jobs
        return {"seconds": time.perf_counter() - start, "first": sorted(first.values())}


def _request(prompt: list[int], new: int):
    from gpt_jax.decode.request import Request
    from gpt_jax.decode.sampling_params import SamplingParams

    return Request(tuple(prompt), SamplingParams(max_tokens=new, temperature=0, ignore_eos=True))


class Peer:
    """Hugging Face's LlamaForCausalLM; leaves its weights in the folder."""

    def __init__(self, shape: str, dtype: str, folder: str):
        import numpy as np
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.set_num_threads(THREADS)
        torch.manual_seed(0)
        # Larger weights than usual: the best of nearly equal logits would be a matter of rounding.
        config = LlamaConfig(
            **SHAPES[shape], max_position_embeddings=CONTEXT, tie_word_embeddings=True,
            rms_norm_eps=1e-6, rope_theta=10000.0, initializer_range=0.1, bos_token_id=1,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        path = Path(folder) / f"{shape}.npz"
        if not path.exists():
            state = {name: value.numpy() for name, value in model.state_dict().items()}
            np.savez(path, **{name: x for name, x in state.items() if name != "lm_head.weight"})
        self._model = model.to(getattr(torch, dtype))
        self.weight_bytes = sum(p.nbytes for p in self._model.parameters())

    def gap(self, text: list[int], ours: int, theirs: int) -> float:
        """How much likelier it holds its next token than ours, in deviations of its logits."""
        import torch

        with torch.no_grad():
            logits = self._model(torch.tensor([text])).logits[0, -1].float()
        return float((logits[theirs] - logits[ours]) / logits.std())

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        import torch

        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
                min_new_tokens=new, use_cache=True,
            )  # fmt: skip
        return out[:, PROMPT:].tolist()


def bandwidth() -> float:
    """Bytes a second at which 256 MiB are summed: the best of some times."""
    import jax
    import jax.numpy as jnp

    array = jnp.ones(64 * 2**20, jnp.float32)
    total = jax.jit(jnp.sum)
    total(array).block_until_ready()
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        total(array).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return array.nbytes / min(seconds)
