"""How the kernels cut a shape.

Units, widths and ranks are covered by pieces whose sizes are powers of two from 16 on (160 is
128 + 32), so that at most 15 rows or columns of a product are padding.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax import lax

ROWS = 64  # Units in a tile: what one Hopper warp group multiplies at once.
MIXTURES = 128 * 32  # Elements of Xᵀ Y, and of its gradient, that registers hold.

Piece = tuple[int, int]  # Start and size; the start may be traced.


def pieces(size: int, most: int) -> tuple[Piece, ...]:
  """Powers of two between 16 and `most` that cover `size`, the largest first."""
  start, found = 0, []
  while start < size:
    left = padded(size - start)
    piece = min(most, 2 ** int(math.log2(left)))
    found.append((start, piece))
    start += piece
  return tuple(found)


def padded(size: int) -> int:
  """The multiple of 16 that `size` takes in a product of tensor cores."""
  return -(-size // 16) * 16


def refusal(dtype: jnp.dtype) -> str | None:
  """Why the kernels cannot do it, or None: sizes are no reason."""
  if jnp.dtype(dtype).itemsize > 4:
    return f"x is {jnp.dtype(dtype).name}, and its tensor cores take at most float32"
  return None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
  """The cut of one shape."""

  batch: int
  units: int
  width: int
  rank: int

  @property
  def n(self) -> tuple[Piece, ...]:
    return pieces(self.units, ROWS)

  @property
  def d(self) -> tuple[Piece, ...]:
    return pieces(self.width, 128)

  @property
  def k(self) -> tuple[Piece, ...]:
    return pieces(self.rank, 64)

  @property
  def looped(self) -> bool:
    """Whether tiles of units are gone through by a loop, where nothing can be kept of each."""
    return self.units >= 2 * ROWS

  @property
  def paged(self) -> bool:
    """Whether Xᵀ Y of an example is too large for registers."""
    return padded(self.width) * padded(self.rank) > MIXTURES

  @property
  def stages(self) -> int:
    """Loads a loop may run ahead: none where it might read a page before that is written."""
    return 2 if self.looped or not self.paged else 1

  @property
  def programs(self) -> int:
    """Each has its own sums over its examples: 64 MiB of them, but a program for any processor.

    2112 = 16 * 132 and 132 are in step with an H100's 132 processors.
    """
    return min(self.batch, 2112, max(132, 2**26 // (12 * self.units * self.rank)))

  def warps(self, backward: bool) -> int:
    """By what its registers hold."""
    mixtures = padded(self.width) * padded(self.rank)
    for warps, most in ((1, 512), (2, 1024), (4, 4096 if backward else 8192)):
      if mixtures <= most:
        return warps
    return 8

  def over_units(self, body, carry):
    """body((start, size), carry) for one tile of units after the other."""
    tiles = self.n
    if self.looped:
      whole = self.units // ROWS
      carry = lax.fori_loop(0, whole, lambda i, c: body((i * ROWS, ROWS), c), carry)
      tiles = tiles[whole:]
    for tile in tiles:
      carry = body(tile, carry)
    return carry
