"""Packing: the columns of some examples as the batch that one process' devices take.

Letters: B examples, E slots for events, N shards.
"""

from __future__ import annotations

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
  rows: int,
  shards: int,
  capacities: dict[str, int],
) -> Batch:
  """The examples of `columns` and padding up to `rows`, in `shards` parts of so many slots.

  `<name>.lengths` says how many events each example has of a sequence or sees of a history.
  """
  words = split_words if features.wide else lambda ids: ids
  sequences, histories = {}, {}
  for f in features.sequence:
    lengths_B = _pad(columns[f"{f.name}.lengths"], rows)
    values_E = _pack(columns[f"{f.name}.values"], lengths_B, shards, capacities[f.name])
    sequences[f.name] = Jagged(values_E=words(values_E), lengths_B=lengths_B)
  for store in stores:
    name = store.history.name
    past = (_pad(columns[c], rows) for c in (f"{name}.stop", f"{name}.lengths", "time"))
    histories[name] = store.batch(*past, shards, capacities[name], words)
  return Batch(
    dense_BF=_pad(columns["dense"], rows),
    ids_BS=words(_pad(columns["ids"], rows)),  # Filled up with 0, which is MISSING.
    label_BT=_pad(columns["label"].astype(np.float32), rows),
    weight_B=_pad(np.ones(examples(columns), np.float32), rows),
    group_B=_pad(columns["group"], rows, fill=-1),
    oracle_BT=_pad(columns["oracle"], rows),
    sequences=sequences,
    histories=histories,
  )


def most_events(lengths_B: np.ndarray, rows: int, shards: int) -> int:
  """Events of the shard that has most, of a batch of `rows` with padding."""
  return int(_pad(lengths_B, rows).reshape(shards, -1).sum(1).max())


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
