"""A prepared set in which every column of example i is a function of i."""

import functools
import itertools

import numpy as np

from gemjax.data.pipeline import evaluation_batches, train_batches
from gemjax.data.prepared import PreparedWriter
from gemjax.features import Dense, EventColumn, FeatureSet, History, Sequence, Sparse

N, BLOCK = 1000, 64  # 15 blocks of 64 and one of 40.
FEATURES = FeatureSet(
  dense=(Dense(name="x"), Dense(name="y")),
  sparse=(Sparse(name="row", size=N, table="row"), Sparse(name="seven", size=7, table="seven")),
  sequence=(
    Sequence(name="h", size=60, table="h", max_length=5),
    Sequence(name="g", size=60, table="h", max_length=300),
  ),
  history=(
    History(
      name="past",
      columns=(
        EventColumn(name="item", size=60, table="h"),
        EventColumn(name="kind", size=5, table="kind"),
      ),
      max_length=50,
    ),
  ),
  tasks=("click", "buy"),
  grouped=True,
)


def h(i: int) -> list[int]:
  return [(i + j) % 60 for j in range(i % 6)]


def g(i: int) -> list[int]:
  """Empty but for every 97th example, whose list is long."""
  return [(i * j) % 60 for j in range(200 + i % 50)] if i % 97 == 0 else []


USERS = N // 10  # User u has the examples 10 u to 10 u + 9.


@functools.cache
def events(u: int) -> list[tuple[int, int, int]]:
  """(item, kind, time) of all events of a user: few, of some users none, of every 13th many."""
  count = 150 if u % 13 == 0 else u * 37 % 23
  return [((7 * u + 3 * e) % 60, (u + e) % 5, u + 5 * (e - e % 2)) for e in range(count)]


def time(i: int) -> int:
  """Some examples come at the very time of events, some before all, the last behind all."""
  u, k = divmod(i, 10)
  return u + 5 * (len(events(u)) * k // 8)


@functools.cache
def past(i: int, length: int = 50) -> list[tuple[int, int, int]]:
  """(item, kind, age) of the last events before example i."""
  return [(a, b, time(i) - t) for a, b, t in events(i // 10) if t < time(i)][-length:]


OFFSETS = np.cumsum([0, *(len(events(u)) for u in range(USERS))])


def columns(rows=range(N)) -> dict[str, np.ndarray]:
  i = np.asarray(rows)
  lists = {"h": [h(r) for r in i], "g": [g(r) for r in i]}
  start = OFFSETS[i // 10]
  seen = [len(past(r, N)) for r in i]
  return {
    "time": np.array([time(r) for r in i], np.int64),
    "past.start": start,
    "past.stop": start + np.array(seen, np.int64),
    "dense": np.stack([i, -2 * i], 1).astype(np.float32),
    "ids": np.stack([i, i % 7], 1).astype(np.int32),
    "label": np.stack([i % 2, i % 6 == 1], 1).astype(np.uint8),
    "group": (i // 10).astype(np.int32),
    "oracle": np.stack([i / N, i / N / 2], 1).astype(np.float32),
    **{f"{k}.values": np.array([*itertools.chain(*v)], np.int32) for k, v in lists.items()},
    **{f"{k}.lengths": np.array([len(x) for x in v], np.int32) for k, v in lists.items()},
  }


def write(path, parts, features=FEATURES, block_size=BLOCK):
  with PreparedWriter(path, block_size=block_size) as writer:
    for part in parts:
      writer.add("train", part)
    for history in features.history:
      item, kind, when = np.array([x for u in range(USERS) for x in events(u)]).T
      item, kind = item.astype(features.id_dtype), kind.astype(features.id_dtype)
      writer.add_history(history, {"item": item, "kind": kind}, when, OFFSETS)
    return writer.finish(features, origin={})


def stream(data, count, **options):
  """The first `count` training batches."""
  iterator = iter(train_batches(data, **{"batch_size": 100, "seed": 1} | options))
  out = [next(iterator) for _ in range(count)]
  iterator.close()
  return out


def rows(batches) -> np.ndarray:
  return np.concatenate([b.ids_BS[:, 0] for b in batches])


def pasts(events) -> list[list[tuple[int, int, int]]]:
  """(item, kind, age) of the events of each example, where the batch has one shard."""
  rows = np.column_stack([events.ids_EC, events.age_E]).tolist()
  ends = np.cumsum(events.lengths_B)
  return [[tuple(x) for x in rows[e - n : e]] for e, n in zip(ends, events.lengths_B)]


def lists(jagged) -> list[list[int]]:
  ends = np.cumsum(jagged.lengths_B)
  return [jagged.values_E[e - n : e].tolist() for e, n in zip(ends, jagged.lengths_B)]


def assert_equal(a, b):
  for x, y in zip(a, b, strict=True):
    if isinstance(x, dict):
      assert x.keys() == y.keys()
      for key in x:
        assert_equal(x[key], y[key])
    else:
      np.testing.assert_array_equal(x, y)
      assert x.dtype == y.dtype


def assert_examples(batch, expected, length=50):
  """Every column of the batch is that of the examples `expected`."""
  want = columns(expected)
  np.testing.assert_array_equal(batch.dense_BF, want["dense"])
  np.testing.assert_array_equal(batch.ids_BS, want["ids"])
  np.testing.assert_array_equal(batch.label_BT, want["label"])
  np.testing.assert_array_equal(batch.group_B, want["group"])
  np.testing.assert_array_equal(batch.oracle_BT, want["oracle"])
  assert lists(batch.sequences["h"]) == [h(r) for r in expected]
  assert lists(batch.sequences["g"]) == [g(r) for r in expected]
  assert pasts(batch.histories["past"]) == [past(r, length) for r in expected]


def drain(data):
  return list(evaluation_batches(data, "train", batch_size=100))
