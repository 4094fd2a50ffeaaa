"""Rooms: how many slots a shard has for its events, of each history or sequence, of a few sizes."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from gemjax.features import event_capacity

Sizes = dict[str, int]  # History or sequence -> events, or slots for them.

RATIO = Fraction(17, 20)  # Of a size and the next larger one; exact, for all hosts must agree.
_STEP, _LEAST = 8, event_capacity(0)  # Slots: sizes are multiples, and none is smaller.


class Rooms(NamedTuple):
  """The sizes C RATIO^j: j = 0 holds all batches that were measured, j = 1, 2, .. are for those of
  which it would leave more empty, and j < 0 for what outgrows it. So no more than 15 % of the slots
  of the fullest shard are empty, of one history, and of several in one of them: those of one batch
  have the same j. Other shards and histories have what dealing (balance.py) leaves them.

  All histories of a batch have the same j, the largest that serves them all: a function of the
  batch alone, so that a run that resumes has the programs, thus the bits, of one that was not
  broken off. Batches that are dealt by cost differ little where a device has many examples, and j
  is 0, as a rule. A sequence, which nothing deals and whose empty slots cost little, has rooms of
  its own and takes j <= 0.
  """

  first: Sizes  # C.
  limit: Sizes  # No size is larger.

  @staticmethod
  def measured(batches: Sequence[Sizes], limit: Sizes, margin: float, steps: int = 16) -> Rooms:
    """For batches like those whose fullest shards have so many events, and a share `margin` more.

    No shard can have more than `limit`. C is one of `steps` sizes an octave.
    """
    most = {n: max(int(b[n] * (1 + margin)) for b in batches) for n in limit}
    largest = {n: event_capacity(events) for n, events in limit.items()}
    fitting = {n: event_capacity(events, steps=steps) for n, events in most.items()}
    return Rooms({n: min(fitting[n], size) for n, size in largest.items()}, largest)

  def of(self, events: Sizes, *, shrink: bool = True) -> Sizes:
    """Slots a shard, by name, for a batch whose fullest shards have so many events.

    Without `shrink` no fewer than C. Raises ValueError for more than the limit.
    """
    if not _fits(events, self.limit):
      raise ValueError(f"shards of {events} events, but none can have more than {self.limit}")
    j = 0
    while not _fits(events, self._size(j)):
      j -= 1
    while shrink and _fits(events, self._size(j + 1)) and self._size(j + 1) != self._size(j):
      j += 1
    return self._size(j)

  def _size(self, j: int) -> Sizes:
    if not j:
      return self.first
    scaled = {n: max(_LEAST, -(-c * RATIO**j // _STEP) * _STEP) for n, c in self.first.items()}
    return {n: min(size, self.limit[n]) for n, size in scaled.items()}


def _fits(events: Sizes, slots: Sizes) -> bool:
  return all(events[n] <= size for n, size in slots.items())
