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

from gpt_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Precision:
    """The dtypes of a product y = x w and of its gradients.

    Attributes:
      operands: x, w and the incoming gradient are cast to it.
      output: dtype of y and of dx, so of the activations.
      weight_gradient: x and the gradient are cast to it for dw, which is always emitted in f32.
      row_major: A product in `operands` is fast only if it contracts the last dim of its left
        operand, both laid out as written; what would contract a leading dim is transposed first.
    """

    operands: str
    output: str
    weight_gradient: str
    row_major: bool = False


# On CPU a bf16 product is fast only if it emits f32 and contracts the last dim of its left operand
# (any other is computed in f32). On accelerators f32 outputs cost traffic.
_PRECISIONS = {
    ("cpu", "bfloat16"): Precision("bfloat16", "float32", "bfloat16", row_major=True),
    ("cpu", "float32"): Precision("float32", "float32", "float32"),
    ("accelerator", "bfloat16"): Precision("bfloat16", "bfloat16", "bfloat16"),
    ("accelerator", "float32"): Precision("float32", "float32", "float32"),
}


# Below so many rows a product is too small for the transposes to pay.
_FEW_ROWS = 64


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


def transposed(x: Array, axes: tuple[int, ...], split: int) -> Array:
    """x.transpose(axes), written out; `split` is a dim of x.

    XLA folds a plain transpose into the product that reads it, and XLA:CPU then leaves its fast
    route; it does not fold the concatenation of two halves.
    """
    half = x.shape[split] // 2
    if not half:
        return x.transpose(axes)
    low = lax.slice_in_dim(x, 0, half, axis=split)
    high = lax.slice_in_dim(x, half, None, axis=split)
    return jnp.concatenate([low.transpose(axes), high.transpose(axes)], axis=axes.index(split))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def project(
    x: Array, w: Array, precision: Precision, num_contract: int = 1, output_first: bool = False
) -> Array:
    """Contracts the last `num_contract` dims of x[..., K] with the first ones of w[K, F].

    Returns [..., F] in `precision.output`. K and F stand for one or more dims each. With
    `output_first` the weights are stored as w[F, K]: the embedding as the head.
    """
    nx, n = x.ndim, num_contract
    contract = (tuple(range(nx - n, nx)), _dims(w, n, output_first)[0])
    return _dot(x, w, contract, ((), ()), precision.operands, precision.output)


def _dims(w: Array, num_contract: int, output_first: bool):
    """The dims of w that meet x, and the others."""
    if output_first:
        free = w.ndim - num_contract
        return tuple(range(free, w.ndim)), tuple(range(free))
    return tuple(range(num_contract)), tuple(range(num_contract, w.ndim))


def _project_fwd(x, w, precision, num_contract, output_first):
    return project(x, w, precision, num_contract, output_first), (x, w)


def _project_bwd(precision, num_contract, output_first, residuals, g):
    x, w = residuals
    _, free = _dims(w, num_contract, output_first)
    dims_g = tuple(range(g.ndim - len(free), g.ndim))
    dx = _dot(g, w, (dims_g, free), ((), ()), precision.operands, x.dtype)
    num_lead = x.ndim - num_contract
    first, second = (g, x) if output_first else (x, g)
    dw = _contract_leading(first, second, num_lead, precision)
    return dx, dw.astype(w.dtype)


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
    # The smaller operand is transposed, and the result back if need be.
    if x_MK.shape[1] <= g_MF.shape[1]:
        dw = _dot(transposed(x_MK, (1, 0), 0), g_MF, ((1,), (0,)), ((), ()), dtype, "float32")
    else:
        dw = _dot(transposed(g_MF, (1, 0), 0), x_MK, ((1,), (0,)), ((), ()), dtype, "float32")
        dw = transposed(dw, (1, 0), 0)
    return dw.reshape(shape)


project.defvjp(_project_fwd, _project_bwd)


def to_compute(x: Array, precision: Precision) -> Array:
    """Casts an activation to the dtype that products emit."""
    return x.astype(jnp.dtype(precision.output))
