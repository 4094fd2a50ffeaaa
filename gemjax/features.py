"""Features: what a column means, and the batch that carries it.

Lies below data and models, so that neither has to know the other. No JAX here.
Letters: B examples, F dense features, S sparse features, T tasks, E events of one sequence feature
or history, C columns of a history's events.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

# The first two rows of every table are reserved, so that "no value" and "a value never seen
# while fitting" are learnt apart from every real value.
MISSING = 0
UNKNOWN = 1
RESERVED = 2

UNLABELLED = 255  # In the place of a label: the example teaches this task nothing.

MAX_ROWS = 2**40  # Of a table: with 256 numbers in bf16 each, they fill 7000 GPUs of 80 GB.


class FeatureError(ValueError):
  """Features that contradict each other, or a file of features that is damaged."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Dense:
  """A real number, stored as z = (f(x) - mean) / std with f = `transform`.

  A missing value is stored as 0, the mean. Where the fitted data had missing values, a second
  dense feature `<name>.missing` says 1 for missing and 0 for present.
  """

  name: str
  transform: str = "identity"  # identity | log1p: sign(x) log(1 + |x|)
  mean: float = 0.0
  std: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sparse:
  """A categorical value, stored as a row of its table: 0 missing, 1 unknown, 2.. the values."""

  name: str
  size: int  # Rows of the table, the two reserved ones included.
  table: str  # Features that name the same table share its rows.
  encoding: str = "vocabulary"  # vocabulary | hash
  hash_seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sequence:
  """A list of categorical values in time order, stored jagged: the last `max_length` of them."""

  name: str
  size: int
  table: str
  max_length: int
  encoding: str = "vocabulary"
  hash_seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EventColumn:
  """One categorical field of an event (item, action, surface, ..), stored as a row of its table."""

  name: str  # Within its history.
  size: int
  table: str  # Shared with the sparse feature of the candidate where both name the same things.
  encoding: str = "vocabulary"
  hash_seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class History:
  """What a user did, event after event in time order, each of several columns and a time.

  Events are stored once a user; an example sees those strictly before its own time, and of those
  the last `max_length`, fewer where the config asks for fewer.
  """

  name: str
  columns: tuple[EventColumn, ...]
  max_length: int


_KINDS = {"dense": Dense, "sparse": Sparse, "sequence": Sequence, "history": History}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSet:
  """The fitted features of a prepared data set; saved with the data and with every checkpoint."""

  dense: tuple[Dense, ...] = ()
  sparse: tuple[Sparse, ...] = ()
  sequence: tuple[Sequence, ...] = ()
  history: tuple[History, ...] = ()
  tasks: tuple[str, ...] = ("label",)
  optional: tuple[str, ...] = ()  # Tasks for which an example may be unlabelled.
  grouped: bool = False  # Whether examples carry a user, so that GAUC is defined.
  vocabularies: str = ""  # Digest of the vocabularies, so that equal sizes with other rows differ.

  def __post_init__(self):
    single = (*self.dense, *self.sparse, *self.sequence)
    names = [f.name for f in (*single, *self.history)] + list(self.tasks)
    for h in self.history:
      names += [f"{h.name}.{c.name}" for c in h.columns]
      if not h.columns or h.max_length < 1:
        raise FeatureError(
          f"history {h.name!r} needs a column and room for an event, has {len(h.columns)} columns "
          f"and max_length {h.max_length}"
        )
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
      raise FeatureError(f"feature names must be unique, but {twice} appear more than once")
    if not self.tasks:
      raise FeatureError("a feature set needs at least one task (label column), but has none")
    if strange := sorted(set(self.optional) - set(self.tasks)):
      raise FeatureError(f"optional names {strange}, but the tasks are {list(self.tasks)}")
    sizes: dict[str, tuple[int, str]] = {}
    for f in self.categorical:
      if f.size < RESERVED:
        raise FeatureError(
          f"feature {f.name!r}: a table has at least {RESERVED} rows, got {f.size}"
        )
      if f.size > MAX_ROWS:
        raise FeatureError(f"feature {f.name!r}: a table has at most 2^40 rows, got {f.size}")
      size, other = sizes.setdefault(f.table, (f.size, f.name))
      if size != f.size:
        raise FeatureError(
          f"features {other!r} and {f.name!r} share table {f.table!r}, "
          f"but its size is {size} for one and {f.size} for the other"
        )

  @property
  def categorical(self) -> tuple[Sparse | Sequence | EventColumn, ...]:
    """All that reads rows of tables: sparse and sequence features, then columns of histories."""
    columns = (column for history in self.history for column in history.columns)
    return (*self.sparse, *self.sequence, *columns)

  @property
  def tables(self) -> dict[str, int]:
    """Rows of every table, by table name, in order of first use."""
    return {f.table: f.size for f in self.categorical}

  @property
  def wide(self) -> bool:
    """Whether some table has more than 2^31 rows: then every id is int64, in a batch two words."""
    return any(size > 2**31 for size in self.tables.values())

  @property
  def id_dtype(self) -> np.dtype:
    """Of the ids of all features on disk."""
    return np.dtype(np.int64 if self.wide else np.int32)

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, tree: dict[str, Any]) -> FeatureSet:
    """Inverse of `to_json`; raises FeatureError naming an entry that is missing or not known."""
    try:
      kinds = {k: tuple(_spec(c, f) for f in tree[k]) for k, c in _KINDS.items()}
      rest = {k: v for k, v in tree.items() if k not in _KINDS}
      tasks, optional = tuple(tree["tasks"]), tuple(tree.get("optional", ()))  # A younger field.
      return cls(**kinds, **rest | {"tasks": tasks, "optional": optional})
    except (KeyError, TypeError) as error:
      raise FeatureError(f"not a feature set: {error}") from error

  def difference(self, other: FeatureSet) -> str | None:
    """The first difference to `other` in words that name the field, or None."""
    for kind in _KINDS:
      mine, theirs = ({f.name: f for f in getattr(s, kind)} for s in (self, other))
      for name in [*mine, *theirs]:
        if name not in theirs:
          return f"{kind} feature {name!r} is not in the other"
        if name not in mine:
          return f"{kind} feature {name!r} is only in the other"
        for field in dataclasses.fields(mine[name]):
          a, b = getattr(mine[name], field.name), getattr(theirs[name], field.name)
          if a != b:
            return f"{kind} feature {name!r} has {field.name} {a!r} here and {b!r} in the other"
      if list(mine) != list(theirs):
        return f"the {kind} features come in another order: {list(mine)} and {list(theirs)}"
    for name in ("tasks", "optional", "grouped", "vocabularies"):
      a, b = getattr(self, name), getattr(other, name)
      if a != b:
        return f"{name} is {a!r} here and {b!r} in the other"
    return None


def _spec(kind: type, tree: dict[str, Any]):
  if kind is History:
    tree = tree | {"columns": tuple(EventColumn(**c) for c in tree["columns"])}
  return kind(**tree)


class Jagged(NamedTuple):
  """Lists of one batch in N shards of B / N examples, each shard with E / N slots for values.

  Shard after shard, the lists lie one behind the other at the front of the shard's slots: list b
  holds the next `lengths_B[b]` values. The slots behind them are MISSING and belong to no example.
  E / N is the same for all shards and takes few values (gemjax/data/rooms.py), so that few
  programs are compiled.
  """

  values_E: np.ndarray  # int32 (E,), or uint32 (E, 2) where the feature set is wide
  lengths_B: np.ndarray  # int32


class Events(NamedTuple):
  """The events of one history for the examples of a batch, laid out in shards as in `Jagged`.

  Oldest first; all of them happened strictly before their example. Slots behind a shard's last
  event have ids MISSING and age 0.
  """

  ids_EC: np.ndarray  # int32 (E, C), or uint32 (E, C, 2) where the feature set is wide
  age_E: np.ndarray  # int32, seconds from the event to its example, at least 1
  lengths_B: np.ndarray  # int32


class Batch(NamedTuple):
  """B examples. Rows with `weight_B` 0 are padding of the last batch of an evaluation.

  Where the feature set is wide, ids and values have a last axis of two words (`split_words`).
  """

  dense_BF: np.ndarray  # float32, standardised
  ids_BS: np.ndarray  # int32, a row of the feature's own table; or uint32 (B, S, 2)
  label_BT: np.ndarray  # float32: 0, 1, or UNLABELLED where the task is optional
  weight_B: np.ndarray  # float32, 1 or 0
  group_B: np.ndarray  # int32, the user, or -1 where the data has none
  oracle_BT: np.ndarray  # float32, the true probability where known (simulator), else width 0
  sequences: dict[str, Jagged]
  histories: dict[str, Events] = {}  # noqa: RUF012 - nobody writes to it.


def split_words(ids: np.ndarray) -> np.ndarray:
  """Whole numbers (...) as two uint32 words each (..., 2), id = low + 2^32 high, low word first.

  JAX has 64-bit integers switched off and would cut an int64 to its low word without a word.
  Raises TypeError for what is no whole number.
  """
  ids = np.asarray(ids).astype("<i8", order="C", casting="same_kind", copy=False)
  return ids[..., None].view("<u4")


def event_capacity(events: int, *, steps: int = 16) -> int:
  """Smallest of 64 2^k (1 + i / steps), i = 0 .. steps - 1, that holds `events`: 64, 68, 72, .."""
  if events <= 64:
    return 64
  octave = 1 << ((events - 1).bit_length() - 1)  # 64 2^k, below `events`.
  step = octave // steps
  return octave + -(-(events - octave) // step) * step
