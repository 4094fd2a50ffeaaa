"""Pallas kernels in the Triton lowering: no atomics, and no sum that two programs share.

multiply  a program takes a tile of one segment's rows through its matrix, piece by piece of K
outer     a program goes over all rows of a segment for a piece of (K, N) of their sum

Rows of nobody lie in two segments more, whose tiles multiply nothing and write zeros. A tile costs
a matrix read, so that many rows share one; short segments, which fill no tile, cost what reading
their matrix does. Letters: S segments, T rows, K and N widths; R rows, P and C pieces of K and N.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.jagged_matmul import tiles

ROWS = 64  # Of a tile: what one wgmma of Hopper multiplies.
_WHOLE = pl.no_block_spec


@dataclasses.dataclass(frozen=True, slots=True)
class Axis:
  """An axis in pieces of a power of two, from 16 on, which is what tensor cores take."""

  size: int
  most: int

  @property
  def piece(self) -> int:
    """The largest that pads at most a quarter more than pieces of 16 do."""
    piece, padded = self.most, pl.cdiv(self.size, 16) * 16
    while piece > 16 and 4 * pl.cdiv(self.size, piece) * piece > 5 * padded:
      piece //= 2
    return piece

  @property
  def pieces(self) -> int:
    return pl.cdiv(self.size, self.piece)

  def place(self, number):
    """Indices of a piece, and whether each lies on the axis; None: all do."""
    index = number * self.piece + jnp.arange(self.piece, dtype=jnp.int32)
    return index, None if self.size % self.piece == 0 else index < self.size


def multiply(x_TK, w_SKN, offsets_S1, *, transposed: bool, interpret: bool) -> jax.Array:
  """y_TN = x w[s]; with `transposed`, of w (S, N, K)."""
  rows, segments = len(x_TK), len(w_SKN)
  edges = jnp.full((1,), 0, jnp.int32), offsets_S1, jnp.full((1,), rows, jnp.int32)
  cut = tiles.cut(jnp.concatenate(edges), rows, ROWS)
  inner = Axis(x_TK.shape[1], 64)
  outer = Axis(w_SKN.shape[1 if transposed else 2], 128 if x_TK.dtype.itemsize == 2 else 64)

  def kernel(segment_N, begin_N, end_N, x_ref, w_ref, y_ref):
    tile, column = pl.program_id(0) // outer.pieces, pl.program_id(0) % outer.pieces
    row_R = begin_N[tile] + jnp.arange(ROWS, dtype=jnp.int32)
    own_R = row_R < end_N[tile]
    column_C, exists_C = outer.place(column)
    segment = segment_N[tile] - 1
    has_matrix = (segment >= 0) & (segment < segments)
    segment = jnp.where(has_matrix, segment, 0)

    def add(p, y_RC):
      k_P, exists_P = inner.place(p)
      x_RP = _load(x_ref, (), (row_R, own_R), (k_P, exists_P))
      if transposed:
        w_CP = _load(w_ref, (segment,), (column_C, exists_C), (k_P, exists_P))
        return y_RC + plgpu.dot(x_RP, w_CP, trans_b=True)
      w_PC = _load(w_ref, (segment,), (k_P, exists_P), (column_C, exists_C))
      return y_RC + plgpu.dot(x_RP, w_PC)

    # The bound is not known when compiling: a loop written out needs more registers.
    pieces = jnp.where(has_matrix, jnp.int32(inner.pieces), jnp.int32(0))
    y_RC = jnp.zeros((ROWS, outer.piece), jnp.float32)
    y_RC = lax.fori_loop(jnp.int32(0), pieces, add, y_RC)
    _store(y_ref, y_RC, (), (row_R, own_R), (column_C, exists_C))

  return _call(
    kernel,
    "backward_rows" if transposed else "forward",
    len(cut.begin_N) * outer.pieces,
    (*cut, x_TK, w_SKN),
    jax.ShapeDtypeStruct((rows, outer.size), x_TK.dtype),
    interpret,
  )


def outer(x_TK, y_TN, offsets_S1, *, interpret: bool) -> jax.Array:
  """w_SKN = the sum of xᵀ y over the rows of s, in float32 until it is whole."""
  segments, most = len(offsets_S1) - 1, 128 if x_TK.dtype.itemsize == 2 else 64
  above, beside = Axis(x_TK.shape[1], 64), Axis(y_TN.shape[1], most)

  def kernel(offsets_ref, x_ref, y_ref, w_ref):
    column, program = pl.program_id(0) % beside.pieces, pl.program_id(0) // beside.pieces
    k, segment = program % above.pieces, program // above.pieces
    begin, end = offsets_ref[segment], offsets_ref[segment + 1]
    places = above.place(k), beside.place(column)

    def add(i, w_PC):
      row_R = begin + i * ROWS + jnp.arange(ROWS, dtype=jnp.int32)
      x_RP, y_RC = (
        _load(ref, (), (row_R, row_R < end), place) for ref, place in zip((x_ref, y_ref), places)
      )
      return w_PC + plgpu.dot(x_RP, y_RC, trans_a=True)

    trips = lax.div(end - begin + (ROWS - 1), jnp.int32(ROWS))
    w_PC = jnp.zeros((above.piece, beside.piece), jnp.float32)
    w_PC = lax.fori_loop(jnp.int32(0), trips, add, w_PC)
    _store(w_ref, w_PC, (segment,), *places)

  return _call(
    kernel,
    "backward_matrices",
    segments * above.pieces * beside.pieces,
    (offsets_S1, x_TK, y_TN),
    jax.ShapeDtypeStruct((segments, above.size, beside.size), x_TK.dtype),
    interpret,
  )


def _call(kernel, name: str, programs: int, args, output, interpret: bool) -> jax.Array:
  return pl.pallas_call(
    kernel,
    grid=(programs,),
    in_specs=[_WHOLE] * len(args),
    out_specs=_WHOLE,
    out_shape=output,
    interpret=interpret,
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
    name=f"jagged_matmul_{name}",
  )(*args)


def _at(ref, lead, rows, columns):
  """A tile of the last two axes by (index, exists) of each, and its mask; None: all exists."""
  (row_R, exists_R), (column_C, exists_C) = rows, columns
  masks = [m for m in (exists_R, exists_C) if m is not None]
  if len(masks) == 2:
    mask = exists_R[:, None] & exists_C[None, :]
  elif masks:
    mask = exists_R[:, None] if exists_C is None else exists_C[None, :]
    mask = jnp.broadcast_to(mask, (len(row_R), len(column_C)))
  else:
    mask = None
  return ref.at[(*lead, row_R[:, None], column_C[None, :])], mask


def _load(ref, lead, rows, columns):
  """A tile, 0 where it does not exist, whatever lies there."""
  place, mask = _at(ref, lead, rows, columns)
  return plgpu.load(place, mask=mask, other=None if mask is None else 0.0)


def _store(ref, value, lead, rows, columns):
  place, mask = _at(ref, lead, rows, columns)
  plgpu.store(place, value.astype(ref.dtype), mask=mask)
