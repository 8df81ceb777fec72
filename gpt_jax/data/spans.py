"""Span corruption (T5, arXiv:1910.10683, section 3.1.4).

n tokens of a row. Spans of it are removed; the source is what is left, a sentinel in the place of
each span, and the target is each sentinel with the span it stands for:

    a b c d e f g h    source  a b <0> e <1> h eos    target  <0> c d <1> f g eos

A row is one text here, as in T5: its documents are told apart by their end-of-text tokens, and a
span may run over one.
"""

import numpy as np

from gpt_jax.data.prefixes import prefix_ranks
from gpt_jax.data.segments import make_record


def num_noise_and_spans(num_tokens: int, mask_rate: float, mean_span: float) -> tuple[int, int]:
    """How many tokens of a row are removed, and in how many spans; exact, not by chance.

    At least one token stays before every span, so that no two spans touch. A row of one token
    keeps it.
    """
    if num_tokens < 2:
        return 0, 0
    noise = min(max(round(num_tokens * mask_rate), 1), num_tokens - 1)
    return noise, min(max(round(noise / mean_span), 1), num_tokens - noise)


def span_lengths(num_tokens: int, mask_rate: float, mean_span: float) -> tuple[int, int]:
    """Lengths of source and target of a row; a shorter row's are no longer."""
    noise, spans = num_noise_and_spans(num_tokens, mask_rate, mean_span)
    return num_tokens - noise + spans + 1, noise + spans + 1


def noise_mask(
    num_tokens: int, rng: np.random.Generator, mask_rate: float, mean_span: float
) -> np.ndarray:
    """True where a token is removed, bool[n]: kept and removed runs in turn, a kept one first."""
    noise, spans = num_noise_and_spans(num_tokens, mask_rate, mean_span)
    lengths = np.zeros(2 * spans, np.int64)
    lengths[0::2] = _random_parts(num_tokens - noise, spans, rng)
    lengths[1::2] = _random_parts(noise, spans, rng)
    mask = np.zeros(num_tokens, bool)
    mask[: lengths.sum()] = np.repeat(np.arange(2 * spans) % 2 == 1, lengths)
    return mask


def _random_parts(total: int, number: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths of at least 1 that sum to `total`, each way of cutting as likely as any other."""
    if not number:
        return np.zeros(0, np.int64)
    cuts = np.sort(rng.choice(total - 1, number - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


def corrupt_spans(
    tokens: np.ndarray, removed: np.ndarray, sentinels: np.ndarray, eos_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Source and target of a row.

    Args:
      tokens: int[n].
      removed: bool[n], from `noise_mask`.
      sentinels: ids, at least as many as spans; the first stands for the first span.
      eos_id: Ends both.

    Returns:
      int[source], int[target].
    """
    begins = removed & ~np.concatenate([[False], removed[:-1]])
    sentinel = np.asarray(sentinels)[np.maximum(np.cumsum(begins) - 1, 0)]
    source = np.where(begins, sentinel, tokens)[~removed | begins]
    # Each first token of a span follows its sentinel: two columns, of which the needed are kept.
    pairs, wanted = np.stack([sentinel, tokens], 1), np.stack([begins, removed], 1)
    return np.append(source, eos_id), np.append(pairs[wanted], eos_id)


def span_corruption(
    tokens: np.ndarray,
    rng: np.random.Generator,
    *,
    mask_rate: float,
    mean_span: float,
    sentinels: np.ndarray,
    eos_id: int,
    start_id: int,
    one_stack: bool,
) -> dict[str, np.ndarray]:
    """A record for an encoder-decoder, or with `one_stack` for a decoder.

    Args:
      tokens: int[n].
      rng: The only source of chance.
      mask_rate: Share of the tokens that are removed.
      mean_span: Mean length of a removed span.
      sentinels: See `corrupt_spans`.
      eos_id: Ends source and target.
      start_id: What the decoder of an encoder-decoder starts from.
      one_stack: Whether the source stands before the target in one row, as a prefix.

    Returns:
      The source in `encoder_tokens`, `encoder_positions` and `encoder_segment_ids`, the target in
      `tokens` (from `start_id`) and `targets`; their lengths are at most `span_lengths`. With
      `one_stack`: `tokens` of source and target less the last, and the ranks of a prefix; the
      length is at most the sum of `span_lengths` less 1.
    """
    removed = noise_mask(len(tokens), rng, mask_rate, mean_span)
    source, target = corrupt_spans(tokens, removed, sentinels, eos_id)
    if one_stack:
        row = np.concatenate([source, target])
        columns = np.arange(len(row) - 1)
        ranks = prefix_ranks(columns, len(source))
        counted = columns >= len(source) - 1
        return make_record(row[:-1], row[1:], counted, -1, key_ranks=ranks, query_ranks=ranks)
    return make_record(
        np.concatenate([[start_id], target[:-1]]),
        target,
        np.ones(len(target)),
        -1,
        encoder_tokens=source,
        encoder_positions=np.arange(len(source)),
        encoder_segment_ids=np.ones(len(source)),
    )
