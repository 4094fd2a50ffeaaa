"""Schema: what the columns of a raw data set mean, declared and checked before any work.

A user's own table is described by a TOML file; columns that it does not name are not read:

  user = "user_id"             # Groups the GAUC. Optional.
  time = "timestamp"           # A number, in any unit. Only `split.by = "time"` needs it.
  missing_values = ["", "NA"]  # Texts that stand for "no value".
  delimiter = ";"              # Of text files. Default: a tab, or a comma in *.csv.
  names = ["click", "ad"]      # Of text files without a header line.
  [split]
  by = "time"                  # files | time | order | random
  fractions = [0.8, 0.1, 0.1]
  seed = 0                     # Of `random`.
  [columns.click]
  kind = "label"               # 0 or 1; with `threshold = 4.0` the label is "value >= 4".
  optional = true              # A row without it teaches this task nothing: how domains have
                               # objectives of their own. Default: every row needs it.
  [columns.price]
  kind = "dense"
  transform = "log1p"          # identity | log1p: sign(x) log(1 + |x|)
  missing = "mean"             # keep: mean and a column `price.missing` | mean | error
  [columns.ad]
  kind = "sparse"
  encoding = "vocabulary"      # Rarer than `min_count` is unknown; `rows` is a limit, 0 = none.
  min_count = 2
  missing = "error"            # keep: row 0 | error
  [columns.past_ads]
  kind = "sequence"
  separator = "|"              # Of texts; Parquet may hold lists.
  max_length = 20              # The last 20 are kept.
  table = "ad"                 # Shares the rows of column `ad`, and so has its encoding.
  min_count = 2
  [columns.query]
  kind = "sparse"
  encoding = "hash"
  rows = 100000                # The two reserved ones included.
  seed = 7
  [histories.clicks]           # What users did; an example sees what its user did before it.
  file = "clicks.csv"          # With a header. Relative to the table, in any order.
  user = "user_id"             # Default: as the table's `user`, which must be given.
  time = "timestamp"           # Likewise. Both times are then seconds; fractions are cut.
  max_length = 1000            # The last 1000 before an example are seen.
  [histories.clicks.columns.ad]
  table = "ad"                 # All fields of sparse columns.

Vocabularies are fitted on the train split, and on the events before its last example.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from gemjax.features import MAX_ROWS, RESERVED

SPLITS = ("train", "valid", "test")
_ENCODED = {"encoding", "rows", "min_count", "seed", "table", "missing"}
FIELDS = {
  "dense": {"transform", "missing"},
  "sparse": _ENCODED,
  "sequence": _ENCODED | {"max_length", "separator"},
  "label": {"threshold", "optional"},
}
_NAME = re.compile(r"[\w-]+")  # Of histories and their columns: files are named by them.
_CHOICES = {
  "encoding": ("vocabulary", "hash"),
  "transform": ("identity", "log1p"),
  "missing": ("keep", "mean", "error"),
  "by": ("files", "time", "order", "random"),
}


class SchemaError(ValueError):
  """A schema that says something unknown, impossible or contradictory."""


def check_value(name: str, value: Any, default: Any) -> None:
  if name in _CHOICES and value not in _CHOICES[name]:
    raise SchemaError(f"{name} {value!r} is unknown; choose from {list(_CHOICES[name])}")
  number = isinstance(value, int | float) and not isinstance(value, bool)
  if name == "threshold" and not (number and abs(value) < 1e308):
    raise SchemaError(f"threshold must be a finite number, got {value!r}")
  if type(default) is int and type(value) is not int:
    raise SchemaError(f"{name} must be a whole number, got {value!r}")
  if type(default) is bool and type(value) is not bool:
    raise SchemaError(f"{name} must be true or false, got {value!r}")
  if type(default) is str and type(value) is not str:
    raise SchemaError(f"{name} must be a text, got {value!r}")
  if type(default) is tuple and not isinstance(value, list | tuple):
    raise SchemaError(f"{name} must be a list, got {value!r}")
  if name in ("missing_values", "names") and not all(type(x) is str for x in value):
    raise SchemaError(f"{name} must be a list of texts, got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Column:
  """One column; which fields a kind has is said by `FIELDS`, what they mean by the module."""

  kind: str
  encoding: str = "vocabulary"
  rows: int = 0
  min_count: int = 1
  seed: int = 0
  table: str = ""  # Empty: a table of its own, named like the column.
  missing: str = "keep"
  transform: str = "identity"
  max_length: int = 50
  separator: str = ""
  threshold: float | None = None
  optional: bool = False

  def __post_init__(self):
    if not isinstance(self.kind, str) or self.kind not in FIELDS:
      raise SchemaError(f"kind {self.kind!r} is unknown; choose from {list(FIELDS)}")
    for field in dataclasses.fields(self)[1:]:
      value = getattr(self, field.name)
      if value == field.default and type(value) is type(field.default):
        continue
      if field.name not in FIELDS[self.kind]:
        allowed = sorted(FIELDS[self.kind])
        raise SchemaError(f"kind {self.kind!r} has no field {field.name!r}, only {allowed}")
      check_value(field.name, value, field.default)
    if self.missing == "mean" and self.kind != "dense":
      raise SchemaError(f"missing = 'mean' is for dense columns, but the kind is {self.kind!r}")
    if self.encoding == "hash" and self.rows <= RESERVED:
      raise SchemaError(
        f"a hash needs rows >= {RESERVED + 1} (two are reserved), but rows = {self.rows}"
      )
    if not 0 <= self.rows <= MAX_ROWS:
      raise SchemaError(f"rows must be from 0 to 2^40, got {self.rows}")
    if self.encoding == "hash" and self.min_count > 1:
      raise SchemaError(f"a hash counts nothing, but min_count = {self.min_count}; drop it")
    if self.encoding == "vocabulary" and 0 < self.rows <= RESERVED:
      raise SchemaError(
        f"rows = {self.rows} leaves no room for a value (two are reserved); raise it or drop it"
      )
    if self.encoding == "vocabulary" and self.seed:
      raise SchemaError(f"a vocabulary needs no seed, but seed = {self.seed}; drop it")
    for name in ("min_count", "max_length"):
      if getattr(self, name) < 1:
        raise SchemaError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SplitRule:
  """How rows become train, valid and test: `files` as given, else by a key of each row."""

  by: str = "files"
  fractions: tuple[float, ...] = (0.8, 0.1, 0.1)
  seed: int = 0

  def __post_init__(self):
    check_value("by", self.by, "files")
    f = self.fractions
    if len(f) != 3 or not all(isinstance(x, int | float) and x > 0 for x in f):
      raise SchemaError(f"split.fractions must be three positive numbers, got {list(f)}")
    if abs(sum(f) - 1) > 1e-9:
      raise SchemaError(f"split.fractions must add up to 1, but {list(f)} add up to {sum(f):g}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HistoryRule:
  """Events of users, and which of their columns are read."""

  columns: dict[str, Column]  # All sparse.
  file: str = ""
  user: str = ""
  time: str = ""
  max_length: int = 1000

  def __post_init__(self):
    if not self.columns:
      raise SchemaError("it has no column; write [histories.NAME.columns.X]")
    for name, column in self.columns.items():
      if column.kind != "sparse":
        raise SchemaError(f"column {name!r} must be sparse, but its kind is {column.kind!r}")
      if not _NAME.fullmatch(name) or name in ("time", "offsets"):
        raise SchemaError(
          f"column {name!r}: the name must be of letters, digits, _ and -, and not time or offsets"
        )
    if self.max_length < 1:
      raise SchemaError(f"max_length must be at least 1, got {self.max_length}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Schema:
  """The columns of a raw data set by name, in the order of the features, and its splits."""

  columns: dict[str, Column]
  split: SplitRule = SplitRule()
  user: str = ""
  time: str = ""
  missing_values: tuple[str, ...] = ("",)
  delimiter: str = ""
  names: tuple[str, ...] = ()
  histories: dict[str, HistoryRule] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if not self.of_kind("label"):
      raise SchemaError("the schema has no label; give one column kind = 'label'")
    if len(self.of_kind("label")) == len(self.columns) and not self.histories:
      raise SchemaError("the schema has no feature; give a column kind dense, sparse or sequence")
    if not self.delimiter.isascii() or set(self.delimiter) & set('"\r\n'):
      raise SchemaError(
        f"delimiter must be of ASCII without quote and line end, got {self.delimiter!r}"
      )
    if self.split.by == "time" and not self.time:
      raise SchemaError("split.by = 'time' needs `time = COLUMN` in the schema")
    for name in self.histories:
      if not (self.user and self.time):
        raise SchemaError(
          f"history {name!r} needs `user = COLUMN` and `time = COLUMN` of the examples"
        )
      if not _NAME.fullmatch(name):
        raise SchemaError(f"history {name!r}: the name must be of letters, digits, _ and -")
      if name in self.columns:
        raise SchemaError(f"history {name!r} is named like a column; rename one of them")
    tables: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, column in self.categories.items():
      mine = {k: getattr(column, k) for k in ("encoding", "rows", "min_count", "seed")}
      first, theirs = tables.setdefault(column.table or name, (name, mine))
      for key, value in mine.items():
        if value != theirs[key]:
          raise SchemaError(
            f"columns {first!r} and {name!r} share table {column.table or name!r}, but {key} is "
            f"{theirs[key]!r} for one and {value!r} for the other; make them equal"
          )

  def of_kind(self, kind: str) -> dict[str, Column]:
    return {n: c for n, c in self.columns.items() if c.kind == kind}

  @property
  def categories(self) -> dict[str, Column]:
    """All columns with a table: sparse, sequence, and HISTORY.COLUMN of the histories."""
    events = {f"{h}.{n}": c for h, rule in self.histories.items() for n, c in rule.columns.items()}
    return self.of_kind("sparse") | self.of_kind("sequence") | events

  def read_of(self, history: str) -> tuple[str, ...]:
    """User, time and then the columns of a history, as its file calls them."""
    rule = self.histories[history]
    return (rule.user or self.user, rule.time or self.time, *rule.columns)

  @property
  def read(self) -> tuple[str, ...]:
    """Names of all columns that have to be read."""
    return tuple(dict.fromkeys([*self.columns, *filter(None, (self.user, self.time))]))

  def encoded(self, *, hash_rows: int = 0, min_count: int = 0) -> Schema:
    """The schema with all categories hashed, or all vocabularies cut at `min_count` (0: as is)."""
    if not hash_rows and not min_count:
      return self
    if hash_rows and min_count:
      raise SchemaError(
        f"hash_rows = {hash_rows} and min_count = {min_count} exclude each other; drop one"
      )
    categories = self.categories
    if hash_rows:
      change = {"encoding": "hash", "rows": hash_rows, "min_count": 1}
    else:
      change = {"min_count": min_count}
      categories = {n: c for n, c in categories.items() if c.encoding == "vocabulary"}
      if not categories:
        raise SchemaError(f"min_count = {min_count}, but there is no vocabulary to cut; drop it")
    changed = {n: dataclasses.replace(c, **change) for n, c in categories.items()}
    columns = {n: changed.get(n, c) for n, c in self.columns.items()}
    histories = {
      h: dataclasses.replace(
        rule, columns={n: changed.get(f"{h}.{n}", c) for n, c in rule.columns.items()}
      )
      for h, rule in self.histories.items()
    }
    return dataclasses.replace(self, columns=columns, histories=histories)
