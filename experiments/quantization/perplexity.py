"""What 8-bit weights cost: perplexity of a fixed held-out text, with f32 weights and with them.

    python experiments/quantization/perplexity.py gguf:PATH runs/tasks/gpt ... [--tokens=4096]

The text is a module of Python's own library, which every installation has. Models may have seen it;
what counts is the difference. It is read in windows of the model's context, at most 512 tokens
each, and every token but a window's first is scored. SPEC is what `open_model` takes.
"""

import argparse
import difflib
import inspect
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.convert.open_model import open_model
from gpt_jax.decode.prompts import as_computed
from gpt_jax.models.quantize import num_bytes, quantize

WINDOW = 512


def windows(tokenizer, context: int, num_tokens: int) -> np.ndarray:
    """int32[B, T] of the text's first ids."""
    ids = tokenizer.encode(inspect.getsource(difflib))[:num_tokens]
    length = min(WINDOW, context, len(ids))
    rows = len(ids) // length
    return np.asarray(ids[: rows * length], np.int32).reshape(rows, length)


def nats_per_token(model, params, tokens_BT: np.ndarray) -> float:
    @jax.jit
    def row_nats(params, tokens_T):
        logits_TV = model.apply({"params": params}, tokens_T[None, :-1])[0]
        logprobs_TV = jax.nn.log_softmax(logits_TV)
        return -jnp.take_along_axis(logprobs_TV, tokens_T[1:, None], -1).sum()

    total = sum(float(row_nats(params, tokens_T)) for tokens_T in tokens_BT)
    return total / (tokens_BT.size - len(tokens_BT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("specs", nargs="+", metavar="SPEC")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text, at most")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results.json"))
    args = parser.parse_args()
    rows = []
    print("model                    tokens  perplexity f32       8-bit   ratio  MB f32  MB 8-bit")
    for spec in args.specs:
        opened = open_model(spec)
        model = as_computed(opened.model)
        tokens_BT = windows(opened.tokenizer, model.config.seq_len, args.tokens)
        small = jax.jit(quantize)(opened.params)
        exact, rounded = (nats_per_token(model, p, tokens_BT) for p in (opened.params, small))
        row = {
            "model": opened.name, "tokens": tokens_BT.size, "perplexity_f32": math.exp(exact),
            "perplexity_int8": math.exp(rounded), "ratio": math.exp(rounded - exact),
            "megabytes_f32": num_bytes(opened.params) / 1e6,
            "megabytes_int8": num_bytes(small) / 1e6,
        }  # fmt: skip
        rows.append(row)
        print(
            f"{row['model'][:24]:24} {row['tokens']:6} {row['perplexity_f32']:15.4f} "
            f"{row['perplexity_int8']:11.4f} {row['ratio']:7.4f} {row['megabytes_f32']:7.1f} "
            f"{row['megabytes_int8']:9.1f}",
            flush=True,
        )
    Path(args.out).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
