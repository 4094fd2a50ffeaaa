"""Public sets that come as tables: Frappe and Criteo's click logs, as their users have them."""

from __future__ import annotations

import gzip
import pathlib
import zlib
from collections.abc import Sequence

from gemjax.data.raw import ParquetFile, RawDataError, Reader, Source, TextFile, existing
from gemjax.data.schema import SPLITS, Column, Schema, SplitRule

_CONTEXT = ("daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city")


def frappe(path: pathlib.Path) -> Source:
  """Frappe_x1 of BARS: {train,valid,test}.csv; the user is a feature and groups the GAUC."""
  columns = {"label": Column(kind="label")} | {
    n: Column(kind="sparse") for n in ("user", "item", *_CONTEXT)
  }
  files = {s: (TextFile(existing(path / f"{s}.csv"), quote=None),) for s in SPLITS}
  return Source(Schema(columns=columns, user="user"), files)


def is_frappe(path: pathlib.Path) -> bool:
  return _first_line(path / "train.csv").startswith("label,user,item,daytime,")


CRITEO_DENSE = [f"i{i}" for i in range(1, 14)]
CRITEO_SPARSE = [f"c{i}" for i in range(1, 27)]
_KAGGLE, _1TB = ("train*.txt*",), ("*.parquet", "day_*")
CRITEO = ("label", *CRITEO_DENSE, *CRITEO_SPARSE)


def _criteo(split: SplitRule, files: tuple[Reader, ...]) -> Source:
  columns = {"label": Column(kind="label")}
  columns |= {n: Column(kind="dense", transform="log1p") for n in CRITEO_DENSE}
  columns |= {n: Column(kind="sparse", min_count=2) for n in CRITEO_SPARSE}
  return Source(Schema(columns=columns, split=split), {"": files})


def criteo_kaggle(path: pathlib.Path) -> Source:
  """Kaggle Display Ads: train*.txt, tab-separated without header, split in the order of rows."""
  files = _files(path, _KAGGLE)
  if len(files) != 1:
    raise RawDataError(
      f"{path} must hold one train*.txt of Criteo Kaggle, but holds {[f.name for f in files]}"
    )
  return _criteo(SplitRule(by="order"), (_log(files[0]),))


def is_criteo_kaggle(path: pathlib.Path) -> bool:
  files = _files(path, _KAGGLE)
  return len(files) == 1 and not files[0].match("day_*") and _is_log(files[0])


def criteo_1tb(path: pathlib.Path) -> Source:
  """Criteo 1TB: *.parquet (label, i1..i13, c1..c26) or the raw day_*; split by hash of the row.

  The samples of it in Parquet carry no time, so that only a random split treats all alike.
  """
  files = _files(path, _1TB)
  if not files:
    raise RawDataError(f"{path} must hold *.parquet or day_* of Criteo 1TB, but holds neither")
  readers = tuple(ParquetFile(f) if f.suffix == ".parquet" else _log(f) for f in files)
  return _criteo(SplitRule(by="random"), readers)


def is_criteo_1tb(path: pathlib.Path) -> bool:
  import pyarrow as pa
  import pyarrow.parquet as pq

  files = _files(path, _1TB)
  if not files or files[0].suffix != ".parquet":
    return bool(files) and _is_log(files[0])
  try:
    return set(CRITEO) <= set(pq.read_schema(files[0]).names)
  except (OSError, pa.ArrowException):
    return False


def _log(path: pathlib.Path) -> TextFile:
  return TextFile(path, delimiter="\t", names=CRITEO, quote=None)


def _is_log(path: pathlib.Path) -> bool:
  return _first_line(path).count("\t") == len(CRITEO) - 1


def _files(path: pathlib.Path, patterns: Sequence[str]) -> list[pathlib.Path]:
  """`path` itself if it is a file, else those in it of such names."""
  return [path] if path.is_file() else sorted(f for p in patterns for f in path.glob(p))


def _first_line(path: pathlib.Path) -> str:
  try:
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
      return file.readline(1 << 16).decode(errors="replace")
  except (OSError, EOFError, zlib.error):
    return ""
