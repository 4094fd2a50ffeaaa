"""Table: a user's own CSV, TSV or Parquet, described by a schema."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Collection

from gemjax.data.raw import ParquetFile, RawDataError, Reader, Source, TextFile
from gemjax.data.schema import SPLITS, Schema

_DELIMITERS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
_FORMATS = {*_DELIMITERS, ".parquet"}


def table(path: pathlib.Path, schema: Schema) -> Source:
  """The file `path`, or all data files of a folder; a folder with train.*, valid.*, test.* if so.

  Data files end in .csv, .tsv, .txt (each also .gz) or .parquet. With split.by = "files", each of
  train, valid and test is a file of that name (`train.csv`) or a folder of such files (`train/`).
  A history's file, or folder of files, is named relative to the table's own folder.
  """
  folder = path if path.is_dir() else path.parent
  histories = {}
  for name, rule in schema.histories.items():
    if not (folder / rule.file).exists():
      raise RawDataError(
        f"history {name!r}: {folder / rule.file} does not exist; name the file of its events, "
        f"relative to {folder}"
      )
    events = dataclasses.replace(schema, names=())
    histories[name] = _readers(folder / rule.file, events)
  if schema.split.by != "files":
    others = {reader.path.resolve() for readers in histories.values() for reader in readers}
    return Source(schema, {"": _readers(path, schema, others)}, histories)
  files = {}
  for split in SPLITS:
    found = [p for p in sorted(path.glob(f"{split}*")) if p.name.split(".")[0] == split]
    if len(found) != 1:
      raise RawDataError(
        f"{path} must hold one file or folder {split!r}, but holds {[p.name for p in found]}; "
        "add it, or set split.by to time, order or random"
      )
    files[split] = _readers(found[0], schema)
  return Source(schema, files, histories)


def _readers(
  path: pathlib.Path, schema: Schema, others: Collection[pathlib.Path] = ()
) -> tuple[Reader, ...]:
  if not path.is_dir():
    return (_reader(path, schema),)
  known = (*_DELIMITERS, *(f"{e}.gz" for e in _DELIMITERS), ".parquet")
  inside = sorted(path.iterdir())
  for p in inside:
    below = p.rglob("*") if p.is_dir() and not p.name.startswith((".", "_")) else ()
    if any(f.name.endswith(known) and f.resolve() not in others for f in below):
      raise RawDataError(
        f"{p} is a folder whose data would not be read: move its files to {path}, or it elsewhere"
      )
    like_data = p.is_file() and _FORMATS & {suffix.lower() for suffix in p.suffixes}
    if like_data and not p.name.endswith(known) and not p.name.startswith((".", "_")):
      raise RawDataError(
        f"{p} would not be read: names of data end in one of {list(known)}; name it so, unpack it "
        "or move it elsewhere"
      )
  files = [p for p in inside if p.name.endswith(known) and p.resolve() not in others]
  if not files:
    beside = " beside its histories" if others else ""
    raise RawDataError(
      f"{path} holds no data file{beside}; its names must end in one of {list(known)}"
    )
  return tuple(_reader(p, schema) for p in files)


def _reader(path: pathlib.Path, schema: Schema) -> Reader:
  if path.suffix == ".parquet":
    return ParquetFile(path)
  ending = pathlib.Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
  delimiter = schema.delimiter or _DELIMITERS.get(ending)
  if delimiter is None:
    raise RawDataError(
      f"{path}: the format is unknown; name it *.parquet, *.csv, *.tsv or give a `delimiter`"
    )
  return TextFile(path, delimiter, schema.names)
