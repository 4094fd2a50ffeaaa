"""Blocks read by number, and checked once against the feature set before anyone computes with them.

Letters: n examples of a block, F dense features, S sparse features, T tasks.
"""

from __future__ import annotations

import threading

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from gemjax.data.blocks import Columns, CorruptBlockError, decode_block
from gemjax.data.histories import Store
from gemjax.data.prepared import PreparedData
from gemjax.features import UNLABELLED, FeatureSet


class BlockReader:
  """The blocks of one split, numbered through its files; every thread may read at once."""

  def __init__(self, data: PreparedData, split: str):
    found = data.split(split)
    self._features = data.features
    self._files = [data.path / name for name in found.files]
    self._blocks = [(f, b) for f, blocks in enumerate(found.blocks) for b in range(len(blocks))]
    self._counts = [len(blocks) for blocks in found.blocks]
    self._open = threading.local()  # An ArrayRecordReader seeks and reads: one a thread.
    self.sizes = np.array([n for blocks in found.blocks for n in blocks])
    self.stores = [Store(data.path, h, data.histories[h.name]) for h in data.features.history]

  def check_files(self) -> None:
    """Raises CorruptBlockError unless every file holds as many blocks as the manifest says."""
    for file in range(len(self._files)):
      self._reader(file)

  def read(self, block: int) -> Columns:
    """Columns `dense`, `ids`, `label`, `group`, `oracle`, the jagged ones and those of histories.

    Raises CorruptBlockError, which names file and block, for a block that cannot be read, that
    does not fit the manifest or the feature set, or that holds a value no model can take.
    """
    file, number = self._blocks[block]
    source = f"{self._files[file]} block {number}"
    try:
      record = self._reader(file).read([number])[0]
    except (RuntimeError, IndexError) as error:  # What ArrayRecord raises for a broken file.
      raise CorruptBlockError(
        f"{source}: truncated or corrupt file ({error}); prepare again"
      ) from error
    columns = decode_block(record, source)
    n = int(self.sizes[block])
    if len(columns.get("label", ())) != n:
      raise CorruptBlockError(
        f"{source}: column 'label' holds {len(columns.get('label', ()))} examples, but the "
        f"manifest says {n}; prepare again"
      )
    return check_block(columns, self._features, self.stores, source)

  def _reader(self, file: int) -> ArrayRecordReader:
    readers = self._open.__dict__
    if file not in readers:
      self._files[file].open("rb").close()  # ArrayRecord takes what it may not read for empty.
      # Blocks are read in shuffled order: reading ahead would decompress what nobody asked for.
      reader = ArrayRecordReader(
        str(self._files[file]), "readahead_buffer_size:0,max_parallelism:0"
      )
      if (found := reader.num_records()) != self._counts[file]:
        raise CorruptBlockError(
          f"{self._files[file]}: holds {found} of the {self._counts[file]} blocks that the "
          "manifest names, the file is truncated or corrupt; prepare again"
        )
      readers[file] = reader
    return readers[file]


def check_block(
  columns: Columns, features: FeatureSet, stores: list[Store], source: str
) -> Columns:
  """`columns` with absent optional ones filled in, after checking shapes, dtypes and values."""
  n = len(columns["label"])
  wanted = {
    "dense": (len(features.dense), np.float32),
    "ids": (len(features.sparse), features.id_dtype),
    "label": (len(features.tasks), columns["label"].dtype),  # The values decide.
  }
  absent = {name: np.zeros((n, 0), dtype) for name, (width, dtype) in wanted.items() if not width}
  absent |= {"group": np.full(n, -1, np.int32), "oracle": np.zeros((n, 0), np.float32)}
  columns = absent | columns

  def bad(field: str, law: str):
    return CorruptBlockError(f"{source}, {field}: {law}; prepare again")

  for name, (width, dtype) in wanted.items():
    found = (columns[name].shape, columns[name].dtype) if name in columns else "absent"
    if found != ((n, width), dtype):
      raise bad(
        f"column {name!r}",
        f"it is {found}, but the feature set asks for {((n, width), np.dtype(dtype))}",
      )
  if features.grouped and columns["group"].min(initial=0) < 0:
    raise bad("column 'group'", "no user for an example, but the feature set says grouped")

  label = columns["label"]
  optional_T = np.array([task in features.optional for task in features.tasks])
  if not (valid := (label == 0) | (label == 1) | (label == UNLABELLED) & optional_T).all():
    b, t = np.argwhere(~valid)[0]
    raise bad(f"task {features.tasks[t]!r}", f"label {label[b, t]} is neither 0 nor 1")
  if not (valid := np.isfinite(columns["dense"])).all():
    b, f = np.argwhere(~valid)[0]
    value = columns["dense"][b, f]
    raise bad(f"dense feature {features.dense[f].name!r}", f"value {value} is not finite")

  def check_ids(ids, specs):
    # As unsigned numbers, negative ids are too large as well: one comparison for both ends.
    unsigned = np.dtype(f"u{ids.itemsize}")
    sizes = np.array([f.size for f in specs], unsigned)
    if (outside := ids.view(unsigned) >= sizes).any():
      b, s = np.argwhere(outside)[0]
      raise bad(
        f"feature {specs[s].name!r}",
        f"id {ids[b, s]} is outside its table of {specs[s].size} rows (0 to {specs[s].size - 1})",
      )

  if features.sparse:
    check_ids(columns["ids"], features.sparse)
  for f in features.sequence:
    values, lengths = columns.get(f"{f.name}.values"), columns.get(f"{f.name}.lengths")
    if values is None or lengths is None:
      raise bad(f"sequence {f.name!r}", "its values or lengths are not in the block")
    found, law = (values.dtype, lengths.dtype), (features.id_dtype, np.dtype(np.int32))
    if found != law:
      raise bad(f"sequence {f.name!r}", f"values and lengths are {found}, but must be {law}")
    if len(lengths) != n or lengths.min(initial=0) < 0 or lengths.sum() != len(values):
      raise bad(
        f"sequence {f.name!r}",
        f"{len(lengths)} lengths that sum to {lengths.sum()} for {n} examples with "
        f"{len(values)} values",
      )
    if (longest := lengths.max(initial=0)) > f.max_length:
      raise bad(f"sequence {f.name!r}", f"{longest} events, but max_length is {f.max_length}")
    check_ids(values[:, None], (f,))
  for store in stores:
    name = store.history.name
    parts = ("time", f"{name}.start", f"{name}.stop")
    for part in parts:
      found = (columns[part].shape, columns[part].dtype) if part in columns else "absent"
      if found != ((n,), np.int64):
        raise bad(f"history {name!r}", f"column {part!r} is {found}, but must be {n} int64")
    time_B, start_B, stop_B = (columns[part] for part in parts)
    if wrong := store.check(start_B, stop_B, time_B):
      raise bad(f"history {name!r}, example {wrong[0]}", wrong[1])
  return columns
