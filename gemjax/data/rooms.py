"""Rooms: how many slots a shard has for the events of each history, of few sizes."""

from __future__ import annotations

from typing import NamedTuple

from gemjax.features import HISTORY_STEPS, event_capacity

RATIO = 0.85  # Of a size and the next larger one.


class Rooms(NamedTuple):
  """The sizes `most` * RATIO^j, j = .., -1, 0, 1, .., rounded up by `event_capacity`.

  All histories of a batch have the same j, the largest that serves them all. So it is a function of
  the batch alone: one that resumes has the programs, thus the bits, of one that was not broken
  off. Batches that are dealt by cost differ by less than RATIO, and j is 0, as a rule; and no more
  than a fifth of the slots of the history that decides j are empty, but for what rounding adds, a
  sixteenth, and for what the shards of one batch differ by.
  """

  most: dict[str, int]  # Events of the fullest shard that was measured, by history.

  def of(self, events: dict[str, int]) -> dict[str, int]:
    """Slots a shard, by history, for a batch whose fullest shards have so many `events`."""
    least = event_capacity(0)
    most = {name: max(n, least) for name, n in self.most.items()}
    fits = lambda size: all(events[name] <= n * size for name, n in most.items())
    size, smallest = 1.0, least / max(most.values(), default=least)
    while not fits(size):
      size /= RATIO
    while size > smallest and fits(size * RATIO):
      size *= RATIO
    return {name: event_capacity(int(n * size), steps=HISTORY_STEPS) for name, n in most.items()}
