"""Permutation language modelling (XLNet, arXiv:1906.08237) as one ordinary row.

n tokens of a row, k of them predicted. XLNet predicts the tokens of a text in a random order, each
from those before it in the order, whatever their places. A token's vector must not know the token
itself when it predicts it, and must when later ones look at it; so XLNet runs two streams through
the same layers: the content stream h attends to the tokens up to its own in the order, the query
stream g to those before it. Keys and values of both come from h alone, and g starts from one
learned vector.

Here the query stream is more tokens of the same row:

    [ content: the n tokens ; queries: k mask tokens with the positions of what they predict ]

The token that is r-th in the order, from 0, has key rank r and query rank r as content; its query
has query rank r - 1, and a key rank that no query reaches. A query sees keys of a rank up to its
own, so content sees content up to itself, queries see content before them, and nobody sees a query.
Projections, norms and MLPs work on each token by itself with the same weights, so every layer
computes exactly XLNet's two streams; its learned vector is the mask token's embedding. (Its own
relative positions and its memory of earlier rows are not part of this.) Only what is predicted
needs a query: n + k tokens, not 2 n.
"""

import numpy as np

from gpt_jax.data.segments import make_record, segment_row

NEVER_A_KEY = 2**30


def num_predicted(num_tokens: int, predict_share: float) -> int:
    """Queries of a row of n tokens: at least 1, and never the whole row; 0 of one token."""
    return min(max(round(num_tokens * predict_share), 1), num_tokens - 1)


def permutation_lm(
    tokens: np.ndarray,
    rng: np.random.Generator,
    *,
    predict_share: float,
    mask_id: int,
    special_ids: np.ndarray,
    eos_id: int,
) -> dict[str, np.ndarray]:
    """Draws an order and adds the queries of its last tokens.

    Attention stays in a document, the order is over the row. Special tokens come first in it: a
    document that begins with one shows each of its tokens something. Where a document has nothing
    before a query, or a query's token is special, it does not count.

    Args:
      tokens: int[n].
      rng: The only source of chance.
      predict_share: Share of the tokens that are predicted.
      mask_id: The token of all queries.
      special_ids: int[m], what is not to be predicted.
      eos_id: What begins a document.

    Returns:
      A record of n + num_predicted(n) tokens, the queries by their positions in the row.
    """
    num_tokens = len(tokens)
    special = np.isin(tokens, special_ids)
    rank = np.empty(num_tokens, np.int64)
    rank[np.argsort(rng.random(num_tokens) - special)] = np.arange(num_tokens)
    positions, segment_ids = segment_row(tokens, eos_id)

    predicted = np.flatnonzero(rank >= num_tokens - num_predicted(num_tokens, predict_share))
    first = np.full(segment_ids.max() + 1, num_tokens)
    np.minimum.at(first, segment_ids, rank)
    counted = (rank > first[segment_ids]) & ~special

    def doubled(content: np.ndarray, queries: np.ndarray) -> np.ndarray:
        return np.concatenate([content, np.broadcast_to(queries, len(predicted))])

    return make_record(
        doubled(tokens, mask_id),
        doubled(tokens, tokens[predicted]),
        doubled(np.zeros(num_tokens), counted[predicted]),
        eos_id,
        positions=doubled(positions, positions[predicted]),
        segment_ids=doubled(segment_ids, segment_ids[predicted]),
        key_ranks=doubled(rank, NEVER_A_KEY),
        query_ranks=doubled(rank, rank[predicted] - 1),
    )
