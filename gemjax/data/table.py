"""Table: a user's own CSV, TSV or Parquet, described by a schema."""

from __future__ import annotations

import pathlib

from gemjax.data.raw import ParquetFile, RawDataError, Reader, Source, TextFile
from gemjax.data.schema import SPLITS, Schema

_DELIMITERS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}


def table(path: pathlib.Path, schema: Schema) -> Source:
  """The file `path`, or all data files of a folder; a folder with train.*, valid.*, test.* if so.

  Data files end in .csv, .tsv, .txt (each also .gz) or .parquet. With split.by = "files", each of
  train, valid and test is a file of that name (`train.csv`) or a folder of such files (`train/`).
  """
  if schema.split.by != "files":
    return Source(schema, {"": _readers(path, schema)})
  files = {}
  for split in SPLITS:
    found = [p for p in sorted(path.glob(f"{split}*")) if p.name.split(".")[0] == split]
    if len(found) != 1:
      raise RawDataError(
        f"{path} must hold one file or folder {split!r}, but holds {[p.name for p in found]}; "
        "add it, or set split.by to time, order or random"
      )
    files[split] = _readers(found[0], schema)
  return Source(schema, files)


def _readers(path: pathlib.Path, schema: Schema) -> tuple[Reader, ...]:
  if not path.is_dir():
    return (_reader(path, schema),)
  known = (*_DELIMITERS, *(f"{e}.gz" for e in _DELIMITERS), ".parquet")
  files = [p for p in sorted(path.iterdir()) if p.name.endswith(known)]
  if not files:
    raise RawDataError(f"{path} holds no data file; its names must end in one of {list(known)}")
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
