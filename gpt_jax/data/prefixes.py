"""Prefix language modelling: what is given sees itself whole, what follows is predicted.

(arXiv:1910.10683, section 3.2.1.) THE convention of a prefix of p tokens: its first p - 1 tokens
see each other; its last token sees them and itself, and predicts the first token that follows; from
there on attention is causal. So generation may fill its cache with prompt[:-1], all tokens of which
see each other, and take the prompt's last token as its first step.
"""

import numpy as np

from gpt_jax.data.segments import make_record, segment_row


def prefix_ranks(positions: np.ndarray, prefix: np.ndarray | int) -> np.ndarray:
    """Ranks of keys and of queries: 0 for the first `prefix` - 1 tokens, then 1, 2, ...

    Args:
      positions: int[n], of each token in its document.
      prefix: Length of its document's prefix, at least 1: a number, or int[n].
    """
    return np.maximum(positions - prefix + 2, 0)


def prefix_lm(row: np.ndarray, rng: np.random.Generator, *, eos_id: int) -> dict[str, np.ndarray]:
    """Splits each document of a row at random.

    Args:
      row: int[n + 1]: the inputs and the last one's target.
      rng: The only source of chance.
      eos_id: What begins a document.

    Returns:
      A record of n tokens. A document with m inputs gets a prefix of 1 to m of them, each length
      as likely as any other, and a loss on the targets from the prefix's last token on.
    """
    tokens, targets = row[:-1], row[1:]
    positions, segment_ids = segment_row(tokens, eos_id)
    lengths = np.bincount(segment_ids)[1:]
    prefix = rng.integers(1, lengths + 1)[segment_ids - 1]
    ranks = prefix_ranks(positions, prefix)
    counted = positions >= prefix - 1
    return make_record(tokens, targets, counted, eos_id, key_ranks=ranks, query_ranks=ranks)
