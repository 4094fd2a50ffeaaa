"""Rooms: how many slots a shard has for the events of each history, of few sizes."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from gemjax.features import HISTORY_STEPS, event_capacity

RATIO = Fraction(17, 20)  # Of a size and the next larger one; exact, for all hosts must agree.
_TILE = 64  # Slots: sizes are multiples.


class Rooms(NamedTuple):
  """The sizes C RATIO^j, j = .., -1, 0, 1, .., where C has room for `most` (`event_capacity`).

  All histories of a batch have the same j, the largest that serves them all. So it is a function of
  the batch alone: a run that resumes has the programs, thus the bits, of one that was not broken
  off. Batches that are dealt by cost differ by less than RATIO, and j is 0, as a rule. Of the
  history that decides j no more than 1 - RATIO of the slots of the fullest shard are empty.
  """

  most: dict[str, int]  # Events of the fullest shard that was measured, by history.

  def of(self, events: dict[str, int]) -> dict[str, int]:
    """Slots a shard, by history, for a batch whose fullest shards have so many `events`."""
    first = {n: event_capacity(most, steps=HISTORY_STEPS) for n, most in self.most.items()}
    sizes = lambda j: {n: -(-c * RATIO**j // _TILE) * _TILE for n, c in first.items()}
    fits = lambda j: all(events[n] <= size for n, size in sizes(j).items())
    j = 0
    while not fits(j):
      j -= 1
    while any(size > _TILE for size in sizes(j).values()) and fits(j + 1):
      j += 1
    return sizes(j)
