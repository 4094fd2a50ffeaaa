"""Sums of runs as one kernel over tiles of their sorted entries and some of the columns
(`run_tiles`), then one for every level of partial sums.

Letters: E entries of a level, U runs that there is room for, W columns of a program.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.run_tiles import TILE, block_of, crossing, sum_tile

COLUMNS = (128, 64, 32)  # Of a program, at most.


def sum_runs(x_NW, order_N, segment_N, *, count: int, interpret: bool):
  """The sums, level by level; the first one writes the zeros of runs that do not occur."""
  sum_UW, *partial = _level(count, kernel_name(0), interpret, x_NW, segment_N, order_N=order_N)
  level = 0
  while partial:
    level, segment_N = level + 1, crossing(segment_N)
    name = kernel_name(level)
    sum_UW, *partial = _level(count, name, interpret, partial[0], segment_N, sum_UW=sum_UW)
  return sum_UW


def kernel_name(level: int) -> str:
  """What the launch of a level is called."""
  return f"sum_runs_combine_{level}" if level else "sum_runs"


def columns_of(width: int) -> int:
  """W: of all that a row has, few of them beyond it."""
  if width <= COLUMNS[-1]:
    return pl.next_power_of_2(width)
  return min(COLUMNS, key=lambda c: c * pl.cdiv(width, c))


def _level(count, name, interpret, x_EW, segment_E, order_N=None, sum_UW=None):
  tiles, width = pl.cdiv(len(segment_E), TILE), x_EW.shape[1]
  columns = columns_of(width)
  block, warps = block_of(columns)
  inputs = [x_EW, segment_E, order_N if sum_UW is None else sum_UW]
  shapes = [jax.ShapeDtypeStruct((count, width), jnp.float32)]
  if tiles > 1:
    shapes.append(jax.ShapeDtypeStruct((2 * tiles, width), jnp.float32))
  # Each program of the first level clears its share of the runs that do not occur.
  share = pl.cdiv(count, tiles) if sum_UW is None else 0
  return pl.pallas_call(
    functools.partial(_kernel, block=block, columns=columns, share=share),
    grid=(tiles, pl.cdiv(width, columns)),
    in_specs=[pl.no_block_spec] * len(inputs),
    out_specs=[pl.no_block_spec] * len(shapes),
    out_shape=shapes,
    input_output_aliases={} if sum_UW is None else {2: 0},
    interpret=interpret,
    compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
    name=name,
  )(*inputs)


def _kernel(x_ref, segment_ref, other_ref, sum_ref, *partial_ref, block, columns, share):
  count, width = sum_ref.shape
  column_W = pl.program_id(1) * columns + jnp.arange(columns)
  inside_W = column_W < width

  def write(mask_B, row_B, x_BW):
    # The interpreter stores what it read where the mask is off: that must be no row of another.
    row_B = jnp.where(mask_B, row_B, count)
    at_BW = (row_B[:, None], column_W[None, :])
    plgpu.store(sum_ref.at[at_BW], x_BW, mask=mask_B[:, None] & inside_W[None, :])

  row_of = lambda run_B: jnp.where(run_B < count, run_B, -1)
  order_ref = other_ref if share else None
  partial_ref = partial_ref[0] if partial_ref else None
  sum_tile(x_ref, order_ref, segment_ref, partial_ref, column_W, block, row_of, write)
  if not share:
    return
  # They stand behind the last one that does.
  begin = jnp.maximum(pl.program_id(0) * share, segment_ref[len(segment_ref) - 1] + 1)
  end = jnp.minimum((pl.program_id(0) + 1) * share, count)

  def clear(i, none):
    row_B = begin + i * block + jnp.arange(block, dtype=jnp.int32)
    write(row_B < end, row_B, jnp.zeros((block, columns), jnp.float32))
    return none

  # Not pl.cdiv, which mixes int32 and int64 where 64-bit integers are switched on.
  turns = jax.lax.div(jnp.maximum(end - begin, 0) + (block - 1), jnp.int32(block))
  jax.lax.fori_loop(jnp.int32(0), turns, clear, None)
