"""The formula: each summand in the order of the runs, added to its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sum_runs(x_NW: jax.Array, order_N: jax.Array, segment_N: jax.Array, *, count: int):
  """Sums by an unsorted scatter, with a sorted copy of x."""
  sorted_NW = x_NW[order_N].astype(jnp.promote_types(x_NW.dtype, jnp.float32))
  sum_UW = jnp.zeros((count, x_NW.shape[1]), sorted_NW.dtype)
  return sum_UW.at[segment_N].add(sorted_NW, mode="drop")
