"""A cache's keys in pages of places, transposed: how decoding on CPU reads them fast.

XLA:CPU has a fast product of a few queries and keys that lie [width, places], if the places are no
more than a page; keys that lie [places, width] it transposes first, each time they are read
(docs/speed.md). That pays where several query heads share a key head.

B rows, K key heads, M queries of a key head, S places, H head width; P pages of C places.
"""

import flax.struct
import jax.numpy as jnp

from gpt_jax.ops import products
from gpt_jax.ops.products import Precision
from gpt_jax.types import Array

PAGE = 64
# More queries than these read keys that lie [places, width]: a prompt's transpose is cheap.
_MOST_QUERIES = 16


@flax.struct.dataclass
class KeyPages:
    """Keys of ceil(S / C) pages.

    Attributes:
      rows_BKRC: A page's H rows stand behind those of the page before it: R = P H.
      width: H.
    """

    rows_BKRC: Array
    width: int = flax.struct.field(pytree_node=False)


def num_rows(num_places: int, width: int) -> int:
    """R of so many places."""
    return -(-num_places // PAGE) * width


def empty(shape: tuple[int, ...], dtype) -> KeyPages:
    """Pages of zeros for keys of shape [..., K, S, H]."""
    *lead, num_places, width = shape
    return KeyPages(jnp.zeros((*lead, num_rows(num_places, width), PAGE), dtype), width)


def write(keys: KeyPages, new_BKTH: Array, index_B: Array) -> KeyPages:
    """The pages with T new keys of each row from its index on; what has no place is left out."""
    B, K, T, H = new_BKTH.shape
    pages_BKPHC = keys.rows_BKRC.reshape(B, K, -1, H, PAGE)
    place_B1T = (index_B[:, None] + jnp.arange(T))[:, None]
    rows, heads = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None]
    at = (rows, heads, place_B1T // PAGE, slice(None), place_B1T % PAGE)
    pages_BKPHC = pages_BKPHC.at[at].set(new_BKTH.astype(pages_BKPHC.dtype), mode="drop")
    return keys.replace(rows_BKRC=pages_BKPHC.reshape(keys.rows_BKRC.shape))


def scores(q_BKMH: Array, keys: KeyPages, num_places: int, precision: Precision) -> Array:
    """f32[B, K, M, S]: the products of queries with the keys of the first S places."""
    B, K, M, H = q_BKMH.shape
    pages_BKPHC = keys.rows_BKRC.reshape(B, K, -1, H, PAGE)
    if M > _MOST_QUERIES:
        keys_BKSH = pages_BKPHC.swapaxes(-1, -2).reshape(B, K, -1, H)[:, :, :num_places]
        return products.batched_dot(q_BKMH, keys_BKSH, ((3,), (3,)), precision)
    P = pages_BKPHC.shape[2]
    q_BKPMH = jnp.broadcast_to(q_BKMH[:, :, None], (B, K, P, M, H))
    scores = products.batched_dot(
        q_BKPMH.reshape(B, K * P, M, H), pages_BKPHC.reshape(B, K * P, H, PAGE), ((3,), (2,)),
        precision,
    )  # fmt: skip
    scores_BKMPC = scores.reshape(B, K, P, M, PAGE).swapaxes(2, 3)
    return scores_BKMPC.reshape(B, K, M, -1)[..., :num_places]
