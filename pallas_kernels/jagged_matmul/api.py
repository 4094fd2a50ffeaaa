"""Rows times the matrix of their segment.

Letters: S segments, T rows, K width in, N width out.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, rows, segments
from pallas_kernels.jagged_matmul import reference, triton, xla

_OP = "jagged_matmul"


def jagged_matmul(
  x_TK: jax.Array,
  w_SKN: jax.Array,
  offsets_S1: jax.Array,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """Every row times the matrix of its segment.

      y[t]  = x[t] w[s]                            offsets[s] <= t < offsets[s + 1]
      y[t]  = 0                                    in no segment
      dx[t] = dy[t] w[s]ᵀ,   dw[s] = sum of x[t]ᵀ dy[t] over the rows of s

  Sums are taken in float32 (float64 for float64), in an order that does not vary: the same bits in
  every run. On a GPU float32 is multiplied as TF32, as XLA does.

  Args:
    x_TK: float. Rows outside the segments are not read, nor is their dy; their gradient is 0.
    w_SKN: One matrix a segment, of x's dtype. That of an empty segment gets the gradient 0.
    offsets_S1: int32, of segments as in `segments`.
    implementation: As in `dispatch`.

  Returns:
    y_TN of x's dtype.

  Raises:
    ValueError: Wrong dtypes or shapes, or an unknown implementation.

  Source: the personalised feed-forward layer of InterFormer (arXiv:2411.09852, PFFN: a matrix for
    every example); FBGEMM's `jagged_dense_bmm`, without its padding.
  """
  dispatch.check(_OP, implementation)
  x_TK, w_SKN = jnp.asarray(x_TK), jnp.asarray(w_SKN)
  offsets_S1 = segments.as_offsets(_OP, "offsets", offsets_S1)
  rows.check_rows(_OP, "x", x_TK)
  S, K = len(offsets_S1) - 1, x_TK.shape[1]
  if w_SKN.ndim != 3 or w_SKN.shape[:2] != (S, K) or w_SKN.dtype != x_TK.dtype:
    raise ValueError(
      f"{_OP}: w must be {x_TK.dtype} like x, of shape (segments, width of x, width of y) = "
      f"({S}, {K}, ...), is {w_SKN.dtype} of shape {w_SKN.shape}"
    )
  if 0 in (*x_TK.shape, *w_SKN.shape):
    # Nothing to add up, and nothing to differentiate by.
    return jnp.zeros((len(x_TK), w_SKN.shape[2]), x_TK.dtype)
  if implementation == "reference":
    return reference.jagged_matmul(x_TK, w_SKN, offsets_S1)
  return _multiply(x_TK, w_SKN, offsets_S1, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _multiply(x_TK, w_SKN, offsets_S1, implementation):
  return _dispatch("multiply", implementation, x_TK, w_SKN, offsets_S1, transposed=False)


def _forward(x_TK, w_SKN, offsets_S1, implementation):
  return _multiply(x_TK, w_SKN, offsets_S1, implementation), (x_TK, w_SKN, offsets_S1)


def _backward(implementation, inputs, dy_TN):
  x_TK, w_SKN, offsets_S1 = inputs
  dx_TK = _dispatch("multiply", implementation, dy_TN, w_SKN, offsets_S1, transposed=True)
  dw_SKN = _dispatch("outer", implementation, x_TK, dy_TN, offsets_S1)
  return dx_TK, dw_SKN, None


_multiply.defvjp(_forward, _backward)


def _dispatch(name, implementation, x, other, offsets_S1, **static):
  return dispatch.dispatch(
    _OP,
    implementation,
    {
      "xla": functools.partial(getattr(xla, name), **static),
      "triton": functools.partial(getattr(triton, name), **static),
    },
    x,
    other,
    offsets_S1,
    refusal=rows.refusal(x.dtype),
  )
