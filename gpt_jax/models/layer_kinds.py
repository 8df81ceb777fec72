"""What differs between the layers of one stack: windows and rotary tables.

Arrays rather than Python values, since the layers of a scan are one program.
"""

import flax.struct
import jax.numpy as jnp
import numpy as np

from gpt_jax.models.config import TransformerConfig
from gpt_jax.ops import few_rows, positions
from gpt_jax.types import Array

# Places of the rotary tables where layers differ.
_GLOBAL, _LOCAL, _NO_ROTATION = 0, 1, 2
# A window that hides nothing.
_SEES_ALL = 2**30


@flax.struct.dataclass
class LayerKind:
    """One layer, or with an axis L in front all of them; None where none differs.

    Attributes:
      window: int32[]; how many tokens are seen, the own one included.
      rotary: int32[]; the place of the rotary tables.
    """

    window: Array | None
    rotary: Array | None


def layer_kinds(config: TransformerConfig) -> LayerKind:
    """The kinds of a decoder's or an encoder's layers, [L]."""
    c = config
    layers = np.arange(c.num_layers)
    sees_all = np.isin(layers, c.global_layers)
    window_L, rotary_L = None, None
    if c.window:
        window_L = jnp.asarray(np.where(sees_all, _SEES_ALL, c.window), jnp.int32)
    if _tables_differ(c):
        place_L = np.where(sees_all | (not c.rope_local_theta), _GLOBAL, _LOCAL)
        unrotated = np.isin(layers, c.unrotated_layers)
        rotary_L = jnp.asarray(np.where(unrotated, _NO_ROTATION, place_L), jnp.int32)
    return LayerKind(window_L, rotary_L)


def rotary_tables(
    config: TransformerConfig, positions_BT: Array, platform: str
) -> tuple[Array, Array] | None:
    """cos and sin, f32[B, T, 1, H/2], or [3, B, T, 1, H/2] where the layers differ; None without
    rotary positions."""
    if config.positions != "rotary":
        return None
    tables = _rotary_tables(config, positions_BT)
    # XLA:CPU would compute each angle's again for every head and layer, and for their gradients.
    return tuple(map(few_rows.computed_once, tables)) if platform == "cpu" else tables


def _rotary_tables(c: TransformerConfig, positions_BT: Array) -> tuple[Array, Array]:
    tables = positions.rotary_tables(positions_BT, c.head_dim, c.rope_theta, c.rope_scaling)
    if not _tables_differ(c):
        return tables
    local = positions.rotary_tables(positions_BT, c.head_dim, c.rope_local_theta or c.rope_theta)
    places = {
        _GLOBAL: tables,
        _LOCAL: local,
        _NO_ROTATION: (jnp.ones_like(local[0]), jnp.zeros_like(local[1])),
    }
    cos, sin = zip(*(places[place] for place in sorted(places)), strict=True)
    return jnp.stack(cos), jnp.stack(sin)


def of_layer(tables: tuple[Array, Array] | None, kind: LayerKind) -> tuple[Array, Array] | None:
    """One layer's tables of `rotary_tables`."""
    if kind.rotary is None:
        return tables
    cos, sin = tables
    return cos[kind.rotary], sin[kind.rotary]


def _tables_differ(c: TransformerConfig) -> bool:
    return bool(c.rope_local_theta or c.unrotated_layers)
