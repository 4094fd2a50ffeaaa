"""Segments of jagged arrays: [offsets[s], offsets[s + 1]) are the rows of segment s.

Rows before offsets[0] and from offsets[-1] on belong to no segment: room of an array whose shape
does not follow the events. They may hold anything, NaN too. Letters: S segments, T rows.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np


def as_offsets(op: str, name: str, offsets_S1: jax.typing.ArrayLike) -> jax.Array:
  """`offsets_S1` as a JAX array.

  Raises:
    ValueError: They are not integers of shape (S + 1,), int32 where they are a JAX array. Values of
      NumPy's and of lists must rise from 0 or more; what is on a device is not waited for, and what
      is traced has none yet.
  """
  given = offsets_S1 if isinstance(offsets_S1, jax.Array) else np.asarray(offsets_S1)
  fits = given.dtype == jnp.int32 if isinstance(given, jax.Array) else given.dtype.kind == "i"
  if given.ndim != 1 or not len(given) or not fits:
    raise ValueError(
      f"{op}: {name} must be int32 of shape (segments + 1,), "
      f"is {given.dtype} of shape {given.shape}"
    )
  if isinstance(given, np.ndarray):
    ends_S1 = given.astype(np.int64)
    if ends_S1[0] < 0 or ends_S1[-1] >= 2**31 or (np.diff(ends_S1) < 0).any():
      s = int(np.argmax(np.diff(ends_S1, prepend=0) < 0))
      at = f"entry {s} is {given[s]} behind {given[s - 1] if s else 0}"
      at = at if ends_S1[-1] < 2**31 else f"the last is {given[-1]}"
      raise ValueError(f"{op}: {name} must rise from 0 or more and stay below 2^31, but {at}")
    given = given.astype(np.int32)
  return jnp.asarray(given)


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
