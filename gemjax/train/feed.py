"""Batches on their way to the devices, the next one always at hand.

A step plans the look-ups of the batch that follows, so that the feed is one batch ahead of the
step, and the data position that a checkpoint keeps is one batch behind the reader.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from jax.sharding import Mesh

from gemjax.features import Batch
from gemjax.parallel.arrays import to_devices


class Feed:
  """`upcoming` is the batch that `advance` returns first; all are global arrays.

  Batches come in few shapes (gemjax/data/rooms.py), each of which is a program.

  Args:
    batches: This process' batches, with `get_state` and `set_state`.
    mesh: Where they go.
  """

  def __init__(self, batches: Iterator[Batch], mesh: Mesh):
    self._batches, self._mesh = batches, mesh
    self._used = self._room = 0  # Slots of histories since `padding` was last asked for.
    self._ahead: deque[tuple[Any, Batch]] = deque()  # (position, batch) of those already read.

  @property
  def upcoming(self) -> Batch:
    return self.ahead(0)

  def ahead(self, count: int) -> Batch:
    """The batch that so many others precede."""
    while len(self._ahead) <= count:
      position = self._batches.get_state()
      batch = next(self._batches)
      self._count(batch)
      self._ahead.append((position, to_devices(self._mesh, batch)))
    return self._ahead[count][1]

  def advance(self) -> tuple[Batch, Batch]:
    """The upcoming batch, and the one behind it that takes its place; where that cannot be read,
    nothing has changed.
    """
    batch, upcoming = self.ahead(0), self.ahead(1)
    self._ahead.popleft()
    return batch, upcoming

  def get_state(self) -> Any:
    """The position of the upcoming batch."""
    return self._ahead[0][0] if self._ahead else self._batches.get_state()

  def set_state(self, state: Any) -> None:
    """Goes on from the state of `get_state`."""
    self._batches.set_state(state)
    self._ahead.clear()

  def padding(self) -> float:
    """Share of this process' event slots of histories that no event filled, since the last call."""
    share = 1 - self._used / self._room if self._room else 0.0
    self._used = self._room = 0
    return share

  def _count(self, batch: Batch) -> None:
    for events in batch.histories.values():
      self._used += int(events.lengths_B.sum())
      self._room += len(events.age_E)
