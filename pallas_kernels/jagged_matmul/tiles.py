"""Tiles of rows that never cross a segment's border, so that one matrix serves a tile.

Letters: S segments, N tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import segments


class Tiles(NamedTuple):
  """Rows [begin_N, end_N) of segment_N, at most `block` of them, in order; int32.

  Unused tiles come last and have no rows: begin_N >= end_N.
  """

  segment_N: jax.Array
  begin_N: jax.Array
  end_N: jax.Array


def bound(rows: int, segments: int, block: int) -> int:
  """N: no lengths of `segments` segments in `rows` rows give more tiles of `block` rows.

  ceil(length / block) <= (length + block - 1) / block, and no tile of these is empty.
  """
  return min(rows, (rows + segments * (block - 1)) // block)


def cut(offsets_S1: jax.Array, rows: int, block: int) -> Tiles:
  """The tiles of at least one segment in at least one row."""
  number = bound(rows, len(offsets_S1) - 1, block)
  count_S = (segments.lengths(offsets_S1) + (block - 1)) // block
  first_S1 = jnp.concatenate([jnp.zeros((1,), jnp.int32), jnp.cumsum(count_S, dtype=jnp.int32)])
  segment_N = jnp.minimum(segments.segment_of_rows(first_S1, number), len(count_S) - 1)
  place_N = jnp.arange(number, dtype=jnp.int32) - first_S1[segment_N]
  begin_N = offsets_S1[segment_N] + place_N * block
  return Tiles(segment_N, begin_N, jnp.minimum(begin_N + block, offsets_S1[segment_N + 1]))
