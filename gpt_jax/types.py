"""Names for arrays.

B batch, T query or target length, S key/value length, D model width, N query heads, K key/value
heads, G = N // K, H head width, F MLP width, V vocabulary, L layers.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

Array = jax.Array
# A nested dict of arrays: parameters, gradients, optimizer slots.
Tree = Any
# tokens, targets, positions, segment_ids: int32[B, T]; loss_mask: float32[B, T], 1.0 where counted.
# segment_ids count the documents of a row from 1; 0 is padding.
Batch = Mapping[str, Array | np.ndarray]
