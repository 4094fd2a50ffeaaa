"""Batches on their way to the devices, the next one always at hand.

A step plans the look-ups of the batch that follows, so that the feed is one batch ahead of the
step, and the data position that a checkpoint keeps is one batch behind the reader.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.sharding import Mesh

from gemjax.features import Batch, Jagged
from gemjax.parallel.arrays import to_devices


class Feed:
  """`upcoming` is the batch that `advance` returns; both are global arrays.

  The event capacity of a sequence never shrinks, so that few programs are compiled: one for each
  new capacity, and one for the step in which it grows.

  Args:
    batches: This process' batches, with `get_state` and `set_state`.
    mesh: Where they go.
  """

  def __init__(self, batches: Iterator[Batch], mesh: Mesh):
    self._batches, self._mesh = batches, mesh
    self._shards = len(mesh.local_devices)
    self._capacities: dict[str, int] = {}
    self._position: Any = None
    self._upcoming: Batch | None = None

  @property
  def upcoming(self) -> Batch:
    if self._upcoming is None:
      self._position = self._batches.get_state()
      self._upcoming = to_devices(self._mesh, self._grown(next(self._batches)))
    return self._upcoming

  def advance(self) -> Batch:
    """The upcoming batch, which gives way to the one behind it."""
    batch, self._upcoming = self.upcoming, None
    return batch

  def get_state(self) -> Any:
    """The position of the upcoming batch."""
    return self._batches.get_state() if self._upcoming is None else self._position

  def set_state(self, state: Any) -> None:
    """Goes on from the state of `get_state`."""
    self._batches.set_state(state)
    self._upcoming = None

  def _grown(self, batch: Batch) -> Batch:
    sequences = {}
    for name, jagged in batch.sequences.items():
      events = len(jagged.values_E) // self._shards
      capacity = self._capacities[name] = max(events, self._capacities.get(name, 0))
      values = jagged.values_E.reshape(self._shards, events, *jagged.values_E.shape[1:])
      room = [(0, 0), (0, capacity - events)] + [(0, 0)] * (values.ndim - 2)
      values = np.pad(values, room).reshape(-1, *values.shape[2:])
      sequences[name] = Jagged(values_E=values, lengths_B=jagged.lengths_B)
    return batch._replace(sequences=sequences)
