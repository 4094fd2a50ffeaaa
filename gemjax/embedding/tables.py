"""Which row of which stack a feature reads, and where the stack lies on the mesh.

Tables of equal width and placement are stacked into one: one sort, one gather and one scatter a
step, however many tables lie in it. Nothing here depends on the mesh, so that a checkpoint fits
every mesh.

Letters: B examples, S sparse features, E events, R rows of a stack, W width of a stack.
"""

from __future__ import annotations

import dataclasses
import math

from gemjax import config as config_lib
from gemjax.features import FeatureSet

# Rows of a stack that is split by row are padded to a multiple of this, so that they divide by
# every `model` axis of 2^k or 3 * 2^k devices up to it.
ROW_MULTIPLE = 768
# A position times the multiplier below 2^30 must stay below 2^64.
MAX_ROWS = 2**34


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StackLayout:
  """One stack. `placement` says what a device of the `model` axis holds of it:

  row         the rows whose positions lie in its equal, contiguous share; see `multiplier`
  column      an equal share of the columns of every row
  replicated  everything
  """

  name: str  # As "row64": placement and width.
  width: int
  rows: int  # Padding included.
  placement: str
  small: bool

  @property
  def multiplier(self) -> int:
    """a of the permutation that spreads a split stack's rows: position = a * row mod rows.

    Popular rows are neighbours (a vocabulary is sorted by frequency, every table begins with
    MISSING and UNKNOWN); the golden section puts any run of neighbours evenly over the range
    (Knuth, The Art of Computer Programming 3, section 6.4). Coprime to `rows`, thus one to one.
    """
    if self.placement != "row":
      return 1
    a = int(0.6180339887498949 * min(self.rows, 2**30))
    while math.gcd(a, self.rows) > 1:
      a += 1
    return a


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
  """A feature and where its rows are: row i of its table is row `offset + i` of `stack`."""

  feature: str
  table: str
  stack: str
  offset: int
  units: int  # Units of width d that one row holds; 0 for a small table.
  column: int  # Its column of ids_BS, or of a history's ids_EC; -1 for a sequence feature.

  @property
  def small(self) -> bool:
    return self.units == 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TableLayout:
  """Static and hashable: the stacks, and every feature's place."""

  dim: int
  stacks: tuple[StackLayout, ...]
  sparse: tuple[Placed, ...]
  sequence: tuple[Placed, ...]
  history: tuple[Placed, ...]  # Columns of events, history after history; `feature` is the history.
  reasons: tuple[str, ...]  # Why tables lie where they lie, a line a placement, for people.

  @property
  def tables(self) -> tuple[str, ...]:
    """Names, each once; those that are left out are not among them."""
    return tuple(dict.fromkeys(p.table for p in (*self.sparse, *self.sequence, *self.history)))

  def positions(self, table: str) -> tuple[StackLayout, int]:
    """(stack, offset): row i of `table` lies at `(offset + i) * multiplier mod rows` of it."""
    places = (*self.sparse, *self.sequence, *self.history)
    place = next(p for p in places if p.table == table)
    return next(s for s in self.stacks if s.name == place.stack), place.offset


def layout_tables(features: FeatureSet, config: config_lib.Embedding) -> TableLayout:
  """Places every table of `features`.

  A feature of u units reads one row of width u * d (Wukong section 3, "multi-embedding"), and so
  do all features of its table; with 0 units it is left out. A table of fewer than
  `config.small_rows` rows that has neither named units nor a sequence or history is small: stored
  `config.small_dim` wide.

  A table goes where `config.placement` says, else by its size: replicated with at most
  `config.replicated_rows` rows (a batch touches most of them, and combining so few rows among all
  devices costs less than asking an owner for them); by column from `config.column_width` on (few
  rows of such width would load their owners unevenly); else by row.

  Raises:
    ConfigError: `units` or `placement` names what is not there, features of one table ask for
      different units, a history reads a table that is left out, or a stack passes 2^34 rows.
  """
  units = _units((*features.sparse, *features.sequence), config)
  for name in config.placement:
    if name not in features.tables:
      raise config_lib.ConfigError(
        f"config.embedding.placement names {name!r}, but the tables are {list(features.tables)}"
      )
  events = [(h.name, column) for h in features.history for column in enumerate(h.columns)]
  out = {table for table, count in units.items() if not count}
  for history, (_, spec) in events:
    if spec.table in out:
      raise config_lib.ConfigError(
        f"config.embedding.units leaves table {spec.table!r} out, but history {history!r} reads it"
      )
  wide = {*units, *(s.table for s in features.sequence), *(c.table for _, (_, c) in events)}
  rows: dict[tuple[str, int, bool], int] = {}  # (placement, width, small) -> rows so far
  tables: dict[str, tuple[tuple[str, int, bool], int, int]] = {}  # Table -> (stack, offset, units)
  for table, size in features.tables.items():
    if table in out:
      continue
    small = size < config.small_rows and table not in wide
    count = 0 if small else units.get(table, 1)
    width = config.small_dim if small else count * config.dim
    stack = (config.placement.get(table) or _placement(size, width, config), width, small)
    tables[table] = (stack, rows.get(stack, 0), count)
    rows[stack] = rows.get(stack, 0) + size
  stacks = {key: _stack(*key, size) for key, size in rows.items()}

  def place(feature: str, table: str, column: int) -> Placed:
    stack, offset, count = tables[table]
    name = stacks[stack].name
    return Placed(
      feature=feature, table=table, stack=name, offset=offset, units=count, column=column
    )

  return TableLayout(
    dim=config.dim,
    stacks=tuple(stacks.values()),
    sparse=tuple(
      place(s.name, s.table, column)
      for column, s in enumerate(features.sparse)
      if s.table not in out
    ),
    sequence=tuple(place(s.name, s.table, -1) for s in features.sequence if s.table not in out),
    history=tuple(place(name, spec.table, column) for name, (column, spec) in events),
    reasons=tuple(_reasons({t: stack[0] for t, (stack, _, _) in tables.items()}, config)),
  )


def check_mesh(layout: TableLayout, model: int) -> None:
  """Raises ConfigError where a stack cannot be split over `model` devices."""
  for stack in layout.stacks:
    if stack.placement == "column" and stack.width % model:
      raise config_lib.ConfigError(
        f"stack {stack.name} of width {stack.width} must divide by the {model} devices of "
        "config.mesh.model, as its columns are split (config.embedding.placement)"
      )
    if stack.placement != "row":
      continue
    if stack.rows % model:
      raise config_lib.ConfigError(
        f"config.mesh.model is {model}, but the {stack.rows:,} rows of stack {stack.name} must "
        f"divide by it; choose a divisor of {ROW_MULTIPLE}"
      )
    if stack.rows // model >= 2**31:
      raise config_lib.ConfigError(
        f"a device would hold {stack.rows // model:,} rows of stack {stack.name}, but a row number "
        f"on a device must stay below 2^31; raise config.mesh.model above {model}"
      )


def _units(specs, config: config_lib.Embedding) -> dict[str, int]:
  """Table -> units, where `config.units` names one of its features."""
  named: dict[str, tuple[str, int]] = {}  # Table -> who named its units, and how many.
  for name, units in config.units.items():
    spec = next((s for s in specs if s.name == name), None)
    if spec is None:
      raise config_lib.ConfigError(
        f"config.embedding.units names {name!r}, but the features are {[s.name for s in specs]}"
      )
    other, before = named.setdefault(spec.table, (name, units))
    if before != units:
      raise config_lib.ConfigError(
        f"config.embedding.units gives {other!r} {before} units and {name!r} {units}, "
        f"but they share table {spec.table!r}"
      )
  return {table: units for table, (_, units) in named.items()}


def _placement(size: int, width: int, config: config_lib.Embedding) -> str:
  if size <= config.replicated_rows:
    return "replicated"
  return "column" if width >= config.column_width else "row"


def _stack(placement: str, width: int, small: bool, size: int) -> StackLayout:
  multiple = ROW_MULTIPLE if placement == "row" else 1
  rows = -(-size // multiple) * multiple
  if rows > (MAX_ROWS if placement == "row" else 2**31 - 1):
    raise config_lib.ConfigError(
      f"the {placement} stack of width {width} would have {rows:,} rows; split by row it may have "
      f"2^34, otherwise fewer than 2^31 (config.embedding.placement)"
    )
  name = f"{placement}{width}" + ("_small" if small else "")
  return StackLayout(name=name, width=width, rows=rows, placement=placement, small=small)


def _reasons(placements: dict[str, str], config: config_lib.Embedding):
  because = {
    "replicated": f"at most {config.replicated_rows:,} rows",
    "row": f"more than {config.replicated_rows:,} rows",
    "column": f"at least {config.column_width:,} wide",
  }
  for placement, reason in because.items():
    tables = [t for t, p in placements.items() if p == placement]
    named = sum(t in config.placement for t in tables)
    parts = [f"{len(tables) - named} {placement} ({reason})"] if len(tables) > named else []
    parts += [f"{named} {placement} (config.embedding.placement)"] if named else []
    yield from parts
