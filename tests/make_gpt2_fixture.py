"""Writes tests/data/gpt2_*.npz: what Hugging Face's GPT-2 computes from weights that a seed makes.

    python tests/make_gpt2_fixture.py

needs the extra `peers`. The tests need only its results: the weights are made again by `weights`.

As Hugging Face initializes a GPT-2, a wrong bias, norm weight or activation would not show: biases
are 0, norm weights 1 and activations tiny. So the matrices are large enough to make activations of
order 1, and every one-dimensional parameter is perturbed.
"""

import dataclasses
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of a GPT-2; the MLP is four times as wide as the model."""

    num_layers: int
    embed_dim: int
    num_heads: int
    vocab_size: int
    seq_len: int = 512


SMALL = Size(num_layers=2, embed_dim=64, num_heads=4, vocab_size=320)
# GPT-2 124M with a smaller vocabulary.
GPT2_124M = Size(num_layers=12, embed_dim=768, num_heads=12, vocab_size=1024)


def weight_shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Hugging Face's names and shapes; products are stored (in, out)."""
    D = size.embed_dim
    shapes = {"wte.weight": (size.vocab_size, D), "wpe.weight": (size.seq_len, D)}
    for i in range(size.num_layers):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{norm}.weight": (D,), f"h.{i}.{norm}.bias": (D,)}
        for name, (fan_in, fan_out) in {
            "attn.c_attn": (D, 3 * D),
            "attn.c_proj": (D, D),
            "mlp.c_fc": (D, 4 * D),
            "mlp.c_proj": (4 * D, D),
        }.items():
            shapes |= {
                f"h.{i}.{name}.weight": (fan_in, fan_out),
                f"h.{i}.{name}.bias": (fan_out,),
            }
    return shapes | {"ln_f.weight": (D,), "ln_f.bias": (D,)}


def weights(size: Size, seed: int) -> dict[str, np.ndarray]:
    """f32 weights by Hugging Face's names, without "transformer."."""
    bits = np.random.PCG64(seed)
    made = {}
    for name, shape in weight_shapes(size).items():
        values = _normal(bits, shape)
        if len(shape) == 1:
            values = 0.3 * values + (1.0 if ".weight" in name else 0.0)
        else:
            # The embeddings' rows are what the first layer reads; the head's fan-in is D too.
            fan_in = size.embed_dim if name.startswith(("wte", "wpe")) else shape[0]
            values = 2 * fan_in**-0.5 * values
        made[name] = values.astype(np.float32)
    return made


def tokens(size: Size, seed: int) -> np.ndarray:
    """int32[T] ids of the whole length."""
    raw = np.random.PCG64(seed + 1).random_raw(size.seq_len)
    return (raw % np.uint64(size.vocab_size)).astype(np.int32)


def _normal(bits: np.random.PCG64, shape: tuple[int, ...]) -> np.ndarray:
    # By Box and Muller from raw bits: numpy may change how its own normal numbers are drawn.
    uniform = (bits.random_raw((2, int(np.prod(shape)))) >> np.uint64(11)) * 2.0**-53
    radius = np.sqrt(-2 * np.log1p(-uniform[0]))
    return (radius * np.cos(2 * np.pi * uniform[1])).reshape(shape)


def hf_model(size: Size, seed: int):
    """A torch GPT2LMHeadModel with these weights, f32, in evaluation mode."""
    import torch
    import transformers

    config = transformers.GPT2Config(
        vocab_size=size.vocab_size, n_positions=size.seq_len, n_embd=size.embed_dim,
        n_layer=size.num_layers, n_head=size.num_heads, attn_implementation="eager",
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    state = {f"transformer.{name}": torch.from_numpy(w) for name, w in weights(size, seed).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)
    model.tie_weights()
    return model


def hf_logits(model, ids_T: np.ndarray) -> np.ndarray:
    """[T, V] in the model's dtype."""
    import torch

    with torch.inference_mode():
        return model(torch.from_numpy(ids_T.astype(np.int64))[None]).logits[0].numpy()


def main() -> None:
    size, seed, prompt_length, num_new = SMALL, 0, 17, 64
    ids_T, model = tokens(size, seed), hf_model(size, seed).double()
    logits_TV = hf_logits(model, ids_T)
    positions = np.unique([*range(0, size.seq_len, 8), size.seq_len - 1])
    # Greedy decoding in float64, with the smallest lead of a chosen token over the next one.
    greedy, lead = list(ids_T[:prompt_length]), np.inf
    for _ in range(num_new):
        logits_V = hf_logits(model, np.array(greedy))[-1]
        second, first = np.sort(logits_V)[-2:]
        lead = min(lead, first - second)
        greedy.append(int(logits_V.argmax()))
    path = DATA / f"gpt2_{size.num_layers}x{size.embed_dim}.npz"
    np.savez_compressed(
        path,
        seed=seed,
        positions=positions.astype(np.int32),
        logits=logits_TV[positions].astype(np.float32),
        greedy=np.array(greedy, np.int32),
        prompt_length=prompt_length,
        checksum=checksum(weights(size, seed)),
    )
    print(f"{path}: {path.stat().st_size} bytes, smallest lead of a greedy token {lead:.2g}")


def checksum(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """f64[number of arrays]: mean absolute values, to tell other weights from a wrong model."""
    return np.array([np.abs(array.astype(np.float64)).mean() for array in arrays.values()])


if __name__ == "__main__":
    main()
