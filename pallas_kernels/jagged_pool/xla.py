"""Pooling as plain XLA: additions into S rows, one pass over the T rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import rows, segments


def segment_sum(x_TW: jax.Array, offsets_S1: jax.Array, scale_S: jax.Array | None) -> jax.Array:
  """y_SW of x's dtype: the sum of each segment, times scale[s]."""
  segment_T = segments.segment_of_rows(offsets_S1, len(x_TW))
  wide_TW = x_TW.astype(jnp.promote_types(x_TW.dtype, jnp.float32))
  # Rows of segment -1 and S fall away.
  y_SW = jax.ops.segment_sum(
    wide_TW, segment_T, len(offsets_S1) - 1, indices_are_sorted=True, mode="drop"
  )
  if scale_S is not None:
    y_SW = y_SW * scale_S[:, None]
  return y_SW.astype(x_TW.dtype)


def segment_max(x_TW: jax.Array, offsets_S1: jax.Array) -> tuple[jax.Array, jax.Array]:
  """y_SW of x's dtype, and row_SW int32: the first row that has it; 0 and T if there is none."""
  T, S = len(x_TW), len(offsets_S1) - 1
  segment_T, inside_T = rows.members(offsets_S1, T)
  target_T = jnp.where(inside_T, segment_T, S)
  y_SW = jax.ops.segment_max(x_TW, target_T, S, mode="drop")
  top_TW = y_SW[segment_T]
  is_top_TW = (x_TW == top_TW) | (jnp.isnan(x_TW) & jnp.isnan(top_TW))
  row_TW = jnp.where(is_top_TW, jnp.arange(T, dtype=jnp.int32)[:, None], T)
  row_SW = jnp.minimum(jax.ops.segment_min(row_TW, target_T, S, mode="drop"), T)
  return jnp.where(row_SW < T, y_SW, 0).astype(x_TW.dtype), row_SW


def max_gradient(dy_SW: jax.Array, row_SW: jax.Array, segment_T: jax.Array) -> jax.Array:
  """dx_TW: dy of the segments for which a row is the first largest."""
  column_W = jnp.arange(dy_SW.shape[1], dtype=jnp.int32)
  dx_TW = jnp.zeros((len(segment_T), dy_SW.shape[1]), dy_SW.dtype)
  return dx_TW.at[row_SW, column_W].set(dy_SW, mode="drop")


def last_gradient(dy_MW: jax.Array, row_M: jax.Array, index_T: jax.Array) -> jax.Array:
  """dx_TW: dy[m] in row[m], where that is not negative; which is dy[index[t]] in every row t."""
  T, W = len(index_T), dy_MW.shape[1]
  if 4 * len(dy_MW) > T:  # A scatter looks at all of dy, one row after the other.
    return rows.take_rows(dy_MW, index_T)
  target_M = jnp.where(row_M >= 0, row_M, T + jnp.arange(len(row_M)))  # All of them unique.
  return jnp.zeros((T, W), dy_MW.dtype).at[target_M].set(dy_MW, mode="drop", unique_indices=True)
