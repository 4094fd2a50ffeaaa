"""Next item: what every user came to in order of time, the last items held out.

Of a user's n events the next item of every one but the last is known. With h held out, sequences
stop before event n - 1 - h, whose item is the last that they are asked for: h = 0 asks for each
user's last item, and training may then use h = 1, which never reads it. Of each user they are the
newest `length` events, as in generative-recommenders.

Batches have equally many users of every length, so that all have one shape, with next to no room
left. Letters: N events of all users, U users, B users of a batch, E slots for events of a batch.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gemjax.data.balance import groups
from gemjax.data.raw import RawDataError, TextFile
from gemjax.data.values import complete, numbers

# File, delimiter, its columns (none: in its header), those of user, item and time.
_LAYOUTS = (
  ("interactions_chronological.csv", ",", "", "user_id item_id timestamp"),
  ("ratings.dat", "::", "user item rating time", "user item time"),
  ("ml-100k.inter", "\t", "", "user_id:token item_id:token timestamp:float"),
  ("u.data", "\t", "user item rating time", "user item time"),
)
_SLOTS = 128  # The room for events is a multiple of it.
_AGES = 2**30 - 1  # Seconds, 34 years: the difference of two is an int32, too.


@dataclasses.dataclass(frozen=True)
class Events:
  """All events, user after user, each user's in order of time."""

  item_N: np.ndarray  # int32, in [0, items).
  time_N: np.ndarray  # int64, seconds.
  offsets_U1: np.ndarray  # int64: user u has the events [offsets[u], offsets[u + 1]).
  items: int

  @functools.cached_property
  def known_V(self) -> np.ndarray:
    """int32: the items that have an event, ascending."""
    return np.unique(self.item_N)


class Batch(NamedTuple):
  """Packed sequences; a user without events fills up the last batches."""

  item_E: np.ndarray  # int32
  next_E: np.ndarray  # int32, the user's next item; -1 in slots of no user.
  age_E: np.ndarray  # int32, seconds before the user's newest event here, from 1.
  next_age_E: np.ndarray  # int32, that of the next event.
  offsets_B1: np.ndarray  # int32


def read_events(path: pathlib.Path, *, own_ids: bool = False) -> Events:
  """Every event of MovieLens, rated or not, in any of its layouts; equal times in file order.

  With `own_ids` items keep their numbers, otherwise those that have an event are numbered anew.

  Raises:
    RawDataError: the folder holds no MovieLens, or a line of it is broken.
  """
  layout = next((at for at in _LAYOUTS if (path / at[0]).is_file()), None)
  if layout is None:
    names = ", ".join(name for name, *_ in _LAYOUTS)
    raise RawDataError(f"{path} holds none of {names}; give it the events of MovieLens")
  name, delimiter, header, wanted = layout
  columns = wanted.split()
  file = TextFile(path / name, delimiter, tuple(header.split()), None)
  parts = []
  for chunk in file.chunks(columns):
    values = [numbers(chunk, column) for column in columns]
    for column, x_N in zip(columns, values):
      complete(chunk, column, np.isnan(x_N), "every row needs it")
    parts.append(np.stack(values))
  user_N, item_N, time_N = np.concatenate(parts, axis=1).astype(np.int64)
  order_N = np.lexsort((time_N, user_N))  # Stable.
  _, count_U = np.unique(user_N, return_counts=True)
  offsets_U1, item_N = np.append(0, np.cumsum(count_U)), item_N[order_N]
  if own_ids:
    if item_N.min() < 0 or item_N.max() >= 2**31 - 1:
      raise RawDataError(f"{path / name}: items must be numbers from 0 to 2^31 - 2 to keep them")
    items = int(item_N.max()) + 1
  else:
    known, item_N = np.unique(item_N, return_inverse=True)
    items = len(known)
  return Events(item_N.astype(np.int32), time_N[order_N], offsets_U1, items)


@dataclasses.dataclass(frozen=True)
class Sequences:
  """One sequence for every user who has at least one event before the item that is asked for.

  A new length costs a new compilation, so `room` is the same for all batches of all epochs.
  """

  events: Events
  length: int  # At most so many events.
  held_out: int  # Of each user's newest items, which nothing here reads.
  batch_size: int  # Users, at most: all batches have as many, but for the last user or two.

  @functools.cached_property
  def stop_U(self) -> np.ndarray:
    """int64, of the users who have a sequence: one past its newest event."""
    stop_U = self.events.offsets_U1[1:] - 1 - self.held_out
    stop_U = stop_U[stop_U > self.events.offsets_U1[:-1]]
    if not len(stop_U):
      raise RawDataError(
        f"no user has the {self.held_out + 2} events that a sequence and the item behind it need; "
        "give longer histories"
      )
    return stop_U

  @functools.cached_property
  def length_U(self) -> np.ndarray:
    start_U = self.events.offsets_U1[:-1]
    all_U = self.events.offsets_U1[1:] - 1 - self.held_out - start_U
    return np.minimum(all_U[all_U > 0], self.length)

  @property
  def batches(self) -> int:
    """Of an epoch."""
    return -(-len(self.stop_U) // self.batch_size)

  @property
  def rows(self) -> int:
    """B"""
    return -(-len(self.stop_U) // self.batches)

  @functools.cached_property
  def room(self) -> int:
    """E: no deal gives a batch more than the longest of each `batches` users of like length."""
    longest = np.sort(self.length_U)[::-1][:: self.batches].sum()
    return int(-(-longest // _SLOTS) * _SLOTS)

  def epoch(self, rng: np.random.Generator) -> Iterator[Batch]:
    """Every sequence once, dealt anew so that all batches hold nearly as many events."""
    users = len(self.length_U)
    filler = np.zeros(self.rows * self.batches - users, np.int64)
    sizes = [self.rows] * self.batches
    length_n = np.append(self.length_U, filler)
    dealt = groups(length_n[None], sizes, rng).reshape(self.batches, self.rows)
    for user_B in dealt:
      yield self.pack(user_B[user_B < users])

  def pack(self, user_B: np.ndarray) -> Batch:
    """The sequences of these users, places in `length_U`, side by side."""
    length_B = np.zeros(self.rows, np.int64)
    length_B[: len(user_B)] = self.length_U[user_B]
    offsets_B1 = np.append(0, np.cumsum(length_B))
    used, stop_B = offsets_B1[-1], self.stop_U[user_B]
    length_B = length_B[: len(user_B)]
    event_E = np.arange(used) + np.repeat(stop_B - length_B - offsets_B1[: len(user_B)], length_B)
    after_E = np.repeat(self.events.time_N[stop_B - 1], length_B) + 1
    item_E, age_E, next_age_E = np.zeros((3, self.room), np.int32)
    next_E = np.full(self.room, -1, np.int32)
    item_E[:used] = self.events.item_N[event_E]
    next_E[:used] = self.events.item_N[event_E + 1]
    for out, at in ((age_E, event_E), (next_age_E, event_E + 1)):
      out[:used] = np.clip(after_E - self.events.time_N[at], -_AGES, _AGES)
    return Batch(item_E, next_E, age_E, next_age_E, offsets_B1.astype(np.int32))
