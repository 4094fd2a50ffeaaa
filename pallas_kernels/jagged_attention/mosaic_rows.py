"""Rows of jagged arrays in Mosaic kernels: the tile that a group owns, and how it is stored.

Letters as in mosaic.py.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.jagged_attention import edges, tiles

GROUPS, ROWS = 2, 64  # Groups that compute; wgmma has 64 rows.
# Registers of a thread: 65,536 are 384 * 168 and some, and 2 * 240 + 24 = 3 * 168.
REGISTERS, REGISTERS_OF_COPIES = 240, 24
TILED = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)  # As wgmma reads it.


def own(cut: tiles.Tiles, rows: int) -> jax.Array:
  """row_NGB, the rows of every tile by groups; `rows`, one past the last, where it has none."""
  row_NB = cut.start_N[:, None] + jnp.arange(GROUPS * ROWS, dtype=jnp.int32)
  row_NB = jnp.where(row_NB < cut.stop_N[:, None], row_NB, rows)
  return row_NB.reshape(-1, GROUPS, ROWS)


def aligned(cut: tiles.Tiles) -> tiles.Tiles:
  """Tiles that begin their visits at a multiple of 8 rows; masks leave out those before."""
  return cut._replace(first_N=cut.first_N - cut.first_N % edges.ALIGNED)


def padded(x_T: jax.Array) -> jax.Array:
  """(T, ...) with zeros up to a multiple of 8 rows."""
  room = -len(x_T) % edges.ALIGNED
  return jnp.pad(x_T, ((0, room), *((0, 0),) * (x_T.ndim - 1))) if room else x_T


def work(tile_refs, heads: int, rows: int):
  """(group, tile, head, what the tile visits, in how many steps of so many rows) of a program."""
  program = lax.axis_index("program")
  tile, head = lax.div(program, heads), lax.rem(program, heads)
  visit = tiles.Tiles(*(ref[tile] for ref in tile_refs))
  steps = lax.div(visit.last_N - visit.first_N + rows - 1, rows)
  return lax.axis_index("group"), tile, head, visit, steps


def across(x, like, axis: int = 0):
  """A vector along an axis of the matrix `like`, repeated over the other."""
  return lax.broadcast_in_dim(x, like.shape, (axis,))


def parts(width: int, columns: int) -> list[slice]:
  return [slice(c, c + columns) for c in range(0, width, columns)]


def load(on, ref, first_row, head, stage, loaded, tiled) -> None:
  """64 rows of one head, from any on, into tiles of shared memory, by way of registers."""
  for part in parts(tiled.shape[-1], stage.shape[-1]):
    source = ref.at[pl.ds(first_row, ROWS), head, _columns(part)]
    plgpu.copy_gmem_to_smem(source, stage, loaded)
    plgpu.barrier_wait(loaded)
    tiled.at[:, part][...] = on.matrix(stage)
    plgpu.commit_smem()


def _columns(part: slice):
  return pl.ds(part.start, part.stop - part.start)


def store(x_BC, stage, out_ref, head, part: slice, first_row, stop) -> None:
  """Rows [first_row, stop) of one head and some columns, as boxes of 64, 32, ..., 1 rows."""
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  stage[...] = x_BC.astype(out_ref.dtype)
  plgpu.commit_smem()
  count = jnp.clip(stop - first_row, 0, ROWS)

  def write(box: int):
    done = count & -2 * box  # The rows in larger boxes.
    target = out_ref.at[pl.ds(first_row + done, box), head, _columns(part)]
    plgpu.copy_smem_to_gmem(stage.at[pl.ds(done, box)], target)

  for i in range(ROWS.bit_length()):
    pl.when(count >> i & 1 == 1)(functools.partial(write, 1 << i))


def interpreter():
  """Beyond the end of an array there are zeros, as TMA gives them."""
  from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # Nowhere public.

  return InterpretGPUParams(out_of_bounds_reads="uninitialized", uninitialized_memory="zero")
