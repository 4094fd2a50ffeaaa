"""Sums of runs in plain JAX: each entry is added to its run where it stands."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sum_runs(x_NW: jax.Array, order_N: jax.Array, segment_N: jax.Array, *, count: int):
  """A copy of x in another order would make XLA for CPUs do what x comes from anew, float by float,
  in that order. On a GPU the additions are atomic: not the same bits in every run.
  """
  run_N = jnp.zeros_like(segment_N).at[order_N].set(segment_N, unique_indices=True)
  wide_NW = x_NW.astype(jnp.promote_types(x_NW.dtype, jnp.float32))
  return jnp.zeros((count, x_NW.shape[1]), wide_NW.dtype).at[run_N].add(wide_NW, mode="drop")
