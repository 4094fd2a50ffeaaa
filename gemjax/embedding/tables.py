"""Which row of which stack a feature reads: tables of equal width are stacked into one.

One stack is one gather and one scatter a step, however many tables lie in it.
Letters: B examples, S sparse features, E events, R rows of a stack, W width of a stack.
"""

from __future__ import annotations

import dataclasses

from gemjax import config as config_lib
from gemjax.features import FeatureSet


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
  """A feature and where its rows are: `width` names the stack, row i is `offset + i` in it."""

  feature: str
  width: int
  offset: int
  units: int  # Units of width d that one row holds; 0 for a small table.
  column: int  # Its column of ids_BS; -1 for a sequence feature.

  @property
  def small(self) -> bool:
    return self.units == 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TableLayout:
  """Static and hashable: the stacks' rows by width, and every feature's place."""

  dim: int
  rows: tuple[tuple[int, int], ...]  # (width, rows) of every stack
  sparse: tuple[Placed, ...]
  sequence: tuple[Placed, ...]


def layout_tables(features: FeatureSet, config: config_lib.Embedding) -> TableLayout:
  """Places every table of `features`.

  A feature of u units reads one row of width u * d (Wukong section 3, "multi-embedding"), and so
  do all features of its table. A table of fewer than `config.small_rows` rows that has neither
  named units nor a sequence is small: stored `config.small_dim` wide.

  Raises:
    ConfigError: `embedding.units` names no feature, or features of one table ask for different
      units, or a stack passes 2^31 rows.
  """
  specs = (*features.sparse, *features.sequence)
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
  wide = {*named, *(s.table for s in features.sequence)}
  rows: dict[int, int] = {}
  tables: dict[str, tuple[int, int, int]] = {}  # Table -> (width, offset, units)
  for spec in specs:
    if spec.table not in tables:
      small = spec.size < config.small_rows and spec.table not in wide
      units = 0 if small else named.get(spec.table, ("", 1))[1]
      width = config.small_dim if small else units * config.dim
      tables[spec.table] = (width, rows.get(width, 0), units)
      rows[width] = rows.get(width, 0) + spec.size
  kinds = {(width, units > 0) for width, _, units in tables.values()}
  if {(config.small_dim, True), (config.small_dim, False)} <= kinds:
    raise config_lib.ConfigError(
      f"config.embedding.small_dim is {config.small_dim}, which is also the width of a table that "
      "is not small; choose another, or config.embedding.small_rows = 0"
    )
  for width, size in rows.items():
    if size >= 2**31:
      raise config_lib.ConfigError(
        f"the stack of width {width} would have {size} rows, but a row number must stay below 2^31"
      )

  def place(spec, column: int) -> Placed:
    width, offset, units = tables[spec.table]
    return Placed(feature=spec.name, width=width, offset=offset, units=units, column=column)

  return TableLayout(
    dim=config.dim,
    rows=tuple(rows.items()),
    sparse=tuple(place(s, column) for column, s in enumerate(features.sparse)),
    sequence=tuple(place(s, -1) for s in features.sequence),
  )
