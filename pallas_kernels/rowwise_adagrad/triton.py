"""Row-wise AdaGrad as one kernel over tiles of the sorted gradients, in place.

A program takes a tile of T entries, B at a time, and updates the rows of the runs that begin and
end in the tile. A run that crosses a tile's border leaves one partial sum on each side of it: a
tile's first run, if it began before (head), and its last, if it goes on (tail). The partial sums,
two a tile, are the entries of the next level, until one tile holds all: a run of any length takes
log_64(N) launches, and no program more than T entries. Every order is fixed; nothing is atomic.

Letters: E entries of a level, C tiles, T entries a tile, B of a block, W columns (a power of two).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.rowwise_adagrad.rule import Rule, stored

TILE = 128
MAX_WIDTH = 1_024
NONE = -1  # An entry of a further level that belongs to no run.


def update(
  rule: Rule, table_RW, v_R, grad_NW, order_N, segment_N, unique_U, lr, words, *, interpret: bool
):
  """New table and accumulator, level by level."""
  level = 0
  while True:
    arrays = (table_RW, v_R, grad_NW, order_N, segment_N, unique_U, lr[None], words)
    table_RW, v_R, *partial = _level(rule, kernel_name(level), interpret, *arrays)
    if not partial:
      return table_RW, v_R
    segment_N, grad_NW = crossing(segment_N), partial[0]
    order_N = jnp.arange(len(segment_N), dtype=jnp.int32)
    level += 1


def kernel_name(level: int) -> str:
  """What the launch of a level is called."""
  return f"rowwise_adagrad_combine_{level}" if level else "rowwise_adagrad_update"


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


def block_of(width: int) -> tuple[int, int]:
  """(B, warps): 16 numbers a lane, eight rows or more. With 32 a lane ptxas spilled some."""
  columns = pl.next_power_of_2(width)
  block = min(32, max(8, 1_024 // columns))
  return block, max(1, block * columns // 512)


def _level(rule, name, interpret, table_RW, v_R, grad_EW, order_E, segment_E, unique_U, lr, words):
  tiles = pl.cdiv(len(segment_E), TILE)
  width = table_RW.shape[1]
  block, warps = block_of(width)
  inputs = [table_RW, v_R, grad_EW, order_E, segment_E, unique_U, lr]
  inputs += [] if words is None else [words]
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (table_RW, v_R)]
  if tiles > 1:
    shapes.append(jax.ShapeDtypeStruct((2 * tiles, width), jnp.float32))
  return pl.pallas_call(
    functools.partial(_kernel, rule=rule, block=block, noisy=words is not None),
    grid=(tiles,),
    in_specs=[pl.no_block_spec] * len(inputs),
    out_specs=[pl.no_block_spec] * len(shapes),
    out_shape=shapes,
    input_output_aliases={0: 0, 1: 1},
    interpret=interpret,
    compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
    name=name,
  )(*inputs)


def _kernel(table_ref, v_ref, grad_ref, order_ref, segment_ref, unique_ref, lr_ref, *refs,
            rule: Rule, block: int, noisy: bool):  # fmt: skip
  words_ref, new_table_ref, new_v_ref, *partial_ref = refs if noisy else (None, *refs)
  words = (words_ref[0], words_ref[1]) if noisy else None
  entries, (rows, width) = len(segment_ref), table_ref.shape
  lr = lr_ref[0]
  tile = pl.program_id(0)
  begin = tile * TILE
  place_B = jnp.arange(block)
  column_W = jnp.arange(pl.next_power_of_2(width))
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
    known_B = (run_B >= 0) & (run_B < len(unique_ref))
    row_B = plgpu.load(unique_ref.at[run_B], mask=known_B, other=-1)
    held_B = (row_B >= 0) & (row_B < rows)
    order_B = plgpu.load(order_ref.at[index_B], mask=held_B, other=0)
    held_BW = held_B[:, None] & inside_W[None, :]
    grad_BW = plgpu.load(
      grad_ref.at[order_B[:, None], column_W[None, :]], mask=held_BW, other=0
    ).astype(jnp.float32)

    # Every entry becomes the sum of its run in this block: one turn for each run of several.
    again_B = held_B & (place_B > 0) & (run_B == segment_at(index_B - 1, -3))
    after = lambda run: jnp.min(jnp.where(again_B & (run_B > run), run_B, 2**31 - 1))

    def sum_run(at):
      run, sum_BW = at
      same_B = run_B == run
      total_W = sum_of_last(same_B, grad_BW)
      return after(run), jnp.where(same_B[:, None], total_W[None, :], sum_BW)

    _, sum_BW = jax.lax.while_loop(lambda at: at[0] < 2**31 - 1, sum_run, (after(NONE), grad_BW))
    sum_BW = jnp.where((run_B == open_run)[:, None], sum_BW + open_W[None, :], sum_BW)

    ends_B = held_B & (run_B != segment_at(index_B + 1, -3))
    head_W += sum_of_last(ends_B & (run_B == head), sum_BW)
    is_last_B = place_B == block - 1
    open_W, open_run = sum_of_last(is_last_B, sum_BW), jnp.max(jnp.where(is_last_B, run_B, NONE))

    whole_B = ends_B & (run_B != head)
    whole_BW = whole_B[:, None] & inside_W[None, :]
    # The interpreter stores what it read where the mask is off: that must be no row of another.
    row_B = jnp.where(whole_B, row_B, rows)
    at_BW = (row_B[:, None], column_W[None, :])
    w_BW = plgpu.load(table_ref.at[at_BW], mask=whole_BW, other=0).astype(jnp.float32)
    v_B = plgpu.load(v_ref.at[row_B], mask=whole_B, other=0.0)
    w_BW, v_B = rule.step(w_BW, v_B, sum_BW, lr, width)
    new_BW = stored(w_BW, row_B, words, new_table_ref.dtype)
    plgpu.store(new_table_ref.at[at_BW], new_BW, mask=whole_BW)
    plgpu.store(new_v_ref.at[row_B], v_B, mask=whole_B)
    return head_W, open_W, open_run

  zero_W = jnp.zeros(column_W.shape, jnp.float32)
  start = (zero_W, zero_W, jnp.full((), NONE, jnp.int32))
  head_W, open_W, open_run = jax.lax.fori_loop(0, TILE // block, body, start)
  if partial_ref:
    goes_on = segment_at(begin + TILE, -3) == open_run
    # A run that fills the tile is its head, and its tail a zero of the same run.
    whole = goes_on & (open_run == head)
    head_W = jnp.where(whole, open_W, head_W)
    tail_W = jnp.where(goes_on & ~whole, open_W, 0.0)
    plgpu.store(partial_ref[0].at[2 * tile, column_W], head_W, mask=inside_W)
    plgpu.store(partial_ref[0].at[2 * tile + 1, column_W], tail_W, mask=inside_W)
