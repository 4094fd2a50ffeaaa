"""Runs of equal ids, found by one sort."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sorted_runs(row_N: jax.Array, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(order_N, segment_N, unique_N) of int32 rows, as `rowwise_adagrad_update` takes them.

  Args:
    row_N: int32, the row of each gradient; what is not in [0, rows) is padding.
    rows: Rows of the table, the value of `unique` for padding and beyond the last run.
  """
  row_N = jnp.asarray(row_N)
  if row_N.ndim != 1 or row_N.dtype != jnp.int32:
    raise ValueError(f"sorted_runs: rows must be int32 (N,), are {row_N.dtype} of {row_N.shape}")
  row_N = jnp.where((row_N >= 0) & (row_N < rows), row_N, rows)
  # One key of row and place: XLA sorts plain keys several times as fast as pairs on a CPU, and on
  # a GPU by radix.
  bits = max(1, (len(row_N) - 1).bit_length())
  with jax.enable_x64(True):
    place_N = jnp.arange(len(row_N), dtype=jnp.uint64)
    key_N = jax.lax.sort((row_N.astype(jnp.uint64) << bits) | place_N)
    sorted_N = (key_N >> bits).astype(jnp.int32)
    order_N = (key_N & ((1 << bits) - 1)).astype(jnp.int32)
  first_N = jnp.concatenate([jnp.zeros((1,), bool), sorted_N[1:] != sorted_N[:-1]])
  segment_N = jnp.cumsum(first_N[: len(row_N)], dtype=jnp.int32)
  unique_N = jnp.full(row_N.shape, rows, jnp.int32)
  return order_N, segment_N, unique_N.at[segment_N].set(sorted_N, indices_are_sorted=True)
