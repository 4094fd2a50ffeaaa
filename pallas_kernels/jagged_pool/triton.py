"""Pooling in the Triton lowering of Pallas: segments cut into chunks, so that a long one spreads.

A program takes one chunk of one segment. A segment of one chunk, most are, is finished there; for
the others a second, small kernel pools the chunks' results in order. No atomics: the same bits in
every run. Letters: C chunks.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import rows, segments

ROWS = 32  # Of a tile: a segment visits at most 31 rows too many.
MAX_ROWS = 16  # A largest value and its row take twice the registers of a sum.
NO_ROW = jnp.iinfo(jnp.int32).max


def chunk_size(T: int) -> int:
  """Rows of a chunk.

  About the root of T, so that a segment of all T rows gives as many chunks as a chunk has rows and
  neither pass is long: 16_384 -> 128 chunks of 128 rows.
  """
  return max(128, pl.next_power_of_2(math.isqrt(T)))


def _chunks(offsets_S1: jax.Array, T: int) -> tuple[jax.Array, jax.Array]:
  """segment_C, the segment of each chunk (S if it is none), and chunks_S1, offsets of chunks."""
  size = chunk_size(T)
  # An empty segment has a chunk, too: somebody must write its 0.
  chunks_S = jnp.maximum((segments.lengths(offsets_S1) + (size - 1)) // size, 1)
  chunks_S1 = jnp.concatenate([jnp.zeros((1,), jnp.int32), jnp.cumsum(chunks_S, dtype=jnp.int32)])
  return segments.segment_of_rows(chunks_S1, len(chunks_S) + T // size), chunks_S1


class _Tile:
  """Where a program of `grid=(chunks or segments, tiles of columns)` works."""

  def __init__(self, width: int, rows_: int):
    self.rows = rows_
    self.columns = rows.columns(width)
    self.column_C = pl.program_id(1) * self.columns + jnp.arange(self.columns)
    self.exists_C = self.column_C < width
    self.shape = (rows_, self.columns)

  def load(self, ref, row_R, there_R, other=0.0):
    return plgpu.load(
      ref.at[row_R[:, None], self.column_C[None, :]],
      mask=there_R[:, None] & self.exists_C[None, :],
      other=other,
    )

  def store(self, ref, row, x_C, there):
    plgpu.store(ref.at[row, self.column_C], x_C.astype(ref.dtype), mask=self.exists_C & there)

  def loop(self, begin, end, body, carry):
    """carry = body(row_R, there_R, carry) over all rows of [begin, end)."""

    def trip(i, carry):
      row_R = begin + i * self.rows + jnp.arange(self.rows, dtype=jnp.int32)
      there_R = row_R < end
      return body(jnp.where(there_R, row_R, 0), there_R, carry)

    # Not pl.cdiv, which mixes int32 and int64 where 64-bit integers are switched on.
    trips = jax.lax.div(jnp.maximum(end - begin, 0) + (self.rows - 1), jnp.int32(self.rows))
    return jax.lax.fori_loop(jnp.int32(0), trips, trip, carry)

  def sum(self, begin, end, load):
    zeros_RC = jnp.zeros(self.shape, jnp.float32)
    sum_RC = self.loop(begin, end, lambda row, there, sum_RC: sum_RC + load(row, there), zeros_RC)
    return sum_RC.sum(0)

  def max(self, begin, end, load):
    """(top_C, row_C): the largest value, NaN above all, and the first row that has it."""

    def body(row_R, there_R, carry):
      top_RC, first_RC = carry
      x_RC, row_RC = load(row_R, there_R)
      larger_RC = (x_RC > top_RC) | (jnp.isnan(x_RC) & ~jnp.isnan(top_RC))
      larger_RC = (row_RC != NO_ROW) & (larger_RC | (first_RC == NO_ROW))
      return jnp.where(larger_RC, x_RC, top_RC), jnp.where(larger_RC, row_RC, first_RC)

    start = jnp.full(self.shape, -jnp.inf, jnp.float32), jnp.full(self.shape, NO_ROW, jnp.int32)
    top_RC, first_RC = self.loop(begin, end, body, start)
    nan_RC = jnp.isnan(top_RC)
    nan_C = nan_RC.astype(jnp.int32).max(0) > 0
    top_C = jnp.where(nan_RC, -jnp.inf, top_RC).max(0)
    is_top_RC = jnp.where(nan_C[None, :], nan_RC, top_RC == top_C[None, :])
    first_C = jnp.where(is_top_RC, first_RC, NO_ROW).min(0)
    return jnp.where(nan_C, jnp.nan, top_C), first_C


def _chunk(segment_ref, chunks_ref, offsets_ref, T, size):
  """(s, c, begin, end, whole): this program's segment, chunk and rows; is it all of the segment?

  s is -1 for a program without a chunk, which has no rows.
  """
  c = pl.program_id(0)
  s = segment_ref[c]
  idle = s >= offsets_ref.shape[0] - 1
  safe = jnp.where(idle, 0, s)
  first = chunks_ref[safe]
  begin = jnp.maximum(offsets_ref[safe] + (c - first) * size, 0)
  end = jnp.minimum(jnp.minimum(begin + size, offsets_ref[safe + 1]), T)
  whole = chunks_ref[safe + 1] - first == 1
  return safe, ~idle, begin, jnp.where(idle, begin, end), whole


def _sum_kernel(*refs, size, scaled, gathered, weighted):
  *refs, y_ref, partial_ref = refs
  segment_ref, chunks_ref, offsets_ref, x_ref, *refs = refs
  scale_ref = refs.pop(0) if scaled else None
  id_ref = refs.pop(0) if gathered else None
  weight_ref = refs.pop(0) if weighted else None
  tile = _Tile(x_ref.shape[1], ROWS)
  T = id_ref.shape[0] if gathered else x_ref.shape[0]
  s, live, begin, end, whole = _chunk(segment_ref, chunks_ref, offsets_ref, T, size)

  def load(row_R, there_R):
    source_R = row_R
    if gathered:
      id_R = plgpu.load(id_ref.at[row_R], mask=there_R, other=-1)
      there_R = (id_R >= 0) & (id_R < x_ref.shape[0])
      source_R = jnp.where(there_R, id_R, 0)
    x_RC = tile.load(x_ref, source_R, there_R).astype(jnp.float32)
    if weighted:
      # No weight of a missing row is looked at: 0 of the row times NaN would be NaN.
      weight_R = plgpu.load(weight_ref.at[row_R], mask=there_R, other=0.0)
      x_RC = x_RC * weight_R.astype(jnp.float32)[:, None]
    return x_RC

  sum_C = tile.sum(begin, end, load)
  tile.store(partial_ref, pl.program_id(0), sum_C, live & ~whole)
  tile.store(y_ref, s, sum_C * scale_ref[s] if scaled else sum_C, live & whole)


def _sum_rest_kernel(*refs, scaled):
  chunks_ref, partial_ref, *refs, _, y_ref = refs
  tile = _Tile(y_ref.shape[1], ROWS)
  s = pl.program_id(0)
  begin, end = chunks_ref[s], chunks_ref[s + 1]
  many = end - begin > 1
  end = jnp.where(many, end, begin)
  sum_C = tile.sum(begin, end, lambda row_R, there_R: tile.load(partial_ref, row_R, there_R))
  tile.store(y_ref, s, sum_C * refs[0][s] if scaled else sum_C, many)


def _max_kernel(
  segment_ref, chunks_ref, offsets_ref, x_ref, y_ref, row_ref, partial_ref, partial_row_ref, *, size
):
  tile = _Tile(x_ref.shape[1], MAX_ROWS)
  s, live, begin, end, whole = _chunk(segment_ref, chunks_ref, offsets_ref, x_ref.shape[0], size)

  def load(row_R, there_R):
    x_RC = tile.load(x_ref, row_R, there_R).astype(jnp.float32)
    row_RC = jnp.broadcast_to(jnp.where(there_R, row_R, NO_ROW)[:, None], tile.shape)
    return x_RC, row_RC

  top_C, first_C = tile.max(begin, end, load)
  c = pl.program_id(0)
  tile.store(partial_ref, c, top_C, live & ~whole)
  tile.store(partial_row_ref, c, first_C, live & ~whole)
  tile.store(y_ref, s, jnp.where(first_C == NO_ROW, 0.0, top_C), live & whole)
  tile.store(row_ref, s, first_C, live & whole)


def _max_rest_kernel(chunks_ref, partial_ref, partial_row_ref, _, __, y_ref, row_ref):
  tile = _Tile(y_ref.shape[1], MAX_ROWS)
  s = pl.program_id(0)
  begin, end = chunks_ref[s], chunks_ref[s + 1]
  many = end - begin > 1
  end = jnp.where(many, end, begin)

  def load(row_R, there_R):
    row_RC = tile.load(partial_row_ref, row_R, there_R, NO_ROW)
    return tile.load(partial_ref, row_R, there_R), row_RC

  top_C, first_C = tile.max(begin, end, load)
  tile.store(y_ref, s, top_C, many)
  tile.store(row_ref, s, first_C, many)


def _call(kernel, programs, width, args, out_shape, name, interpret, aliases=None):
  specs = jax.tree.map(lambda _: pl.no_block_spec, out_shape)
  return pl.pallas_call(
    kernel,
    grid=(programs, pl.cdiv(width, rows.columns(width))),
    in_specs=[pl.no_block_spec] * len(args),
    out_specs=specs,
    out_shape=out_shape,
    input_output_aliases=aliases or {},
    interpret=interpret,
    compiler_params=plgpu.CompilerParams(num_warps=4 if width > 32 else 2, num_stages=2),
    name=name,
  )(*args)


def segment_sum(
  x_TW: jax.Array,
  offsets_S1: jax.Array,
  scale_S: jax.Array | None,
  id_N: jax.Array | None = None,
  weight_N: jax.Array | None = None,
  *,
  op: str,
  interpret: bool,
) -> jax.Array:
  """y_SW of x's dtype: scale[s] times the sum of each segment.

  With id_N the segments are of ids, and the rows x[id_N] (none where the id is no row of x), times
  weight_N, are summed.
  """
  T, W, S = len(x_TW if id_N is None else id_N), x_TW.shape[1], len(offsets_S1) - 1
  segment_C, chunks_S1 = _chunks(offsets_S1, T)
  options = [a for a in (scale_S, id_N, weight_N) if a is not None]
  kernel = functools.partial(
    _sum_kernel,
    size=chunk_size(T),
    scaled=scale_S is not None,
    gathered=id_N is not None,
    weighted=weight_N is not None,
  )
  y = jax.ShapeDtypeStruct((S, W), x_TW.dtype)
  partial = jax.ShapeDtypeStruct((len(segment_C), W), jnp.float32)
  args = (segment_C, chunks_S1, offsets_S1, x_TW, *options)
  name = f"{op}_forward"
  y_SW, partial_CW = _call(kernel, len(segment_C), W, args, (y, partial), name, interpret)
  if chunk_size(T) >= T:  # No segment has two chunks.
    return y_SW
  kernel = functools.partial(_sum_rest_kernel, scaled=scale_S is not None)
  args = (chunks_S1, partial_CW, *options[: scale_S is not None], y_SW)
  return _call(kernel, S, W, args, y, name + "_rest", interpret, {len(args) - 1: 0})


def segment_max(
  x_TW: jax.Array, offsets_S1: jax.Array, *, op: str, interpret: bool
) -> tuple[jax.Array, jax.Array]:
  """y_SW of x's dtype, and row_SW int32: the first row that has it; 0 and NO_ROW if none has."""
  (T, W), S = x_TW.shape, len(offsets_S1) - 1
  segment_C, chunks_S1 = _chunks(offsets_S1, T)
  y = jax.ShapeDtypeStruct((S, W), x_TW.dtype), jax.ShapeDtypeStruct((S, W), jnp.int32)
  partial = tuple(
    jax.ShapeDtypeStruct((len(segment_C), W), dtype) for dtype in (jnp.float32, jnp.int32)
  )
  kernel = functools.partial(_max_kernel, size=chunk_size(T))
  args = (segment_C, chunks_S1, offsets_S1, x_TW)
  name = f"{op}_max_forward"
  *y_and_row, partial_CW, partial_row_CW = _call(
    kernel, len(segment_C), W, args, (*y, *partial), name, interpret
  )
  if chunk_size(T) >= T:
    return tuple(y_and_row)
  args = (chunks_S1, partial_CW, partial_row_CW, *y_and_row)
  return _call(_max_rest_kernel, S, W, args, y, name + "_rest", interpret, {3: 0, 4: 1})


def _max_gradient_kernel(dy_ref, row_ref, segment_ref, dx_ref, *, columns):
  T, W = dx_ref.shape
  row_R = pl.program_id(0) * ROWS + jnp.arange(ROWS)
  column_C = pl.program_id(1) * columns + jnp.arange(columns)
  exists_RC = (row_R < T)[:, None] & (column_C < W)[None, :]
  segment_R = plgpu.load(segment_ref.at[row_R], mask=row_R < T, other=-1)
  there_RC = exists_RC & (segment_R >= 0)[:, None]
  at = (jnp.where(segment_R >= 0, segment_R, 0)[:, None], column_C[None, :])
  first_RC = plgpu.load(row_ref.at[at], mask=there_RC, other=NO_ROW)
  dy_RC = plgpu.load(dy_ref.at[at], mask=there_RC, other=0.0)
  dx_RC = jnp.where(first_RC == row_R[:, None], dy_RC, 0.0)
  plgpu.store(dx_ref.at[row_R[:, None], column_C[None, :]], dx_RC, mask=exists_RC)


def max_gradient(
  dy_SW: jax.Array, row_SW: jax.Array, segment_T: jax.Array, *, op: str, interpret: bool
) -> jax.Array:
  """dx_TW: dy of the segments for which a row is the first largest."""
  T, W = len(segment_T), dy_SW.shape[1]
  kernel = functools.partial(_max_gradient_kernel, columns=rows.columns(W))
  args, dx = (dy_SW, row_SW, segment_T), jax.ShapeDtypeStruct((T, W), dy_SW.dtype)
  return _call(kernel, pl.cdiv(T, ROWS), W, args, dx, f"{op}_max_backward", interpret)


def last_gradient(
  dy_MW: jax.Array, row_M: jax.Array, index_T: jax.Array, *, op: str, interpret: bool
) -> jax.Array:
  """dx_TW: dy[index[t]], 0 where there is none; row_M is the other direction's."""
  name = f"{op}_last_backward"
  return rows.gather_kernel([(dy_MW, index_T)], None, fill=0.0, name=name, interpret=interpret)
