"""The stream against what was written: every column of example i is a function of i."""

import collections
import json

import numpy as np
import pytest
from numbered import BLOCK, FEATURES, N, assert_equal, assert_examples, rows, stream, write

from gemjax.data.batches import Batches, BatchSizeError
from gemjax.data.pipeline import evaluation_batches, train_batches
from gemjax.data.prepared import PreparedDataError
from gemjax.features import FeatureSet


@pytest.mark.parametrize("window_blocks", [1, 3, 16, 100])
@pytest.mark.parametrize("batch_size", [7, 64, 100, 333, 1000])
def test_every_example_once_in_each_epoch(data, batch_size, window_blocks):
  count = -(-3 * N // batch_size)
  batches = stream(data, count, batch_size=batch_size, window_blocks=window_blocks)
  assert {len(b.ids_BS) for b in batches} == {batch_size}
  epochs = rows(batches)[: 3 * N].reshape(3, N)
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(N))
  assert not (epochs[0] == epochs[1]).all() and not (epochs[1] == epochs[2]).all()


def test_columns_stay_together(data):
  for batch in stream(data, 25, batch_size=90, window_blocks=2):
    assert_examples(batch, batch.ids_BS[:, 0].tolist())
    assert (batch.weight_B == 1).all()
    dtypes = {
      name: x.dtype for name, x in batch._asdict().items() if name not in ("sequences", "histories")
    }
    ints = {"ids_BS", "group_B"}
    assert dtypes == {n: np.dtype("i4" if n in ints else "f4") for n in dtypes}
    past = batch.histories["past"]
    assert {x.dtype for x in past} == {np.dtype("i4")}
    used = past.lengths_B.sum()
    assert not past.ids_EC[used:].any() and not past.age_E[used:].any()
    for jagged in batch.sequences.values():
      events = int(jagged.lengths_B.sum())
      assert len(jagged.values_E) >= events
      assert (jagged.values_E[events:] == 0).all()


def test_seed_decides_the_order(data):
  first, again, other = (rows(stream(data, 10, seed=s)) for s in (1, 1, 2))
  np.testing.assert_array_equal(first, again)
  assert (first == other).mean() < 0.05


def test_a_window_mixes_its_blocks_and_no_others(data):
  order = rows(stream(data, 10, window_blocks=3))
  blocks = order // BLOCK
  assert len(set(blocks[:120])) == 3  # The short block is in one window: 120 are always within.
  changes = (np.diff(blocks[:120]) != 0).mean()
  assert 0.5 < changes < 0.8  # 2/3 where the three are well mixed.
  assert sorted(set(blocks)) == list(range(16))
  firsts = list(dict.fromkeys(blocks))
  assert firsts != sorted(firsts)


def test_every_epoch_has_its_own_order_of_blocks_and_within_blocks(data):
  """With windows of one block, both permutations can be read off the stream."""
  epochs = rows(stream(data, 30, window_blocks=1)).reshape(3, N)
  blocks = [tuple(dict.fromkeys((epoch // BLOCK).tolist())) for epoch in epochs]
  assert len({*blocks, tuple(range(16))}) == 4
  within = [tuple(epoch[epoch // BLOCK == b] % BLOCK) for epoch in epochs for b in range(15)]
  assert len({*within, tuple(range(BLOCK))}) == 46


def test_every_block_is_decoded_once_an_epoch(data, monkeypatch):
  batches, counts = Batches(data, "train", 50, 1, 3), collections.Counter()
  read = batches._reader.read
  count = lambda block: counts.update([block]) or read(block)
  monkeypatch.setattr(batches._reader, "read", count)
  for t in range(N // 50):
    batches[t]
  assert counts == dict.fromkeys(range(16), 1)


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_do_not_change_the_stream(data, threads):
  plain = stream(data, 40, threads=0, prefetch=0, window_blocks=2)
  for a, b in zip(plain, stream(data, 40, threads=threads, prefetch=8, window_blocks=2)):
    assert_equal(a, b)


@pytest.mark.parametrize("done", [0, 1, 9, 10, 23])
def test_resumes_at_the_exact_example(data, done):
  whole = stream(data, 35, window_blocks=3)
  first = iter(train_batches(data, batch_size=100, seed=1, window_blocks=3))
  for _ in range(done):
    next(first)
  state = json.loads(json.dumps(first.get_state()))
  for _ in range(5):  # Going on must not change the state that was taken.
    next(first)
  second = iter(train_batches(data, batch_size=100, seed=1, window_blocks=3))
  next(second)
  for iterator in (first, second):  # One that is far ahead, one that is behind.
    iterator.set_state(state)
    for expected in whole[done:]:
      assert_equal(next(iterator), expected)
    iterator.close()


def test_the_position_does_not_depend_on_the_number_of_processes(data):
  """1 -> 2 -> 4 -> 3 processes: the batches of one, each example once an epoch."""
  size, seed = 60, 1  # 17 batches begin in an epoch.
  whole, state, taken, done = stream(data, 40, batch_size=size, seed=seed), None, [], 0
  for processes, count in ((1, 7), (2, 9), (4, 11), (3, 13)):
    iterators = [
      iter(
        train_batches(
          data,
          batch_size=size,
          seed=seed,
          process_index=p,
          process_count=processes,
          shards=processes,
        )
      )
      for p in range(processes)
    ]
    for iterator in iterators:
      if state is not None:
        iterator.set_state(state)
    for _ in range(count):
      parts = [next(iterator) for iterator in iterators]
      ids_B = np.concatenate([part.ids_BS[:, 0] for part in parts])
      np.testing.assert_array_equal(ids_B, whole[done].ids_BS[:, 0])
      taken.extend(ids_B.tolist())
      done += 1
    states = [json.loads(json.dumps(iterator.get_state())) for iterator in iterators]
    assert all(s == states[0] for s in states)  # One process writes it for all.
    state = states[-1]
    for iterator in iterators:
      iterator.close()
  for epoch in np.reshape(taken[: 2 * N], (2, N)):
    np.testing.assert_array_equal(np.sort(epoch), np.arange(N))


def test_a_batch_is_a_function_of_its_number(data):
  batches = Batches(data, "train", 100, 1)
  expected = stream(data, 30)
  for t in (29, 3, 17, 0):
    assert_equal(batches[t], expected[t])
  far = batches[10**12]  # 10^11 epochs later.
  assert_examples(far, far.ids_BS[:, 0].tolist())


@pytest.mark.parametrize("batch_size", [1, 64, 300, 1000, 1500])
def test_evaluation_is_in_file_order_and_padded(data, batch_size):
  batches = list(evaluation_batches(data, "train", batch_size=batch_size))
  assert len(batches) == -(-N // batch_size)
  start = 0
  for batch in batches:
    n = int(batch.weight_B.sum())
    real = type(batch)(*(x[:n] if not isinstance(x, dict) else x for x in batch))
    sequences = {k: j._replace(lengths_B=j.lengths_B[:n]) for k, j in batch.sequences.items()}
    past = batch.histories["past"]
    histories = {"past": past._replace(lengths_B=past.lengths_B[:n])}
    real = real._replace(sequences=sequences, histories=histories)
    assert_examples(real, list(range(start, start + n)))
    assert not past.lengths_B[n:].any()
    assert len(batch.weight_B) == batch_size and (batch.weight_B[:n] == 1).all()
    assert (batch.ids_BS[n:] == 0).all() and (batch.group_B[n:] == -1).all()
    for padding in (batch.dense_BF[n:], batch.label_BT[n:], batch.weight_B[n:]):
      assert (padding == 0).all()
    assert all((j.lengths_B[n:] == 0).all() for j in batch.sequences.values())
    start += n
  assert start == N


def test_optional_columns_are_filled_in(tmp_path):
  features = FeatureSet(sparse=FEATURES.sparse[:1])
  part = {"ids": np.arange(10, dtype=np.int32)[:, None], "label": np.zeros((10, 1), np.uint8)}
  (batch,) = evaluation_batches(write(tmp_path / "p", [part], features), "train", batch_size=10)
  assert batch.dense_BF.shape == (10, 0) and batch.oracle_BT.shape == (10, 0)
  assert (batch.group_B == -1).all() and batch.sequences == {}


def test_dense_features_alone(tmp_path):
  features = FeatureSet(dense=FEATURES.dense)
  part = {"dense": np.ones((10, 2), np.float32), "label": np.zeros((10, 1), np.uint8)}
  (batch,) = stream(write(tmp_path / "p", [part], features), 1, batch_size=10)
  assert batch.ids_BS.shape == (10, 0) and batch.ids_BS.dtype == np.int32


def test_batch_sizes_that_cannot_be(data):
  with pytest.raises(BatchSizeError, match=r"batch 1001 is larger than the 1000 examples"):
    train_batches(data, batch_size=1001, seed=0)
  with pytest.raises(ValueError, match="at least 1, got 0"):
    train_batches(data, batch_size=0, seed=0)
  with pytest.raises(ValueError, match=r"process_index 2 must be in \[0, 2\)"):
    train_batches(data, batch_size=100, seed=0, process_index=2, process_count=2, shards=2)
  with pytest.raises(PreparedDataError, match="no split 'nope', only"):
    evaluation_batches(data, "nope", batch_size=10)
