"""Processes and devices: they share out the same batches, events packed device by device."""

import itertools

import numpy as np
import pytest
from numbered import FEATURES, N, assert_equal, columns, g, h, stream, write

from gemjax.data.batches import BatchSizeError
from gemjax.data.pipeline import evaluation_batches, train_batches
from gemjax.features import event_capacity

MESHES = [(n, p) for n, p in itertools.product((1, 2, 4, 8), (1, 2, 4)) if n % p == 0]


def packed(lists, shards, capacity):
  """The global values: every shard's events, filled up with 0 to its slots."""
  rows = len(lists) // shards
  events = [[x for v in lists[s * rows : (s + 1) * rows] for x in v] for s in range(shards)]
  assert capacity >= max(map(len, events))
  return [x for e in events for x in e + [0] * (capacity - len(e))]


def assert_packed(batch, numbers, shards):
  """The batch is that of the examples `numbers`, where -1 is padding, for so many shards."""
  for name, of in (("h", h), ("g", g)):
    lists = [of(i) if i >= 0 else [] for i in numbers]
    jagged = batch.sequences[name]
    np.testing.assert_array_equal(jagged.lengths_B, [len(x) for x in lists])
    capacity = len(jagged.values_E) // shards
    np.testing.assert_array_equal(jagged.values_E, packed(lists, shards, capacity))
    assert jagged.values_E.dtype == jagged.lengths_B.dtype == np.int32


def join(parts):
  """The global batch of what the processes have, one behind the other."""
  if isinstance(parts[0], dict):
    return {k: join([p[k] for p in parts]) for k in parts[0]}
  if isinstance(parts[0], tuple):
    return type(parts[0])(*map(join, zip(*parts)))
  return np.concatenate(parts)


@pytest.mark.parametrize(("shards", "processes"), MESHES)
def test_the_devices_share_out_the_same_batches(data, shards, processes):
  options = {"batch_size": 128, "window_blocks": 2}
  whole = stream(data, 25, **options)
  mesh = {"process_count": processes, "shards": shards}
  shared = [stream(data, 25, **options, **mesh, process_index=p) for p in range(processes)]
  for expected, *parts in zip(whole, *shared):
    assert {len(p.weight_B) for p in parts} == {128 // processes}
    for name in ("h", "g"):  # They compile one program.
      assert len({p.sequences[name].values_E.shape for p in parts}) == 1
    joined = join(parts)
    assert_equal(joined[:6], expected[:6])  # Without what is packed.
    assert_packed(joined, expected.ids_BS[:, 0].tolist(), shards)
  # Few programs: one for all batches but those that outgrow what the first ones need.
  sizes = {tuple(len(j.values_E) for j in p.sequences.values()) for p in shared[0]}
  assert len(sizes) <= 2
  for name in ("h", "g"):
    most = max(
      j.lengths_B.reshape(shards // processes, -1).sum(1).max()
      for of_process in shared
      for j in (p.sequences[name] for p in of_process)
    )
    size = min(len(p.sequences[name].values_E) for p in shared[0]) * processes // shards
    assert size <= event_capacity(int(1.15 * most), steps=2)
  # The case holds shards without an event beside shards with many.
  slots = [b.sequences["g"].values_E.reshape(shards // processes, -1) for b in shared[0]]
  assert shards < 8 or any((s == 0).all(1).any() and s.any() for s in slots)


@pytest.mark.parametrize(("shards", "processes"), MESHES)
def test_processes_evaluate_equally_often(data, shards, processes):
  parts = [
    list(
      evaluation_batches(
        data,
        "train",
        batch_size=304,
        process_index=p,
        process_count=processes,
        shards=shards,
      )
    )
    for p in range(processes)
  ]
  assert [len(p) for p in parts] == [4] * processes
  for t, batch in enumerate(map(join, zip(*parts))):
    numbers = [*range(t * 250, (t + 1) * 250), *[-1] * 54]  # All have equally many.
    np.testing.assert_array_equal(batch.weight_B, [i >= 0 for i in numbers])
    np.testing.assert_array_equal(batch.ids_BS[:, 0], np.maximum(numbers, 0))
    assert_packed(batch, numbers, shards)
  real = [max(0, min(304 // processes, 250 - p * 304 // processes)) for p in range(processes)]
  assert [p[-1].weight_B.sum() for p in parts] == real


def test_a_batch_without_any_event(tmp_path):
  numbers = [i for i in range(1, N) if i % 6 == 0 and i % 97]
  data = write(tmp_path / "p", [columns(numbers)], FEATURES)
  (batch,) = stream(data, 1, batch_size=64, shards=4)
  for jagged in batch.sequences.values():
    assert jagged.values_E.shape == (4 * 64,)
    assert not jagged.values_E.any() and not jagged.lengths_B.any()


def test_batches_that_the_devices_cannot_share(data):
  law = "batch 100 must divide by the 3 devices of the mesh; change config.data.{} or config.mesh"
  with pytest.raises(BatchSizeError, match=law.format("batch_size")):
    train_batches(data, batch_size=100, seed=0, process_count=3, shards=3)
  with pytest.raises(BatchSizeError, match=law.format("eval_batch_size")):
    evaluation_batches(data, "train", batch_size=100, shards=3)
  for shards in (0, -2, 1, 3):
    with pytest.raises(BatchSizeError, match=f"{shards} shards .* multiple of 2 processes; give"):
      train_batches(data, batch_size=100, seed=0, process_count=2, shards=shards)
