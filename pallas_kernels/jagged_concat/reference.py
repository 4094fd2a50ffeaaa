"""The formula of `api`, in plain JAX."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def jagged_concat(
  xs: Sequence[jax.Array], offsets: Sequence[jax.Array], rows_out: int
) -> tuple[jax.Array, jax.Array]:
  out_S1 = sum(o_S1 - o_S1[0] for o_S1 in offsets)
  y_TW = jnp.zeros((rows_out, xs[0].shape[1]), xs[0].dtype)
  start_S = out_S1[:-1]
  for x_TW, o_S1 in zip(xs, offsets):
    row_T = jnp.arange(len(x_TW), dtype=jnp.int32)
    segment_T = jnp.searchsorted(o_S1, row_T, side="right") - 1
    inside_T = (row_T >= o_S1[0]) & (row_T < o_S1[-1])
    to_T = (
      start_S.at[segment_T].get(mode="clip") + row_T - o_S1[segment_T] if len(start_S) else row_T
    )
    y_TW = y_TW.at[jnp.where(inside_T, to_T, rows_out)].set(x_TW, mode="drop")
    start_S = start_S + o_S1[1:] - o_S1[:-1]
  return y_TW, jnp.minimum(out_S1, rows_out)
