"""How the kernels cut a shape.

Axes of products go in pieces whose sizes are powers of two from 16 on, which is what tensor cores
and Triton take: the pieces of one axis follow each other in a loop, or stand written out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

Piece = tuple[Any, int]  # Start and size; the start is traced in a loop.


def padded(size: int) -> int:
  """The multiple of 16 that `size` takes in a product of tensor cores."""
  return -(-size // 16) * 16


def refusal(dtype: jnp.dtype) -> str | None:
  """Why the kernels cannot do it, or None: sizes are no reason."""
  if jnp.dtype(dtype).itemsize > 4:
    return f"x is {jnp.dtype(dtype).name}, and tensor cores take at most float32 here"
  return None


@dataclasses.dataclass(frozen=True, slots=True)
class Axis:
  """An axis in pieces: all alike for a loop, or the fewest that cover it."""

  size: int
  most: int  # The largest piece.
  alike: bool

  @property
  def pieces(self) -> tuple[Piece, ...]:
    piece = self.most
    if self.alike:
      # A tenth more than the least padding for fewer, larger pieces.
      while piece > 16 and 10 * -(-self.size // piece) * piece > 11 * padded(self.size):
        piece //= 2
    start, found = 0, []
    while start < self.size:
      while not self.alike and piece > padded(self.size - start):
        piece //= 2
      found.append((start, piece))
      start += piece
    return tuple(found)

  @property
  def padded(self) -> int:
    return sum(size for _, size in self.pieces)

  def inside(self, piece: Piece) -> Any:
    """How much of a piece lies on the axis."""
    start, size = piece
    if isinstance(start, int):
      return min(size, self.size - start)
    return size if self.padded == self.size else jnp.minimum(size, self.size - start)

  def each(self, one: Any, body: Callable[[Piece, Any], Any], carry: Any = None) -> Any:
    """body(piece, carry) for one piece after the other.

    `one` is 1, read from memory: where LLVM knows how short a loop is, it writes it out, and
    registers spill.
    """
    pieces = self.pieces
    if self.alike and len(pieces) > 1:
      size = pieces[0][1]
      return lax.fori_loop(0, len(pieces) * one, lambda i, c: body((i * size, size), c), carry)
    for piece in pieces:
      carry = body(piece, carry)
    return carry


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
  """The cut of one shape: B examples, N units, D width, K rank."""

  batch: int
  units: int
  width: int
  rank: int

  @property
  def paged(self) -> bool:
    """Whether intermediate results of an example are too large for registers."""
    return self.units > 64 or self.width > 160 or self.rank > 32

  @property
  def n(self) -> Axis:
    return Axis(self.units, 64, self.paged)

  @property
  def d(self) -> Axis:
    return Axis(self.width, 64 if self.paged else 128, self.paged)

  @property
  def k(self) -> Axis:
    return Axis(self.rank, 32, self.paged)

  @property
  def warps(self) -> int:
    if self.paged:
      # Four multiply 64 rows; few elements for each leave little but addresses in registers.
      return 4 if self.n.pieces[0][1] * self.k.pieces[0][1] > 1024 else 2
    elements = self.d.padded * max(self.k.padded, self.n.padded)
    return 1 if elements <= 512 else 2 if elements <= 1024 else 4

  def stages(self, itemsize: int, backward: bool) -> int:
    """Pieces that a loop loads ahead; between examples other programs fill the wait."""
    return 1 if not self.paged else 3 if backward and itemsize == 2 else 2

  def programs(self, bytes_each: int) -> int:
    """Programs, of which each has `bytes_each` of its own: about what an L2 cache holds.

    From 2 to 16 for each of an H100's 132 processors.
    """
    return min(self.batch, max(2 * 132, min(16 * 132, 32 * 2**20 // max(1, bytes_each))))
