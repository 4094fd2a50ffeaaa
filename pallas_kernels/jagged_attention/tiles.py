"""Tiles of a jagged axis, and the stretch of the other axis that each has to visit.

A segment at least as long as a tile is cut into tiles of its own, from its first row on. Shorter
ones that lie side by side share tiles: 64 rows hold ten users with six events each, and their keys
lie side by side, too. Rows outside of all segments get tiles that visit nothing and write zeros. So
every row lies in one tile, and their number has a bound that knows no lengths:

    N = T // block + min(2 (T // block), 2 S) + 3

since at most T // block segments are long, and each starts a tile and lets what follows start one.
Letters: S segments, T rows to be tiled, N tiles, B rows of a tile, E rows of the other axis.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import segments


class Tiles(NamedTuple):
  """Rows [start_N, stop_N), at most `block`; they visit [first_N, last_N) of the other axis. int32.

  All of them see all of [inner_first_N, inner_last_N), a part of that, so that no mask is needed.

  The costliest first, so that on a GPU no long tile starts last, and so that those that a CPU works
  on together are equal. Unused ones have no rows.
  """

  start_N: jax.Array
  stop_N: jax.Array
  first_N: jax.Array
  last_N: jax.Array
  inner_first_N: jax.Array
  inner_last_N: jax.Array


def bound(rows: int, segments: int, block: int) -> int:
  """N: no lengths of `segments` segments in `rows` rows give more tiles."""
  return rows // block + min(2 * (rows // block), 2 * segments) + 3


def cut(offsets_S1: jax.Array, rows: int, block: int) -> tuple[jax.Array, jax.Array]:
  """(start_N, stop_N) of the tiles in order; start = stop = T in those not used."""
  begins_T1 = jnp.zeros((rows + 1,), bool).at[0].set(True)
  begins_T1 = begins_T1.at[offsets_S1[0]].set(True, mode="drop")
  begins_T1 = begins_T1.at[offsets_S1[-1]].set(True, mode="drop")
  long_S = segments.lengths(offsets_S1) >= block
  for edge_S in (offsets_S1[:-1], offsets_S1[1:]):
    begins_T1 = begins_T1.at[jnp.where(long_S, edge_S, rows)].set(True)
  row_T = jnp.arange(rows, dtype=jnp.int32)
  group_T = jax.lax.cummax(jnp.where(begins_T1[:-1], row_T, 0))
  number = bound(rows, len(offsets_S1) - 1, block)
  starts_T = (row_T - group_T) % block == 0
  (start_N1,) = jnp.nonzero(starts_T, size=number + 1, fill_value=rows)
  start_N1 = start_N1.astype(jnp.int32)
  return start_N1[:-1], start_N1[1:]


def query_tiles(q_offsets_S1: jax.Array, lo_T: jax.Array, hi_T: jax.Array, block: int) -> Tiles:
  """Tiles of queries, and the keys that any query of a tile sees."""
  rows = len(lo_T)
  start_N, stop_N = cut(q_offsets_S1, rows, block)
  row_NB = start_N[:, None] + jnp.arange(block, dtype=jnp.int32)
  own_NB = row_NB < stop_N[:, None]
  row_NB = jnp.where(own_NB, row_NB, rows)
  lo_NB = lo_T.at[row_NB].get(mode="fill", fill_value=0)
  hi_NB = hi_T.at[row_NB].get(mode="fill", fill_value=0)
  sees_NB = lo_NB < hi_NB
  first_N = jnp.min(jnp.where(sees_NB, lo_NB, jnp.iinfo(jnp.int32).max), axis=1)
  last_N = jnp.max(jnp.where(sees_NB, hi_NB, 0), axis=1)
  inner_first_N = jnp.max(lo_NB, axis=1)
  inner_last_N = jnp.min(jnp.where(own_NB, hi_NB, jnp.iinfo(jnp.int32).max), axis=1)
  return _by_cost(start_N, stop_N, first_N, last_N, inner_first_N, inner_last_N)


def key_tiles(
  kv_offsets_S1: jax.Array, lo_T: jax.Array, hi_T: jax.Array, keys: int, block: int
) -> Tiles:
  """Tiles of keys, and the queries that see any key of a tile: one stretch, found by bisection.

  lo and hi rise with t but for segments that share keys; the greatest hi up to t and the least lo
  from t on rise always, and bound the stretch from outside, as the least hi from t on and the
  greatest lo up to t bound the inner one from within.
  """
  start_N, stop_N = cut(kv_offsets_S1, keys, block)
  sees_T = lo_T < hi_T
  reached_T = jax.lax.cummax(jnp.where(sees_T, hi_T, 0))
  needed_T = jax.lax.cummin(jnp.where(sees_T, lo_T, keys), reverse=True)
  first_N = segments.bisect(reached_T, start_N, "right")
  last_N = segments.bisect(needed_T, stop_N, "left")
  last_N = jnp.where(start_N < stop_N, last_N, 0)
  # Rows behind the last that sees anything lie behind the inner stretch in any case.
  behind_T = jnp.cumsum(sees_T[::-1])[::-1] == 0
  least_T = jax.lax.cummin(jnp.where(behind_T, keys, hi_T), reverse=True)
  greatest_T = jax.lax.cummax(jnp.where(behind_T, keys, lo_T))
  inner_first_N = segments.bisect(least_T, stop_N, "left")
  inner_last_N = segments.bisect(greatest_T, start_N, "right")
  return _by_cost(start_N, stop_N, first_N, last_N, inner_first_N, inner_last_N)


def _by_cost(start_N, stop_N, first_N, last_N, inner_first_N, inner_last_N) -> Tiles:
  works_N = first_N < last_N
  first_N, last_N = (jnp.where(works_N, x, 0) for x in (first_N, last_N))
  inner_first_N = jnp.clip(inner_first_N, first_N, last_N)
  inner_last_N = jnp.clip(inner_last_N, inner_first_N, last_N)
  order_N = jnp.argsort(first_N - last_N, stable=True)
  # Of tiles without work those with rows come first: they are still to be written.
  found = Tiles(start_N, stop_N, first_N, last_N, inner_first_N, inner_last_N)
  return Tiles(*(x_N[order_N] for x_N in found))
