"""Segments of jagged arrays: [offsets[s], offsets[s + 1]) are the rows of segment s.

Rows before offsets[0] and from offsets[-1] on belong to no segment: room of an array whose shape
does not follow the events. They may hold anything, NaN too. Letters: S segments, T rows.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def check_offsets(op: str, name: str, offsets_S1: jax.Array) -> None:
  """ValueError unless `offsets_S1` are int32 of shape (S + 1,)."""
  if offsets_S1.ndim != 1 or not len(offsets_S1) or offsets_S1.dtype != jnp.int32:
    raise ValueError(
      f"{op}: {name} must be int32 of shape (segments + 1,), "
      f"is {offsets_S1.dtype} of shape {offsets_S1.shape}"
    )


def segment_of_rows(offsets_S1: jax.Array, rows: int) -> jax.Array:
  """segment_T int32: the segment that each row belongs to; -1 before the first, S after the last.

  Additions of integers, so O(T + S) and the same bits in every run.
  """
  ends_T = jnp.zeros((rows,), jnp.int32).at[offsets_S1].add(1, mode="drop")
  return jnp.cumsum(ends_T, dtype=jnp.int32) - 1


def bisect(rising_N: jax.Array, x_M: jax.Array, side: str) -> jax.Array:
  """(M,) int32: jnp.searchsorted; on a GPU one kernel or few instead of a loop of several."""
  search = functools.partial(jnp.searchsorted, side=side)
  unrolled = functools.partial(search, method="scan_unrolled")
  found_M = jax.lax.platform_dependent(rising_N, x_M, cuda=unrolled, default=search)
  return found_M.astype(jnp.int32)


def lengths(offsets_S1: jax.Array) -> jax.Array:
  """length_S int32: the rows of each segment."""
  return offsets_S1[1:] - offsets_S1[:-1]
