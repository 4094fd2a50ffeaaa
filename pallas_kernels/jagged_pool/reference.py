"""The formulas of `api`, in plain JAX; derivatives are JAX's own."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def jagged_pool(x_TW: jax.Array, offsets_S1: jax.Array, mode: str, k: int | None) -> jax.Array:
  begin_S, end_S = offsets_S1[:-1], offsets_S1[1:]
  if mode == "last":
    row_SK = end_S[:, None] - k + jnp.arange(k)
    inside_SK = row_SK >= begin_S[:, None]
    row_SKW = x_TW.at[jnp.where(inside_SK, row_SK, len(x_TW))].get(mode="fill", fill_value=0)
    return row_SKW
  S, (T, W) = len(begin_S), x_TW.shape
  row_T = jnp.arange(T)
  segment_T = jnp.searchsorted(offsets_S1, row_T, side="right") - 1
  # Rows of no segment go to segment S, which is cut off.
  segment_T = jnp.where(segment_T >= 0, segment_T, S)
  wide_TW = x_TW.astype(jnp.promote_types(x_TW.dtype, jnp.float32))
  if mode == "max":
    top_SW = jax.ops.segment_max(jax.lax.stop_gradient(wide_TW), segment_T, S + 1)
    top_TW = top_SW[segment_T]
    is_top_TW = (wide_TW == top_TW) | (jnp.isnan(wide_TW) & jnp.isnan(top_TW))
    first_TW = jnp.where(is_top_TW, row_T[:, None], T)
    first_SW = jax.ops.segment_min(first_TW, segment_T, S + 1)[:S]
    # An empty segment has no first row: it reads the row behind the last, which is 0.
    return x_TW.at[first_SW, jnp.arange(W)].get(mode="fill", fill_value=0)
  wide_TW = jnp.where((segment_T < S)[:, None], wide_TW, 0)
  y_SW = jax.ops.segment_sum(wide_TW, segment_T, S + 1)[:S]
  if mode == "mean":
    y_SW = y_SW / jnp.maximum(end_S - begin_S, 1)[:, None]
  return y_SW.astype(x_TW.dtype)
