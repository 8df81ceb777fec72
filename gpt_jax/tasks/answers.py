"""From a model's outputs back to predictions that a task scores.

n tokens of the record, C classes.
"""

from typing import Any

import numpy as np

from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.tasks.contract import Formatted
from gpt_jax.tasks.encode import read_texts, read_words

_MAX_SPAN = 30  # tokens


def read_outputs(
    head: str, outputs: np.ndarray, formatted: Formatted, tokenizer: Tokenizer, seq_len: int
) -> Any:
    """The prediction for one example.

    Args:
      head: "sequence" (outputs [C], or [1] for a regression), "tokens" ([n, C]) or "span"
        ([n, 2]).
      outputs: Of the model, without padding.
      formatted: The example.
      tokenizer: The one it was encoded with.
      seq_len: The length it was encoded to.
    """
    return _READERS[head](outputs, formatted, tokenizer, seq_len)


def _read_class(outputs_C, formatted, tokenizer, seq_len) -> int | float:
    if isinstance(formatted.label, float):
        return float(outputs_C[0])
    return int(np.argmax(outputs_C))


def _read_words(outputs_nC, formatted, tokenizer, seq_len) -> list[int]:
    """A class for each word; 0 for those that the model did not see."""
    _, starts = read_words(formatted, tokenizer, seq_len)
    return [int(np.argmax(outputs_nC[start])) if start >= 0 else 0 for start in starts]


def _read_span(outputs_n2, formatted, tokenizer, seq_len) -> str:
    """The most likely characters of the pair; "" where no answer is more likely."""
    inputs = read_texts(formatted, tokenizer, seq_len)
    size = len(inputs.offsets)
    if not size:
        return ""
    pair = slice(inputs.pair_start, inputs.pair_start + size)
    scores = outputs_n2[pair, 0][:, None] + outputs_n2[pair, 1][None, :]
    distance = np.arange(size)[None, :] - np.arange(size)[:, None]
    scores = np.where((distance >= 0) & (distance < _MAX_SPAN), scores, -np.inf)
    first, last = np.unravel_index(np.argmax(scores), scores.shape)
    if outputs_n2[0].sum() > scores[first, last]:
        return ""
    return formatted.pair[inputs.offsets[first][0] : inputs.offsets[last][1]].strip()


_READERS = {"sequence": _read_class, "tokens": _read_words, "span": _read_span}
