"""The input pipeline: batches as a pure function of (seed, number), driven by Grain.

Training sees an endless stream of examples, epoch after epoch. In epoch e the blocks come in a
permuted order drawn from (seed, e), and every window of `window_blocks` of them is shuffled by a
permutation drawn from (seed, e, window). Batch t is positions [t B, (t + 1) B) of the stream:
nothing is dropped or repeated at the borders of blocks, windows and epochs, and a batch that spans
them is as large as any other. The only state is therefore the number of the next batch, and
process p of P takes rows [p B / P, (p + 1) B / P) of the same batches, however many processes ran
before. B and the seed must be those of the run that is resumed. The batch is made for a mesh of N
devices, the shards: shard s is rows [s B / N, (s + 1) B / N), with its events packed by itself.
"""

from __future__ import annotations

import collections
import itertools
import sys
import threading
from collections.abc import Callable, Hashable
from concurrent import futures
from typing import Any

import grain
import numpy as np

from gemjax.data.block_reader import BlockReader
from gemjax.data.blocks import Columns
from gemjax.data.prepared import PreparedData, concatenate, examples, take
from gemjax.features import MISSING, Batch, Jagged, event_capacity, split_words

# Batches in flight touch the window that ends and the one that begins; the third is slack.
RECENT_WINDOWS = 3


class BatchSizeError(ValueError):
  """A batch that the data, the processes or the devices cannot share."""


def train_batches(
  data: PreparedData,
  *,
  batch_size: int,
  seed: int,
  split: str = "train",
  window_blocks: int = 16,
  process_index: int = 0,
  process_count: int = 1,
  shards: int = 1,
  threads: int = 2,
  prefetch: int = 8,
) -> grain.IterDataset[Batch]:
  """The endless shuffled stream of `split`, in batches of exactly `batch_size / process_count`.

  `shards` counts the devices of all processes together. `iter()` of it has `get_state()` and
  `set_state()`; memory is about 3 windows of `window_blocks` blocks and `prefetch` batches. Raises
  BatchSizeError where the batch is larger than the split or does not divide by the shards, or
  these not by the processes.
  """
  batches = Batches(
    data, split, batch_size, seed, window_blocks, process_index, process_count, shards
  )
  return batches.to_iter_dataset(_read_options(threads, prefetch))


def evaluation_batches(
  data: PreparedData,
  split: str,
  *,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  shards: int = 1,
  threads: int = 2,
  prefetch: int = 8,
) -> grain.IterDataset[Batch]:
  """Every example of `split` once, in file order; rows that fill up the last batch have weight 0.

  All processes get the same number of batches, ceil(examples / batch_size).
  """
  batches = Batches(data, split, batch_size, None, 1, process_index, process_count, shards)
  return batches.to_iter_dataset(_read_options(threads, prefetch))


class Batches(grain.MapDataset[Batch]):
  """Element t is batch t: of the endless shuffled stream, or with `seed` None in file order.

  Of its rows this process has those of `shards / process_count` consecutive shards.
  """

  def __init__(
    self,
    data: PreparedData,
    split: str,
    batch_size: int,
    seed: int | None,
    window_blocks: int = 16,
    process_index: int = 0,
    process_count: int = 1,
    shards: int = 1,
  ):
    super().__init__()
    self._reader = BlockReader(data, split)
    self._features = data.features
    self._examples = data.split(split).examples
    self._batch_size, self._seed, self._window_blocks = batch_size, seed, window_blocks
    if batch_size < 1 or window_blocks < 1:
      raise ValueError(
        f"batch_size and window_blocks must be at least 1, got {batch_size} and {window_blocks}"
      )
    if not 0 <= process_index < process_count:
      raise ValueError(f"process_index {process_index} must be in [0, {process_count})")
    if shards < 1 or shards % process_count:
      raise BatchSizeError(
        f"{shards} shards (devices of the mesh) must be a multiple of {process_count} processes; "
        "give each process the same number of devices"
      )
    if batch_size % shards:
      field = "batch_size" if seed is not None else "eval_batch_size"
      raise BatchSizeError(
        f"batch {batch_size} must divide by the {shards} devices of the mesh; change "
        f"config.data.{field} or config.mesh"
      )
    if seed is not None and batch_size > self._examples:
      raise BatchSizeError(
        f"batch {batch_size} is larger than the {self._examples} examples of split {split!r} in "
        f"{data.path}; choose a smaller batch_size"
      )
    self._rows = batch_size // process_count
    self._first_row = process_index * self._rows
    self._shards = shards // process_count  # Of this process.
    self._epochs = _Recent(self._make_epoch, 2)
    self._windows = _Recent(self._make_window, RECENT_WINDOWS)

  def __len__(self) -> int:
    return sys.maxsize if self._seed is not None else -(-self._examples // self._batch_size)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    first = index % len(self) * self._batch_size
    runs = list(self._runs(first, first + self._batch_size))
    return self._batch(self._own(runs), self._capacities(runs))

  def _runs(self, first: int, stop: int):
    """Yields (window, its rows) that hold positions [first, stop) of the stream, in order."""
    if self._seed is None:
      stop = min(stop, self._examples)
    while first < stop:
      epoch, offset = divmod(first, self._examples)
      _, bounds = self._epochs(epoch)
      w = int(np.searchsorted(bounds, offset, "right")) - 1
      end = min(int(bounds[w + 1]), offset + stop - first)
      columns, order = self._windows((epoch, w))
      yield columns, order[offset - bounds[w] : end - bounds[w]]
      first += end - offset

  def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The order of the blocks, and the position in the epoch where each window begins and ends."""
    blocks = len(self._reader.sizes)
    order = np.arange(blocks) if self._seed is None else self._random(epoch, 0).permutation(blocks)
    ends = np.cumsum(self._reader.sizes[order])
    last = [*range(self._window_blocks - 1, blocks - 1, self._window_blocks), blocks - 1]
    return order, np.concatenate([[0], ends[last]])

  def _make_window(self, key: tuple[int, int]) -> tuple[Columns, np.ndarray]:
    """The examples of a window as they lie on disk, and the order in which to take them."""
    epoch, w = key
    blocks = self._epochs(epoch)[0][w * self._window_blocks : (w + 1) * self._window_blocks]
    columns = concatenate([self._reader.read(b) for b in blocks])
    n = examples(columns)
    order = np.arange(n) if self._seed is None else self._random(epoch, w + 1).permutation(n)
    return columns, order

  def _random(self, epoch: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([self._seed, epoch, stream])

  def _own(self, runs: list[tuple[Columns, np.ndarray]]) -> Columns:
    """The rows of this process."""
    starts = itertools.accumulate((len(rows) for _, rows in runs), initial=0)
    parts = []
    for (columns, rows), start in zip(runs, starts):
      low, high = (max(0, r - start) for r in (self._first_row, self._first_row + self._rows))
      if len(rows[low:high]) or not parts:  # No part may have a row: all of ours are padding.
        parts.append(take(columns, rows[low:high]))
    return concatenate(parts) if len(parts) > 1 else parts[0]

  def _capacities(self, runs: list[tuple[Columns, np.ndarray]]) -> dict[str, int]:
    """Slots a shard: for the shard with the most events of the whole batch, so that the shards of
    all processes run one program.
    """
    out = {}
    for f in self._features.sequence:
      lengths_B = np.concatenate([c[f"{f.name}.lengths"][rows] for c, rows in runs])
      rows = self._rows // self._shards
      events_N = _pad(lengths_B, self._batch_size).reshape(-1, rows).sum(1)
      out[f.name] = event_capacity(int(events_N.max()))
    return out

  def _batch(self, columns: Columns, capacities: dict[str, int]) -> Batch:
    rows, words = self._rows, split_words if self._features.wide else lambda ids: ids
    sequences = {}
    for name, capacity in capacities.items():
      lengths_B = _pad(columns[f"{name}.lengths"], rows)
      values_E = _pack(columns[f"{name}.values"], lengths_B, self._shards, capacity)
      sequences[name] = Jagged(values_E=words(values_E), lengths_B=lengths_B)
    return Batch(
      dense_BF=_pad(columns["dense"], rows),
      ids_BS=words(_pad(columns["ids"], rows)),  # Filled up with 0, which is MISSING.
      label_BT=_pad(columns["label"].astype(np.float32), rows),
      weight_B=_pad(np.ones(examples(columns), np.float32), rows),
      group_B=_pad(columns["group"], rows, fill=-1),
      oracle_BT=_pad(columns["oracle"], rows),
      sequences=sequences,
    )


class _Recent:
  """The last few results of `make`, each made once even where many threads ask for it at once."""

  def __init__(self, make: Callable[[Any], Any], size: int):
    self._make, self._size = make, size
    self._lock = threading.Lock()
    self._results: collections.OrderedDict[Hashable, futures.Future] = collections.OrderedDict()

  def __call__(self, key: Hashable) -> Any:
    with self._lock:
      found = self._results.get(key)
      result = self._results[key] = found or futures.Future()
      self._results.move_to_end(key)
      if len(self._results) > self._size:
        self._results.popitem(last=False)
    if found is None:
      try:
        result.set_result(self._make(key))
      except BaseException as error:
        result.set_exception(error)  # Those who wait must not wait for ever.
    return result.result()


def _pad(x: np.ndarray, rows: int, fill: int = 0) -> np.ndarray:
  """`x` with rows of `fill` behind it."""
  if len(x) == rows:
    return x
  out = np.full((rows, *x.shape[1:]), fill, x.dtype)
  out[: len(x)] = x
  return out


def _pack(values: np.ndarray, lengths_B: np.ndarray, shards: int, capacity: int) -> np.ndarray:
  """The values shard after shard, each at the front of its own `capacity` slots."""
  out = np.full((shards, capacity), MISSING, values.dtype)
  ends = np.cumsum(lengths_B.reshape(shards, -1).sum(1))
  for slots, part in zip(out, np.split(values, ends[:-1])):
    slots[: len(part)] = part
  return out.reshape(-1)


def _read_options(threads: int, prefetch: int) -> grain.ReadOptions:
  return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
