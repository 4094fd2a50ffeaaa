"""Values: the columns of a chunk as texts, numbers and lists, each checked row by row.

Letters: B rows, E events of one sequence column.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import polars as pl

from gemjax.data.raw import Chunk, RawDataError
from gemjax.data.schema import Column, Schema


def texts(chunk: Chunk, name: str, missing_values: tuple[str, ...] = ("",)) -> pl.Series:
  """The values of a column as texts, null where missing.

  Whole numbers read alike from text and from Parquet, also where Parquet made them floats.
  """
  return _texts(chunk.frame[name], chunk, name, missing_values)


def _texts(x: pl.Series, chunk: Chunk, name: str, missing_values: tuple[str, ...]) -> pl.Series:
  if x.dtype.is_nested() or x.dtype in (pl.Binary, pl.Object):
    raise RawDataError(
      f"{chunk.path}: column {name!r} holds {x.dtype}, but one value a row is needed; "
      "make its kind 'sequence' or write it as text"
    )
  if x.dtype.is_float():
    x = x.fill_nan(None)
    whole = x.cast(pl.Int64, strict=False)
    x = whole.cast(pl.String).zip_with((whole == x).fill_null(False), x.cast(pl.String))
  x = x.cast(pl.String)
  if missing_values == ("",):
    return x.set(x == "", None) if x.len() else x
  return x.set(x.is_in(missing_values), None) if x.len() else x


def numbers(chunk: Chunk, name: str, missing_values: tuple[str, ...] = ("",)) -> np.ndarray:
  """The values of a column as float64, NaN where missing; raises RawDataError with the row.

  Dates, times and durations are microseconds.
  """
  x = chunk.frame[name]
  if x.dtype in (pl.Date, pl.Datetime, pl.Duration):  # Files may have them in different units.
    x = (x.cast(pl.Datetime) if x.dtype == pl.Date else x).dt.cast_time_unit("us")
  if x.dtype.is_temporal():
    x = x.to_physical()
  if x.dtype.is_nested() or x.dtype in (pl.Binary, pl.Object):
    raise RawDataError(f"{chunk.path}: column {name!r} must hold numbers, but holds {x.dtype}")
  if x.dtype == pl.String:
    x = texts(chunk, name, missing_values)
    y = x.cast(pl.Float64, strict=False)
    wrong = np.flatnonzero((y.is_null() & x.is_not_null()).to_numpy())
    if len(wrong):
      raise RawDataError(
        f"{chunk.at(wrong[0])}: column {name!r} must be a number, but is {x[int(wrong[0])]!r}; "
        "mend it, or leave it empty where it is missing"
      )
  else:
    y = x.cast(pl.Float64)
    if missing_values != ("",):
      y = y.set(texts(chunk, name, missing_values).is_null(), None)
  y_B = y.fill_null(math.nan).to_numpy()
  if len(wrong := np.flatnonzero(np.isinf(y_B))):
    raise RawDataError(
      f"{chunk.at(wrong[0])}: column {name!r} must be finite, but is {y_B[wrong[0]]}; mend it, "
      "or leave it empty where it is missing"
    )
  return y_B


def seconds(chunk: Chunk, name: str, missing_values: tuple[str, ...] = ("",)) -> np.ndarray:
  """The values of a column of times as whole seconds, int64; none may be missing."""
  x = chunk.frame[name]
  if x.dtype in (pl.Date, pl.Datetime):
    frame = chunk.frame.with_columns(x.dt.epoch("s"))
    chunk = dataclasses.replace(chunk, frame=frame)
  x_B = numbers(chunk, name, missing_values)
  complete(chunk, name, np.isnan(x_B), "the past of an example is found by it")
  if len(wrong := np.flatnonzero(np.abs(x_B) >= 2**53)):
    raise RawDataError(
      f"{chunk.at(wrong[0])}: column {name!r} must be seconds, but is {x_B[wrong[0]]:g}; mend it"
    )
  return np.floor(x_B).astype(np.int64)


def complete(chunk: Chunk, name: str, missing_B: np.ndarray, why: str) -> None:
  """Raises RawDataError with the first row where `name` is missing, if there is one."""
  if len(wrong := np.flatnonzero(missing_B)):
    raise RawDataError(f"{chunk.at(wrong[0])}: column {name!r} is missing, but {why}; mend the row")


def dense(chunk: Chunk, name: str, schema: Schema) -> np.ndarray:
  """f(x), NaN where missing."""
  column = schema.columns[name]
  x_B = numbers(chunk, name, schema.missing_values)
  if column.missing == "error":
    complete(chunk, name, np.isnan(x_B), "its schema says missing = 'error'")
  return np.sign(x_B) * np.log1p(np.abs(x_B)) if column.transform == "log1p" else x_B


def categories(
  chunk: Chunk, name: str, column: Column, missing_values: tuple[str, ...] = ("",)
) -> pl.Series:
  """The categories of a sparse column; null where missing."""
  x = texts(chunk, name, missing_values)
  if column.missing == "error":
    complete(chunk, name, x.is_null().to_numpy(), "its schema says missing = 'error'")
  return x


def events(chunk: Chunk, name: str, schema: Schema) -> tuple[pl.Series, np.ndarray]:
  """The last `max_length` events of every list, one behind the other, and the lists' lengths."""
  column, x = schema.columns[name], chunk.frame[name]
  if x.dtype == pl.String and column.separator:
    x = texts(chunk, name, schema.missing_values).str.split(column.separator)
  if not isinstance(x.dtype, pl.List | pl.Array):
    raise RawDataError(
      f"{chunk.path}: column {name!r} is a sequence, but holds {x.dtype} and not lists; "
      "write lists to Parquet, or texts and give the column a `separator`"
    )
  if isinstance(x.dtype, pl.Array):
    x = x.arr.to_list()
  if column.missing == "error":
    complete(chunk, name, x.is_null().to_numpy(), "its schema says missing = 'error'")
  x = x.list.tail(column.max_length)
  lengths_B = x.list.len().fill_null(0).to_numpy().astype(np.int32)
  events_E = x.filter(pl.Series(lengths_B > 0)).explode()  # An empty list would become a null.
  return _texts(events_E, chunk, name, schema.missing_values), lengths_B
