"""The input pipeline: batches as a pure function of (seed, number), driven by Grain.

Training sees an endless stream of examples, epoch after epoch. In epoch e the blocks come in a
permuted order drawn from (seed, e), and every window of `window_blocks` of them is shuffled by a
permutation drawn from (seed, e, window). Batch t is positions [t B, (t + 1) B) of the stream:
nothing is dropped or repeated at the borders of blocks, windows and epochs, and a batch that spans
them is as large as any other. The only state is therefore the number of the next batch, and
process p of P takes rows [p B / P, (p + 1) B / P) of the same batches, however many processes ran
before. B and the seed must be those of the run that is resumed. The batch is made for a mesh of N
devices, the shards: shard s is rows [s B / N, (s + 1) B / N), with its events packed by itself.

With a `cost`, blocks are dealt to windows so that each has some of every part of the file, examples
to batches so that all cost alike, and those of a batch to its halves, quarters and so on
(balance.py). It is all a function of the seed, the epoch and B: neither processes nor devices
change a batch.
Slots for events are those of the fullest shard among the batches of the first windows, and a
margin, unless a batch needs more: one program, as a rule.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import grain
import numpy as np

from gemjax.data.balance import alike, groups, halves
from gemjax.data.block_reader import BlockReader
from gemjax.data.blocks import Columns
from gemjax.data.packing import make_batch, most_events
from gemjax.data.prepared import PreparedData, concatenate, examples, take
from gemjax.data.recent import Recent
from gemjax.features import HISTORY_STEPS, Batch, event_capacity

# Batches in flight touch the window that ends and the one that begins; the third is slack.
RECENT_WINDOWS = 3
MARGIN = 0.03  # Share of slots beyond what the first windows need: later ones differ a little.

# Events that each example sees, by history, to what each example costs.
Cost = Callable[[dict[str, np.ndarray]], np.ndarray]


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
  history_length: int = 0,
  cost: Cost | None = None,
  threads: int = 2,
  prefetch: int = 8,
) -> grain.IterDataset[Batch]:
  """The endless shuffled stream of `split`, in batches of exactly `batch_size / process_count`.

  An example sees the last `history_length` events of each history, but no more than the history's
  `max_length` (0: so many). `cost` says what an example costs with so many events of each
  history; it decides which examples share a batch and a shard, so that all cost nearly alike.

  `shards` counts the devices of all processes together. `iter()` of it has `get_state()` and
  `set_state()`; memory is about 3 windows of `window_blocks` blocks and `prefetch` batches. Raises
  BatchSizeError where the batch is larger than the split or does not divide by the shards, or
  these not by the processes.
  """
  batches = Batches(
    data,
    split,
    batch_size,
    seed,
    window_blocks,
    process_index,
    process_count,
    shards,
    history_length,
    cost,
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
  history_length: int = 0,
  threads: int = 2,
  prefetch: int = 8,
) -> grain.IterDataset[Batch]:
  """Every example of `split` once, in file order; rows that fill up the last batch have weight 0.

  All processes get the same number of batches, ceil(examples / batch_size).
  """
  batches = Batches(
    data, split, batch_size, None, 1, process_index, process_count, shards, history_length
  )
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
    history_length: int = 0,
    cost: Cost | None = None,
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
    if history_length < 0:
      raise ValueError(f"history_length must be 0 (all) or more, got {history_length}")
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
    self._shards = shards  # Of all processes.
    self._own_shards = shards // process_count
    self._cost = cost
    self._longest = {
      f.name: min(history_length or f.max_length, f.max_length) for f in data.features.history
    }
    self._room = Recent(self._make_room, 1)
    self._epochs = Recent(self._make_epoch, 2)
    self._windows = Recent(self._make_window, RECENT_WINDOWS)

  def __len__(self) -> int:
    return sys.maxsize if self._seed is not None else -(-self._examples // self._batch_size)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    room = self._room(None)  # First of all: it may push windows out that this batch needs.
    runs, order = self._examples_of(index)
    events = self._events(runs, order)
    capacities = {f.name: event_capacity(events[f.name]) for f in self._features.sequence}
    for name, least in room.items():
      capacities[name] = event_capacity(max(events[name], least), steps=HISTORY_STEPS)
    return make_batch(
      self._own(runs, order),
      self._features,
      self._reader.stores,
      rows=self._rows,
      shards=self._own_shards,
      capacities=capacities,
    )

  def _examples_of(self, index: int) -> tuple[list[tuple[Columns, np.ndarray]], np.ndarray]:
    """The runs of batch `index`, and which of their examples is at each of its places."""
    first = index % len(self) * self._batch_size
    runs = list(self._runs(first, first + self._batch_size))
    if self._cost is None:
      return runs, np.arange(sum(len(rows) for _, rows in runs))
    return runs, halves(np.concatenate([columns["cost"][rows] for columns, rows in runs]))

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

  def _make_epoch(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The blocks of each window, and the position in the epoch where each begins and ends."""
    blocks, most = len(self._reader.sizes), self._window_blocks
    if self._seed is not None and self._cost is not None:
      windows = alike(blocks, most, self._random(epoch, 0))
    else:
      order = np.arange(blocks)
      order = order if self._seed is None else self._random(epoch, 0).permutation(blocks)
      windows = np.split(order, range(most, blocks, most))
    return windows, np.cumsum([0, *(self._reader.sizes[window].sum() for window in windows)])

  def _make_window(self, key: tuple[int, int]) -> tuple[Columns, np.ndarray]:
    """The examples of a window as they lie on disk, and the order in which to take them."""
    epoch, w = key
    columns = concatenate([self._reader.read(b) for b in self._epochs(epoch)[0][w]])
    for name, longest in self._longest.items():
      past_n = columns[f"{name}.stop"] - columns[f"{name}.start"]
      columns[f"{name}.lengths"] = np.minimum(past_n, longest).astype(np.int32)
    n = examples(columns)
    if self._seed is None:
      return columns, np.arange(n)
    rng = self._random(epoch, w + 1)
    if self._cost is None:
      return columns, rng.permutation(n)
    lengths = {name: columns[f"{name}.lengths"] for name in self._longest}
    columns["cost"] = np.asarray(self._cost(lengths), np.float64)
    first = epoch * self._examples + int(self._epochs(epoch)[1][w])  # Of the stream.
    borders = range((first // self._batch_size + 1) * self._batch_size, first + n, self._batch_size)
    return columns, groups(columns["cost"], np.diff([first, *borders, first + n]), rng)

  def _random(self, epoch: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([self._seed, epoch, stream])

  def _own(self, runs: list[tuple[Columns, np.ndarray]], order: np.ndarray) -> Columns:
    """The rows of this process."""
    order = order[self._first_row : self._first_row + self._rows]
    starts = itertools.accumulate((len(rows) for _, rows in runs), initial=0)
    parts, places = [], []
    for (columns, rows), start in zip(runs, starts):
      place = np.flatnonzero((order >= start) & (order < start + len(rows)))
      if len(place) or not parts:  # No part may have a row: all of ours are padding.
        parts.append(take(columns, rows[order[place] - start]))
        places.append(place)
    whole = concatenate(parts) if len(parts) > 1 else parts[0]
    back = np.argsort(np.concatenate(places))
    return whole if (np.diff(back) == 1).all() else take(whole, back)

  def _events(self, runs: list[tuple[Columns, np.ndarray]], order: np.ndarray) -> dict[str, int]:
    """Most events of a shard, of all shards of the whole batch, so that the shards of all
    processes run one program.
    """
    out = {}
    for name in [f.name for f in self._features.sequence] + list(self._longest):
      lengths_B = np.concatenate([columns[f"{name}.lengths"][rows] for columns, rows in runs])
      out[name] = most_events(lengths_B[order], self._batch_size, self._shards)
    return out

  def _make_room(self, _) -> dict[str, int]:
    """Events of each history that a shard has room for, whatever its batch."""
    if not self._longest:
      return {}
    count, margin = len(self), 0.0  # Evaluation sees what is measured here.
    if self._seed is not None:
      bounds = self._epochs(0)[1][: RECENT_WINDOWS + 1]
      count, margin = max(1, int(bounds[-1]) // self._batch_size), MARGIN
    most = [self._events(*self._examples_of(t)) for t in range(count)]
    events = {name: max(m[name] for m in most) for name in self._longest}
    return {name: n + int(n * margin) for name, n in events.items()}


def _read_options(threads: int, prefetch: int) -> grain.ReadOptions:
  return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
