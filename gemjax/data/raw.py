"""Raw files: text and Parquet read as a stream of chunks that remember where each row stands."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import os
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from gemjax.data.schema import Schema

BLOCK_BYTES = 1 << 24
BATCH_ROWS = 1 << 16


class RawDataError(ValueError):
  """Raw data that is missing, broken or not what its schema says."""


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
  """Some rows of a file; B rows. Row b stands in line (or row) `rows_B[b]` of the file."""

  frame: pl.DataFrame
  rows_B: np.ndarray
  path: pathlib.Path
  unit: str  # line | row: what rows_B counts, from 1.
  bytes: int  # Of the file, read for this chunk.

  def at(self, b: int) -> str:
    return f"{self.path}, {self.unit} {self.rows_B[b]}"

  def where(self, mask_B: np.ndarray) -> Chunk:
    return dataclasses.replace(
      self, frame=self.frame.filter(pl.Series(mask_B)), rows_B=self.rows_B[mask_B]
    )


class Reader(Protocol):
  """A file that can be read as often as needed, always in the same order."""

  path: pathlib.Path

  @property
  def size(self) -> int: ...  # Bytes, for the progress bar.

  def chunks(self, columns: Sequence[str]) -> Iterator[Chunk]: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
  """Raw data: its schema, its files by split, or all under "" where a rule splits them, and the
  files of events of each history.
  """

  schema: Schema
  files: dict[str, tuple[Reader, ...]]
  histories: dict[str, tuple[Reader, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class TextFile:
  """Delimited text, plain or .gz, one row a line, every value a text (empty: missing).

  Without `names` the first line is the header. `delimiter` may be longer than one character;
  `encoding` other than UTF-8 must be one byte a character. Raises RawDataError with the line.
  """

  path: pathlib.Path
  delimiter: str = ","
  names: tuple[str, ...] = ()
  quote: str | None = '"'
  encoding: str = "utf-8"

  @property
  def size(self) -> int:
    return self.path.stat().st_size

  def chunks(self, columns: Sequence[str]) -> Iterator[Chunk]:
    line, read, names = 1, 0, self.names
    try:
      with open(self.path, "rb") as raw:
        file = gzip.GzipFile(fileobj=raw) if self.path.suffix == ".gz" else raw
        for block in _blocks(file):
          text = self._text(block, line)
          if not names:
            header, _, text = text.partition("\n")
            names, line = self._header(header), line + 1
          check_columns(self.path, names, columns)
          if not text:
            continue
          frame = self._parse(text, names, columns, line)
          rows_B = np.arange(line, line + len(frame))
          line += len(frame)
          yield Chunk(frame, rows_B, self.path, "line", raw.tell() - read)
          read = raw.tell()
    except (zlib.error, gzip.BadGzipFile) as error:
      raise RawDataError(
        f"{self.path} is a corrupt gzip file ({_reason(error)}); fetch or compress it again"
      ) from error
    except EOFError as error:
      raise RawDataError(
        f"{self.path} is a truncated gzip file; fetch or compress it again"
      ) from error
    except OSError as error:
      raise RawDataError(
        f"{self.path} cannot be read ({_reason(error)}); make it readable or name another"
      ) from error
    if line == 1:
      wanted = "rows" if self.names else "a header line and rows"
      raise RawDataError(f"{self.path} is empty; give it {wanted}")
    if line == 2 and not self.names:
      raise RawDataError(f"{self.path} has a header, but no rows below it; give it rows")

  def _header(self, line: str) -> tuple[str, ...]:
    text, delimiter = _single(line.removesuffix("\r"), self.delimiter)
    try:
      return tuple(next(csv.reader([text], delimiter=delimiter), ()))
    except csv.Error as error:  # Lines that end in a lone carriage return are all one to us.
      raise RawDataError(
        f"{self.path}, line 1 is no header ({error}); lines end in \\n or \\r\\n"
      ) from error

  def _text(self, block: bytes, line: int) -> str:
    try:
      return block.decode("utf-8-sig" if line == 1 and self.encoding == "utf-8" else self.encoding)
    except UnicodeDecodeError as error:
      bad = line + block.count(b"\n", 0, error.start)
      byte = block[error.start]
      raise RawDataError(
        f"{self.path}, line {bad} is not {self.encoding} (byte 0x{byte:02x}); convert the file"
      ) from error

  def _parse(self, text: str, names, columns, line: int) -> pl.DataFrame:
    text, delimiter = _single(text, self.delimiter)
    data = text.encode()
    lines = text.count("\n") + (not text.endswith("\n"))
    plain = self.quote is None or self.quote not in text
    if not plain or not _even(data, delimiter, lines, len(names)):  # Polars lets short rows pass.
      self._check_lines(text, delimiter, len(names), line)
    try:
      frame = pl.read_csv(
        data,
        has_header=False,
        schema=dict.fromkeys(names, pl.String),
        columns=sorted(names.index(c) for c in columns),
        separator=delimiter,
        quote_char=self.quote,
        infer_schema=False,
      ).select(columns)
      if len(frame) != lines:
        raise pl.exceptions.ShapeError(f"{len(frame)} rows in {lines} lines")
    except pl.exceptions.PolarsError as error:
      raise RawDataError(
        f"{self.path}, lines {line} to {line + lines - 1} are no delimited text "
        f"({_reason(error)}); mend them"
      ) from error
    return frame

  def _check_lines(self, text: str, delimiter: str, expected: int, first: int) -> None:
    rules: dict[str, Any] = {"delimiter": delimiter, "strict": True, "quotechar": self.quote}
    rules["quoting"] = csv.QUOTE_MINIMAL if self.quote else csv.QUOTE_NONE
    for line, content in enumerate(text.removesuffix("\n").split("\n"), first):
      try:
        found = len(next(csv.reader([content.removesuffix("\r")], **rules), [""]))
      except csv.Error as error:
        raise RawDataError(
          f"{self.path}, line {line}: {error}; quoted values must be closed on their line"
        ) from error
      if found != expected:
        raise RawDataError(
          f"{self.path}, line {line} has {found} columns, but {expected} are expected; mend it"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class ParquetFile:
  """A Parquet file; raises RawDataError if it is truncated or corrupt."""

  path: pathlib.Path

  @property
  def size(self) -> int:
    return self.path.stat().st_size

  def chunks(self, columns: Sequence[str]) -> Iterator[Chunk]:
    row = 1
    try:
      with pq.ParquetFile(self.path) as file:
        check_columns(self.path, file.schema_arrow.names, columns)
        total = max(file.metadata.num_rows, 1)
        for batch in file.iter_batches(BATCH_ROWS, columns=list(columns)):
          frame = pl.DataFrame(pl.from_arrow(pa.Table.from_batches([batch]))).select(columns)
          frame = frame.cast({pl.Categorical: pl.String, pl.Enum: pl.String})  # Dictionaries.
          rows_B = np.arange(row, row + len(frame))
          row += len(frame)
          yield Chunk(frame, rows_B, self.path, "row", self.size * len(frame) // total)
    except (OSError, pa.ArrowException) as error:
      raise RawDataError(
        f"{self.path} is no whole Parquet file ({_reason(error)}); fetch or write it again"
      ) from error
    if row == 1:
      raise RawDataError(f"{self.path} has columns, but no rows; give it rows")


def check_columns(path: pathlib.Path, names: Sequence[str], wanted: Sequence[str]) -> None:
  """Raises RawDataError if a name comes twice or a wanted column is not there."""
  names = list(names)
  twice = sorted({n for n in names if names.count(n) > 1})
  if twice:
    raise RawDataError(f"{path}: column names must be unique, but {twice} come twice; rename them")
  for name in wanted:
    if name not in names:
      raise RawDataError(
        f"{path} has no column {name!r}, only {names}; mend its header or the schema"
      )


def existing(path: str | os.PathLike) -> pathlib.Path:
  """`path`, if something is there; else RawDataError."""
  path = pathlib.Path(path)
  if not path.exists():
    raise RawDataError(f"{path} does not exist; name the file or folder of the raw data")
  return path


def fingerprint(path: str | os.PathLike) -> int:
  """CRC32 of the names and sizes of all files at `path` that may be read, and of their first and
  last MiB.
  """
  path = pathlib.Path(path)
  files = [f for f in sorted(path.rglob("*")) if f.is_file()] if path.is_dir() else [path]
  files = [f for f in files if os.access(f, os.R_OK)]
  code = 0
  for file in files:
    size = file.stat().st_size
    code = zlib.crc32(repr((str(file.relative_to(path)), size)).encode(), code)
    with file.open("rb") as content:
      code = zlib.crc32(content.read(1 << 20), code)
      content.seek(max(0, size - (1 << 20)))
      code = zlib.crc32(content.read(), code)
  return code


def _single(text: str, delimiter: str) -> tuple[str, str]:
  """The text with a delimiter of one character, which is all that csv and Polars know."""
  if len(delimiter) == 1:
    return text, delimiter
  return text.replace(delimiter, "\x1f"), "\x1f"


def _blocks(file) -> Iterator[bytes]:
  """Pieces of about BLOCK_BYTES that end where a line ends."""
  rest = b""
  while block := file.read(BLOCK_BYTES):
    cut = block.rfind(b"\n") + 1
    if not cut:
      rest += block
      continue
    yield rest + block[:cut]
    rest = block[cut:]
  if rest:
    yield rest


def _even(data: bytes, delimiter: str, lines: int, columns: int) -> bool:
  """Whether every line holds columns - 1 delimiters; quotes are taken for plain characters."""
  bytes_ = np.frombuffer(data, np.uint8)
  marks = np.flatnonzero(bytes_ == ord(delimiter))
  if len(marks) != lines * (columns - 1):
    return False
  if columns == 1:
    return True
  marks = marks.reshape(lines, columns - 1)
  ends = np.flatnonzero(bytes_ == ord("\n"))[: lines - 1]
  return bool((marks[:-1, -1] < ends).all() and (ends < marks[1:, 0]).all())


def _reason(error: Exception) -> str:
  return str(getattr(error, "strerror", None) or error).split("\n")[0].strip(" .")
