"""Tiles: every row once, every pair that is seen visited, no more tiles than the bound."""

import itertools

import numpy as np
import pytest

from pallas_kernels.case import LENGTHS, offsets
from pallas_kernels.jagged_attention import tiles
from pallas_kernels.jagged_attention.visible import visible

MASKS = ({}, {"causal": True}, {"window": 40}, {"causal": True, "window": 40}, {"block": 64})


def random_lengths(seed):
  """Few or many segments, short or long or empty, side by side in any order."""
  rng = np.random.default_rng(seed)
  kinds = [rng.integers(0, 4, 40), rng.integers(0, 300, 12), np.zeros(9, int), np.full(7, 64)]
  return rng.permutation(np.concatenate([kinds[i] for i in rng.integers(0, 4, 3)]))


@pytest.mark.parametrize("block", (16, 64))
@pytest.mark.parametrize(
  "seed", [*range(5), *(pytest.param(s, marks=pytest.mark.slow) for s in range(5, 20))]
)
def test_tiles_cover_all_rows_and_all_pairs(seed, block):
  q_length_S = random_lengths(seed)
  kv_length_S = np.random.default_rng(seed).permutation(q_length_S)
  owner_S = np.sort(np.random.default_rng(seed).integers(0, len(q_length_S), len(q_length_S)))
  (q_offsets, T), (kv_offsets, E) = (
    (o := offsets(length_S, 3), int(o[-1]) + 5) for length_S in (q_length_S, kv_length_S)
  )
  kv_segment_S = owner_S.astype(np.int32) if seed % 2 else None
  seen = visible(q_offsets, kv_offsets, kv_segment_S, T, **MASKS[seed % len(MASKS)])
  key_E = np.arange(E)
  pairs_TE = (key_E >= np.asarray(seen.lo_T)[:, None]) & (key_E < np.asarray(seen.hi_T)[:, None])
  by_queries = tiles.query_tiles(q_offsets, seen.lo_T, seen.hi_T, block)
  by_keys = tiles.key_tiles(kv_offsets, seen.lo_T, seen.hi_T, E, block)
  for cut, rows, pairs in ((by_queries, T, pairs_TE), (by_keys, E, pairs_TE.T)):
    start_N, stop_N, first_N, last_N, inner_first_N, inner_last_N = map(np.asarray, cut)
    assert len(start_N) == tiles.bound(rows, len(q_offsets) - 1, block)
    assert np.all(stop_N - start_N <= block)
    covered = np.concatenate([np.arange(a, b) for a, b in zip(start_N, stop_N)])
    assert np.array_equal(np.sort(covered), np.arange(rows))
    cost_N = last_N - first_N
    assert np.all(cost_N >= 0) and np.all(np.diff(cost_N) <= 0)
    visited = np.zeros_like(pairs)
    for start, stop, first, last in zip(start_N, stop_N, first_N, last_N):
      visited[start:stop, first:last] = True
    assert not np.any(pairs & ~visited)
    assert np.all((first_N <= inner_first_N) & (inner_first_N <= inner_last_N))
    assert np.all(inner_last_N <= last_N)
    for start, stop, first, last in zip(start_N, stop_N, inner_first_N, inner_last_N):
      assert np.all(pairs[start:stop, first:last])


@pytest.mark.parametrize("name", ("around_block", "one_long", "zipf"))
def test_a_tile_of_a_long_segment_visits_nothing_outside_of_it(name):
  offset_S1 = offsets(LENGTHS[name])
  seen = visible(offset_S1, offset_S1, None, int(offset_S1[-1]))
  for start, stop, first, last, inner_first, inner_last in zip(
    *map(np.asarray, tiles.query_tiles(offset_S1, seen.lo_T, seen.hi_T, 64))
  ):
    for a, b in itertools.pairwise(offset_S1):
      if b - a >= 64 and a <= start < b:
        assert a <= first and last <= b and stop <= b
        assert (inner_first, inner_last) == (first, last)


def test_intervals_of_keys_by_hand():
  offset_S1 = np.array([1, 5, 5, 8], np.int32)
  of = lambda **mask: [
    [int(x) for x in y]
    for y in visible(offset_S1, offset_S1, None, 9, **mask)[:2]
  ]  # fmt: skip
  assert of() == [[0, 1, 1, 1, 1, 5, 5, 5, 0], [0, 5, 5, 5, 5, 8, 8, 8, 0]]
  assert of(causal=True) == [[0, 1, 1, 1, 1, 5, 5, 5, 0], [0, 2, 3, 4, 5, 6, 7, 8, 0]]
  assert of(window=2) == [[0, 1, 1, 2, 3, 5, 5, 6, 0], [0, 3, 4, 5, 5, 7, 8, 8, 0]]
  assert of(block=2) == [[0, 1, 1, 3, 3, 5, 5, 7, 0], [0, 3, 3, 5, 5, 7, 7, 8, 0]]
  # Two queries at the end of four keys; three queries of one key, of which two stand before it.
  q_offsets, kv_offsets = np.array([0, 2, 5], np.int32), np.array([0, 4, 5], np.int32)
  seen = visible(q_offsets, kv_offsets, None, 5, causal=True)
  assert [*map(int, seen.lo_T)] == [0, 0, 4, 4, 4] and [*map(int, seen.hi_T)] == [3, 4, 4, 4, 5]
