"""Quantisation as one kernel that reads a tile once: its scales, its values.

A tile holds whole groups, so that no program waits for another: some rows, or a row of blocks of
32 x 32. One scale for the tensor, or rows too long for a tile, take their largest from an XLA
reduction before.

Letters: R rows of a tile, C columns, G groups of a tile.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import noise
from pallas_kernels.quantize_fp8 import form, layout
from pallas_kernels.quantize_fp8.form import BLOCK

ELEMENTS = 4_096  # Of a tile: 32 a thread.
LONGEST = 16_384  # Columns of a row that fits into one tile, with more warps.


def tile_of(matrices: tuple[int, int, int], granularity: str) -> tuple[int, int]:
  """(R, C) of a tile, powers of two."""
  _, rows, columns = matrices
  columns = pl.next_power_of_2(columns)
  if granularity == "block":
    return BLOCK, min(ELEMENTS // BLOCK, max(BLOCK, columns))
  if granularity == "row" and columns <= LONGEST:
    return max(1, min(ELEMENTS // columns, pl.next_power_of_2(rows))), columns
  rows = pl.next_power_of_2(rows)
  columns = min(columns, max(128, ELEMENTS // rows))
  return min(ELEMENTS // columns, rows), columns


def quantize(granularity, dtype, x, words, *, interpret: bool):
  """(values, scales)."""
  matrices = layout.as_matrices(x.shape)
  if granularity != "block":  # Rows are rows, whatever matrix they are of.
    matrices = (1, matrices[0] * matrices[1], matrices[2])
  count, rows, columns = matrices
  tile = tile_of(matrices, granularity)
  grid_rows, grid_columns = pl.cdiv(rows, tile[0]), pl.cdiv(columns, tile[1])
  given = granularity == "tensor" or (granularity == "row" and tile[1] < columns)
  x_MK = x.reshape(count * rows, columns)
  inputs, shapes = [x_MK], [jax.ShapeDtypeStruct(x_MK.shape, jnp.uint8)]
  if given:
    largest = layout.largest_of(form.magnitude(x.astype(jnp.float32)), granularity)
    scales, inverse = form.scale_of(largest, dtype)
    inputs.append(inverse.reshape(-1))
  elif granularity == "row":
    shapes.append(jax.ShapeDtypeStruct((rows, 1), jnp.float32))
  else:
    groups = (count * pl.cdiv(rows, BLOCK), pl.cdiv(columns, BLOCK))
    shapes.append(jax.ShapeDtypeStruct(groups, jnp.float32))
  if words is not None:
    inputs.append(words)
  kernel = functools.partial(
    _kernel,
    granularity=granularity,
    dtype=dtype,
    given=given,
    noisy=words is not None,
    tile=tile,
    rows=rows,
    grid=(grid_rows, grid_columns),
  )
  out = pl.pallas_call(
    kernel,
    grid=(count * grid_rows * grid_columns,),
    in_specs=[pl.no_block_spec] * len(inputs),
    out_specs=[pl.no_block_spec] * len(shapes),
    out_shape=shapes,
    interpret=interpret,
    compiler_params=plgpu.CompilerParams(
      num_warps=max(1, min(16, tile[0] * tile[1] // 1_024)), num_stages=1
    ),
    name="quantize_fp8_forward",
  )(*inputs)
  if not given:
    scales = out[1].reshape(layout.scale_shape(x.shape, granularity))
  return jax.lax.bitcast_convert_type(out[0].reshape(x.shape), dtype), scales


def _kernel(x_ref, *refs, granularity, dtype, given, noisy, tile, rows, grid):
  refs = list(refs)
  inverse_ref = refs.pop(0) if given else None
  words_ref = refs.pop(0) if noisy else None
  bits_ref, *scales_ref = refs
  program, (grid_rows, grid_columns) = pl.program_id(0), grid
  tile_row, tile_column = program // grid_columns, program % grid_columns
  # A tile does not leave its matrix: the last of each may be short.
  matrix, row_in = tile_row // grid_rows, tile_row % grid_rows * tile[0]
  place_R = row_in + jnp.arange(tile[0])
  row_R = matrix * rows + place_R
  column_C = tile_column * tile[1] + jnp.arange(tile[1])
  inside_RC = (place_R < rows)[:, None] & (column_C < x_ref.shape[1])[None, :]
  at_RC = (jnp.where(place_R < rows, row_R, x_ref.shape[0])[:, None], column_C[None, :])
  x_RC = plgpu.load(x_ref.at[at_RC], mask=inside_RC, other=0.0).astype(jnp.float32)
  if given and granularity == "tensor":
    inverse_RC = inverse_ref[0]
  elif given:
    inverse_RC = plgpu.load(inverse_ref.at[row_R], mask=place_R < rows, other=1.0)[:, None]
  elif granularity == "row":
    scale_R, inverse_R = form.scale_of(jnp.max(form.magnitude(x_RC), axis=1), dtype)
    plgpu.store(scales_ref[0].at[at_RC[0][:, 0], 0], scale_R, mask=place_R < rows)
    inverse_RC = inverse_R[:, None]
  else:
    groups = tile[1] // BLOCK
    largest_C = jnp.max(form.magnitude(x_RC), axis=0)
    scale_G, inverse_G = form.scale_of(jnp.max(largest_C.reshape(groups, BLOCK), axis=1), dtype)
    group_G = tile_column * groups + jnp.arange(groups)
    plgpu.store(scales_ref[0].at[tile_row, group_G], scale_G, mask=group_G < scales_ref[0].shape[1])
    inverse_GB = jnp.broadcast_to(inverse_G[:, None], (groups, BLOCK))
    inverse_RC = inverse_GB.reshape(1, tile[1])
  random_RC = None
  if noisy:
    random_RC = noise.random_bits(words_ref[0], words_ref[1], row_R[:, None], column_C[None, :])
  bits_RC = form.rounded(x_RC, inverse_RC, random_RC, dtype)
  plgpu.store(bits_ref.at[at_RC], bits_RC, mask=inside_RC)
