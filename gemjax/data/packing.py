"""Packing: the columns of some examples as the batch that one process' devices take.

Letters: B examples, E slots for events, N shards.
"""

from __future__ import annotations

import functools

import numpy as np

from gemjax.data.blocks import Columns
from gemjax.data.histories import Store
from gemjax.data.prepared import examples
from gemjax.features import MISSING, Batch, FeatureSet, Jagged, split_words


def make_batch(
  columns: Columns,
  features: FeatureSet,
  stores: list[Store],
  *,
  places: np.ndarray,
  rows: int,
  shards: int,
  capacities: dict[str, int],
) -> Batch:
  """The examples of `columns` at `places`, which rise, of so many rows, and padding at others, in
  `shards` parts of so many slots.

  `<name>.lengths` says how many events each example has of a sequence or sees of a history.
  """
  words = split_words if features.wide else lambda ids: ids
  put = functools.partial(_put, places, rows)
  sequences, histories = {}, {}
  for f in features.sequence:
    lengths_B = put(columns[f"{f.name}.lengths"])
    values_E = _pack(columns[f"{f.name}.values"], lengths_B, shards, capacities[f.name])
    sequences[f.name] = Jagged(values_E=words(values_E), lengths_B=lengths_B)
  for store in stores:
    name = store.history.name
    past = (put(columns[c]) for c in (f"{name}.stop", f"{name}.lengths", "time"))
    histories[name] = store.batch(*past, shards, capacities[name], words)
  return Batch(
    dense_BF=put(columns["dense"]),
    ids_BS=words(put(columns["ids"])),  # Elsewhere 0, which is MISSING.
    label_BT=put(columns["label"].astype(np.float32)),
    weight_B=put(np.ones(examples(columns), np.float32)),
    group_B=put(columns["group"], fill=-1),
    oracle_BT=put(columns["oracle"]),
    sequences=sequences,
    histories=histories,
  )


def _put(places: np.ndarray, rows: int, x: np.ndarray, fill: int = 0) -> np.ndarray:
  """`x` at its places, and `fill` in the other rows."""
  if len(x) == rows:
    return x
  out = np.full((rows, *x.shape[1:]), fill, x.dtype)
  out[places] = x
  return out


def _pack(values: np.ndarray, lengths_B: np.ndarray, shards: int, capacity: int) -> np.ndarray:
  """The values shard after shard, each at the front of its own `capacity` slots."""
  out = np.full((shards, capacity), MISSING, values.dtype)
  ends = np.cumsum(lengths_B.reshape(shards, -1).sum(1))
  for slots, part in zip(out, np.split(values, ends[:-1])):
    slots[: len(part)] = part
  return out.reshape(-1)
