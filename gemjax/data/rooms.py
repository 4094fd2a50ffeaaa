"""Rooms: how many slots a shard has for the events of each history, of a few sizes."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from gemjax.features import HISTORY_STEPS, event_capacity

Sizes = dict[str, int]  # History -> events, or slots for them.

RATIO = Fraction(17, 20)  # Of a size and the next larger one; exact, for all hosts must agree.
SHARE = Fraction(1, 4)  # Of the batches, for which a smaller size is worth another program.
_STEP, _LEAST = 8, event_capacity(0)  # Slots: sizes are multiples, and none is smaller.


class Rooms(NamedTuple):
  """The sizes C RATIO^j: j = 0 for all batches that were measured, j = 1, 2, .. while a quarter of
  them fit, so that of those no more than 15 % of the slots of one history are empty; and j < 0 for
  what outgrows them.

  All histories of a batch have the same j, the largest that serves them all. So it is a function of
  the batch alone: a run that resumes has the programs, thus the bits, of one that was not broken
  off. Batches that are dealt by cost differ little, and j is 0, as a rule.
  """

  first: Sizes  # C.
  limit: Sizes  # No size is larger.
  smallest: int  # The largest j.

  @staticmethod
  def measured(batches: Sequence[Sizes], limit: Sizes, margin: float) -> Rooms:
    """For batches like those whose fullest shards have so many events, and a share `margin` more.

    No shard can have more than `limit`.
    """
    most = {n: max(int(b[n] * (1 + margin)) for b in batches) for n in limit}
    capacity = lambda events: event_capacity(events, steps=HISTORY_STEPS)
    largest = {n: capacity(events) for n, events in limit.items()}
    first = {n: min(capacity(most[n]), size) for n, size in largest.items()}
    rooms = Rooms(first, largest, 0)
    while any(size > _LEAST for size in rooms._size(rooms.smallest).values()):
      smaller = rooms._size(rooms.smallest + 1)
      if sum(_fits(b, smaller) for b in batches) < SHARE * len(batches):
        break
      rooms = rooms._replace(smallest=rooms.smallest + 1)
    return rooms

  def of(self, events: Sizes) -> Sizes:
    """Slots a shard, by history, for a batch whose fullest shards have so many events.

    Raises ValueError for more than the limit.
    """
    if not _fits(events, self.limit):
      raise ValueError(f"shards of {events} events, but none can have more than {self.limit}")
    j = self.smallest
    while not _fits(events, self._size(j)):
      j -= 1
    return self._size(j)

  def _size(self, j: int) -> Sizes:
    if not j:
      return self.first
    scaled = {n: max(_LEAST, -(-c * RATIO**j // _STEP) * _STEP) for n, c in self.first.items()}
    return {n: min(size, self.limit[n]) for n, size in scaled.items()}


def _fits(events: Sizes, slots: Sizes) -> bool:
  return all(events[n] <= size for n, size in slots.items())
