"""What fewer bits cost: perplexity of a text, with f32 weights, with bfloat16 and with int8 ones.

    python -m gpt_jax data fetch gutenberg sympy_code stories15m smollm2
    python experiments/quantization/perplexity.py hf:stories15m --texts=stories
    python experiments/quantization/perplexity.py gguf:smollm2 --texts=stories,code

`stories` are tales for children, the simple English that stories15m writes; it was trained on made
stories alone and has not seen them. `code` is SymPy's. A model of the web such as smollm2 may have
seen both. A text is read in windows of the model's context, at most 512 tokens each, spread evenly
over it, and every token but a window's first is scored. SPEC is what `open_model` takes.
"""

import argparse
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.convert.open_model import held_as, open_model
from gpt_jax.data.corpora import corpus_folder
from gpt_jax.decode.prompts import as_computed
from gpt_jax.models.config import WEIGHT_DTYPES
from gpt_jax.models.quantize import num_bytes
from gpt_jax.parallel.cache_folder import cache_dir

WINDOW = 512
_TALES = ("bryant-stories", "burgess-busterbrown")
# Name -> corpus, and which rows of its test split.
TEXTS: dict[str, tuple[str, Callable[[dict[str, Any]], bool]]] = {
    "stories": ("gutenberg", lambda row: row["book"].startswith(_TALES)),
    "code": ("sympy_code", lambda row: True),
}


def read_text(name: str) -> str:
    """All that there is of a text."""
    corpus, wanted = TEXTS[name]
    lines = (corpus_folder(corpus, cache_dir()) / "test.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if wanted(row)]
    return "\n\n".join(row["text"] for row in rows)


def windows(tokenizer, text: str, context: int, num_tokens: int) -> np.ndarray:
    """int32[B, T] of the text's ids: so many tokens in all, or fewer where it has fewer."""
    ids = np.asarray(tokenizer.encode(text), np.int32)
    length = min(WINDOW, context, len(ids))
    rows_BT = ids[: len(ids) // length * length].reshape(-1, length)
    most = min(len(rows_BT), max(1, num_tokens // length))
    return rows_BT[np.linspace(0, len(rows_BT) - 1, most).round().astype(int)]


def windows_for(opened, name: str, num_tokens: int) -> np.ndarray:
    """`windows` of one of TEXTS."""
    return windows(opened.tokenizer, read_text(name), opened.model.config.seq_len, num_tokens)


def nats_per_token(model, params, tokens_BT: np.ndarray) -> np.ndarray:
    """f64[B]: the mean of each window."""

    @jax.jit
    def row_nats(params, tokens_T):
        logits_TV = model.apply({"params": params}, tokens_T[None, :-1])[0]
        logprobs_TV = jax.nn.log_softmax(logits_TV)
        return -jnp.take_along_axis(logprobs_TV, tokens_T[1:, None], -1).mean()

    return np.array([float(row_nats(params, tokens_T)) for tokens_T in tokens_BT])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("specs", nargs="+", metavar="SPEC")
    parser.add_argument("--texts", default=",".join(TEXTS), help="with commas between them")
    parser.add_argument("--tokens", type=int, default=4096, help="of each text, at most")
    args = parser.parse_args()
    print("model            text     tokens weights   perplexity  ratio (stderr)        MB")
    for spec in args.specs:
        opened = open_model(spec)
        windows_of = {
            name: windows_for(opened, name, args.tokens) for name in args.texts.split(",")
        }
        exact = {}
        for dtype in WEIGHT_DTYPES:  # the exact one first
            held = held_as(opened, dtype)
            model = as_computed(held.model, held.params)
            for name, tokens_BT in windows_of.items():
                nats_B = nats_per_token(model, held.params, tokens_BT)
                exact_B = exact.setdefault(name, nats_B)
                # Of the same windows: their difference varies far less than they do.
                ratio = math.exp((nats_B - exact_B).mean())
                error = ratio * (nats_B - exact_B).std(ddof=1) / math.sqrt(len(nats_B))
                print(
                    f"{spec[:16]:16} {name:8} {tokens_BT.size:6} {dtype:9} "
                    f"{math.exp(nats_B.mean()):10.3f}  {ratio:.4f} ({error:.4f}) "
                    f"{num_bytes(held.params) / 1e6:8.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
