"""Encoding: fits features on the train split, then turns chunks of raw rows into block columns.

Letters: B examples, E events of one sequence.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
from collections.abc import Callable, Iterable

import numpy as np

from gemjax.data import values
from gemjax.data.blocks import Columns
from gemjax.data.events import EventTable, number, read_events
from gemjax.data.raw import Chunk, RawDataError
from gemjax.data.schema import Schema
from gemjax.data.vocabulary import Counter, Hash, Vocabulary, digest
from gemjax.features import (
  MISSING,
  RESERVED,
  UNLABELLED,
  Dense,
  EventColumn,
  FeatureSet,
  History,
  Sequence,
  Sparse,
)


@dataclasses.dataclass(slots=True)
class Moments:
  """Running mean and sum of squared deviations in float64 (Chan et al. 1983).

  All is measured from the first value, so that a constant deviates by exactly 0.
  """

  count: int = 0
  first: float = 0.0
  offset: float = 0.0  # Mean of x - first.
  squares: float = 0.0
  missing: bool = False  # Whether any value was.

  def add(self, x_B: np.ndarray) -> None:
    present = x_B[~np.isnan(x_B)]
    self.missing |= len(present) < len(x_B)
    if not len(present):
      return
    if not self.count:
      self.first = float(present[0])
    with np.errstate(over="ignore", invalid="ignore"):
      present = present - self.first
      n, mean = self.count + len(present), present.mean()
      delta = mean - self.offset
      self.squares += float(
        np.square(present - mean).sum() + delta**2 * (self.count * len(present) / n)
      )
      self.offset += float(delta * (len(present) / n))
    self.count = n

  @property
  def mean(self) -> float:
    return self.first + self.offset

  @property
  def std(self) -> float:
    """1 where nothing varies, so that a constant is stored as 0."""
    return math.sqrt(self.squares / self.count) or 1.0 if self.count else 1.0


class Encoder:
  """Turns rows into columns of a prepared block; made by `fit`, keeps the index of users."""

  def __init__(
    self, schema: Schema, moments: dict[str, Moments], tables: dict[str, Vocabulary | Hash]
  ):
    self._schema, self._tables = schema, tables
    self._users: dict[str, int] = {}
    self._past: dict[str, EventTable] = {}
    self._threads = concurrent.futures.ThreadPoolExecutor()  # numpy and polars leave the GIL.
    dense = []
    for name, m in moments.items():
      transform = schema.columns[name].transform
      dense.append(Dense(name=name, transform=transform, mean=m.mean, std=m.std))
      if m.missing and schema.columns[name].missing == "keep":
        dense.append(Dense(name=f"{name}.missing"))
    self.vocabularies = {t: v.values for t, v in tables.items() if isinstance(v, Vocabulary)}
    self.features = FeatureSet(
      dense=tuple(dense),
      sparse=tuple(Sparse(**self._table(n)) for n in schema.of_kind("sparse")),
      sequence=tuple(
        Sequence(**self._table(n), max_length=c.max_length)
        for n, c in schema.of_kind("sequence").items()
      ),
      history=tuple(
        History(
          name=h,
          columns=tuple(EventColumn(**self._table(f"{h}.{n}") | {"name": n}) for n in rule.columns),
          max_length=rule.max_length,
        )
        for h, rule in schema.histories.items()
      ),
      tasks=tuple(schema.of_kind("label")),
      optional=tuple(n for n, c in schema.of_kind("label").items() if c.optional),
      grouped=bool(schema.user),
      vocabularies=digest(self.vocabularies),
    )

  def _table(self, name: str) -> dict:
    column = self._schema.categories[name]
    table = column.table or name
    size = self._tables[table].size
    kind = {"encoding": column.encoding, "hash_seed": column.seed}
    return {"name": name, "table": table, "size": size, **kind}

  def events(self, history: History, chunks: Iterable[Chunk]) -> EventTable:
    """The encoded events of a history, which `encode` looks for those of its examples in."""
    tables = {column.name: column.table for column in history.columns}
    rows = lambda name, texts: self._rows(tables[name], texts)
    found = self._past[history.name] = read_events(chunks, history.name, self._schema, rows)
    return found

  def encode(self, chunk: Chunk) -> Columns:
    """The columns that `PreparedWriter.add` takes; raises RawDataError with the row."""
    B, schema = len(chunk.frame), self._schema
    dense_BF = np.zeros((B, len(self.features.dense)), np.float32)
    for f, feature in enumerate(self.features.dense):
      if feature.name in schema.columns:
        x_B = values.dense(chunk, feature.name, schema)
        missing_B = np.isnan(x_B)
        with np.errstate(over="ignore"):
          dense_BF[:, f] = np.where(missing_B, 0, (x_B - feature.mean) / feature.std)
        if len(wrong := np.flatnonzero(np.isinf(dense_BF[:, f]))):
          raise RawDataError(
            f"{chunk.at(wrong[0])}: column {feature.name!r} is {x_B[wrong[0]]:g}, too large "
            "for float32 once standardised; mend the row or give the column transform = 'log1p'"
          )
      else:  # <name>.missing comes right behind <name>.
        dense_BF[:, f] = missing_B
    ids_BS = np.zeros((B, len(self.features.sparse)), self.features.id_dtype)

    def fill(s: int, feature: Sparse) -> None:
      column = schema.columns[feature.name]
      texts = values.categories(chunk, feature.name, column, schema.missing_values)
      ids_BS[:, s] = self._rows(feature.table, texts)

    list(self._threads.map(fill, *zip(*enumerate(self.features.sparse))))
    label_BT = np.stack([self._label(chunk, t) for t in self.features.tasks], axis=1)
    columns = {"dense": dense_BF, "ids": ids_BS, "label": label_BT}
    if schema.user:
      texts = values.texts(chunk, schema.user, schema.missing_values)
      values.complete(chunk, schema.user, texts.is_null().to_numpy(), "it names the user")
      columns["group"] = number(texts, self._users).astype(np.int32)
    for name, past in self._past.items():
      columns["time"] = values.seconds(chunk, schema.time, schema.missing_values)
      found = past.before(texts, columns["time"])
      columns[f"{name}.start"], columns[f"{name}.stop"] = found
    for feature in self.features.sequence:
      texts_E, lengths_B = values.events(chunk, feature.name, schema)
      columns[f"{feature.name}.values"] = self._rows(feature.table, texts_E)
      columns[f"{feature.name}.lengths"] = lengths_B
    return columns

  def _rows(self, table: str, texts) -> np.ndarray:
    rows = self._tables[table].rows(texts.fill_null(""))
    rows = rows.astype(self.features.id_dtype, copy=False)  # A table's size decides: none is cut.
    return np.where(texts.is_null().to_numpy(), rows.dtype.type(MISSING), rows)

  def _label(self, chunk: Chunk, name: str) -> np.ndarray:
    x_B = values.numbers(chunk, name, self._schema.missing_values)
    missing_B, column = np.isnan(x_B), self._schema.columns[name]
    if not column.optional:
      values.complete(chunk, name, missing_B, "a label is needed")
    if column.threshold is not None:
      x_B = np.where(missing_B, x_B, x_B >= column.threshold)
    if len(wrong := np.flatnonzero(~missing_B & (x_B != 0) & (x_B != 1))):
      raise RawDataError(
        f"{chunk.at(wrong[0])}: label {name!r} must be 0 or 1, but is {x_B[wrong[0]]:g}; mend it, "
        "or give the column a `threshold`"
      )
    return np.where(missing_B, UNLABELLED, x_B).astype(np.uint8)


def fit(
  schema: Schema, chunks: Iterable[Chunk], events: Callable[[str], Iterable[Chunk]]
) -> Encoder:
  """Reads the train split once for means, deviations and vocabularies; returns the encoder.

  `events` reads those of a history; vocabularies count the ones before the last train example.
  """
  moments = {n: Moments() for n in schema.of_kind("dense")}
  unlabelled = {n for n, c in schema.of_kind("label").items() if c.optional}
  categories = schema.categories
  of_examples = {n: c for n, c in categories.items() if n in schema.columns}
  end = -math.inf  # Of the train split.
  tables = {c.table or n: c for n, c in categories.items()}
  counters = {t: Counter() for t, c in tables.items() if c.encoding == "vocabulary"}
  for chunk in chunks:
    if schema.histories:
      end = max(end, values.seconds(chunk, schema.time, schema.missing_values).max())
    unlabelled -= {
      n for n in unlabelled if not np.isnan(values.numbers(chunk, n, schema.missing_values)).all()
    }
    for name, moment in moments.items():
      moment.add(values.dense(chunk, name, schema))
      if not math.isfinite(moment.squares):
        raise RawDataError(
          f"{chunk.path}: column {name!r} holds values too large to standardise; mend them or "
          "give the column transform = 'log1p'"
        )
    for name, column in of_examples.items():
      if column.encoding == "hash":
        continue
      sequence = column.kind == "sequence"
      texts = (
        values.events(chunk, name, schema)[0]
        if sequence
        else values.categories(chunk, name, column, schema.missing_values)
      )
      counters[column.table or name].add(texts)
  if unlabelled:
    raise RawDataError(
      f"{chunk.path}: label {min(unlabelled)!r} is missing in every row of the train split: "
      "nothing can be learnt of it; mend the rows or drop its column from the schema"
    )
  for history, rule in schema.histories.items():
    counted = [n for n, c in rule.columns.items() if c.encoding == "vocabulary"]
    for chunk in events(history) if counted else ():
      time_E = values.seconds(chunk, schema.read_of(history)[1], schema.missing_values)
      chunk = chunk.where(time_E < end)
      for name in counted:
        column = rule.columns[name]
        texts = values.categories(chunk, name, column, schema.missing_values)
        counters[column.table or f"{history}.{name}"].add(texts)
  fitted = {}
  for table, c in tables.items():
    if c.encoding == "hash":
      fitted[table] = Hash(c.rows, c.seed)
    else:
      limit = c.rows - RESERVED if c.rows else 0
      fitted[table] = Vocabulary(counters[table].values(min_count=c.min_count, limit=limit))
  return Encoder(schema, moments, fitted)
