"""Sums over runs of equal ids inside a kernel, in tiles of the sorted entries: what `sum_runs` and
`rowwise_adagrad_update` share.

A program takes a tile of T entries, B at a time, and is done with the runs that begin and end in
the tile. A run that crosses a tile's border leaves one partial sum on each side of it: a tile's
first run, if it began before (head), and its last, if it goes on (tail). The partial sums, two a
tile, are the entries of the next level, until one tile holds all: a run of any length takes
log_64(N) launches, and no program more than T entries. Every order is fixed; nothing is atomic.

Letters: E entries of a level, C tiles, T entries a tile, B of a block, W columns of a program (a
power of two).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

TILE = 128
NONE = -1  # An entry of a further level that belongs to no run.


def level_entries(entries: int) -> list[int]:
  """E of every level, for `entries` gradients."""
  found = [entries]
  while found[-1] > TILE:
    found.append(2 * pl.cdiv(found[-1], TILE))
  return found


def crossing(segment_E: jax.Array) -> jax.Array:
  """(2 C,) int32: the run of every tile's head and tail, NONE where it has none."""
  first_C = segment_E[::TILE]
  last_C = segment_E[TILE - 1 :: TILE]
  none_1 = jnp.full((1,), NONE, jnp.int32)
  # The last tile may be short, and nothing follows it; so the borders are one fewer than tiles.
  last_C = last_C[: len(first_C) - 1]
  crosses_C = jnp.where(last_C == first_C[1:], last_C, NONE)
  head_C, tail_C = jnp.concatenate([none_1, crosses_C]), jnp.concatenate([crosses_C, none_1])
  return jnp.stack([head_C, tail_C], axis=1).reshape(-1)


def block_of(columns: int) -> tuple[int, int]:
  """(B, warps): 16 numbers a lane, eight rows or more. With 32 a lane ptxas spilled some."""
  block = min(32, max(8, 1_024 // columns))
  return block, max(1, block * columns // 512)


def sum_tile(
  x_ref: Any,
  order_ref: Any,
  segment_ref: Any,
  partial_ref: Any,
  column_W: jax.Array,
  block: int,
  row_of: Callable[[jax.Array], jax.Array],
  finish: Callable[[jax.Array, jax.Array, jax.Array], None],
) -> None:
  """The tile of this program, `pl.program_id(0)`.

  Args:
    x_ref: (any, width) summands, floating; added in float32.
    order_ref: int32, where in x each entry stands; None where entry i is row i.
    segment_ref: (E,) int32, the run that it belongs to, ascending.
    partial_ref: (2 C, width) float32 for heads and tails; None where one tile holds all.
    column_W: Of these columns, which may lie beyond the width.
    block: B.
    row_of: Runs of B entries -> the row where each one's sum belongs, below 0 where it has none;
      such entries are not read.
    finish: Takes (whether an entry is the last of a run that is done, those rows, sums (B, W)).
  """
  entries, width = len(segment_ref), x_ref.shape[1]
  tile = pl.program_id(0)
  begin = tile * TILE
  place_B = jnp.arange(block)
  inside_W = column_W < width

  def segment_at(index, other):
    inside = (index >= 0) & (index < entries)
    return plgpu.load(segment_ref.at[index], mask=inside, other=other)

  # Which run is the head; -2 is none's, as is -3 beyond the entries.
  first = segment_at(begin, NONE)
  head = jnp.where(segment_at(begin - 1, -3) == first, first, -2)

  def sum_of_last(mask_B, x_BW):
    return jnp.sum(jnp.where(mask_B[:, None], x_BW, 0.0), axis=0)

  def body(i, at):
    head_W, open_W, open_run = at
    index_B = begin + i * block + place_B
    run_B = segment_at(index_B, NONE)
    row_B = row_of(run_B)
    held_B = row_B >= 0
    from_B = index_B
    if order_ref is not None:
      from_B = plgpu.load(order_ref.at[index_B], mask=held_B, other=0)
    held_BW = held_B[:, None] & inside_W[None, :]
    at_BW = (from_B[:, None], column_W[None, :])
    x_BW = plgpu.load(x_ref.at[at_BW], mask=held_BW, other=0).astype(jnp.float32)

    # Every entry becomes the sum of its run in this block: one turn for each run of several.
    again_B = held_B & (place_B > 0) & (run_B == segment_at(index_B - 1, -3))
    after = lambda run: jnp.min(jnp.where(again_B & (run_B > run), run_B, 2**31 - 1))

    def sum_run(at):
      run, sum_BW = at
      same_B = run_B == run
      total_W = sum_of_last(same_B, x_BW)
      return after(run), jnp.where(same_B[:, None], total_W[None, :], sum_BW)

    _, sum_BW = jax.lax.while_loop(lambda at: at[0] < 2**31 - 1, sum_run, (after(NONE), x_BW))
    sum_BW = jnp.where((run_B == open_run)[:, None], sum_BW + open_W[None, :], sum_BW)

    ends_B = held_B & (run_B != segment_at(index_B + 1, -3))
    head_W += sum_of_last(ends_B & (run_B == head), sum_BW)
    is_last_B = place_B == block - 1
    open_W, open_run = sum_of_last(is_last_B, sum_BW), jnp.max(jnp.where(is_last_B, run_B, NONE))
    finish(ends_B & (run_B != head), row_B, sum_BW)
    return head_W, open_W, open_run

  zero_W = jnp.zeros(column_W.shape, jnp.float32)
  start = (zero_W, zero_W, jnp.full((), NONE, jnp.int32))
  head_W, open_W, open_run = jax.lax.fori_loop(0, TILE // block, body, start)
  if partial_ref is not None:
    goes_on = segment_at(begin + TILE, -3) == open_run
    # A run that fills the tile is its head, and its tail a zero of the same run.
    whole = goes_on & (open_run == head)
    head_W = jnp.where(whole, open_W, head_W)
    tail_W = jnp.where(goes_on & ~whole, open_W, 0.0)
    plgpu.store(partial_ref.at[2 * tile, column_W], head_W, mask=inside_W)
    plgpu.store(partial_ref.at[2 * tile + 1, column_W], tail_W, mask=inside_W)
