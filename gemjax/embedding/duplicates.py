"""Equal ids of a batch: found by one sort, their gradients summed in a fixed order.

Sorted first, so that equal ids are summed as neighbours: no contended atomic add on a GPU, and the
same bits in every run.

Letters: N ids, U unique ones (at most N), W width, C chunks of T.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 32  # T of the scan below: log2(T) additions an entry, N / T entries for the next level.


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
  """(U, W): the sum of the gradients of every run, in their order in the batch."""
  return jax.lax.platform_dependent(segments, grad_NW, cuda=sum_sorted, default=sum_in_place)


def sum_sorted(segments: Segments, grad_NW: jax.Array) -> jax.Array:
  sorted_NW = grad_NW.at[segments.order_N].get(mode="promise_in_bounds", unique_indices=True)
  return sum_runs(sorted_NW, segments.segment_N, len(segments.unique_U))


def sum_in_place(segments: Segments, grad_NW: jax.Array) -> jax.Array:
  """Each gradient is added to its run where it stands in the batch: a copy in another order would
  make XLA for CPUs do what is left of the gradient anew, float by float, in that order.
  """
  run_N = jnp.zeros_like(segments.segment_N)
  run_N = run_N.at[segments.order_N].set(segments.segment_N, unique_indices=True)
  sum_UW = jnp.zeros((len(segments.unique_U), grad_NW.shape[1]), grad_NW.dtype)
  return sum_UW.at[run_N].add(grad_NW, mode="promise_in_bounds")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def sum_runs(x_NW: jax.Array, segment_N: jax.Array, count: int) -> jax.Array:
  """(count, W): the sums of neighbours of one segment.

  On a GPU without atomics: those of floats give other bits in every run, and with this version of
  XLA many are loops of compare-and-swap, 450 times as slow where ids meet (openxla/xla#46225).

  Args:
    x_NW: Summands.
    segment_N: int32 in [0, count), ascending.
    count: Segments; one that does not occur has sum 0.
  """
  scatter = functools.partial(_by_scatter, count=count)
  return jax.lax.platform_dependent(
    x_NW, segment_N, cuda=functools.partial(by_scan, count=count), default=scatter
  )


def _sum_runs_forward(x_NW, segment_N, count):
  return sum_runs(x_NW, segment_N, count), segment_N


def _sum_runs_backward(count, segment_N, gradient_UW):
  del count
  return gradient_UW.at[segment_N].get(mode="promise_in_bounds", indices_are_sorted=True), None


sum_runs.defvjp(_sum_runs_forward, _sum_runs_backward)


def by_scan(x_NW: jax.Array, segment_N: jax.Array, *, count: int) -> jax.Array:
  """`sum_runs` as a scan, of which the last of every segment is kept."""
  ends_N = jnp.append(segment_N[1:] != segment_N[:-1], True)
  last_U = jnp.full((count,), -1, jnp.int32)
  last_U = last_U.at[jnp.where(ends_N, segment_N, count)].set(
    jnp.arange(len(segment_N), dtype=jnp.int32), mode="drop"
  )
  found_U = last_U >= 0
  total_UW = _scan(x_NW, segment_N).at[last_U].get(mode="clip")
  return jnp.where(found_U[:, None], total_UW, 0)


def _scan(x_NW: jax.Array, segment_N: jax.Array) -> jax.Array:
  """Sums over each segment up to here: inside chunks of T by doubling (Hillis and Steele 1986),
  then the same over the last sums of the chunks, N / T of them, which the next may go on from.

  Selected and not multiplied by masks: what is not finite stays in its segment.
  """
  count, chunks = len(x_NW), -(-len(x_NW) // CHUNK)
  sum_CTW = _chunked(x_NW, 0, chunks)
  segment_CT = _chunked(segment_N, -1, chunks)
  step = 1
  while step < CHUNK:
    same_CT = segment_CT[:, step:] == segment_CT[:, :-step]
    before_CTW = jnp.where(same_CT[..., None], sum_CTW[:, :-step], 0)
    sum_CTW += jnp.pad(before_CTW, ((0, 0), (step, 0), (0, 0)))
    step *= 2
  if chunks > 1:
    last_CW = _scan(sum_CTW[:, -1], segment_CT[:, -1])
    goes_on_CT = segment_CT[1:] == segment_CT[:-1, -1:]
    carried_CTW = jnp.where(goes_on_CT[..., None], last_CW[:-1, None], 0)
    sum_CTW += jnp.pad(carried_CTW, ((1, 0), (0, 0), (0, 0)))
  return sum_CTW.reshape(-1, *x_NW.shape[1:])[:count]


def _chunked(x_N: jax.Array, fill: int, chunks: int) -> jax.Array:
  room = [(0, chunks * CHUNK - len(x_N))] + [(0, 0)] * (x_N.ndim - 1)
  return jnp.pad(x_N, room, constant_values=fill).reshape(chunks, CHUNK, *x_N.shape[1:])


def _by_scatter(x_NW: jax.Array, segment_N: jax.Array, *, count: int) -> jax.Array:
  return jax.ops.segment_sum(
    x_NW, segment_N, count, indices_are_sorted=True, mode="promise_in_bounds"
  )
