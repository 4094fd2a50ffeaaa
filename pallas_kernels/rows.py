"""Rows copied by index: all of the ops that only move rows, and the gradients of sums.

Letters: M rows written, T rows read from, W width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import dispatch, segments

DTYPES = ("float32", "bfloat16", "float16")
COLUMNS = 128  # Of a tile. 256 bytes of bfloat16: two full cache lines of a row.
ELEMENTS = 4_096  # Of a tile. 32 a thread: four loads of 16 bytes in flight in bfloat16.

Source = tuple[jax.Array, jax.Array]  # x_TW, index_M.


def check_rows(op: str, name: str, x: jax.Array, ndim: int = 2, *, moved: bool = False) -> None:
  """ValueError unless `x` is floating and of `ndim` axes, and of 16 bits or more unless it is only
  `moved`.
  """
  floating = jnp.issubdtype(x.dtype, jnp.floating) and (moved or x.dtype.itemsize > 1)
  if x.ndim != ndim or not floating:
    axes = {2: "(rows, width)", 3: "(segments, length, width)"}[ndim]
    bits = "" if moved else " and of 16 bits or more"
    raise ValueError(
      f"{op}: {name} must be floating of shape {axes}{bits}, is {x.dtype} of shape {x.shape}"
    )


def refusal(dtype: jnp.dtype) -> str | None:
  """Why the kernels cannot move or add values of this dtype; None where they can."""
  if jnp.dtype(dtype).name in DTYPES:
    return None
  return f"the kernels take {', '.join(DTYPES)}, not {jnp.dtype(dtype).name}"


def members(offsets_S1: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
  """The segment of each row, 0 where it has none, and whether it has one. At least one segment."""
  segment_T = segments.segment_of_rows(offsets_S1, rows)
  inside_T = (segment_T >= 0) & (segment_T < len(offsets_S1) - 1)
  return jnp.where(inside_T, segment_T, 0), inside_T


def columns(width: int) -> int:
  """Columns of a tile: a power of two, all of a narrow row."""
  return min(COLUMNS, pl.next_power_of_2(width))


def gather(
  sources: Sequence[Source],
  scale_M: jax.Array | None = None,
  *,
  op: str,
  direction: str,
  implementation: str | None,
  fill: float = 0.0,
) -> jax.Array:
  """Rows of the sources, each to its place.

      y[m] = scale[m] x_k[index_k[m]]   for the one k with 0 <= index_k[m] < T_k
      y[m] = fill                       where there is none

  Args:
    sources: One (x_TW, index_M) or more, of one dtype and width; index int32. Rows that no index
      names are not read.
    scale_M: float32 (float64 for float64), or None for 1; the product is taken in it.
    op: The op's name. With `direction`, "forward" or "backward", the name of the kernel.
    direction: See `op`.
    implementation: As in `dispatch`.
    fill: The value of rows that no source has.

  Returns:
    y_MW of the sources' dtype.
  """
  dtype, width = sources[0][0].dtype, sources[0][0].shape[1]
  shape = (len(sources[0][1]), width)
  sources = tuple(s for s in sources if len(s[0]))
  if not sources or 0 in shape:
    return jnp.full(shape, fill, dtype)
  return dispatch.dispatch(
    op,
    implementation,
    {
      "xla": functools.partial(_xla, fill=fill),
      "triton": functools.partial(gather_kernel, fill=fill, name=f"{op}_{direction}"),
    },
    sources,
    scale_M,
    refusal=refusal(dtype),
  )


def found(index: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
  """Whether an index names a row, and the row to load so that no load leaves the array."""
  found = (index >= 0) & (index < rows)
  return found, jnp.where(found, index, 0)


def take_rows(x_RW: jax.Array, row_M: jax.Array) -> jax.Array:
  """Rows of a floating array, in plain XLA.

      y[m] = x[row[m]]   for 0 <= row[m] < R
      y[m] = 0           elsewhere

  Args:
    x_RW: Its rows.
    row_M: int32.
  """
  x_RW, row_M = jnp.asarray(x_RW), jnp.asarray(row_M)
  found_M, inside_M = found(row_M, len(x_RW))
  return jnp.where(found_M[:, None], copied(x_RW, inside_M), 0)


def copied(x_RW: jax.Array, row_M: jax.Array) -> jax.Array:
  """x[row] of rows that exist.

  A NaN becomes a NaN, which changes nothing but the code: LLVM unrolls a loop that only copies a
  row before it could use vectors, and the single loads of a row of 64 floats, which fill the core's
  window of instructions, take five times as long.
  """
  y_MW = x_RW.at[row_M].get(mode="promise_in_bounds")
  return jnp.where(jnp.isnan(y_MW), jnp.nan, y_MW)


def _xla(sources: Sequence[Source], scale_M: jax.Array | None, *, fill: float) -> jax.Array:
  dtype = sources[0][0].dtype
  y_MW = jnp.asarray(fill, dtype)
  for x_TW, index_M in sources:
    found_M, row_M = found(index_M, len(x_TW))
    row_MW = copied(x_TW, row_M)
    if scale_M is not None:
      row_MW = (row_MW * scale_M[:, None]).astype(dtype)
    y_MW = jnp.where(found_M[:, None], row_MW, y_MW)
  return y_MW


def _kernel(*refs, fill, scaled, block):
  *refs, y_ref = refs
  scale_ref = refs.pop() if scaled else None
  rows, columns = block
  row_R = pl.program_id(0) * rows + jnp.arange(rows)
  column_C = pl.program_id(1) * columns + jnp.arange(columns)
  exists_R, exists_C = row_R < y_ref.shape[0], column_C < y_ref.shape[1]
  y_RC = jnp.full(block, fill, y_ref.dtype)
  for x_ref, index_ref in zip(refs[::2], refs[1::2]):
    index_R = plgpu.load(index_ref.at[row_R], mask=exists_R, other=-1)
    found_R, from_R = found(index_R, x_ref.shape[0])
    mask_RC = found_R[:, None] & exists_C[None, :]
    x_RC = plgpu.load(x_ref.at[from_R[:, None], column_C[None, :]], mask=mask_RC, other=0.0)
    if scaled:
      scale_R = plgpu.load(scale_ref.at[row_R], mask=exists_R, other=0.0)
      x_RC = (x_RC.astype(jnp.float32) * scale_R[:, None]).astype(y_ref.dtype)
    y_RC = jnp.where(found_R[:, None], x_RC, y_RC)
  plgpu.store(
    y_ref.at[row_R[:, None], column_C[None, :]], y_RC, mask=exists_R[:, None] & exists_C[None, :]
  )


def gather_kernel(
  sources: Sequence[Source],
  scale_M: jax.Array | None,
  *,
  fill: float,
  name: str,
  interpret: bool,
) -> jax.Array:
  """`gather` in the Triton lowering."""
  x_TW, index_M = sources[0]
  shape = (len(index_M), x_TW.shape[1])
  block = (min(256, ELEMENTS // columns(shape[1])), columns(shape[1]))
  args = [array for source in sources for array in source]
  if scale_M is not None:
    args.append(scale_M)
  return pl.pallas_call(
    functools.partial(_kernel, fill=fill, scaled=scale_M is not None, block=block),
    grid=(pl.cdiv(shape[0], block[0]), pl.cdiv(shape[1], block[1])),
    in_specs=[pl.no_block_spec] * len(args),
    out_specs=pl.no_block_spec,
    out_shape=jax.ShapeDtypeStruct(shape, x_TW.dtype),
    interpret=interpret,
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
    name=name,
  )(*args)
