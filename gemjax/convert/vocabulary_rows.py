"""Where the rows of a table come from when its vocabulary has grown or its hashes are others."""

from __future__ import annotations

import json
import pathlib

import numpy as np

from gemjax.convert.fitting import RowMap
from gemjax.features import RESERVED, FeatureSet

VOCABULARIES = "vocabularies.json"


def row_maps(
  old: FeatureSet,
  new: FeatureSet,
  old_folders: list[pathlib.Path],
  new_folders: list[pathlib.Path],
) -> dict[str, RowMap]:
  """Table -> the row of the old table that every new row begins from, where it is another one.

  vocabulary   the row of the same value; of MISSING and UNKNOWN their own; -1 for a new value
  hash         from size S to S', r = 2 + (r' - 2) mod (S - 2): exactly the values of r' where
               S' - 2 is a multiple of S - 2, so that the table grows without forgetting

  Tables whose prepared folders (the first that is there) keep no vocabularies are left, as are
  hashes under another seed.
  """
  found: dict[str, RowMap] = {}
  values = [_vocabularies(folders) for folders in (old_folders, new_folders)]
  before = {f.table: f for f in old.categorical}
  for feature in new.categorical:
    table, was = feature.table, before.get(feature.table)
    if was is None or was.encoding != feature.encoding:
      continue
    if feature.encoding == "hash":
      whole = (feature.size - RESERVED) % max(1, was.size - RESERVED) == 0
      if was.size != feature.size and whole and was.hash_seed == feature.hash_seed:
        found[table] = _hashed(was.size)
    elif all(table in v for v in values) and values[0][table] != values[1][table]:
      found[table] = _by_value(*(v[table] for v in values))
  return found


def _hashed(size: int) -> RowMap:
  def rows(start: int, stop: int) -> np.ndarray:
    row = np.arange(start, stop)
    return np.where(row < RESERVED, row, RESERVED + (row - RESERVED) % (size - RESERVED))

  return rows


def _by_value(old: list[str], new: list[str]) -> RowMap:
  places = {value: RESERVED + i for i, value in enumerate(old)}
  at = np.array([*range(RESERVED), *(places.get(value, -1) for value in new)])
  return lambda start, stop: at[start:stop]


def _vocabularies(folders: list[pathlib.Path]) -> dict[str, list[str]]:
  files = [pathlib.Path(folder) / VOCABULARIES for folder in folders]
  return next((json.loads(file.read_text()) for file in files if file.is_file()), {})
