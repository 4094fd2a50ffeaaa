"""Equal ids of a batch: found by one sort, their gradients summed in a fixed order.

Sorted first, so that equal ids are summed as neighbours: no contended atomic add on a GPU, and the
same bits in every run.

Letters: N ids, U unique ones (at most N), W width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import sum_runs


class Segments(NamedTuple):
  """Runs of equal ids among N sorted ones. All int32."""

  order_N: jax.Array  # Where the i-th smallest id stands in the input; stable.
  segment_N: jax.Array  # The run it belongs to; ascending from 0.
  unique_U: jax.Array  # The id of every run, ascending; the tail holds the padding.


def sort_ids(id_N: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(sorted uint64 ids, order_N int32), stable; call it with 64-bit integers switched on.

  One key of (id, place in the input): XLA sorts plain keys five times as fast as pairs on a CPU,
  and on a GPU by CUB's radix sort. Ids must stay below 2^64 / N.
  """
  bits = max(1, (len(id_N) - 1).bit_length())
  place_N = jnp.arange(len(id_N), dtype=jnp.uint64)
  key_N = jax.lax.sort((id_N.astype(jnp.uint64) << bits) | place_N)
  return key_N >> bits, (key_N & ((1 << bits) - 1)).astype(jnp.int32)


def runs(sorted_N: jax.Array) -> jax.Array:
  """segment_N int32: the number of the run of equal values that each belongs to."""
  first_N = jnp.concatenate([jnp.zeros((1,), bool), sorted_N[1:] != sorted_N[:-1]])
  return jnp.cumsum(first_N.astype(jnp.int32))


def find_duplicates(row_N: jax.Array, padding: int, capacity: int | None = None) -> Segments:
  """The runs of non-negative rows, none above `padding`.

  Args:
    row_N: Rows; `padding` where there is none.
    padding: Fills the tail of `unique_U`.
    capacity: U, the most different values that can occur; N unless given.
  """
  with jax.enable_x64(True):
    sorted_N, order_N = sort_ids(row_N)
    sorted_N = sorted_N.astype(jnp.int32)
  segment_N = runs(sorted_N)
  unique_U = jnp.full((capacity or len(row_N),), padding, jnp.int32)
  return Segments(order_N, segment_N, unique_U.at[segment_N].set(sorted_N, indices_are_sorted=True))


def sum_duplicates(segments: Segments, grad_NW: jax.Array) -> jax.Array:
  """(U, W) float32: the sum of the gradients of every run, in a fixed order."""
  return sum_runs(grad_NW, segments.order_N, segments.segment_N, count=len(segments.unique_U))
