"""The stream against what was written: every column of example i is a function of i."""

import collections
import dataclasses
import itertools
import json
import pathlib
import shutil

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from gemjax.data.blocks import CorruptBlockError, encode_block
from gemjax.data.pipeline import Batches, BatchSizeError, evaluation_batches, train_batches
from gemjax.data.prepared import PreparedDataError, PreparedWriter, concatenate, examples, take
from gemjax.features import Dense, FeatureSet, Sequence, Sparse, event_capacity

N, BLOCK = 1000, 64  # 15 blocks of 64 and one of 40.
FEATURES = FeatureSet(
  dense=(Dense(name="x"), Dense(name="y")),
  sparse=(Sparse(name="row", size=N, table="row"), Sparse(name="seven", size=7, table="seven")),
  sequence=(
    Sequence(name="h", size=60, table="h", max_length=5),
    Sequence(name="g", size=60, table="h", max_length=300),
  ),
  tasks=("click", "buy"),
  grouped=True,
)


def h(i: int) -> list[int]:
  return [(i + j) % 60 for j in range(i % 6)]


def g(i: int) -> list[int]:
  """Empty but for every 97th example, whose list is long."""
  return [(i * j) % 60 for j in range(200 + i % 50)] if i % 97 == 0 else []


def columns(rows=range(N)) -> dict[str, np.ndarray]:
  i = np.asarray(rows)
  lists = {"h": [h(r) for r in i], "g": [g(r) for r in i]}
  return {
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
    return writer.finish(features, origin={})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return write(tmp_path_factory.mktemp("data") / "prepared", [columns()])


def stream(data, count, **options):
  """The first `count` training batches."""
  iterator = iter(train_batches(data, **{"batch_size": 100, "seed": 1} | options))
  out = [next(iterator) for _ in range(count)]
  iterator.close()
  return out


def rows(batches) -> np.ndarray:
  return np.concatenate([b.ids_BS[:, 0] for b in batches])


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


def assert_examples(batch, expected):
  """Every column of the batch is that of the examples `expected`."""
  want = columns(expected)
  np.testing.assert_array_equal(batch.dense_BF, want["dense"])
  np.testing.assert_array_equal(batch.ids_BS, want["ids"])
  np.testing.assert_array_equal(batch.label_BT, want["label"])
  np.testing.assert_array_equal(batch.group_B, want["group"])
  np.testing.assert_array_equal(batch.oracle_BT, want["oracle"])
  assert lists(batch.sequences["h"]) == [h(r) for r in expected]
  assert lists(batch.sequences["g"]) == [g(r) for r in expected]


# --- every example once an epoch


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
    dtypes = {name: x.dtype for name, x in batch._asdict().items() if name != "sequences"}
    ints = {"ids_BS", "group_B"}
    assert dtypes == {n: np.dtype("i4" if n in ints else "f4") for n in dtypes}
    for jagged in batch.sequences.values():
      events = int(jagged.lengths_B.sum())
      assert len(jagged.values_E) == event_capacity(events)
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


# --- resuming


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


def test_a_batch_is_a_function_of_its_number(data):
  batches = Batches(data, "train", 100, 1)
  expected = stream(data, 30)
  for t in (29, 3, 17, 0):
    assert_equal(batches[t], expected[t])
  far = batches[10**12]  # 10^11 epochs later.
  assert_examples(far, far.ids_BS[:, 0].tolist())


# --- processes


def join(parts):
  """The batch whose rows the processes share out."""
  arrays = [np.concatenate(x) for x in zip(*(p[:-1] for p in parts))]
  return arrays, {k: [x for p in parts for x in lists(p.sequences[k])] for k in ("h", "g")}


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_out_the_same_batches(data, processes):
  whole = stream(data, 25, batch_size=128, window_blocks=2)
  shared = [
    stream(
      data,
      25,
      batch_size=128,
      window_blocks=2,
      process_index=p,
      process_count=processes,
      shards=processes,
    )
    for p in range(processes)
  ]
  for expected, *parts in zip(whole, *shared):
    assert {len(p.weight_B) for p in parts} == {128 // processes}
    (arrays, sequences), (want, want_sequences) = join(parts), join([expected])
    for a, b in zip(arrays, want):
      np.testing.assert_array_equal(a, b)
    assert sequences == want_sequences
    for name in ("h", "g"):  # They compile one program.
      assert len({len(p.sequences[name].values_E) for p in parts}) == 1


def test_processes_evaluate_equally_often(data):
  parts = [
    list(
      evaluation_batches(data, "train", batch_size=300, process_index=p, process_count=4, shards=4)
    )
    for p in range(4)
  ]
  assert [len(p) for p in parts] == [4] * 4
  # 900 + 100: the first two processes get 75 and 25 of the last batch, the others only padding.
  assert [p[-1].weight_B.sum() for p in parts] == [75, 25, 0, 0]
  seen = np.concatenate([p[t].ids_BS[p[t].weight_B > 0, 0] for t in range(4) for p in parts])
  np.testing.assert_array_equal(seen, np.arange(N))


# --- evaluation


@pytest.mark.parametrize("batch_size", [1, 64, 300, 1000, 1500])
def test_evaluation_is_in_file_order_and_padded(data, batch_size):
  batches = list(evaluation_batches(data, "train", batch_size=batch_size))
  assert len(batches) == -(-N // batch_size)
  start = 0
  for batch in batches:
    n = int(batch.weight_B.sum())
    real = type(batch)(*(x[:n] if not isinstance(x, dict) else x for x in batch))
    sequences = {k: j._replace(lengths_B=j.lengths_B[:n]) for k, j in batch.sequences.items()}
    assert_examples(real._replace(sequences=sequences), list(range(start, start + n)))
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


# --- gathering jagged columns


@pytest.mark.parametrize("seed", range(5))
def test_take_and_concatenate_against_loops(seed):
  rng = np.random.default_rng(seed)
  whole = columns(range(200))
  mask = rng.random(200) < 0.3
  picks = (
    rng.integers(0, 200, 80),  # With repetitions.
    np.array([], int),
    slice(*sorted(rng.integers(0, 201, 2).tolist())),
    slice(5, 5),
    mask,
  )
  for index in picks:
    expected = [h(i) for i in np.arange(200)[index]]
    got = take(whole, index)
    assert got["h.values"].tolist() == [*itertools.chain(*expected)]
    assert got["h.lengths"].tolist() == [len(x) for x in expected]
    np.testing.assert_array_equal(got["ids"], whole["ids"][index])
    assert examples(got) == len(expected)
  cuts = [0, *np.sort(rng.integers(0, 200, 3)).tolist(), 200]
  joined = concatenate([take(whole, slice(a, b)) for a, b in itertools.pairwise(cuts)])
  for name, column in whole.items():
    np.testing.assert_array_equal(joined[name], column)


# --- bad input: one sentence that names the place and the law


def drain(data):
  return list(evaluation_batches(data, "train", batch_size=100))


def change(name, row, value):
  """Columns with one value changed, in the second block."""

  def changed():
    out = {k: v.copy() for k, v in columns().items()}
    out[name] = out[name].astype(np.asarray(value).dtype) if name == "label" else out[name]
    out[name][row] = value
    return out

  return changed


@pytest.mark.parametrize(
  ("name", "row", "value", "words"),
  [
    ("ids", (70, 1), 7, ["'seven'", "id 7", "table of 7 rows"]),
    ("ids", (70, 0), -1, ["'row'", "id -1", "1000 rows"]),
    ("ids", (70, 0), 2**31 - 1, ["'row'", "id 2147483647"]),
    ("label", (70, 1), np.uint8(2), ["'buy'", "label 2"]),
    ("label", (70, 0), np.float32(np.nan), ["'click'", "nan"]),
    ("label", (70, 0), np.float32(0.5), ["'click'", "0.5"]),
    ("label", (70, 0), np.int8(-1), ["'click'", "-1"]),
    ("dense", (70, 1), np.nan, ["'y'", "nan", "not finite"]),
    ("dense", (70, 0), -np.inf, ["'x'", "-inf", "not finite"]),
    ("group", 70, -1, ["'group'", "no user"]),
    ("h.values", 170, 60, ["'h'", "id 60", "60 rows"]),
    ("h.values", 170, -5, ["'h'", "id -5"]),
  ],
)
def test_a_bad_value_is_named(tmp_path, name, row, value, words):
  data = write(tmp_path / "p", [change(name, row, value)()])
  with pytest.raises(CorruptBlockError) as error:
    drain(data)
  text = str(error.value)
  assert "train-00000.array_record block 1" in text and "prepare again" in text
  assert "\n" not in text
  for word in words:
    assert word in text


def _lengths(row, by):
  def changed(c):
    c["h.lengths"][row] += by
    return c

  return changed


@pytest.mark.parametrize(
  ("broken", "words"),
  [
    (lambda c: c | {"dense": c["dense"][:, :1]}, ["'dense'", "(64, 1)", "(64, 2)"]),
    (lambda c: c | {"ids": np.tile(c["ids"], 2)}, ["'ids'", "(64, 4)", "(64, 2)"]),
    (lambda c: c | {"label": c["label"][:, :1]}, ["'label'", "(64, 1)", "(64, 2)"]),
    (lambda c: c | {"label": c["label"][:, 0]}, ["'label'", "(64,)", "(64, 2)"]),
    (lambda c: {k: v for k, v in c.items() if k != "ids"}, ["'ids'", "absent"]),
    (lambda c: {k: v for k, v in c.items() if k != "group"}, ["'group'"]),
    (lambda c: {k: v for k, v in c.items() if k != "h.values"}, ["'h'", "not in the block"]),
    (lambda c: c | {"dense": c["dense"].astype(np.float64)}, ["'dense'", "float64"]),
    (lambda c: c | {"ids": c["ids"].astype(np.int64)}, ["'ids'", "int64"]),
    (lambda c: c | {"h.values": c["h.values"].astype(np.int64)}, ["'h'", "int64"]),
    (_lengths(5, 1), ["'h'", "64 lengths that sum to"]),
    (_lengths(5, -9), ["'h'", "64 lengths that sum to"]),
  ],
)
def test_a_block_that_disagrees_with_the_features(tmp_path, broken, words):
  """Blocks as another program might have written them: with a good checksum."""
  data = write(tmp_path / "p", [columns()])
  rewrite(data, lambda b, c: broken(c) if b == 0 else c)
  with pytest.raises(CorruptBlockError) as error:
    drain(data)
  for word in ["train-00000.array_record block 0", "prepare again", *words]:
    assert word in str(error.value)


def rewrite(data, change_block, change_record=lambda b, record: record, blocks=16):
  """Writes the block file anew, one block after the other changed."""
  path = data.path / data.splits["train"].files[0]
  whole = columns()
  writer = ArrayRecordWriter(str(path), "group_size:1")
  for b in range(blocks):
    block = {k: v.copy() for k, v in take(whole, slice(b * BLOCK, (b + 1) * BLOCK)).items()}
    writer.write(change_record(b, encode_block(change_block(b, block))))
  writer.close()


def test_an_event_list_longer_than_its_maximum(tmp_path):
  short = dataclasses.replace(FEATURES.sequence[0], max_length=4)
  features = dataclasses.replace(FEATURES, sequence=(short, FEATURES.sequence[1]))
  with pytest.raises(CorruptBlockError, match=r"'h': 5 events, but max_length is 4"):
    drain(write(tmp_path / "p", [columns()], features))


def _flipped(record):
  return record[:-1] + bytes([record[-1] ^ 1])


@pytest.mark.parametrize(
  ("change_record", "words"),
  [
    (lambda b, r: _flipped(r) if b == 3 else r, ["block 3", "checksum"]),
    (lambda b, r: r[: len(r) // 2] if b == 3 else r, ["block 3", "checksum"]),
    (lambda b, r: r[:10] if b == 3 else r, ["block 3", "truncated or corrupt"]),
    (lambda b, r: b"" if b == 3 else r, ["block 3", "truncated or corrupt"]),
    (lambda b, r: b"X" * len(r) if b == 3 else r, ["block 3", "not a gemjax block"]),
  ],
)
def test_a_corrupt_record(tmp_path, change_record, words):
  data = write(tmp_path / "p", [columns()])
  rewrite(data, lambda b, c: c, change_record)
  with pytest.raises(CorruptBlockError) as error:
    drain(data)
  for word in words:
    assert word in str(error.value)


def test_a_block_of_another_size_than_the_manifest_says(tmp_path):
  data = write(tmp_path / "p", [columns()])
  rewrite(data, lambda b, c: take(c, slice(0, 63)) if b == 2 else c)
  with pytest.raises(CorruptBlockError, match=r"block 2: .*holds 63 examples.*says 64"):
    drain(data)


def test_a_file_with_fewer_blocks_than_the_manifest_says(tmp_path):
  data = write(tmp_path / "p", [columns()])
  rewrite(data, lambda b, c: c, blocks=10)
  with pytest.raises(CorruptBlockError, match=r"holds 10 of the 16 blocks"):
    drain(data)


@pytest.mark.parametrize("keep", [0, 100, 0.3, 0.9, -1])
def test_a_truncated_file(tmp_path, keep):
  data = write(tmp_path / "p", [columns()])
  path = data.path / data.splits["train"].files[0]
  whole = path.read_bytes()
  path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
  with pytest.raises(CorruptBlockError, match=r"train-00000.*prepare again"):
    drain(data)


def test_a_flipped_byte_is_noticed_or_harmless(tmp_path):
  good = write(tmp_path / "good", [columns()])
  expected = drain(good)
  whole = (good.path / good.splits["train"].files[0]).read_bytes()
  shutil.copytree(good.path, tmp_path / "bad")
  bad = dataclasses.replace(good, path=tmp_path / "bad")
  noticed = 0
  for position in np.random.default_rng(0).integers(0, len(whole), 40):
    flipped = bytes([whole[position] ^ 0x10])
    path = pathlib.Path(bad.path / bad.splits["train"].files[0])
    path.write_bytes(whole[:position] + flipped + whole[position + 1 :])
    try:
      for a, b in zip(drain(bad), expected, strict=True):
        assert_equal(a, b)
    except CorruptBlockError:
      noticed += 1
  assert noticed > 0


@pytest.mark.parametrize("threads", [0, 4])
def test_an_error_reaches_the_trainer_and_nobody_waits_for_ever(tmp_path, threads):
  data = write(tmp_path / "p", [change("ids", (70, 1), 7)()])
  iterator = iter(train_batches(data, batch_size=100, seed=0, threads=threads, prefetch=8))
  with pytest.raises(CorruptBlockError, match="'seven'"):
    for _ in range(20):
      next(iterator)
  iterator.close()


def test_batch_sizes_that_cannot_be(data):
  with pytest.raises(BatchSizeError, match=r"batch 1001 is larger than the 1000 examples"):
    train_batches(data, batch_size=1001, seed=0)
  law = "batch 100 must divide by the 3 devices of the mesh; change config.data.{} or config.mesh"
  with pytest.raises(BatchSizeError, match=law.format("batch_size")):
    train_batches(data, batch_size=100, seed=0, process_count=3, shards=3)
  with pytest.raises(BatchSizeError, match=law.format("eval_batch_size")):
    evaluation_batches(data, "train", batch_size=100, shards=3)
  for shards in (0, -2, 1, 3):
    with pytest.raises(BatchSizeError, match=f"{shards} shards .* multiple of 2 processes; give"):
      train_batches(data, batch_size=100, seed=0, process_count=2, shards=shards)
  with pytest.raises(ValueError, match="at least 1, got 0"):
    train_batches(data, batch_size=0, seed=0)
  with pytest.raises(ValueError, match=r"process_index 2 must be in \[0, 2\)"):
    train_batches(data, batch_size=100, seed=0, process_index=2, process_count=2, shards=2)
  with pytest.raises(PreparedDataError, match="no split 'nope', only"):
    evaluation_batches(data, "nope", batch_size=10)
