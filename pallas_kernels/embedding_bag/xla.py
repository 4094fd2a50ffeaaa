"""Lookup and pooling as plain XLA; the work follows the ids."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import rows, segments


def embedding_bag(
  table_RW: jax.Array,
  offsets_S1: jax.Array,
  scale_S: jax.Array | None,
  id_N: jax.Array,
  weight_N: jax.Array | None,
) -> jax.Array:
  """y_SW of the table's dtype: scale[s] times the weighted sum of the rows of each bag."""
  wide = jnp.promote_types(table_RW.dtype, jnp.float32)
  found_N, row_N = rows.found(id_N, len(table_RW))
  row_NW = rows.copied(table_RW, row_N).astype(wide)
  if weight_N is not None:
    row_NW = row_NW * weight_N.astype(wide)[:, None]
  row_NW = jnp.where(found_N[:, None], row_NW, 0)
  segment_N = segments.segment_of_rows(offsets_S1, len(id_N))
  y_SW = jax.ops.segment_sum(
    row_NW, segment_N, len(offsets_S1) - 1, indices_are_sorted=True, mode="drop"
  )
  if scale_S is not None:
    y_SW = y_SW * scale_S[:, None]
  return y_SW.astype(table_RW.dtype)


def row_dots(a_SW: jax.Array, a_row_N: jax.Array, b_RW: jax.Array, b_row_N: jax.Array) -> jax.Array:
  """dot_N: <a[a_row[n]], b[b_row[n]]> in float32 or wider, 0 where one of the rows is missing."""
  wide = jnp.promote_types(jnp.promote_types(a_SW.dtype, b_RW.dtype), jnp.float32)
  a_found_N, a_row_N = rows.found(a_row_N, len(a_SW))
  b_found_N, b_row_N = rows.found(b_row_N, len(b_RW))
  a_NW = a_SW.at[a_row_N].get(mode="promise_in_bounds").astype(wide)
  b_NW = b_RW.at[b_row_N].get(mode="promise_in_bounds").astype(wide)
  return jnp.where(a_found_N & b_found_N, (a_NW * b_NW).sum(1), 0)
