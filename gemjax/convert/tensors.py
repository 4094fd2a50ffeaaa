"""Named arrays that are read when they are needed, rows at a time: what conversion is made of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np

PIECE_BYTES = 2**22  # Of rows that are read at a time.


class ConvertError(ValueError):
  """A file that cannot be converted, or a config that does not describe it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
  """`read(start, stop)` returns those rows of the first axis; a scalar has one row of no axes.

  `take(numbers)`, of some, returns any rows and holds nothing for it that `read` does not hold.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[int, int], np.ndarray]
  take: Callable[[np.ndarray], np.ndarray] | None = None

  @property
  def rows(self) -> int:
    return self.shape[0] if self.shape else 1

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def whole(self) -> np.ndarray:
    return self.read(0, self.rows).reshape(self.shape)

  def pieces(self, rows: int | None = None) -> Iterator[np.ndarray]:
    """All rows in order, so many at a time, by default as PIECE_BYTES hold."""
    rows = rows or max(1, PIECE_BYTES * max(1, self.rows) // max(1, self.nbytes))
    for start in range(0, self.rows, rows):
      yield self.read(start, min(start + rows, self.rows))


Tensors = dict[str, Tensor]


def of_array(array: np.ndarray) -> Tensor:
  """A tensor that is in memory."""
  rows = array if array.ndim else array[None]
  return Tensor(array.shape, array.dtype, lambda start, stop: rows[start:stop])


def mapped(function: Callable[[np.ndarray], np.ndarray], tensor: Tensor) -> Tensor:
  """`function` of the whole tensor, computed when it is read; its result's shape is found by a
  trial on zeros that take no room.
  """
  trial = function(np.broadcast_to(np.zeros((), tensor.dtype), tensor.shape))

  def read(start: int, stop: int) -> np.ndarray:
    array = np.asarray(function(tensor.whole()))
    return array[start:stop] if array.ndim else array[None]

  return Tensor(trial.shape, trial.dtype, read)


def cast(tensor: Tensor, dtype: np.dtype) -> Tensor:
  """Rounded to the nearest, ties to even."""
  if tensor.dtype == dtype:
    return tensor
  return Tensor(tensor.shape, np.dtype(dtype), lambda a, b: tensor.read(a, b).astype(dtype))


def dtype_of(name: str) -> np.dtype:
  """numpy's type of a name as "bfloat16"."""
  return np.dtype(getattr(ml_dtypes, name, None) or name)


def described(tensor: Tensor) -> str:
  """Type and shape as text."""
  return f"{tensor.dtype} {'x'.join(map(str, tensor.shape)) or 'scalar'}"


def first_difference(one: Tensor, other: Tensor) -> str | None:
  """In words, or None where both are equal to the bit."""
  if (one.shape, one.dtype) != (other.shape, other.dtype):
    return f"{described(one)} and {described(other)}"
  row = 0
  for a, b in zip(one.pieces(), other.pieces()):
    same = _bits(a) == _bits(b)
    if not same.all():
      return f"row {row + int(np.argmin(same.reshape(len(a), -1).all(1)))}"
    row += len(a)
  return None


def _bits(array: np.ndarray) -> np.ndarray:
  """So that NaN equals itself and 0 is not -0."""
  return np.ascontiguousarray(array).view(np.dtype(f"u{array.dtype.itemsize}"))
