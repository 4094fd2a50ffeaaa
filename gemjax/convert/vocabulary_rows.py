"""Where the rows of a table come from when its vocabulary has grown or its hashes are others."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable

import numpy as np

from gemjax.convert.fitting import RowMap
from gemjax.convert.tensors import ConvertError
from gemjax.data.prepared import MANIFEST
from gemjax.features import RESERVED, EventColumn, FeatureSet, Sequence, Sparse

VOCABULARIES = "vocabularies.json"
ANEW = "or name the table otherwise, so that it begins anew"

Feature = Sparse | Sequence | EventColumn


def row_maps(
  tables: Iterable[str],
  old: FeatureSet,
  new: FeatureSet,
  old_folders: list[pathlib.Path],
  new_folder: pathlib.Path,
) -> dict[str, RowMap]:
  """Table -> the row of the old table that every new row begins from, where it is another one.

  vocabulary   the row of the same value; of MISSING and UNKNOWN their own; -1 for a new value
  hash         from size S to S', r = 2 + (r' - 2) mod (S - 2): exactly the values of r' where
               S' - 2 is a multiple of S - 2, so that the table grows without forgetting

  Args:
    tables: That both have.
    old: Features that the rows were trained with.
    new: Features that they shall serve.
    old_folders: Where the prepared data of `old` may lie.
    new_folder: The prepared data of `new`.

  Raises:
    ConvertError: nothing says which rows stand for the same values.
  """
  found: dict[str, RowMap] = {}
  before, after = ({f.table: f for f in features.categorical} for features in (old, new))
  values: list[dict[str, list] | None] | None = None
  for table in tables:
    was, now = before[table], after[table]
    if was.encoding != now.encoding:
      raise ConvertError(
        f"table {table!r} is {_described(was)} in the input, but {_described(now)} in "
        f"{new_folder}, whose rows stand for other values; prepare it as {was.encoding}, {ANEW}"
      )
    if now.encoding == "hash":
      if (was.size, was.hash_seed) != (now.size, now.hash_seed):
        found[table] = _hashed(was, now, new_folder)
      continue
    if was.size == now.size and old.vocabularies == new.vocabularies:
      continue
    if values is None:
      values = [_vocabularies(old, old_folders), _vocabularies(new, [new_folder])]
    lists = [None if v is None else v.get(table) for v in values]
    if None not in lists:
      if lists[0] != lists[1]:
        found[table] = _by_value(*lists)
    # Where data keep vocabularies, but none of this table, its ids are numbers of their own.
    elif None in values or lists != [None, None] or was.size != now.size:
      what = f"table {table!r} is {_described(was)} in the input and another, {_described(now)}, in"
      what = f"{what} {new_folder}, but "
      if lists[0] is None:
        where = " or ".join(map(str, old_folders))
        raise ConvertError(
          f"{what}the {VOCABULARIES} of the data that the input was trained on, by which rows are "
          f"matched, is not in {where}; put that prepared folder (digest {old.vocabularies!r}) "
          f"there, {ANEW}"
        )
      raise ConvertError(f"{what}no {VOCABULARIES} is there to match rows by; prepare it again")
  return found


def _hashed(was: Feature, now: Feature, folder: pathlib.Path) -> RowMap:
  size = was.size - RESERVED
  if was.hash_seed != now.hash_seed or size < 1 or (now.size - RESERVED) % size:
    raise ConvertError(
      f"table {was.table!r} is {_described(was)} in the input, but {_described(now)} in {folder}, "
      f"whose rows stand for other values; prepare it with seed {was.hash_seed} and {was.size} "
      f"rows, or {RESERVED} and a multiple of {size}, {ANEW}"
    )

  def rows(start: int, stop: int) -> np.ndarray:
    row = np.arange(start, stop)
    return np.where(row < RESERVED, row, RESERVED + (row - RESERVED) % size)

  return rows


def _by_value(old: list, new: list) -> RowMap:
  places = {value: RESERVED + i for i, value in enumerate(old)}
  at = np.array([*range(RESERVED), *(places.get(value, -1) for value in new)])
  return lambda start, stop: at[start:stop]


def _vocabularies(features: FeatureSet, folders: list[pathlib.Path]) -> dict[str, list] | None:
  """Those that `features` were fitted with: a folder may have been prepared again since."""
  for folder in folders:
    manifest, file = folder / MANIFEST, folder / VOCABULARIES
    if not (manifest.is_file() and file.is_file()):
      continue
    try:
      if json.loads(manifest.read_text())["features"]["vocabularies"] == features.vocabularies:
        return dict(json.loads(file.read_text()))
    except (ValueError, KeyError, TypeError) as error:
      raise ConvertError(f"{folder}: {MANIFEST} or {VOCABULARIES} is corrupt ({error})") from error
  return None


def _described(feature: Feature) -> str:
  seed = f", seed {feature.hash_seed}" if feature.encoding == "hash" else ""
  return f"a {feature.encoding} of {feature.size} rows{seed}"
