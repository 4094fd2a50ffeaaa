"""Preparation: raw data in, prepared folder out, in streaming passes: one to fit, one to write.

Memory holds a chunk, the values counted for the vocabularies, the users, and of every event of a
history some 20 bytes. A split by order or time takes one more pass, before these, and holds a key
of 8 bytes for every row.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tqdm

from gemjax.data import movielens, public, table
from gemjax.data.encoding import fit
from gemjax.data.prepared import PreparedData, PreparedWriter
from gemjax.data.raw import Chunk, RawDataError, Reader, Source, existing, fingerprint
from gemjax.data.schema import SPLITS, Schema, SchemaError
from gemjax.data.schema_file import load_schema
from gemjax.data.values import complete, numbers
from gemjax.data.vocabulary import mix
from gemjax.features import UNLABELLED

# Name: how to open it, and how to tell it from a path.
_PUBLIC: dict[str, tuple[Callable[[pathlib.Path], Source], Callable[[pathlib.Path], bool]]] = {
  "frappe": (public.frappe, public.is_frappe),
  "movielens-100k": (movielens.movielens_100k, movielens.is_movielens_100k),
  "movielens-1m": (movielens.movielens_1m, movielens.is_movielens_1m),
  "criteo-kaggle": (public.criteo_kaggle, public.is_criteo_kaggle),
  "criteo-1tb": (public.criteo_1tb, public.is_criteo_1tb),
}
DATASETS = (*_PUBLIC, "table")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def recognise(path: str | os.PathLike) -> str | None:
  """Name of the public set whose raw files lie at `path`, or None."""
  path = pathlib.Path(path)
  return next((name for name, (_, known) in _PUBLIC.items() if known(path)), None)


def prepare(
  dataset: str,
  input: str | os.PathLike,
  output: str | os.PathLike,
  schema: Schema | str | os.PathLike | None = None,
  *,
  hash_rows: int = 0,
  min_count: int = 0,
  progress: bool = True,
) -> PreparedData:
  """Fits features on the train split of `input` and writes all splits to the folder `output`.

  `schema` (of `table` only) is a TOML file or a Schema; `hash_rows` hashes all categories to so
  many rows, `min_count` calls rarer values unknown (0: as the schema says). Raises SchemaError,
  RawDataError, PreparedDataError or OSError with one sentence, and then leaves no output.
  """
  if dataset not in DATASETS:
    raise SchemaError(f"data set {dataset!r} is unknown; choose from {list(DATASETS)}")
  path = existing(input)
  if dataset == "table":
    if schema is None:
      raise SchemaError("the data set 'table' needs a schema; name its TOML file by --schema=FILE")
    source = table.table(path, schema if isinstance(schema, Schema) else load_schema(schema))
  elif schema is not None:
    raise SchemaError(f"data set {dataset!r} has its own schema; --schema is for 'table'")
  else:
    source = _PUBLIC[dataset][0](path)
  schema = source.schema.encoded(hash_rows=hash_rows, min_count=min_count)
  try:
    with PreparedWriter(output) as writer, contextlib.ExitStack() as bars:
      rule = _Split(source, schema, progress, bars)
      train = (chunk for _, chunk in rule.chunks("fit", ["train"]))
      encoder = fit(schema, train, lambda history: rule.events("fit", history))
      for history in encoder.features.history:
        events = encoder.events(history, rule.events("store", history.name))
        writer.add_history(history, events.ids, events.time_E, events.offsets_U1)
      counts, optional = dict.fromkeys(SPLITS, 0), encoder.features.optional
      labelled = {task: dict.fromkeys(SPLITS, 0) for task in optional}
      past = {history.name: dict.fromkeys(SPLITS, 0) for history in encoder.features.history}
      for split, chunk in rule.chunks("encode", SPLITS):
        columns = encoder.encode(chunk)
        writer.add(split, columns)
        counts[split] += len(chunk.frame)
        for task, known in labelled.items():
          label_B = columns["label"][:, encoder.features.tasks.index(task)]
          known[split] += int((label_B != UNLABELLED).sum())
        for name, seen in past.items():
          seen[split] += int((columns[f"{name}.stop"] > columns[f"{name}.start"]).sum())
      for split, count in counts.items():
        if not count:
          raise RawDataError(
            f"split {split!r} of {path} is empty (rows: {counts}, split by {schema.split.by}); "
            "give it rows or other fractions"
          )
      known = labelled.get(first := encoder.features.tasks[0])
      if known and not known["valid"]:
        raise RawDataError(
          f"no row of split 'valid' of {path} has the label {first!r} (rows with it: {known}), by "
          "which training would stop; give it some, other fractions, or another first label"
        )
      for name, seen in past.items():
        if not seen["train"]:
          raise RawDataError(
            f"no example of {path} to train on has an event of history {name!r} before it; write "
            "users of both alike, and their times in one unit"
          )
      origin = {"dataset": dataset, "input": os.path.abspath(path)}
      origin["fingerprint"] = fingerprint(path)
      origin |= {"split": schema.split.by, "rows": counts}
      origin |= {"labelled": labelled} if labelled else {}
      origin |= {"past": past} if past else {}
      return writer.finish(encoder.features, vocabularies=encoder.vocabularies, origin=origin)
  except OSError as error:
    # From the system, and not one of our sentences, nor of the input.
    if error.strerror and str(error.filename or output).startswith(str(output)):
      mend = "free the disk or " if error.errno in _FULL else ""
      raise OSError(
        f"writing the prepared data to {output} failed: {error.strerror}; "
        f"{mend}name another --output"
      ) from error
    raise


class _Split:
  """The chunks of a source by split.

  Unless the files are split already, each row has a key and goes to train below the first of two
  cuts, to test from the second on: its number (`order`), its time (`time`, so that equal times
  never part) or mix(number + seed) / 2^64 (`random`).

  `bars` closes progress bars: what reads may be left in the middle of a file, and then its bar must
  not follow the sentence that says why.
  """

  def __init__(self, source: Source, schema: Schema, progress: bool, bars: contextlib.ExitStack):
    self._source, self._schema, self._progress, self._bars = source, schema, progress, bars
    train, valid, _ = schema.split.fractions
    cuts = np.array([train, train + valid])
    if schema.split.by in ("order", "time"):
      read = [schema.time] if schema.split.by == "time" else list(schema.columns)[:1]
      keys = np.concatenate([k for k, _ in self._keys("split", read)])
      cuts = np.sort(keys)[np.minimum(np.round(cuts * len(keys)).astype(int), len(keys) - 1)]
    self._cuts = cuts

  def chunks(self, title: str, splits: Sequence[str]) -> Iterator[tuple[str, Chunk]]:
    if self._schema.split.by == "files":
      files = [(s, f) for s in splits for f in self._source.files[s]]
      yield from self._read(title, files, self._schema.read)
      return
    for key_B, chunk in self._keys(title, self._schema.read):
      split_B = np.searchsorted(self._cuts, key_B, side="right")
      for split in splits:
        mask_B = split_B == SPLITS.index(split)
        if mask_B.any():
          yield split, chunk.where(mask_B)

  def events(self, title: str, history: str) -> Iterator[Chunk]:
    """The events of a history, in the order of their files."""
    files = [("", file) for file in self._source.histories[history]]
    for _, chunk in self._read(f"{title} {history}", files, self._schema.read_of(history)):
      yield chunk

  def _keys(self, title: str, columns: Sequence[str]) -> Iterator[tuple[np.ndarray, Chunk]]:
    rule, first = self._schema.split, 0
    for _, chunk in self._read(title, [("", f) for f in self._source.files[""]], columns):
      number_B = np.arange(first, first + len(chunk.frame))
      first += len(number_B)
      if rule.by == "time":
        key_B = numbers(chunk, self._schema.time, self._schema.missing_values)
        complete(chunk, self._schema.time, np.isnan(key_B), "rows are split by time")
        yield key_B, chunk
      elif rule.by == "random":
        seed = np.uint64(rule.seed * 2**32 % 2**64)
        yield mix(number_B.astype(np.uint64) + seed) / 2.0**64, chunk
      else:
        yield number_B, chunk

  def _read(
    self, title: str, files: Sequence[tuple[str, Reader]], columns: Sequence[str]
  ) -> Iterator[tuple[str, Chunk]]:
    total = sum(f.size for _, f in files)
    off = not self._progress
    bar = tqdm.tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=off)
    self._bars.callback(bar.close)
    with bar:
      for split, file in files:
        for chunk in file.chunks(columns):
          yield split, chunk
          bar.update(chunk.bytes)
