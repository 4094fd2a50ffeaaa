"""The input pipeline: the batches of training and of evaluation, driven by Grain."""

from __future__ import annotations

import grain

from gemjax.data.batches import Batches, Cost
from gemjax.data.prepared import PreparedData
from gemjax.features import Batch


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
  window_blocks: int = 1,
  process_index: int = 0,
  process_count: int = 1,
  shards: int = 1,
  history_length: int = 0,
  cost: Cost | None = None,
  threads: int = 2,
  prefetch: int = 8,
) -> grain.IterDataset[Batch]:
  """Every example of `split` once, dealt by `cost`, or in file order; rows of no example
  have weight 0.

  All processes get the same number of batches, ceil(examples / batch_size).
  """
  batches = Batches(
    data,
    split,
    batch_size,
    None,
    window_blocks,
    process_index,
    process_count,
    shards,
    history_length,
    cost,
  )
  return batches.to_iter_dataset(_read_options(threads, prefetch))


def _read_options(threads: int, prefetch: int) -> grain.ReadOptions:
  return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
