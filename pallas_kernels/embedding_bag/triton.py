"""Gradient of the weights in the Triton lowering of Pallas. (Lookup and sum: `jagged_pool`.)"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import rows

ROWS = 16  # Of a program: two rows are held for each.


def _kernel(a_ref, a_row_ref, b_ref, b_row_ref, dot_ref, *, columns):
  n_R = pl.program_id(0) * ROWS + jnp.arange(ROWS)
  exists_R = n_R < dot_ref.shape[0]
  a_row_R = plgpu.load(a_row_ref.at[n_R], mask=exists_R, other=-1)
  b_row_R = plgpu.load(b_row_ref.at[n_R], mask=exists_R, other=-1)
  a_found_R, a_row_R = rows.found(a_row_R, a_ref.shape[0])
  b_found_R, b_row_R = rows.found(b_row_R, b_ref.shape[0])
  width = a_ref.shape[1]

  def add(i, sum_RC):
    column_C = i * columns + jnp.arange(columns)
    mask_RC = (a_found_R & b_found_R)[:, None] & (column_C < width)[None, :]
    a_RC = plgpu.load(a_ref.at[a_row_R[:, None], column_C[None, :]], mask=mask_RC, other=0.0)
    b_RC = plgpu.load(b_ref.at[b_row_R[:, None], column_C[None, :]], mask=mask_RC, other=0.0)
    return sum_RC + a_RC.astype(jnp.float32) * b_RC.astype(jnp.float32)

  zeros_RC = jnp.zeros((ROWS, columns), jnp.float32)
  sum_RC = jax.lax.fori_loop(0, pl.cdiv(width, columns), add, zeros_RC)
  plgpu.store(dot_ref.at[n_R], sum_RC.sum(1), mask=exists_R)


def row_dots(
  a_SW: jax.Array,
  a_row_N: jax.Array,
  b_RW: jax.Array,
  b_row_N: jax.Array,
  *,
  name: str,
  interpret: bool,
) -> jax.Array:
  """dot_N float32: <a[a_row[n]], b[b_row[n]]>, 0 where one of the rows is missing."""
  N, W = len(a_row_N), a_SW.shape[1]
  return pl.pallas_call(
    functools.partial(_kernel, columns=rows.columns(W)),
    grid=(pl.cdiv(N, ROWS),),
    in_specs=[pl.no_block_spec] * 4,
    out_specs=pl.no_block_spec,
    out_shape=jax.ShapeDtypeStruct((N,), jnp.float32),
    interpret=interpret,
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
    name=name,
  )(a_SW, a_row_N, b_RW, b_row_N)
