"""Histories: the events of every user, stored once, memory-mapped, and sliced for a batch.

  DIR/<history>.<column>.npy   (E,) rows of the column's table, of the feature set's `id_dtype`
  DIR/<history>.time.npy       (E,) int64 seconds, of which those of a user never fall
  DIR/<history>.offsets.npy    (U + 1,) int64: user u has the events offsets[u] .. offsets[u + 1]

An example names its past by two numbers of events: `<history>.start`, the first of its user, and
`<history>.stop`, one past the last that happened strictly before the example's own `time`.
Letters: E events, U users, B examples, C columns, N shards, K slots of all shards.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import zlib
from collections.abc import Callable

import numpy as np

from gemjax.features import MISSING, Events, History

_PIECE = 1 << 24  # Bytes read at once for a checksum.
_OWN = ("time", "offsets")


class CorruptHistoryError(ValueError):
  """A history whose files are missing, cut or changed."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
  """What the manifest says of a history."""

  users: int
  events: int
  files: dict[str, tuple[int, int]]  # Name -> bytes, CRC32.


def write_history(
  folder: pathlib.Path,
  history: History,
  ids: dict[str, np.ndarray],
  time_E: np.ndarray,
  offsets_U1: np.ndarray,
) -> Stored:
  """Writes the events of all users, user after user in order of time, one column after the other.

  Raises ValueError for ids outside their tables, times that fall within a user, and columns or
  offsets of other lengths; for names that are no file's, or are taken by time and offsets.
  """
  name = history.name
  for part in (name, *(c.name for c in history.columns)):
    if not re.fullmatch(r"[\w-]+", part) or part in _OWN:
      raise ValueError(
        f"history {name!r}: {part!r} must be of letters, digits, _ and -, and none of {_OWN}"
      )
  lengths = {n: len(x) for n, x in ids.items()}
  if lengths != {c.name: len(time_E) for c in history.columns}:
    raise ValueError(f"history {name!r}: columns of {lengths} events for {len(time_E)} times")
  if offsets_U1[0] != 0 or offsets_U1[-1] != len(time_E) or (np.diff(offsets_U1) < 0).any():
    raise ValueError(f"history {name!r}: offsets must rise from 0 to {len(time_E)} events")
  falls_E = np.flatnonzero(np.diff(time_E) < 0) + 1
  if not np.isin(falls_E, offsets_U1).all():
    raise ValueError(f"history {name!r}: events of a user are not in order of time")
  for column in history.columns:
    x_E = ids[column.name]
    if len(x_E) and not (x_E.min() >= 0 and x_E.max() < column.size):
      raise ValueError(
        f"history {name!r}, column {column.name!r}: ids {x_E.min()} to {x_E.max()} are outside "
        f"its table of {column.size} rows"
      )
  columns = {c.name: ids[c.name] for c in history.columns}
  arrays = columns | {
    "time": time_E.astype(np.int64, copy=False),
    "offsets": offsets_U1.astype(np.int64, copy=False),
  }
  files = {}
  for part, array in arrays.items():
    path = folder / f"{name}.{part}.npy"
    try:
      np.save(path, array, allow_pickle=False)
    except OSError as error:  # Of a full disk numpy tells how many items it wrote.
      raise OSError(f"writing {path} failed ({error}); free the disk and try again") from error
    files[path.name] = (path.stat().st_size, _crc32(path))
  return Stored(users=len(offsets_U1) - 1, events=len(time_E), files=files)


def check_history(folder: pathlib.Path, stored: Stored) -> None:
  """Raises CorruptHistoryError, naming the file, unless all files are what was written."""
  for name, (size, crc) in stored.files.items():
    path = folder / name
    if not path.is_file():
      raise CorruptHistoryError(f"{path} is missing, but the manifest names it; prepare again")
    if (found := path.stat().st_size) != size:
      raise CorruptHistoryError(
        f"{path}: truncated or corrupt, it has {found} bytes where {size} were written; "
        "prepare again"
      )
    if _crc32(path) != crc:
      raise CorruptHistoryError(f"{path}: checksum mismatch, the file is corrupt; prepare again")


def by_user(user_E: np.ndarray, time_E: np.ndarray, users: int) -> tuple[np.ndarray, np.ndarray]:
  """(order_E, offsets_U1): user after user, each in order of time, equal times as they came."""
  order_E = np.lexsort((time_E, user_E))
  return order_E, np.append(0, np.cumsum(np.bincount(user_E, minlength=users)))


def locate(
  offsets_U1: np.ndarray, time_E: np.ndarray, user_B: np.ndarray, time_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """(start_B, stop_B): each user's first event, and one past its last strictly before `time_B`.

  A user of -1 has no event.
  """
  known_B = user_B >= 0
  start_B = np.where(known_B, offsets_U1[user_B], 0)
  low_B, high_B = start_B.copy(), np.where(known_B, offsets_U1[user_B + 1], 0)
  while (open_B := low_B < high_B).any():  # All examples bisect at once.
    middle_B = (low_B + high_B) // 2
    earlier_B = np.zeros_like(open_B)
    earlier_B[open_B] = time_E[middle_B[open_B]] < time_B[open_B]
    low_B = np.where(earlier_B, middle_B + 1, low_B)
    high_B = np.where(open_B & ~earlier_B, middle_B, high_B)
  return start_B, low_B


class Store:
  """The events of one history, which stay on disk until a batch asks for them."""

  def __init__(self, folder: pathlib.Path, history: History, stored: Stored):
    self.history, self.events = history, stored.events
    read = lambda part, mode: np.load(folder / f"{history.name}.{part}.npy", mmap_mode=mode)
    self._ids = [read(c.name, "r") for c in history.columns]
    self._time_E = read("time", "r")
    self._offsets_U1 = read("offsets", None)

  def check(
    self, start_B: np.ndarray, stop_B: np.ndarray, time_B: np.ndarray
  ) -> tuple[int, str] | None:
    """(example, law) for the first example whose events are not the past of one user, or None."""
    wrong_B = (start_B < 0) | (stop_B < start_B) | (stop_B > self.events)
    if wrong_B.any():
      b = int(wrong_B.argmax())
      return b, f"events {start_B[b]} to {stop_B[b]} are not within the {self.events} stored"
    seen = np.flatnonzero(stop_B > start_B)
    user = np.searchsorted(self._offsets_U1, start_B[seen], side="right") - 1
    first, behind = self._offsets_U1[user], self._offsets_U1[user + 1]
    if len(wrong := np.flatnonzero((first != start_B[seen]) | (behind < stop_B[seen]))):
      b, u = int(seen[wrong[0]]), int(wrong[0])
      return b, (
        f"events {start_B[b]} to {stop_B[b]} do not begin with the first of a user or reach into "
        f"another's; the user there has {first[u]} to {behind[u]}"
      )
    last = self._time_E[stop_B[seen] - 1]
    if len(wrong := np.flatnonzero(last >= time_B[seen])):
      b = int(seen[wrong[0]])
      return b, (
        f"event {stop_B[b] - 1} happened at {last[wrong[0]]}, which is not before the example at "
        f"{time_B[b]}"
      )
    return None

  def batch(
    self,
    stop_B: np.ndarray,
    lengths_B: np.ndarray,
    time_B: np.ndarray,
    shards: int,
    capacity: int,
    words: Callable[[np.ndarray], np.ndarray],
  ) -> Events:
    """The last `lengths_B` events before `stop_B`, each shard's at the front of its `capacity`."""
    events_NB = lengths_B.reshape(shards, -1).astype(np.int64)
    first_NB = np.cumsum(events_NB, 1) - events_NB + np.arange(shards)[:, None] * capacity
    total = int(lengths_B.sum())
    # Slots and events both count up within an example: two shifts of one running number.
    number = np.arange(total) - np.repeat(np.cumsum(lengths_B) - lengths_B, lengths_B)
    slot = number + np.repeat(first_NB.reshape(-1), lengths_B)
    event = number + np.repeat(stop_B - lengths_B, lengths_B)
    ids_KC = np.full((shards * capacity, len(self._ids)), MISSING, self._ids[0].dtype)
    for c, ids_E in enumerate(self._ids):
      ids_KC[slot, c] = ids_E[event]
    age_K = np.zeros(shards * capacity, np.int32)
    age = np.repeat(time_B, lengths_B) - self._time_E[event]
    age_K[slot] = np.minimum(age, np.iinfo(np.int32).max)
    return Events(ids_EC=words(ids_KC), age_E=age_K, lengths_B=lengths_B.astype(np.int32))


def _crc32(path: pathlib.Path) -> int:
  crc = 0
  with open(path, "rb") as file:
    while piece := file.read(_PIECE):
      crc = zlib.crc32(piece, crc)
  return crc
