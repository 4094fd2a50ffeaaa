"""The formulas of `api`, in plain JAX; derivatives, also the table's dense one, are JAX's own."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def embedding_bag(
  table_RW: jax.Array,
  id_N: jax.Array,
  offsets_S1: jax.Array,
  weight_N: jax.Array | None,
  mode: str,
) -> jax.Array:
  wide = jnp.promote_types(table_RW.dtype, jnp.float32)
  rows_NW = table_RW.astype(wide).at[_row(table_RW, id_N)].get(mode="fill", fill_value=0)
  return _pool(table_RW, rows_NW, id_N, offsets_S1, weight_N, mode)


def embedding_bag_gradients(
  dy_SW: jax.Array,
  table_RW: jax.Array,
  id_N: jax.Array,
  offsets_S1: jax.Array,
  weight_N: jax.Array | None,
  mode: str,
) -> tuple[jax.Array, jax.Array | None]:
  wide = jnp.promote_types(table_RW.dtype, jnp.float32)
  rows_NW = table_RW.astype(wide).at[_row(table_RW, id_N)].get(mode="fill", fill_value=0)
  pool = lambda rows_NW, weight_N: _pool(table_RW, rows_NW, id_N, offsets_S1, weight_N, mode)
  y_SW, pullback = jax.vjp(pool, rows_NW, weight_N)
  grad_row_NW, grad_weight_N = pullback(dy_SW.astype(y_SW.dtype))
  return grad_row_NW.astype(dy_SW.dtype), grad_weight_N


def _row(table_RW, id_N):
  return jnp.where((id_N >= 0) & (id_N < len(table_RW)), id_N, len(table_RW))


def _pool(table_RW, rows_NW, id_N, offsets_S1, weight_N, mode):
  S = len(offsets_S1) - 1
  segment_N = jnp.searchsorted(offsets_S1, jnp.arange(len(id_N)), side="right") - 1
  present_N = (segment_N >= 0) & (segment_N < S) & (_row(table_RW, id_N) < len(table_RW))
  # Ids that are missing or in no bag go to segment S, which is cut off.
  segment_N = jnp.where(present_N, segment_N, S)
  if weight_N is not None:
    weight_N = jnp.where(present_N, weight_N, 0)
    rows_NW = rows_NW * weight_N[:, None]
  rows_NW = jnp.where(present_N[:, None], rows_NW, 0)
  y_SW = jax.ops.segment_sum(rows_NW, segment_N, S + 1)[:S]
  if mode == "mean":
    count_S = jax.ops.segment_sum(present_N.astype(jnp.int32), segment_N, S + 1)[:S]
    y_SW = y_SW / jnp.maximum(count_S, 1)[:, None]
  return y_SW.astype(table_RW.dtype)
