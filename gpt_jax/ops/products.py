"""Matrix products: one function, and one table that says per backend in which dtypes they run.

Parameters are f32. A product casts its operands, accumulates in f32 and emits what the table says;
the gradient of the weights has a dtype of its own. The entries for CPU were measured
(docs/speed.md), the others were not.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from gpt_jax.ops import few_rows
from gpt_jax.ops.quantized import Quantized
from gpt_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Precision:
    """The dtypes of a product y = x w and of its gradients.

    Attributes:
      operands: x, w and the incoming gradient are cast to it.
      output: dtype of y and of dx, so of the activations.
      weight_gradient: x and the gradient are cast to it for dw, which is always emitted in f32.
      cache: Decoding keeps keys and values in it and multiplies them in it.
      row_major: A product in `operands` is fast only if it contracts the last dim of its left
        operand, both laid out as written; what would contract a leading dim is transposed first.
      by_sums: A few rows times weights that lie as [F, K] are faster as sums of products.
    """

    operands: str
    output: str
    weight_gradient: str
    cache: str
    row_major: bool = False
    by_sums: bool = False


# On CPU a bf16 product is fast only if it emits f32 and contracts the last dim of its left operand
# (any other is computed in f32); to write a token's keys to a bf16 cache it would convert all of it
# to f32 and back. On accelerators f32 outputs cost traffic.
_PRECISIONS = {
    ("cpu", "bfloat16"): Precision(
        "bfloat16", "float32", "bfloat16", "float32", row_major=True, by_sums=True
    ),
    ("cpu", "float32"): Precision("float32", "float32", "float32", "float32", by_sums=True),
    ("accelerator", "bfloat16"): Precision("bfloat16", "bfloat16", "bfloat16", "bfloat16"),
    ("accelerator", "float32"): Precision("float32", "float32", "float32", "float32"),
}


# Below so many rows a product is too small for the transposes to pay, and by_sums holds.
_FEW_ROWS = 64

# A weight's gradient contracts x^T, whose rows then are so many bytes apart that all fall into one
# set of the cache if the number of tokens is a multiple of _ONE_SET; _PADDING more and they do not.
_ONE_SET = 2048
_PADDING = 16


def precision(dtype: str, platform: str) -> Precision:
    """The table's entry for a compute dtype ("float32", "bfloat16") on a platform of JAX."""
    return _PRECISIONS["cpu" if platform == "cpu" else "accelerator", dtype]


def _dot(x: Array, y: Array, contract: tuple, batch: tuple, dtype: str, out: str) -> Array:
    # f32 operands mean f32: without the explicit precision a TPU would multiply in bf16.
    return lax.dot_general(
        x.astype(dtype),
        y.astype(dtype),
        (contract, batch),
        precision=lax.Precision.HIGHEST if dtype == "float32" else None,
        preferred_element_type=out,
    )


def batched_dot(x: Array, y: Array, contract: tuple, precision: Precision) -> Array:
    """dot_general over two leading batch dims, `contract` = (dims of x, dims of y); emits f32."""
    return _dot(x, y, contract, ((0, 1), (0, 1)), precision.operands, "float32")


def einsum(how: str, x: Array, w: Array, precision: Precision) -> Array:
    """The einsum `how` of x and f32 weights w, in `precision.output`; dw is in `operands` first.

    For products that are no plain `project`: those of experts, whose weights are a batch.
    """
    dtype = precision.operands
    y = jnp.einsum(
        how,
        x.astype(dtype),
        w.astype(dtype),
        precision=lax.Precision.HIGHEST if dtype == "float32" else None,
        preferred_element_type=jnp.float32,
    )
    return y.astype(precision.output)


def transposed(x: Array, axes: tuple[int, ...], split: int) -> Array:
    """x.transpose(axes), written out.

    XLA folds a plain transpose into the product that reads it, and XLA:CPU then leaves its fast
    route. It does not fold one whose dim `split` is two dims meanwhile, nor the concatenation of
    two parts, which takes two to three times as long.

    Args:
      x: An array.
      axes: The order of its dims.
      split: The dim that is split.
    """
    size = x.shape[split]
    if size % 2:
        # What reads exactly one of the parts reads a plain transpose: none does if one has size 1.
        low = lax.slice_in_dim(x, 0, 1, axis=split)
        high = lax.slice_in_dim(x, 1, None, axis=split)
        return jnp.concatenate([low.transpose(axes), high.transpose(axes)], axis=axes.index(split))
    halves = x.reshape(*x.shape[:split], 2, size // 2, *x.shape[split + 1 :])
    order = [axis + (axis > split) for axis in axes]
    order.insert(order.index(split) + 1, split + 1)
    return halves.transpose(order).reshape([x.shape[axis] for axis in axes])


def transposed_once(x: Array, axes: tuple[int, ...], split: int) -> Array:
    """x.transpose(axes), written out in a loop of its own, for what is read more than once.

    XLA:CPU transposes fast where a loop does nothing else, but it fuses transposes with all that
    read them. The branches of a conditional it leaves alone; which of the two runs is the same.
    """
    if jax.sharding.get_abstract_mesh().size > 1:  # devices would have to agree on the branch
        return transposed(x, axes, split)
    first = x[(0,) * x.ndim]
    return lax.cond(first == first, *[lambda x: transposed(x, axes, split)] * 2, x)


def project(
    x: Array,
    w: Array | Quantized,
    precision: Precision,
    num_contract: int = 1,
    output_first: bool = False,
) -> Array:
    """Contracts the last `num_contract` dims of x[..., K] with the first ones of w[K, F].

    Returns [..., F] in `precision.output`. K and F stand for one or more dims each. With
    `output_first` the weights are stored as w[F, K]: the embedding as the head. 8-bit weights
    always are; they have no gradient.
    """
    if isinstance(w, Quantized):
        return _project_quantized(x, w, precision, num_contract)
    return _project(x, w, precision, num_contract, output_first)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _project(x, w, precision: Precision, num_contract: int, output_first: bool) -> Array:
    num_lead = x.ndim - num_contract
    num_rows = math.prod(x.shape[:num_lead])
    if precision.by_sums and num_rows < _FEW_ROWS:
        if w.dtype == jnp.bfloat16:
            return _few_bf16_rows(x, w, precision, num_contract, output_first)
        if output_first and precision.operands == "float32" and num_rows > 1:
            K = math.prod(x.shape[num_lead:])
            y = few_rows.by_sums(x.reshape(-1, K), w.reshape(-1, K))
            free = w.shape[: w.ndim - num_contract]
            return y.reshape(*x.shape[:num_lead], *free).astype(precision.output)
    contract = (tuple(range(num_lead, x.ndim)), _dims(w, num_contract, output_first)[0])
    return _dot(x, w, contract, ((), ()), precision.operands, precision.output)


def _few_bf16_rows(x, w, precision: Precision, num_contract: int, output_first: bool) -> Array:
    """x[..., K] times weights that are stored in bf16."""
    num_lead = x.ndim - num_contract
    F_dims, K = _dims(w, num_contract, output_first)[1], math.prod(x.shape[num_lead:])
    x_MK = x.reshape(-1, K)
    w_2 = w.reshape(-1, K) if output_first else w.reshape(K, -1)
    if len(x_MK) == 1:  # of which XLA:CPU has no fast product
        x_MK = few_rows.computed_once(x_MK)
        # Or it would cast all weights in front of the loop that decodes.
        x_MK, w_2 = lax.optimization_barrier((x_MK, w_2))
        y_MF = (few_rows.one_or_two_rows if output_first else few_rows.one_row)(x_MK, w_2)
    else:
        # Or it would transpose a tied head there.
        x_MK, w_2 = lax.optimization_barrier((x_MK.astype(precision.operands), w_2))
        contract = ((1,), (1 if output_first else 0,))
        y_MF = _dot(x_MK, w_2, contract, ((), ()), precision.operands, "float32")
    y = y_MF.reshape(*x.shape[:num_lead], *(w.shape[dim] for dim in F_dims))
    return y.astype(precision.output)


def _project_quantized(x: Array, w: Quantized, precision: Precision, num_contract: int) -> Array:
    num_lead = x.ndim - num_contract
    x_MK = x.reshape(math.prod(x.shape[:num_lead]), -1)
    w_FK = w.integers_FK.reshape(w.scale_F.size, -1)
    few = precision.by_sums and len(x_MK) < _FEW_ROWS
    if few:
        x_MK = few_rows.computed_once(x_MK)
    # Or XLA takes the conversion of all weights to f32 out of the loop that decodes.
    x_MK, w_FK = lax.optimization_barrier((x_MK, w_FK))
    if few:
        product = few_rows.one_or_two_rows if len(x_MK) <= 2 else few_rows.by_sums
        y_MF = product(x_MK, w_FK)
    else:
        y_MF = _dot(x_MK, w_FK, ((1,), (1,)), ((), ()), precision.operands, "float32")
    y = y_MF.reshape(*x.shape[:num_lead], *w.scale_F.shape)
    return (y * w.scale_F).astype(precision.output)


def _dims(w: Array, num_contract: int, output_first: bool):
    """The dims of w that meet x, and the others."""
    if output_first:
        free = w.ndim - num_contract
        return tuple(range(free, w.ndim)), tuple(range(free))
    return tuple(range(num_contract)), tuple(range(num_contract, w.ndim))


def _padded(x: Array, num_lead: int, precision: Precision) -> Array:
    """x as [rows, ...] in `operands` with rows of zeros behind, or x if its rows are no _ONE_SET.

    All that reads x has to read this one, or XLA computes it twice.
    """
    num_rows = math.prod(x.shape[:num_lead])
    several_devices = jax.sharding.get_abstract_mesh().size > 1  # they would exchange rows
    if not precision.row_major or num_rows % _ONE_SET or several_devices:
        return x
    rows = x.reshape(num_rows, *x.shape[num_lead:]).astype(precision.operands)
    # XLA writes a concatenation part by part, but a padding, which it makes of one with a constant,
    # number by number.
    zeros = lax.optimization_barrier(jnp.zeros((_PADDING, *rows.shape[1:]), rows.dtype))
    return jnp.concatenate([rows, zeros])


def _cut(y: Array, shape: tuple[int, ...]) -> Array:
    """y of padded rows without the padding; as it is if nothing was padded."""
    return y if y.shape == shape else y[:-_PADDING].reshape(shape)


def _project_fwd(x, w, precision, num_contract, output_first):
    num_lead = x.ndim - num_contract
    K = math.prod(x.shape[num_lead:])
    is_head = w.size // K > 8 * K  # to cut off rows of the logits would copy them
    rows = x if is_head else _padded(x, num_lead, precision)
    y = _project(rows, w, precision, num_contract, output_first)
    return _cut(y, x.shape[:num_lead] + y.shape[rows.ndim - num_contract :]), (x, w)


def _project_bwd(precision, num_contract, output_first, residuals, g):
    x, w = residuals
    x_rows, g_rows = (_padded(array, x.ndim - num_contract, precision) for array in (x, g))
    _, free = _dims(w, num_contract, output_first)
    dims_g = tuple(range(g_rows.ndim - len(free), g_rows.ndim))
    dx = _dot(g_rows, w, (dims_g, free), ((), ()), precision.operands, x.dtype)
    first, second = (g_rows, x_rows) if output_first else (x_rows, g_rows)
    dw = _contract_leading(first, second, x_rows.ndim - num_contract, precision)
    return _cut(dx, x.shape), dw.astype(w.dtype)


def _contract_leading(x: Array, g: Array, num_lead: int, precision: Precision) -> Array:
    """x^T g over the first `num_lead` dims, f32."""
    lead = tuple(range(num_lead))
    dtype = precision.weight_gradient
    num_rows = math.prod(x.shape[:num_lead])
    if not precision.row_major or num_rows < _FEW_ROWS:
        dtype = "float32" if precision.row_major else dtype
        return _dot(x, g, (lead, lead), ((), ()), dtype, "float32")
    shape = x.shape[num_lead:] + g.shape[num_lead:]
    x_MK = x.reshape(num_rows, -1).astype(dtype)
    g_MF = g.reshape(num_rows, -1).astype(dtype)
    # The smaller operand is transposed, and the result back if need be: so not if together they
    # are more than the larger operand, as with a head's few rows and large vocabulary.
    K, F = x_MK.shape[1], g_MF.shape[1]
    if K <= F or num_rows * K < (num_rows + K) * F:
        dw = _dot(transposed(x_MK, (1, 0), 1), g_MF, ((1,), (0,)), ((), ()), dtype, "float32")
    else:
        dw = _dot(transposed(g_MF, (1, 0), 1), x_MK, ((1,), (0,)), ((), ()), dtype, "float32")
        dw = transposed_once(dw, (1, 0), 0)
    return dw.reshape(shape)


_project.defvjp(_project_fwd, _project_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def add_bias(y: Array, b: Array, precision: Precision) -> Array:
    """y + b for f32 b, whose dims are the last ones of y.

    The gradient of b is a sum over the rows of y's as it is cast for the product behind y, where
    that is fast: so none of it need be written in f32.
    """
    return y + b.astype(y.dtype)


def _add_bias_fwd(y, b, precision):
    return add_bias(y, b, precision), b


def _add_bias_bwd(precision, b, g):
    num_lead = g.ndim - b.ndim
    num_rows = math.prod(g.shape[:num_lead])
    if not precision.row_major or num_rows < _FEW_ROWS:
        return g, g.astype(b.dtype).sum(tuple(range(num_lead)))
    rows = _padded(g, num_lead, precision).reshape(-1, b.size)
    # Or XLA would sum what is cast, and what is padded, each by itself.
    rows = lax.optimization_barrier(rows.astype(precision.weight_gradient))
    return g, rows.astype(jnp.float32).sum(0).reshape(b.shape)


add_bias.defvjp(_add_bias_fwd, _add_bias_bwd)


def to_compute(x: Array, precision: Precision) -> Array:
    """Casts an activation to the dtype that products emit."""
    return x.astype(jnp.dtype(precision.output))
