"""MovieLens: ratings with the user's and the movie's side and the user's true past.

An example is a rating; its label says rating >= 4. The history `rated` holds all movies that the
user came to, with the rating where it is known and the movie's first genre. Both sets are read as
GroupLens publishes them and as typed tables (RecBole's files for 100K, chronological CSV for 1M).
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import polars as pl

from gemjax.data.raw import BATCH_ROWS, Chunk, RawDataError, Source, TextFile
from gemjax.data.schema import Column, HistoryRule, Schema, SplitRule
from gemjax.data.values import complete, numbers

_SCHEMA = Schema(
  columns={
    "label": Column(kind="label", threshold=4.0),
    "user": Column(kind="sparse"),
    "item": Column(kind="sparse"),
    "age": Column(kind="sparse"),
    "gender": Column(kind="sparse"),
    "occupation": Column(kind="sparse"),
    "zip": Column(kind="sparse"),  # The first three digits: a region.
    "year": Column(kind="sparse"),
    "genres": Column(kind="sequence", max_length=10, table="genre"),
  },
  histories={
    "rated": HistoryRule(
      columns={n: Column(kind="sparse", table=n) for n in ("item", "rating", "genre")},
      max_length=2000,
    )
  },
  split=SplitRule(by="time"),
  user="user",
  time="time",
)


@dataclasses.dataclass(frozen=True, slots=True)
class _Layout:
  """Three files, and how their columns become ours."""

  events: TextFile
  users: TextFile
  items: TextFile
  event_names: dict[str, str]  # Ours: theirs.
  user_names: dict[str, str]
  item_columns: Callable[[pl.DataFrame], pl.DataFrame]  # -> item, year, genres
  item_key: str = "item"


@dataclasses.dataclass(slots=True)
class _Tables:
  """The three files together; they are small and kept in memory once read."""

  layout: _Layout
  _events: Chunk | None = None
  _examples: Chunk | None = None

  @property
  def events(self) -> Chunk:
    """All events in the order of the file, with the movie's side."""
    self._events = self._events or self._load_events()
    return self._events

  @property
  def examples(self) -> Chunk:
    """The rated events, with the user's side as well."""
    self._examples = self._examples or self._load_examples()
    return self._examples

  def _load_events(self) -> Chunk:
    files = self.layout
    events = _renamed(files.events, files.event_names)
    for name, kind in (("user", int), ("item", int), ("time", float), ("label", float)):
      events = _numbered(events, name, kind)
    items = _numbered(_whole(files.items), files.item_key, int).frame
    items = files.item_columns(items.rename({files.item_key: "item"}))
    items = items.with_columns(pl.col("genres").list.first().alias("genre"))
    known = pl.col("label") > 0  # 0 stands for an unknown rating.
    frame = events.frame.with_columns(pl.when(known).then("label").alias("rating"))
    return dataclasses.replace(events, frame=_joined(frame, items, "item"))

  def _load_examples(self) -> Chunk:
    files = self.layout
    users = _numbered(_renamed(files.users, files.user_names), "user", int).frame
    users = users.with_columns(pl.col("zip").str.slice(0, 3))
    rated = self.events.where(self.events.frame["rating"].is_not_null().to_numpy())
    if not len(rated.frame):
      raise RawDataError(f"{files.events.path} holds no known rating; give it ratings of 1 to 5")
    return dataclasses.replace(rated, frame=_joined(rated.frame, users, "user"))


@dataclasses.dataclass(frozen=True, slots=True)
class MovieLens:
  """A reader of the events of a MovieLens, or of those that are examples."""

  tables: _Tables
  examples: bool

  @property
  def path(self) -> pathlib.Path:
    return self.tables.layout.events.path

  @property
  def size(self) -> int:
    return self.tables.layout.events.size

  def chunks(self, columns: Sequence[str]) -> Iterator[Chunk]:
    whole = self.tables.examples if self.examples else self.tables.events
    for start in range(0, len(whole.frame), BATCH_ROWS):
      rows = slice(start, start + BATCH_ROWS)
      frame = whole.frame[rows].select(columns)
      share = self.size * len(frame) // len(whole.frame)
      yield dataclasses.replace(whole, frame=frame, rows_B=whole.rows_B[rows], bytes=share)


def _source(layout: _Layout) -> Source:
  tables = _Tables(layout)
  examples, events = MovieLens(tables, examples=True), MovieLens(tables, examples=False)
  return Source(_SCHEMA, {"": (examples,)}, {"rated": (events,)})


def movielens_100k(path: pathlib.Path) -> Source:
  """`ml-100k.{inter,user,item}`, or the published u.data, u.user, u.item and u.genre."""
  if _has(path, "ml-100k.inter", "ml-100k.user", "ml-100k.item"):
    read = lambda kind: TextFile(path / f"ml-100k.{kind}", "\t", quote=None)
    layout = _Layout(
      events=read("inter"),
      users=read("user"),
      items=read("item"),
      event_names={
        "user": "user_id:token",
        "item": "item_id:token",
        "label": "rating:float",
        "time": "timestamp:float",
      },
      user_names={n: f"{n}:token" for n in ("age", "gender", "occupation")}
      | {"user": "user_id:token", "zip": "zip_code:token"},
      item_columns=lambda t: t.select(
        "item",
        pl.col("release_year:token").alias("year"),
        pl.col("class:token_seq").str.split(" ").alias("genres"),
      ),
      item_key="item_id:token",
    )
  elif _has(path, "u.data", "u.user", "u.item", "u.genre"):
    lines = (path / "u.genre").read_text().split()  # Its last line is blank.
    genres = [line.split("|")[0] for line in lines]
    names = ("item", "title", "date", "video", "url", *genres)
    layout = _Layout(
      events=_file(path / "u.data", "\t", "user item label time"),
      users=_file(path / "u.user", "|", "user age gender occupation zip"),
      items=TextFile(path / "u.item", "|", names, None, "latin-1"),
      event_names=_same("user item label time"),
      user_names=_same("user age gender occupation zip"),
      item_columns=lambda t: t.select(
        "item",
        pl.col("date").str.slice(-4).alias("year"),
        pl.concat_list(pl.when(pl.col(g) == "1").then(pl.lit(g)) for g in genres)
        .list.drop_nulls()
        .alias("genres"),
      ),
    )
  else:
    raise RawDataError(
      f"{path} must hold ml-100k.inter, .user and .item, or u.data, u.user, u.item and u.genre"
    )
  return _source(layout)


def movielens_1m(path: pathlib.Path) -> Source:
  """`interactions_chronological.csv`, `users.tsv` and `movies.tsv`, or the published *.dat.

  In the first, events of rating 0 are known only to have happened: they are past, no examples.
  """
  events, users = "user item label time", "user gender age occupation zip"
  if _has(path, "interactions_chronological.csv", "users.tsv", "movies.tsv"):
    layout = _Layout(
      events=TextFile(path / "interactions_chronological.csv", quote=None),
      users=_file(path / "users.tsv", "\t", users),
      items=_file(path / "movies.tsv", "\t", "item title genres"),
      event_names={"user": "user_id", "item": "item_id", "label": "rating", "time": "timestamp"},
      user_names=_same(users),
      item_columns=_titled,
    )
  elif _has(path, "ratings.dat", "users.dat", "movies.dat"):
    layout = _Layout(
      events=_file(path / "ratings.dat", "::", events),
      users=_file(path / "users.dat", "::", users),
      items=dataclasses.replace(
        _file(path / "movies.dat", "::", "item title genres"), encoding="latin-1"
      ),
      event_names=_same(events),
      user_names=_same(users),
      item_columns=_titled,
    )
  else:
    raise RawDataError(
      f"{path} must hold interactions_chronological.csv, users.tsv and movies.tsv, "
      "or ratings.dat, users.dat and movies.dat"
    )
  return _source(layout)


def is_movielens_100k(path: pathlib.Path) -> bool:
  return _has(path, "ml-100k.inter") or _has(path, "u.data", "u.user", "u.item")


def is_movielens_1m(path: pathlib.Path) -> bool:
  return any(
    _has(path, *names)
    for names in (
      ("interactions_chronological.csv", "users.tsv", "movies.tsv"),
      ("ratings.dat", "users.dat", "movies.dat"),
    )
  )


def _titled(items: pl.DataFrame) -> pl.DataFrame:
  return items.select(
    "item",
    pl.col("title").str.extract(r"\((\d{4})\)\s*$").alias("year"),
    pl.col("genres").str.split("|"),
  )


def _joined(frame: pl.DataFrame, side: pl.DataFrame, key: str) -> pl.DataFrame:
  return frame.join(side.unique(key), on=key, how="left", maintain_order="left")


def _whole(file: TextFile, columns: Sequence[str] | None = None) -> Chunk:
  chunks = list(file.chunks(columns or file.names or _header(file)))
  frame = pl.concat([c.frame for c in chunks])
  rows_B = np.concatenate([c.rows_B for c in chunks])
  return dataclasses.replace(chunks[0], frame=frame, rows_B=rows_B)


def _header(file: TextFile) -> list[str]:
  with open(file.path, encoding=file.encoding) as lines:
    return lines.readline().rstrip("\r\n").split(file.delimiter)


def _renamed(file: TextFile, names: dict[str, str]) -> Chunk:
  chunk = _whole(file, list(names.values()))
  return dataclasses.replace(chunk, frame=chunk.frame.rename({v: k for k, v in names.items()}))


def _numbered(chunk: Chunk, name: str, kind: type) -> Chunk:
  x_B = numbers(chunk, name)
  complete(chunk, name, np.isnan(x_B), "every row needs it")
  column = pl.Series(name, x_B).cast(kind)
  return dataclasses.replace(chunk, frame=chunk.frame.with_columns(column))


def _file(path: pathlib.Path, delimiter: str, names: str) -> TextFile:
  return TextFile(path, delimiter, tuple(names.split()), None)


def _same(names: str) -> dict[str, str]:
  return {n: n for n in names.split()}


def _has(path: pathlib.Path, *names: str) -> bool:
  return all((path / n).is_file() for n in names)
