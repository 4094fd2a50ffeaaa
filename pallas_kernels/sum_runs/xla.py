"""Sums of runs in plain JAX: a run begins as a copy of its first entry, others are added to it.

Letters: N summands, U runs, W width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.once import computed_once


def sum_runs(x_NW: jax.Array, order_N: jax.Array, segment_N: jax.Array, *, count: int):
  """The first entry of a run is copied, the others are added to it where they stand: a copy of x in
  another order would make XLA for CPUs do what x comes from anew, float by float, in that order. On
  a GPU the additions are atomic: not the same bits in every run.
  """
  x_NW = x_NW.astype(jnp.promote_types(x_NW.dtype, jnp.float32))
  first_N = jnp.concatenate([jnp.ones((1,), bool), segment_N[1:] != segment_N[:-1]])
  first_U = jnp.full((count,), -1, jnp.int32)
  first_U = first_U.at[jnp.where(first_N, segment_N, count)].set(order_N, mode="drop")
  run_N = jnp.zeros_like(segment_N)
  run_N = run_N.at[order_N].set(jnp.where(first_N, count, segment_N), unique_indices=True)
  return computed_once(_begun)(x_NW, first_U).at[run_N].add(x_NW, mode="drop")


def _begun(x_NW: jax.Array, first_U: jax.Array) -> jax.Array:
  """(U, W): the first entry of every run, zeros for none. NaN becomes NaN as in `rows.copied`."""
  first_UW = x_NW.at[first_U].get(mode="clip")  # `jnp.where` would be a call within the call.
  first_UW = jax.lax.select(
    jax.lax.ne(first_UW, first_UW), jax.lax.full_like(first_UW, jnp.nan), first_UW
  )
  there_UW = jax.lax.broadcast_in_dim(first_U >= 0, first_UW.shape, (0,))
  return jax.lax.select(there_UW, first_UW, jax.lax.full_like(first_UW, 0))
