"""Row-wise AdaGrad as one kernel over tiles of the sorted gradients (`run_tiles`), in place: the
rows of the runs that begin and end in a tile are updated there, those of the others by what
combines the partial sums.

Letters: E entries of a level, B of a block, W columns (a power of two).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.rowwise_adagrad.rule import Rule, stored
from pallas_kernels.run_tiles import TILE, block_of, crossing, sum_tile

MAX_WIDTH = 1_024


def update(
  rule: Rule, table_RW, v_R, grad_NW, order_N, segment_N, unique_U, lr, words, *, interpret: bool
):
  """New table and accumulator, level by level."""
  level = 0
  while True:
    arrays = (table_RW, v_R, grad_NW, segment_N, unique_U, lr[None], order_N, words)
    table_RW, v_R, *partial = _level(rule, kernel_name(level), interpret, *arrays)
    if not partial:
      return table_RW, v_R
    segment_N, grad_NW, order_N = crossing(segment_N), partial[0], None
    level += 1


def kernel_name(level: int) -> str:
  """What the launch of a level is called."""
  return f"rowwise_adagrad_combine_{level}" if level else "rowwise_adagrad_update"


def _level(rule, name, interpret, table_RW, v_R, grad_EW, segment_E, unique_U, lr, order_E, words):
  tiles = pl.cdiv(len(segment_E), TILE)
  width = table_RW.shape[1]
  block, warps = block_of(pl.next_power_of_2(width))
  inputs = [table_RW, v_R, grad_EW, segment_E, unique_U, lr]
  inputs += [x for x in (order_E, words) if x is not None]
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (table_RW, v_R)]
  if tiles > 1:
    shapes.append(jax.ShapeDtypeStruct((2 * tiles, width), jnp.float32))
  ordered, noisy = order_E is not None, words is not None
  return pl.pallas_call(
    functools.partial(_kernel, rule=rule, block=block, ordered=ordered, noisy=noisy),
    grid=(tiles,),
    in_specs=[pl.no_block_spec] * len(inputs),
    out_specs=[pl.no_block_spec] * len(shapes),
    out_shape=shapes,
    input_output_aliases={0: 0, 1: 1},
    interpret=interpret,
    compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
    name=name,
  )(*inputs)


def _kernel(table_ref, v_ref, grad_ref, segment_ref, unique_ref, lr_ref, *refs,
            rule: Rule, block: int, ordered: bool, noisy: bool):  # fmt: skip
  refs = list(refs)
  order_ref = refs.pop(0) if ordered else None
  words_ref = refs.pop(0) if noisy else None
  new_table_ref, new_v_ref, *partial_ref = refs
  words = (words_ref[0], words_ref[1]) if noisy else None
  rows, width = table_ref.shape
  lr = lr_ref[0]
  column_W = jnp.arange(pl.next_power_of_2(width))

  def row_of(run_B):
    known_B = (run_B >= 0) & (run_B < len(unique_ref))
    row_B = plgpu.load(unique_ref.at[run_B], mask=known_B, other=-1)
    return jnp.where(row_B < rows, row_B, -1)

  def step(whole_B, row_B, sum_BW):
    whole_BW = whole_B[:, None] & (column_W < width)[None, :]
    # The interpreter stores what it read where the mask is off: that must be no row of another.
    row_B = jnp.where(whole_B, row_B, rows)
    at_BW = (row_B[:, None], column_W[None, :])
    w_BW = plgpu.load(table_ref.at[at_BW], mask=whole_BW, other=0).astype(jnp.float32)
    v_B = plgpu.load(v_ref.at[row_B], mask=whole_B, other=0.0)
    w_BW, v_B = rule.step(w_BW, v_B, sum_BW, lr, width)
    new_BW = stored(w_BW, row_B, words, new_table_ref.dtype)
    plgpu.store(new_table_ref.at[at_BW], new_BW, mask=whole_BW)
    plgpu.store(new_v_ref.at[row_B], v_B, mask=whole_B)

  partial_ref = partial_ref[0] if partial_ref else None
  sum_tile(grad_ref, order_ref, segment_ref, partial_ref, column_W, block, row_of, step)
