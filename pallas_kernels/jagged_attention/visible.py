"""Which keys a query sees: always those of one interval, so two numbers a query say it all.

    self, cross            the keys of its segment
    causal                 up to its own position p
    window w               nearer to p than w
    block b                of the b positions that p lies among, [p // b * b, p // b * b + b)

p counts from the start of the segment's keys and is aligned at the ends: the last query of a
segment stands at its last key. So a kernel needs no case for any mask, and a tile knows what it
visits. Letters: S segments, T queries, E keys (events).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import segments


class Visible(NamedTuple):
  """Query t sees the keys [lo_T[t], hi_T[t]); none where it belongs to no segment. All int32."""

  lo_T: jax.Array
  hi_T: jax.Array
  position_T: jax.Array  # p; negative where a segment has fewer keys than queries.
  keys_T: jax.Array  # The keys of its segment, seen or not.


def visible(
  q_offsets_S1: jax.Array,
  kv_offsets_S1: jax.Array,
  kv_segment_S: jax.Array | None,
  queries: int,
  *,
  causal: bool = False,
  window: int | None = None,
  block: int | None = None,
) -> Visible:
  """The interval of every query.

  Args:
    q_offsets_S1: Segments of the queries.
    kv_offsets_S1: Segments of the keys.
    kv_segment_S: Whose keys a segment of queries attends to, none if there is no such one; its own
      number unless given.
    queries: T.
    causal: See above, as `window` and `block`; together they narrow each other.
  """
  count = len(q_offsets_S1) - 1
  if not count or not queries or not len(kv_offsets_S1) - 1:
    return Visible(*(jnp.zeros((queries,), jnp.int32),) * 4)
  segment_T = segments.segment_of_rows(q_offsets_S1, queries)
  inside_T = (segment_T >= 0) & (segment_T < count)
  kv_T = segment_T = jnp.clip(segment_T, 0, count - 1)
  if kv_segment_S is not None:
    kv_T = kv_segment_S[segment_T]
    inside_T &= (kv_T >= 0) & (kv_T < len(kv_offsets_S1) - 1)
    kv_T = jnp.clip(kv_T, 0, len(kv_offsets_S1) - 2)
  start_T, end_T = kv_offsets_S1[kv_T], kv_offsets_S1[kv_T + 1]
  place_T = jnp.arange(queries, dtype=jnp.int32) - q_offsets_S1[segment_T]
  keys_T = end_T - start_T
  p_T = place_T + keys_T - segments.lengths(q_offsets_S1)[segment_T]
  lo_T, hi_T = start_T, end_T
  if causal:
    hi_T = jnp.minimum(hi_T, start_T + p_T + 1)
  if window is not None:
    lo_T = jnp.maximum(lo_T, start_T + p_T - window + 1)
    hi_T = jnp.minimum(hi_T, start_T + p_T + window)
  if block is not None:
    first_T = start_T + p_T // block * block
    lo_T, hi_T = jnp.maximum(lo_T, first_T), jnp.minimum(hi_T, first_T + block)
  lo_T = jnp.where(inside_T, jnp.clip(lo_T, start_T, end_T), 0)
  hi_T = jnp.where(inside_T, jnp.clip(hi_T, lo_T, end_T), 0)
  return Visible(lo_T, hi_T, jnp.where(inside_T, p_T, 0), jnp.where(inside_T, keys_T, 0))


def key_positions(kv_offsets_S1: jax.Array, keys: int) -> jax.Array:
  """position_E int32: the place of every key in its segment; 0 outside of all."""
  count = len(kv_offsets_S1) - 1
  if not count or not keys:
    return jnp.zeros((keys,), jnp.int32)
  segment_E = segments.segment_of_rows(kv_offsets_S1, keys)
  inside_E = (segment_E >= 0) & (segment_E < count)
  start_E = kv_offsets_S1[jnp.clip(segment_E, 0, count - 1)]
  return jnp.where(inside_E, jnp.arange(keys, dtype=jnp.int32) - start_E, 0)
