"""Rooms: how many slots a shard has for its events, of each history or sequence, of a few sizes."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from gemjax.features import event_capacity

Sizes = dict[str, int]  # History or sequence -> events, or slots for them.

RATIO = Fraction(17, 20)  # Of a size and the next larger one; exact, for all hosts must agree.
_OWN = 2  # Sizes that a history is smaller than the others of its batch, or a multiple.
_STEP, _LEAST = 8, event_capacity(0)  # Slots: sizes are multiples, and none is smaller.


class Rooms(NamedTuple):
  """The sizes C RATIO^j: j = 0 holds all batches that were measured, j = 1, 2, .. are for those of
  which it would leave more empty, and j < 0 for what outgrows it. The histories of a batch have the
  largest j that serves them all, so that no more than 15 % of the slots of the fullest shard are
  empty, of one history; where a history needs less than that, as a rare one, it has j + 2, j + 4,
  .., and 28 % at most. Other shards have what dealing (balance.py) leaves them.

  That is a function of the batch alone, so that a run that resumes has the programs, thus the bits,
  of one that was not broken off. Batches that are dealt by cost differ little where a device has
  many examples, and j is 0, as a rule: more sizes would be more programs. A sequence, which nothing
  deals and whose empty slots cost little, has rooms of its own and takes j <= 0.
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
    if any(events[n] > most for n, most in self.limit.items()):
      raise ValueError(f"shards of {events} events, but none can have more than {self.limit}")
    j = 0
    while any(events[n] > self._slots(n, j) for n in self.first):
      j -= 1
    if not shrink:
      return {n: self._slots(n, j) for n in self.first}
    j = min(self._last(n, events[n], j, 1) for n in self.first) if self.first else j
    return {n: self._slots(n, self._last(n, events[n], j, _OWN)) for n in self.first}

  def _last(self, name: str, events: int, j: int, step: int) -> int:
    """The last of j, j + step, .. that holds the events, where sizes still shrink."""
    while events <= self._slots(name, j + step) < self._slots(name, j):
      j += step
    return j

  def _slots(self, name: str, j: int) -> int:
    scaled = max(_LEAST, -(-self.first[name] * RATIO**j // _STEP) * _STEP)
    return min(int(scaled) if j else self.first[name], self.limit[name])
