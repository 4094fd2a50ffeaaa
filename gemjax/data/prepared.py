"""A prepared data set: a folder of block files with the feature set that made them.

  DIR/manifest.json          feature set, files and examples per block of every split
  DIR/<split>-00000.array_record
  DIR/<history>.*.npy        events of all users; see histories.py
  DIR/vocabularies.json      written by the fitting code, for people and for serving

The folder appears whole or not at all: it is written beside its place and renamed at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from gemjax.data.blocks import Columns, encode_block
from gemjax.data.histories import Stored, check_history, write_history
from gemjax.features import FeatureSet, History

MANIFEST = "manifest.json"
VERSION = 4
BLOCK_SIZE = 4096
WRITTEN = (".array_record", ".npy", ".json")


class PreparedDataError(ValueError):
  """A prepared folder that is missing, of another version, incomplete or empty."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Split:
  """One split: its block files, and the examples of each block in file order."""

  files: tuple[str, ...]
  blocks: tuple[tuple[int, ...], ...]  # Per file, the examples of each block.
  digest: int  # CRC32 of all its blocks and histories: tells other data with equal features.

  @property
  def examples(self) -> int:
    return sum(map(sum, self.blocks))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PreparedData:
  """What `open_prepared` found: the folder, its features and its splits."""

  path: pathlib.Path
  features: FeatureSet
  splits: dict[str, Split]
  histories: dict[str, Stored]
  origin: dict[str, Any]  # Data set name, options and notes of the preparation, for people.

  def split(self, name: str) -> Split:
    if name not in self.splits:
      raise PreparedDataError(
        f"{self.path} has no split {name!r}, only {sorted(self.splits)}; name one of them"
      )
    split = self.splits[name]
    if not split.examples:
      raise PreparedDataError(f"split {name!r} of {self.path} is empty; prepare it again")
    return split


def open_prepared(path: str | os.PathLike) -> PreparedData:
  """Reads the manifest of `path` and checks that every file it names is there, and that histories
  are whole.
  """
  path = pathlib.Path(path)
  file = path / MANIFEST
  if not path.exists():
    raise PreparedDataError(
      f"{path} is no prepared data set, it does not exist; name one, or make it with "
      f"`python launch/prepare.py --dataset=NAME --input=PATH --output={path}`"
    )
  if not file.is_file():
    raise PreparedDataError(
      f"{path} is no prepared data set (no {MANIFEST}); prepare what it holds, if it is data, "
      f"with `python launch/prepare.py --dataset=NAME --input={path} --output=DIR` and name DIR"
    )
  try:
    tree = json.loads(file.read_text())
    if tree["version"] != VERSION:
      raise PreparedDataError(
        f"{file}: version {tree['version']}, but this code reads {VERSION}; prepare again"
      )
    if tree.pop("crc32") != checksum(tree):
      raise PreparedDataError(f"{file} is damaged or was edited (its checksum); prepare again")
    features = FeatureSet.from_json(tree["features"])
    splits = {
      name: Split(
        files=tuple(s["files"]), blocks=tuple(tuple(b) for b in s["blocks"]), digest=s["digest"]
      )
      for name, s in tree["splits"].items()
    }
    histories = {
      f.name: Stored(
        users=h["users"], events=h["events"], files={n: (b, c) for n, (b, c) in h["files"].items()}
      )
      for f, h in ((f, tree["histories"][f.name]) for f in features.history)
    }
  except PreparedDataError:
    raise
  except (KeyError, TypeError, AttributeError, ValueError) as error:
    raise PreparedDataError(f"{file}: truncated or corrupt ({error}); prepare again") from error
  for split in splits.values():
    for name in split.files:
      if not (path / name).is_file():
        raise PreparedDataError(f"{path / name} is missing, but {file} names it; prepare again")
  for stored in histories.values():
    check_history(path, stored)
  origin = tree.get("origin", {})
  return PreparedData(
    path=path, features=features, splits=splits, histories=histories, origin=origin
  )


class PreparedWriter:
  """Writes a prepared folder in bounded memory: `add` columns, `finish` with the features.

  Used as a context manager, it leaves nothing behind if the body raises.

  Columns of `add`, each with one entry an example (n of them): `dense` (n, F) float32, `ids`
  (n, S) int32, `label` (n, T) uint8, and where the data has them `group` (n,) int32, `oracle`
  (n, T) float32; `<name>.values` and `<name>.lengths` int32 for every sequence feature. Ids and
  values are int64 where the feature set is wide. With histories `time` (n,) int64 in seconds, and
  `<name>.start` and `<name>.stop` (n,) int64 for each, which `add_history` stores.
  """

  def __init__(self, path: str | os.PathLike, *, block_size: int = BLOCK_SIZE):
    self._path = pathlib.Path(path)
    self._partial = self._path.with_name(self._path.name + ".partial")
    self._block_size = block_size
    self._pending: dict[str, list[Columns]] = {}
    self._writers: dict[str, ArrayRecordWriter] = {}
    self._blocks: dict[str, list[int]] = {}
    self._digests: dict[str, int] = {}
    self._histories: dict[str, Stored] = {}
    if self._path.exists() and any(self._path.iterdir()):
      raise PreparedDataError(f"{self._path} exists and is not empty; name another output folder")

  def __enter__(self) -> PreparedWriter:
    foreign = [f for f in self._partial.glob("*") if f.suffix not in WRITTEN]
    if foreign:
      raise PreparedDataError(f"{foreign[0]} is where {self._path} is to be made; move it away")
    shutil.rmtree(self._partial, ignore_errors=True)
    try:
      self._partial.mkdir(parents=True)
    except BaseException:  # A signal may come as soon as the folder is there.
      shutil.rmtree(self._partial, ignore_errors=True)
      raise
    return self

  def __exit__(self, kind, value, trace) -> None:
    for writer in self._writers.values():
      with contextlib.suppress(RuntimeError):  # On a full disk; `_failing` has said so already.
        if writer.is_open():
          writer.close()
    shutil.rmtree(self._partial, ignore_errors=True)

  def add(self, split: str, columns: Columns) -> None:
    """Appends examples to a split, in their order."""
    self._blocks.setdefault(split, [])
    pending = self._pending.setdefault(split, [])
    pending.append(columns)
    if sum(map(examples, pending)) >= self._block_size:
      whole = concatenate(pending)
      n = examples(whole) // self._block_size * self._block_size
      for start in range(0, n, self._block_size):
        self._write(split, take(whole, slice(start, start + self._block_size)))
      self._pending[split] = [take(whole, slice(n, None))]

  def add_history(
    self,
    history: History,
    ids: dict[str, np.ndarray],
    time_E: np.ndarray,
    offsets_U1: np.ndarray,
  ) -> None:
    """Stores the events of all users; arguments and errors are those of `write_history`."""
    self._histories[history.name] = write_history(self._partial, history, ids, time_E, offsets_U1)

  def finish(
    self, features: FeatureSet, *, vocabularies: dict[str, list] | None = None, origin: dict
  ) -> PreparedData:
    """Writes what is pending and the manifest, then moves the folder to its place."""
    for split, pending in self._pending.items():
      rest = concatenate(pending)
      if examples(rest):
        self._write(split, rest)
    for split, writer in self._writers.items():
      with self._failing(split):
        writer.close()
    self._verify()  # A closed writer always says it is not ok: only the records tell.
    histories = {name: dataclasses.asdict(h) for name, h in self._histories.items()}
    past = json.dumps(histories).encode() if histories else b""
    splits = {
      s: {"files": [_file(s)], "blocks": [b], "digest": zlib.crc32(past, self._digests[s])}
      for s, b in self._blocks.items()
      if b
    }
    if vocabularies is not None:
      (self._partial / "vocabularies.json").write_text(json.dumps(vocabularies))
    manifest = {"version": VERSION, "features": features.to_json(), "splits": splits}
    manifest |= {"histories": histories, "origin": origin}
    text = json.dumps(manifest | {"crc32": checksum(manifest)}, indent=1)
    (self._partial / MANIFEST).write_text(text)
    if self._path.exists():
      self._path.rmdir()
    self._partial.rename(self._path)
    return open_prepared(self._path)

  def _write(self, split: str, columns: Columns) -> None:
    if split not in self._writers:
      # One record a group, so that a block can be read alone.
      file = str(self._partial / _file(split))
      self._writers[split] = ArrayRecordWriter(file, "group_size:1,zstd:1")
    block = encode_block(columns)
    self._digests[split] = zlib.crc32(block, self._digests.get(split, 0))
    with self._failing(split):
      self._writers[split].write(block)
      if not self._writers[split].ok():
        raise RuntimeError("no reason given")
    self._blocks[split].append(examples(columns))

  @contextlib.contextmanager
  def _failing(self, split: str) -> Iterator[None]:
    """Makes what ArrayRecord raises an OSError that names the file."""
    try:
      yield
    except RuntimeError as error:
      reason = str(error).split(";")[0]
      file = self._partial / _file(split)
      raise OSError(f"writing {file} failed ({reason}); free the disk and try again") from error

  def _verify(self) -> None:
    """A writer may fail without a word on a full disk: count the records that are there."""
    from array_record.python.array_record_module import ArrayRecordReader

    for split, blocks in self._blocks.items():
      if not blocks:
        continue
      file = self._partial / _file(split)
      reader = ArrayRecordReader(str(file), "readahead_buffer_size:0,max_parallelism:0")
      found = reader.num_records() if reader.ok() else 0
      reader.close()
      if found != len(blocks):
        raise OSError(f"{file} holds {found} of {len(blocks)} blocks; is the disk full?")


def checksum(manifest: dict[str, Any]) -> int:
  """CRC32 of a manifest's values, however they are laid out."""
  return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def _file(split: str) -> str:
  return f"{split}-00000.array_record"


def examples(columns: Columns) -> int:
  """Number of examples of a block."""
  return len(columns["label"])


def concatenate(blocks: list[Columns]) -> Columns:
  """The examples of all blocks, in order."""
  return {n: np.concatenate([b[n] for b in blocks]) for n in blocks[0]}


def take(columns: Columns, index: slice | np.ndarray) -> Columns:
  """The examples at `index`, jagged columns included."""
  out = {}
  for name, column in columns.items():
    if name.endswith(".values"):
      lengths = columns[name.removesuffix("values") + "lengths"]
      starts = np.concatenate([[0], np.cumsum(lengths)])
      if isinstance(index, slice):
        rows = np.arange(len(lengths))[index]
        first, last = (starts[rows[0]], starts[rows[-1] + 1]) if len(rows) else (0, 0)
        out[name] = column[first:last]  # Contiguous: slices here have step 1.
        continue
      picked = lengths[index]
      # Event e of picked example b sits at starts[b] + (e - first event of b).
      shift = starts[:-1][index] - np.concatenate([[0], np.cumsum(picked)[:-1]])
      out[name] = column[np.repeat(shift, picked) + np.arange(picked.sum())]
    else:
      # np.take copies row by row, 6 times as fast as column[index] where index is an array.
      rows = isinstance(index, slice) or index.dtype == bool
      out[name] = column[index] if rows else np.take(column, index, axis=0)
  return out
