"""Jagged arrays to padded ones and back: each is the other's gradient.

Letters: S segments, T rows, L rows of a padded segment, W width.
"""

from __future__ import annotations

import functools
from numbers import Integral

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, rows, segments
from pallas_kernels.jagged_dense import reference


def jagged_to_dense(
  x_TW: jax.Array,
  offsets_S1: jax.Array,
  max_length: int,
  *,
  padding_value: float = 0.0,
  implementation: str | None = None,
) -> jax.Array:
  """The rows of every segment side by side with padding behind them.

      y[s, l] = x[offsets[s] + l]   if offsets[s] + l < offsets[s + 1]
                padding_value       otherwise

  A segment longer than `max_length` is cut: its first `max_length` rows stay, and the gradient of
  the others is 0. (`jagged_pool(mode="last")` keeps the last ones.) Where none may be cut, see to
  `segments.lengths(offsets).max() <= max_length` before: shapes cannot show it.

  Args:
    x_TW: float. Rows outside the segments are not read; their gradient is 0.
    offsets_S1: int32, of segments as in `segments`.
    max_length: L, at least 0.
    padding_value: What fills the rest.
    implementation: As in `dispatch`.

  Returns:
    y_SLW of x's dtype.

  Raises:
    ValueError: Wrong dtypes or ranks, a negative length, an unknown implementation.

  Source: `torch.ops.fbgemm.jagged_to_padded_dense`, which cuts in the same way.
  """
  op = "jagged_to_dense"
  dispatch.check(op, implementation)
  x_TW, offsets_S1 = jnp.asarray(x_TW), segments.as_offsets(op, "offsets", offsets_S1)
  rows.check_rows(op, "x", x_TW, moved=True)
  if not isinstance(max_length, Integral) or max_length < 0:
    raise ValueError(f"{op}: max_length must be a whole number of 0 or more, is {max_length}")
  shape = (len(offsets_S1) - 1, max_length, x_TW.shape[1])
  if 0 in (*x_TW.shape, *shape):  # Nothing to move.
    return jnp.full(shape, padding_value, x_TW.dtype)
  if implementation == "reference":
    return reference.jagged_to_dense(x_TW, offsets_S1, max_length, padding_value)
  return _to_dense(x_TW, offsets_S1, max_length, padding_value, len(x_TW), implementation)


def dense_to_jagged(
  y_SLW: jax.Array, offsets_S1: jax.Array, rows_out: int, *, implementation: str | None = None
) -> jax.Array:
  """The first rows of every padded segment, one segment behind the other.

      x[offsets[s] + l] = y[s, l]   for l < min(L, offsets[s + 1] - offsets[s])
      x[t] = 0                      in every other row

  Args:
    y_SLW: float. Padding is not read; its gradient is 0.
    offsets_S1: int32, of segments as in `segments`; a segment longer than L ends with zeros.
    rows_out: T, the static room of the result: at least offsets[-1], or rows are lost.
    implementation: As in `dispatch`.

  Returns:
    x_TW of y's dtype.

  Raises:
    ValueError: Wrong dtypes or ranks, offsets of other segments than y's, negative room, an
      unknown implementation.

  Source: `torch.ops.fbgemm.dense_to_jagged`.
  """
  op = "dense_to_jagged"
  dispatch.check(op, implementation)
  y_SLW, offsets_S1 = jnp.asarray(y_SLW), segments.as_offsets(op, "offsets", offsets_S1)
  rows.check_rows(op, "y", y_SLW, ndim=3, moved=True)
  if len(y_SLW) != len(offsets_S1) - 1:
    raise ValueError(f"{op}: y has {len(y_SLW)} segments, offsets have {len(offsets_S1) - 1}")
  if not isinstance(rows_out, Integral) or rows_out < 0:
    raise ValueError(f"{op}: rows_out must be a whole number of 0 or more, is {rows_out}")
  if 0 in (rows_out, *y_SLW.shape):
    return jnp.zeros((rows_out, y_SLW.shape[2]), y_SLW.dtype)
  if implementation == "reference":
    return reference.dense_to_jagged(y_SLW, offsets_S1, rows_out)
  return _to_jagged(y_SLW, offsets_S1, rows_out, y_SLW.shape[1], implementation)


def _gather_dense(op, direction, x_TW, offsets_S1, length, padding_value, implementation):
  index_SL = offsets_S1[:-1, None] + jnp.arange(length, dtype=jnp.int32)
  index_SL = jnp.where(index_SL < offsets_S1[1:, None], index_SL, -1)
  y_MW = rows.gather(
    [(x_TW, index_SL.reshape(-1))],
    op=op,
    direction=direction,
    implementation=implementation,
    fill=padding_value,
  )
  return y_MW.reshape(*index_SL.shape, x_TW.shape[1])


def _gather_jagged(op, direction, y_SLW, offsets_S1, rows_out, implementation):
  S, L, W = y_SLW.shape
  segment_T, inside_T = rows.members(offsets_S1, rows_out)
  place_T = jnp.arange(rows_out, dtype=jnp.int32) - offsets_S1[segment_T]
  index_T = jnp.where(inside_T & (place_T < L), segment_T * L + place_T, -1)
  return rows.gather(
    [(y_SLW.reshape(S * L, W), index_T)],
    op=op,
    direction=direction,
    implementation=implementation,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _to_dense(x_TW, offsets_S1, length, padding_value, rows_in, implementation):
  del rows_in
  return _gather_dense(
    "jagged_to_dense", "forward", x_TW, offsets_S1, length, padding_value, implementation
  )


def _to_dense_forward(x_TW, offsets_S1, *static):
  return _to_dense(x_TW, offsets_S1, *static), offsets_S1


def _to_dense_backward(length, padding_value, rows_in, implementation, offsets_S1, dy_SLW):
  del length, padding_value
  op = "jagged_to_dense"
  return _gather_jagged(op, "backward", dy_SLW, offsets_S1, rows_in, implementation), None


_to_dense.defvjp(_to_dense_forward, _to_dense_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _to_jagged(y_SLW, offsets_S1, rows_out, length, implementation):
  del length
  return _gather_jagged("dense_to_jagged", "forward", y_SLW, offsets_S1, rows_out, implementation)


def _to_jagged_forward(y_SLW, offsets_S1, *static):
  return _to_jagged(y_SLW, offsets_S1, *static), offsets_S1


def _to_jagged_backward(rows_out, length, implementation, offsets_S1, dx_TW):
  del rows_out
  op = "dense_to_jagged"
  return _gather_dense(op, "backward", dx_TW, offsets_S1, length, 0.0, implementation), None


_to_jagged.defvjp(_to_jagged_forward, _to_jagged_backward)
