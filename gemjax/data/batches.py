"""Batches: a pure function of (seed, number).

Training sees an endless stream of examples, epoch after epoch. In epoch e the blocks come in a
permuted order drawn from (seed, e), and every window of `window_blocks` of them is shuffled by a
permutation drawn from (seed, e, window). Batch t is positions [t B, (t + 1) B) of the stream:
nothing is dropped or repeated at the borders of blocks, windows and epochs, and a batch that spans
them is as large as any other. The only state is therefore the number of the next batch, and
process p of P takes rows [p B / P, (p + 1) B / P) of the same batches, however many processes ran
before. B and the seed must be those of the run that is resumed. The batch is made for a mesh of N
devices, the shards: shard s is rows [s B / N, (s + 1) B / N), with its events packed by itself.

With a `cost`, blocks are dealt to windows so that each has some of every part of the file, examples
to batches so that all cost alike and have as many events of each of several histories, and those of
a batch to its halves, quarters and so on (balance.py). It is all a function of the seed, the epoch
and B: neither processes nor devices change a batch. Slots for events come in few sizes (rooms.py).

Evaluation takes every example once, in as few batches as can hold them, all with nearly as many
examples: rows that are left over are examples of no cost and no weight. It is dealt like an epoch
of training; without a cost it is in file order.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence

import grain
import numpy as np

from gemjax.data.balance import alike, groups, halves
from gemjax.data.block_reader import BlockReader
from gemjax.data.blocks import Columns
from gemjax.data.packing import make_batch
from gemjax.data.prepared import PreparedData, concatenate, examples, take
from gemjax.data.recent import Recent
from gemjax.data.rooms import Rooms
from gemjax.features import Batch

# Batches in flight touch the window that ends and the one that begins; the third is slack.
RECENT_WINDOWS = 3
# Share of slots beyond what the first windows need: later ones differ a little, those of sequences,
# which are not dealt, more; and these have few sizes, for valid and test shall have one program.
MARGIN, UNDEALT_MARGIN, UNDEALT_STEPS = 0.03, 0.15, 2

# Events that each example sees, by history, to what each example costs.
Cost = Callable[[dict[str, np.ndarray]], np.ndarray]


class BatchSizeError(ValueError):
  """A batch that the data, the processes or the devices cannot share."""


class Batches(grain.MapDataset[Batch]):
  """Element t is batch t: of the endless shuffled stream, or with `seed` None of an evaluation.

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
    self._sequences = {f.name: f.max_length for f in data.features.sequence}
    self._rooms = Recent(self._make_rooms, 1)
    self._epochs = Recent(self._make_epoch, 2)
    self._windows = Recent(self._make_window, RECENT_WINDOWS)

  def __len__(self) -> int:
    return sys.maxsize if self._seed is not None else -(-self._examples // self._batch_size)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    rooms, of_sequences = self._rooms(None)  # First: it may push out windows that we need.
    runs, order_B = self._examples_of(index)
    events = self._events(runs, order_B)
    columns, places = self._own(runs, order_B)
    capacities = rooms.of(events)
    for of_sequence in of_sequences:
      capacities = capacities | of_sequence.of(events, shrink=False)
    return make_batch(
      columns,
      self._features,
      self._reader.stores,
      places=places,
      rows=self._rows,
      shards=self._own_shards,
      capacities=capacities,
    )

  def _start(self, index: int) -> int:
    """Where batch `index` begins in the stream."""
    if self._seed is not None:
      return index * self._batch_size
    return index * self._examples // len(self)

  def _examples_of(
    self, index: int, shards: int | None = None
  ) -> tuple[list[tuple[Columns, np.ndarray]], np.ndarray]:
    """The runs of batch `index`, and which of their examples is at each of its places: where the
    number is not below theirs, none. With `shards` in a quick order, right for each shard's sums.
    """
    index %= len(self)
    runs = list(self._runs(self._start(index), self._start(index + 1)))
    if self._cost is None:
      return runs, np.arange(self._batch_size)
    cost_nK = np.concatenate([columns["cost"][rows] for columns, rows in runs])
    return runs, halves(self._filled(cost_nK).T, shards)

  def _filled(self, x_n: np.ndarray) -> np.ndarray:
    """With zeros for every row of the batch that no example has."""
    return np.pad(x_n, [(0, self._batch_size - len(x_n)), *[(0, 0)] * (x_n.ndim - 1)])

  def _runs(self, first: int, stop: int):
    """Yields (window, its rows) that hold positions [first, stop) of the stream, in order."""
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
    if self._cost is not None:
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
    if self._cost is None:
      ordered = self._seed is None
      return columns, np.arange(n) if ordered else self._random(epoch, w + 1).permutation(n)
    lengths = {name: columns[f"{name}.lengths"] for name in self._longest}
    # Several histories shall have events alike, too; what one has is like what it costs.
    kinds = [self._cost(lengths), *(lengths.values() if len(lengths) > 1 else ())]
    columns["cost"] = np.stack(kinds, 1).astype(np.float64)
    first = epoch * self._examples + int(self._epochs(epoch)[1][w])  # Of the stream.
    sizes_G = np.diff([first, *self._borders(first, first + n), first + n])
    return columns, groups(columns["cost"].T, sizes_G, self._random(epoch, w + 1))

  def _borders(self, first: int, stop: int) -> Sequence[int]:
    """Where batches begin or end between two positions of the stream."""
    if self._seed is not None:
      return range((first // self._batch_size + 1) * self._batch_size, stop, self._batch_size)
    return [start for start in map(self._start, range(len(self) + 1)) if first < start < stop]

  def _random(self, epoch: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([self._seed or 0, epoch, stream])

  def _own(
    self, runs: list[tuple[Columns, np.ndarray]], order: np.ndarray
  ) -> tuple[Columns, np.ndarray]:
    """The examples of this process, and their places among its rows, which rise."""
    order = order[self._first_row : self._first_row + self._rows]
    starts = itertools.accumulate((len(rows) for _, rows in runs), initial=0)
    parts, places = [], []
    for (columns, rows), start in zip(runs, starts):
      place = np.flatnonzero((order >= start) & (order < start + len(rows)))
      if len(place) or not parts:  # No part may have a row: all of ours are padding.
        parts.append(take(columns, rows[order[place] - start]))
        places.append(place)
    whole = concatenate(parts) if len(parts) > 1 else parts[0]
    places = np.concatenate(places)
    back = np.argsort(places)
    return whole if (np.diff(back) == 1).all() else take(whole, back), places[back]

  def _events(self, runs: list[tuple[Columns, np.ndarray]], order_B: np.ndarray) -> dict[str, int]:
    """Most events of a shard, of all shards of the whole batch, so that the shards of all
    processes run one program.
    """
    out = {}
    for name in self._sequences | self._longest:
      lengths_n = np.concatenate([columns[f"{name}.lengths"][rows] for columns, rows in runs])
      lengths_B = self._filled(lengths_n)[order_B]
      out[name] = int(lengths_B.reshape(self._shards, -1).sum(1).max())
    return out

  def _make_rooms(self, _) -> tuple[Rooms, list[Rooms]]:
    """Of histories and of each sequence, from the batches of the first windows."""
    if not self._longest and not self._sequences:
      return Rooms({}, {}), []
    behind = int(self._epochs(0)[1][: RECENT_WINDOWS + 1][-1])
    count = max(1, len(self._borders(0, behind + 1)))
    batches = [self._events(*self._examples_of(t, self._shards)) for t in range(count)]
    rows = self._batch_size // self._shards

    def measured(longest: dict[str, int], margin: float, steps: int = 16) -> Rooms:
      limit = {name: rows * most for name, most in longest.items()}
      return Rooms.measured(batches, limit, 0.0 if count == len(self) else margin, steps)

    sequences = [{name: longest} for name, longest in self._sequences.items()]
    undealt = [measured(s, UNDEALT_MARGIN, UNDEALT_STEPS) for s in sequences]
    return measured(self._longest, MARGIN), undealt
