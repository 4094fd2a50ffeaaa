"""Tables of names: which tensors of another library are which of ours, read in both directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from gemjax.convert.tensors import ConvertError, Tensor, Tensors, mapped


class Form(NamedTuple):
  """How one tensor of ours and those of theirs follow from each other; inverse functions."""

  to_ours: Callable[..., np.ndarray]  # (theirs, ..) -> ours
  to_theirs: Callable[[np.ndarray, int], np.ndarray]  # (ours, i) -> the i-th of theirs


class Entry(NamedTuple):
  """One line of a table; without a form both are equal to the bit."""

  ours: str
  theirs: tuple[str, ...]
  form: Form | None = None


TRANSPOSED = Form(lambda x: x.T, lambda x, i: x.T)


def same(ours: str, theirs: str) -> Entry:
  return Entry(ours, (theirs,))


def transposed(ours: str, theirs: str) -> Entry:
  """A kernel: PyTorch's Linear keeps (outputs, inputs)."""
  return Entry(ours, (theirs,), TRANSPOSED)


def to_ours(entries: list[Entry], theirs: Tensors, what: str) -> Tensors:
  """Our tensors, read from theirs.

  Raises:
    ConvertError: theirs lack a tensor of the table, or have one that is not in it.
  """
  wanted = dict.fromkeys(name for entry in entries for name in entry.theirs)
  if missing := [name for entry in entries for name in entry.theirs if name not in theirs]:
    raise ConvertError(
      f"{what} lacks {_few(missing)}, which a model of this config has; it has "
      f"{_few([n for n in theirs if n not in wanted]) or 'nothing else'}"
    )
  if extra := [name for name in theirs if name not in wanted]:
    raise ConvertError(f"{what} has {_few(extra)}, which a model of this config has not")
  ours: Tensors = {}
  for entry in entries:
    # Tables that features share come more than once.
    if entry.ours not in ours:
      ours[entry.ours] = _joined(entry, [theirs[name] for name in entry.theirs])
  return ours


def to_theirs(entries: list[Entry], ours: Tensors) -> Tensors:
  """Their tensors, read from ours, in the order of the table."""
  theirs: Tensors = {}
  for entry in entries:
    tensor = ours[entry.ours]
    if entry.form and not entry.theirs:
      entry.form.to_theirs(tensor.whole(), 0)  # Refuses what the format cannot say.
    for i, name in enumerate(entry.theirs):
      part = lambda array, form=entry.form, i=i: np.ascontiguousarray(form.to_theirs(array, i))
      theirs[name] = mapped(part, tensor) if entry.form else tensor
  return theirs


def _joined(entry: Entry, parts: list[Tensor]) -> Tensor:
  if entry.form is None:
    return parts[0]
  if len(parts) == 1:
    return mapped(lambda array: np.ascontiguousarray(entry.form.to_ours(array)), parts[0])
  zeros = [np.broadcast_to(np.zeros((), part.dtype), part.shape) for part in parts]
  like = entry.form.to_ours(*zeros)

  def read(start: int, stop: int) -> np.ndarray:
    return entry.form.to_ours(*(part.whole() for part in parts))[start:stop]

  return Tensor(like.shape, like.dtype, read)


def _few(names: list[str]) -> str:
  more = f" and {len(names) - 3} more" if len(names) > 3 else ""
  return ", ".join(names[:3]) + more
