"""Matrix products: one function, and one table that says per backend in which dtypes they run.

Parameters are f32. A product casts its operands, accumulates in f32 and emits what the table says;
the gradient of the weights has a dtype of its own. Each entry was measured (docs/speed.md).
"""

import dataclasses
import functools

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
    """

    operands: str
    output: str
    weight_gradient: str


# On CPU a bf16 product is fast only if it emits f32, and x^T g is fast only in f32: bf16 operands
# would first be transposed, which XLA:CPU does slowly. On accelerators f32 outputs cost traffic.
_PRECISIONS = {
    ("cpu", "bfloat16"): Precision("bfloat16", "float32", "float32"),
    ("cpu", "float32"): Precision("float32", "float32", "float32"),
    ("accelerator", "bfloat16"): Precision("bfloat16", "bfloat16", "bfloat16"),
    ("accelerator", "float32"): Precision("float32", "float32", "float32"),
}


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def project(x: Array, w: Array, precision: Precision, num_contract: int = 1) -> Array:
    """Contracts the last `num_contract` dims of x[..., K] with the first ones of w[K, F].

    Returns [..., F] in `precision.output`. K and F stand for one or more dims each.
    """
    nx, n = x.ndim, num_contract
    contract = (tuple(range(nx - n, nx)), tuple(range(n)))
    return _dot(x, w, contract, ((), ()), precision.operands, precision.output)


def _project_fwd(x, w, precision, num_contract):
    return project(x, w, precision, num_contract), (x, w)


def _project_bwd(precision, num_contract, residuals, g):
    x, w = residuals
    n = num_contract
    num_free, num_lead = w.ndim - n, x.ndim - n
    dims_g = tuple(range(g.ndim - num_free, g.ndim))
    dx = _dot(g, w, (dims_g, tuple(range(n, w.ndim))), ((), ()), precision.operands, x.dtype)
    lead = tuple(range(num_lead))
    dw = _dot(x, g, (lead, lead), ((), ()), precision.weight_gradient, "float32")
    return dx, dw.astype(w.dtype)


project.defvjp(_project_fwd, _project_bwd)


def to_compute(x: Array, precision: Precision) -> Array:
    """Casts an activation to the dtype that products emit."""
    return x.astype(jnp.dtype(precision.output))
