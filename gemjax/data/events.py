"""Events: the rows of a history as raw data has them, in the order in which they are stored.

Memory holds a user's number, a time and a row of each column for every event.
Letters: E events, U users, B examples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np
import polars as pl

from gemjax.data import values
from gemjax.data.histories import by_user, locate
from gemjax.data.raw import Chunk
from gemjax.data.schema import Schema


@dataclasses.dataclass(frozen=True, slots=True)
class EventTable:
  """User after user in order of time; user u has the events offsets_U1[u] .. offsets_U1[u + 1]."""

  users: dict[str, int]
  ids: dict[str, np.ndarray]
  time_E: np.ndarray
  offsets_U1: np.ndarray

  def before(self, users: pl.Series, time_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(start_B, stop_B): the events of each user that happened strictly before its example."""
    user_B = number(users, self.users, grow=False)
    return locate(self.offsets_U1, self.time_E, user_B, time_B)


def read_events(
  chunks: Iterable[Chunk],
  history: str,
  schema: Schema,
  rows: Callable[[str, pl.Series], np.ndarray],
) -> EventTable:
  """All events of a history; `rows` turns the texts of a column into rows of its table.

  Raises RawDataError with the row for a user or time that is missing, or a time that is no number.
  """
  user, time, *names = schema.read_of(history)
  users: dict[str, int] = {}
  parts = []
  for chunk in chunks:
    texts = values.texts(chunk, user, schema.missing_values)
    values.complete(chunk, user, texts.is_null().to_numpy(), "an event belongs to a user")
    part = {
      name: rows(name, values.categories(chunk, name, column, schema.missing_values))
      for name, column in schema.histories[history].columns.items()
    }
    parts.append((number(texts, users), values.seconds(chunk, time, schema.missing_values), part))
  user_E, time_E = (np.concatenate(x) for x in list(zip(*parts))[:2])
  order_E, offsets_U1 = by_user(user_E, time_E, len(users))
  ids = {name: np.concatenate([part[name] for _, _, part in parts])[order_E] for name in names}
  return EventTable(users, ids, time_E[order_E], offsets_U1)


def number(texts: pl.Series, known: dict[str, int], *, grow: bool = True) -> np.ndarray:
  """int64 number of every text in `known`; a new one gets the next number, or -1 if not `grow`."""
  coded = texts.rechunk().to_arrow().dictionary_encode()
  found = coded.dictionary.to_pylist()
  if grow:
    numbers = [known.setdefault(text, len(known)) for text in found]
  else:
    numbers = [known.get(text, -1) for text in found]
  return np.asarray(numbers, np.int64)[coded.indices.to_numpy(zero_copy_only=False)]
